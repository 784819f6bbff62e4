"""What the kernels of the backward pass share: from the products of a tile to the gradients of its scores."""

import triton
import triton.language as tl

from .score_dropout import dropout_keep
from .scores import hide_biased, multiplied, of_rows, product_gradient, seen_in, shifted
from .softmax import LOG2E
from .state import ScoreGradients, Statistics, Window
from .tile import load_columns, product_of_chunks


@triton.jit
def load_statistics(lse_parts, delta, left, BLOCK_M: tl.constexpr, CHECK: tl.constexpr):
    """Of BLOCK_M rows, from pointers to the first; rows past the end have weights of 0.

    delta: None is 0.
    """
    rows = tl.arange(0, BLOCK_M)
    inside = rows < left
    if CHECK:
        top = tl.load(lse_parts + 2 * rows, mask=inside, other=0.0)
        log2_total = tl.load(lse_parts + 2 * rows + 1, mask=inside, other=float("inf"))
    else:
        top, log2_total = tl.load(lse_parts + 2 * rows), tl.load(lse_parts + 2 * rows + 1)
    if delta is None:
        row_delta = tl.zeros_like(top)
    elif CHECK:
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
    else:
        row_delta = tl.load(delta + rows)
    return Statistics(top, log2_total, row_delta)


@triton.jit
def window_of(row, col, lengths, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The window of the tile from a query and a key on."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    return Window(
        of_rows(row + rows, TRANSPOSED), of_rows(rows, TRANSPOSED), of_rows(cols, not TRANSPOSED),
        lengths.queries - row, lengths.keys - col, col,
    )  # fmt: skip


@triton.jit
def gradients_of_scores(
    s, dp, place, row, col, terms, lengths, bitmap, statistics, bounds, TILE: tl.constexpr, FLAGS: tl.constexpr,
    MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Of the tile from query `row` and key `col` on, from its products s and dp.

    terms of the head from its first query on. bitmap: of the tile, or None. MASKED: some query may not see some key.
    TRANSPOSED: the tile is [keys, queries]
    """
    window = window_of(row, col, lengths, TILE.BLOCK_M, TILE.BLOCK_N, TRANSPOSED)
    m, n = tl.cast(row, tl.int64), tl.cast(col, tl.int64)
    top, log2_total = of_rows(statistics.top, TRANSPOSED), of_rows(statistics.log2_total, TRANSPOSED)
    if MASKED:
        seen = seen_in(bounds, terms, bitmap, window, m, n, TILE, FLAGS, TRANSPOSED)
    s, derivative = multiplied(s, terms, FLAGS)
    added = None
    if terms.bias.ptr is not None:
        seen, added = hide_biased(seen, terms, window, m, n)
    s = shifted(s, added, terms, window, lengths, FLAGS)
    if FLAGS.MODIFIED:
        p = tl.exp2((s - top) - log2_total)  # in two steps: a bias may be huge
    else:
        p = tl.exp2(s * (terms.scale * LOG2E) - (top + log2_total))
    if MASKED:
        p = tl.where(seen, p, 0.0)
    kept = p
    if FLAGS.DROPOUT:
        queries = row + tl.arange(0, TILE.BLOCK_M)[:, None]
        keep = dropout_keep(queries, col, place.heads, place.batch, terms, TRANSPOSED, TILE.BLOCK_M, TILE.BLOCK_N)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * terms.keep_factor, 0.0)
    ds = p * (dp - of_rows(statistics.delta, TRANSPOSED))
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    return ScoreGradients(kept, ds, product_gradient(ds, derivative, FLAGS))


@triton.jit
def product(
    a, b, left, ROWS: tl.constexpr, N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr,
    CHECK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(a b^T, b's columns in one or two tiles) of the ROWS rows of a, a `Factor` or `Reloaded`, and N rows of b."""
    if TILE.RELOAD:
        acc = product_of_chunks(a, b, left, ROWS, N, W0, W1, DIM, TILE.PRECISION)
    b0, b1 = load_columns(b, left, N, 0, W0, DIM, CHECK), 0.0
    if not TILE.RELOAD:
        acc = tl.dot(a.x0, tl.trans(b0), input_precision=TILE.PRECISION)
    if W1 > 0:
        b1 = load_columns(b, left, N, W0, W1, DIM, CHECK)
        if not TILE.RELOAD:
            acc = tl.dot(a.x1, tl.trans(b1), acc, input_precision=TILE.PRECISION)
    return acc, b0, b1
