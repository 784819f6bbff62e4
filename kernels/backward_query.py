"""Gradient of q: a program keeps a block of queries and goes through the keys that they see.

Also the sums of each row that delta and the gradients of alibi_slopes and softmax_scale consist of.
"""

import triton
import triton.language as tl

from . import launch
from .backward_tile import distances, gradients_of_scores, load_statistics, product
from .lists import masked_tile, open_lists, unmasked_tile
from .tile import (
    finite_or,
    key_range,
    limits_of,
    load_both,
    load_scale,
    load_slope,
    row_bounds,
    scores_of,
    store_columns,
    widen,
)


@triton.jit
def query_step(
    sums, queries, keys, bounds, scores, bitmap, place, numbers,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, WANTED: tl.constexpr,
    MASKED: tl.constexpr, HIDES: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """`sums` (dq0, dq1, sum of dS, part of dslope, part of dscale) with the part of one block of keys.

    queries  (q, dout, statistics), the first two for `product`
    keys     (k, strides, v, strides), pointers to the head's first key
    WANTED   of dq, the sum of dS, dslope, dscale
    MASKED   some query may not see some key. HIDES: NaN or Inf may be there. The others as in `gradients_of_scores`
    """
    dq0, dq1, total, dslope, dscale = sums
    statistics = queries[2]
    k, k_strides, v, v_strides = keys
    col = place[3]
    HEAD_DIM: tl.constexpr = DIMS[0]
    D0: tl.constexpr = DIMS[1]
    D1: tl.constexpr = DIMS[2]
    HEAD_DIM_V: tl.constexpr = DIMS[3]
    E0: tl.constexpr = DIMS[4]
    E1: tl.constexpr = DIMS[5]
    PRECISION: tl.constexpr = FLAGS[6]
    keys_left, n = numbers[1] - col, tl.cast(col, tl.int64)
    s, k0, k1 = product(
        queries[0], k + n * k_strides[0], k_strides, keys_left, BLOCK_M, BLOCK_N, D0, D1, HEAD_DIM, MASKED, PRECISION,
        RELOAD,
    )  # fmt: skip
    dp, _, _ = product(
        queries[1], v + n * v_strides[0], v_strides, keys_left, BLOCK_M, BLOCK_N, E0, E1, HEAD_DIM_V, MASKED,
        PRECISION, RELOAD,
    )  # fmt: skip
    _, ds, dproduct = gradients_of_scores(
        s, dp, scores, bitmap, place, statistics, bounds, numbers, BLOCK_M, BLOCK_N, FLAGS, MASKED, False
    )
    if WANTED[1]:
        total += tl.sum(ds, 1)
    if WANTED[2]:
        dslope -= tl.sum(ds * distances(place, numbers, BLOCK_M, BLOCK_N, False), 1)
    if WANTED[3]:
        dscale += tl.sum(tl.where(dproduct == 0.0, 0.0, dproduct * s), 1)
    if WANTED[0]:
        if HIDES:  # a key that no row here sees may hold anything
            k0 = finite_or(k0, True)
        dproduct = dproduct.to(k0.dtype)
        dq0 = tl.dot(dproduct, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            if HIDES:
                k1 = finite_or(k1, True)
            dq1 = tl.dot(dproduct, k1, dq1, input_precision=PRECISION)
    return dq0, dq1, total, dslope, dscale


@triton.jit(do_not_specialize=[*launch.SIZES, "num_bitmaps"])
def query_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    dout,          # [batch, num_heads, seqlen_q, head_dim_v]
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous
    delta,         # [batch, num_heads, seqlen_q], contiguous; None: 0
    dq,            # like q, or None
    totals,        # [batch, num_heads, seqlen_q], contiguous, or None: the sum of dS of each row
    dslopes,       # likewise: the part of each row
    dscales,       # likewise
    k_start, k_end, mask, bias, alibi_slopes, softmax_scale,  # as in prefill.forward_kernel
    seed: tl.int64,
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of a block mask (`lists.of`), or None
    list_strides, num_bitmaps, dq_strides,
    q_strides, k_strides, v_strides, dout_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    WIDE: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    # 1. which queries, and the keys that they see
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None  # any tile may hide a key
    HIDES: tl.constexpr = EVERYWHERE or BOUNDED or counts is not None
    DIMS: tl.constexpr = (HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = (HAS_FIRST, SOFTCAP, alibi_slopes is not None, DROPOUT, LEARNED_SCALE, EXACT, PRECISION)
    WANTED: tl.constexpr = (dq is not None, totals is not None, dslopes is not None, dscales is not None)
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
    if HAS_HI:
        m_block = num_m - 1 - m_block  # causal: longest first
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    row = m_block * BLOCK_M
    b, h, hk, m = batch.to(tl.int64), head.to(tl.int64), (head // group_size).to(tl.int64), row.to(tl.int64)
    rows, rows_left = row + tl.arange(0, BLOCK_M), seqlen_q - row
    limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
    bounds = row_bounds(rows, limits, seqlen_q, seqlen_k, HAS_LO, HAS_HI)
    if counts is not None:
        visits = open_lists(
            (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b, h, row,
            seqlen_k, BLOCK_Q, BLOCK_K, EVERYWHERE or BOUNDED,
        )  # fmt: skip
        full_lo, full_hi, masked = 0, visits[1] * (BLOCK_K // BLOCK_N), visits[2] * (BLOCK_K // BLOCK_N)
    else:
        lo, hi, common_lo, common_hi = key_range(bounds, seqlen_k, BLOCK_N, HAS_FIRST, BOUNDED, EVERYWHERE)
        full_lo, full_hi = common_lo // BLOCK_N, common_hi // BLOCK_N
        blocks_before = tl.cdiv(common_lo - lo, BLOCK_N)
        masked = blocks_before + tl.cdiv(hi - common_hi, BLOCK_N)

    # 2. q, dout and the statistics
    q += b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
    dout += b * dout_strides[0] + h * dout_strides[1] + m * dout_strides[2]
    k += b * k_strides[0] + hk * k_strides[1]
    v += b * v_strides[0] + hk * v_strides[1]
    keys = (k, widen(k_strides, WIDE), v, widen(v_strides, WIDE))
    scores = scores_of(mask, mask_strides, bias, bias_strides, b, h, 0, WIDE)
    scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
    slope = load_slope(alibi_slopes, slope_strides, b, h)
    numbers = (seqlen_q, seqlen_k, scale, softcap, slope, threshold, keep_factor, seed)
    of_q, of_dout = (q, widen(q_strides, WIDE), rows_left), (dout, widen(dout_strides, WIDE), rows_left)
    if not RELOAD:
        of_q = load_both(q, widen(q_strides, WIDE), rows_left, BLOCK_M, D0, D1, HEAD_DIM)
        of_dout = load_both(dout, widen(dout_strides, WIDE), rows_left, BLOCK_M, E0, E1, HEAD_DIM_V)
    statistics = (b * num_heads + h) * seqlen_q + m
    if delta is not None:
        delta += statistics
    queries = (of_q, of_dout, load_statistics(lse_parts + 2 * statistics, delta, rows_left, BLOCK_M, True))

    # 3. loops
    dq0, dq1, zeros = tl.zeros([BLOCK_M, D0], tl.float32), 0.0, tl.zeros([BLOCK_M], tl.float32)
    if D1 > 0:
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    sums = (dq0, dq1, zeros, zeros, zeros)
    if not EVERYWHERE:
        for index in tl.range(full_lo, full_hi):
            col = index * BLOCK_N
            if counts is not None:
                col = unmasked_tile(index, visits, BLOCK_K, BLOCK_N)
            sums = query_step(
                sums, queries, keys, bounds, scores, None, (batch, head, row, col), numbers, BLOCK_M, BLOCK_N, DIMS,
                FLAGS, WANTED, False, False, RELOAD,
            )  # fmt: skip
    for index in tl.range(0, masked):
        bitmap = None
        if counts is not None:
            col, bitmap = masked_tile(index, visits, BLOCK_Q, BLOCK_K, BLOCK_N)
        else:
            col = tl.where(index < blocks_before, lo + index * BLOCK_N, common_hi + (index - blocks_before) * BLOCK_N)
        sums = query_step(
            sums, queries, keys, bounds, scores, bitmap, (batch, head, row, col), numbers, BLOCK_M, BLOCK_N, DIMS,
            FLAGS, WANTED, True, HIDES, RELOAD,
        )  # fmt: skip

    # 4. epilogue
    dq0, dq1, total, dslope, dscale = sums
    statistics += tl.arange(0, BLOCK_M)
    if totals is not None:
        tl.store(totals + statistics, total, mask=rows < seqlen_q)
    if dslopes is not None:
        tl.store(dslopes + statistics, dslope, mask=rows < seqlen_q)
    if dscales is not None:
        tl.store(dscales + statistics, dscale, mask=rows < seqlen_q)
    if dq is not None:
        dq += b * dq_strides[0] + h * dq_strides[1] + m * dq_strides[2]
        store_columns(dq, widen(dq_strides, WIDE), dq0 * scale, rows_left, BLOCK_M, 0, D0, HEAD_DIM)
        if D1 > 0:
            store_columns(dq, widen(dq_strides, WIDE), dq1 * scale, rows_left, BLOCK_M, D0, D1, HEAD_DIM)
