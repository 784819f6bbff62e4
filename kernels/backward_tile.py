"""What the kernels of the backward pass share: from the products of a tile to the gradients of its scores."""

import triton
import triton.language as tl

from .tile import (
    LOG2E,
    bias_log2,
    bits,
    dropout_keep,
    load_columns,
    load_scores,
    product_of_chunks,
    softcap_scores,
    visible,
)


@triton.jit
def load_statistics(lse_parts, delta, rows_left, BLOCK_M: tl.constexpr, CHECK: tl.constexpr):
    """(top, log2_total, delta) of BLOCK_M rows, from pointers to the first; rows past the end have weights of 0.

    delta: None is 0.
    """
    rows = tl.arange(0, BLOCK_M)
    inside = rows < rows_left
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
    return top, log2_total, row_delta


@triton.jit
def of_rows(x, TRANSPOSED: tl.constexpr):
    """A number for each query, shaped to broadcast to the tile: [M, 1], or [1, M] in a transposed one."""
    if TRANSPOSED:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def distances(place, numbers, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """How far each query is from each key, the ends of both aligned, as ALiBi counts."""
    rows = of_rows(place[2] + tl.arange(0, BLOCK_M), TRANSPOSED)
    cols = of_rows(place[3] + tl.arange(0, BLOCK_N), not TRANSPOSED)
    return tl.abs(rows + (numbers[1] - numbers[0]) - cols).to(tl.float32)


@triton.jit
def gradients_of_scores(
    s, dp, scores, bitmap, place, statistics, bounds, numbers,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(weights after dropout but for its factor, dS, d(scaled product)) of a tile from its products s and dp.

    scores      of the head, by `tile.scores_of`. bitmap: for `tile.bits`, of the tile, or None
    place       (batch, head, first query, first key)
    statistics  of the queries, by `load_statistics`; bounds: of their keys, by `tile.row_bounds`
    MASKED      some query may not see some key. TRANSPOSED: the tile is [keys, queries]
    """
    mask, mask_strides, bias, bias_strides = scores
    batch, head, row, col = place
    seqlen_q, seqlen_k, scale, softcap, slope, threshold, keep_factor, seed = numbers
    m, n = tl.cast(row, tl.int64), tl.cast(col, tl.int64)
    HAS_FIRST: tl.constexpr = FLAGS[0]
    SOFTCAP: tl.constexpr = FLAGS[1]
    ALIBI: tl.constexpr = FLAGS[2]
    DROPOUT: tl.constexpr = FLAGS[3]
    LEARNED_SCALE: tl.constexpr = FLAGS[4]
    EXACT: tl.constexpr = FLAGS[5]
    MODIFIED: tl.constexpr = SOFTCAP or ALIBI or LEARNED_SCALE or EXACT or bias is not None
    rows, cols = of_rows(tl.arange(0, BLOCK_M), TRANSPOSED), of_rows(tl.arange(0, BLOCK_N), not TRANSPOSED)
    top, log2_total = of_rows(statistics[0], TRANSPOSED), of_rows(statistics[1], TRANSPOSED)
    if MASKED:
        first, last = of_rows(bounds[0], TRANSPOSED), of_rows(bounds[1], TRANSPOSED)
        seen = visible(cols, first - col, last - col, HAS_FIRST)
        if mask is not None:
            mask += m * mask_strides[0] + n * mask_strides[1]
            seen = seen & (load_scores(mask, mask_strides, rows, cols, seqlen_q - row, seqlen_k - col) != 0)
        if bitmap is not None:
            if TRANSPOSED:
                seen = seen & bits(bitmap, cols, BLOCK_M)
            else:
                seen = seen & bits(bitmap, rows, BLOCK_N)
    slope_of_cap = 1.0
    if SOFTCAP:
        s, slope_of_cap = softcap_scores(s, scale, softcap)
    elif LEARNED_SCALE:
        s = s * scale * LOG2E
    elif MODIFIED:
        s = s * (scale * LOG2E)
    if bias is not None:
        bias += m * bias_strides[0] + n * bias_strides[1]
        added = load_scores(bias, bias_strides, rows, cols, seqlen_q - row, seqlen_k - col)
        seen = seen & (added.to(tl.float32) != float("-inf"))
        s += bias_log2(added)
    if ALIBI:
        s -= slope * distances(place, numbers, BLOCK_M, BLOCK_N, TRANSPOSED)
    if MODIFIED:
        p = tl.exp2((s - top) - log2_total)  # in two steps: a bias may be huge
    else:
        p = tl.exp2(s * (scale * LOG2E) - (top + log2_total))
    if MASKED:
        p = tl.where(seen, p, 0.0)
    kept = p
    if DROPOUT:
        queries = row + tl.arange(0, BLOCK_M)[:, None]
        keep = dropout_keep(queries, col, head, batch, threshold, seed, BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            keep = tl.trans(keep)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_factor, 0.0)
    ds = p * (dp - of_rows(statistics[2], TRANSPOSED))
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    if SOFTCAP:
        return kept, ds, tl.where(ds == 0.0, 0.0, ds * slope_of_cap)
    else:
        return kept, ds, ds


@triton.jit
def product(
    a, b, b_strides, b_left, ROWS: tl.constexpr, N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    DIM: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """(a b^T, b's columns in one or two tiles) of ROWS rows of a and N of DIM columns from pointer b on.

    a: its one or two tiles of columns or, with RELOAD, (pointer, strides, rows left).
    """
    if RELOAD:
        acc = product_of_chunks(a, b, b_strides, b_left, ROWS, N, W0, W1, DIM, PRECISION)
    b0, b1 = load_columns(b, b_strides, b_left, N, 0, W0, DIM, CHECK), 0.0
    if not RELOAD:
        acc = tl.dot(a[0], tl.trans(b0), input_precision=PRECISION)
    if W1 > 0:
        b1 = load_columns(b, b_strides, b_left, N, W0, W1, DIM, CHECK)
        if not RELOAD:
            acc = tl.dot(a[1], tl.trans(b1), acc, input_precision=PRECISION)
    return acc, b0, b1
