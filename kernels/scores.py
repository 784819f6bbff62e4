"""The scores of a tile, forward and backward: what hides keys, what modifies scores, in which order.

Each modification has a file of its own, score_*.py, with its gradient; here is its row in each of the four functions.
"""

import triton
import triton.language as tl

from .bounds import bits, visible
from .rows import skip
from .score_alibi import distances, load_slope, slope_gradient
from .score_bias import bias_log2, is_seen, load_scores
from .score_scale import load_scale, scale_gradient, scaled
from .score_softcap import capped, capped_gradient
from .state import Flags, Rows, RowSums, Terms
from .sums import row_sum


@triton.jit
def flags_of(
    k_start, k_end, mask, bias, alibi_slopes, counts, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, SCALE_APART: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """EXACT: scores are wanted in units of log2 in any case."""
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None
    HIDES: tl.constexpr = EVERYWHERE or BOUNDED or counts is not None
    ALIBI: tl.constexpr = alibi_slopes is not None
    MODIFIED: tl.constexpr = SOFTCAP or ALIBI or SCALE_APART or EXACT or bias is not None
    return Flags(
        HAS_LO, HAS_HI, HAS_FIRST, BOUNDED, EVERYWHERE, HIDES, SOFTCAP, ALIBI, DROPOUT, SCALE_APART, MODIFIED
    )  # fmt: skip


@triton.jit
def terms_of(
    mask, bias, alibi_slopes, slope_strides, softmax_scale, scale_stride, softcap, threshold, keep_factor, seed, batch,
    heads, LEARNED_SCALE: tl.constexpr,
):  # fmt: skip
    """The terms of a head; mask and bias are `Rows`. heads: one, or [M, 1]."""
    scale = load_scale(softmax_scale, scale_stride, heads, LEARNED_SCALE)
    slope = load_slope(alibi_slopes, slope_strides, batch, heads)
    return Terms(mask, bias, scale, softcap, slope, threshold, keep_factor, seed)


@triton.jit
def tile_of(rows, m, n):
    """The tile m rows and n columns after the first of `rows`."""
    rows = skip(rows, m)
    return Rows(rows.ptr + n * rows.col_stride, rows.row_stride, rows.col_stride)


@triton.jit
def seen_in(
    bounds, terms, bitmap, window, m, n, TILE: tl.constexpr, FLAGS: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Which of its keys each query of a tile sees, by bounds, bitmap (or None) and mask. The tile begins m queries and
    n keys after the rows of `terms`."""
    first, last = of_rows(bounds.first, TRANSPOSED), of_rows(bounds.last, TRANSPOSED)
    seen = visible(window.local_cols, first - window.col, last - window.col, FLAGS.HAS_FIRST)
    seen = hide_masked(seen, terms, window, m, n)
    if bitmap is not None:
        if TRANSPOSED:
            seen = seen & bits(bitmap, window.local_cols, TILE.BLOCK_M)
        else:
            seen = seen & bits(bitmap, window.local_rows, TILE.BLOCK_N)
    return seen


@triton.jit
def hide_masked(seen, terms, window, m, n):
    """`seen` without the keys that the mask hides, as `seen_in`."""
    if terms.mask.ptr is not None:
        seen = seen & (load_scores(tile_of(terms.mask, m, n), window) != 0)
    return seen


@triton.jit
def hide_biased(seen, terms, window, m, n):
    """(`seen` without the keys that the bias hides, the bias for `shifted`), as `seen_in`; there has to be a bias."""
    added = load_scores(tile_of(terms.bias, m, n), window)
    return seen & is_seen(added), added


@triton.jit
def multiplied(s, terms, FLAGS: tl.constexpr):
    """(scores of the products s in units of log2, if FLAGS.MODIFIED; derivative for `product_gradient`)"""
    derivative = 1.0
    if FLAGS.SOFTCAP:
        s, derivative = capped(s, terms.scale, terms.softcap)
    elif FLAGS.MODIFIED:
        s = scaled(s, terms.scale, FLAGS.SCALE_APART)
    return s, derivative


@triton.jit
def shifted(s, added, terms, window, lengths, FLAGS: tl.constexpr):
    """Scores with what is added to them."""
    if added is not None:
        s += bias_log2(added)
    if FLAGS.ALIBI:
        s -= terms.slope * distances(window, lengths)
    return s


@triton.jit
def of_rows(x, TRANSPOSED: tl.constexpr):
    """A number for each query, shaped to broadcast to the tile: [M, 1], or [1, M] in a transposed one."""
    if TRANSPOSED:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def product_gradient(ds, derivative, FLAGS: tl.constexpr):
    """The gradient of the scaled products from that of the scores."""
    if FLAGS.SOFTCAP:
        return capped_gradient(ds, derivative)
    else:
        return ds


@triton.jit
def add_row_sums(sums, product, gradients, window, lengths, WANTED: tl.constexpr):
    """`sums` with those of one more tile, where WANTED."""
    total, slope, scale = sums
    if WANTED.total:
        total += row_sum(gradients.scores)
    if WANTED.slope:
        slope -= slope_gradient(gradients.scores, window, lengths)
    if WANTED.scale:
        scale += scale_gradient(gradients.product, product)
    return RowSums(total, slope, scale)
