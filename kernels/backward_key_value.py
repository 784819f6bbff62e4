"""Gradients of k and v: a program keeps a block of keys and goes through the queries of all heads that share it."""

import triton
import triton.language as tl

from . import launch
from .backward_tile import gradients_of_scores, load_statistics, product
from .lists import masked_tile, open_lists, unmasked_tile
from .tile import (
    INT_MAX,
    finite_or,
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
def key_value_step(
    gradients, keys, queries, limits, scores, bitmap, place, numbers,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, ENDS: tl.constexpr,
    MASKED: tl.constexpr, HIDES: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """`gradients` with the part of one block of queries; scores stand as [keys, queries].

    gradients        (dk0, dk1, dv0, dv1)
    keys             (k, v), for `product`
    queries          (q, strides, dout, strides, lse_parts, delta), pointers to the head's first query
    limits           of the head, for `tile.row_bounds`; the others as in `gradients_of_scores`
    MASKED           some query may not see some key. HIDES: NaN or Inf may be there
    """
    dk0, dk1, dv0, dv1 = gradients
    q, q_strides, dout, dout_strides, lse_parts, delta = queries
    row = place[2]
    HEAD_DIM: tl.constexpr = DIMS[0]
    D0: tl.constexpr = DIMS[1]
    D1: tl.constexpr = DIMS[2]
    HEAD_DIM_V: tl.constexpr = DIMS[3]
    E0: tl.constexpr = DIMS[4]
    E1: tl.constexpr = DIMS[5]
    PRECISION: tl.constexpr = FLAGS[6]
    rows_left, m = numbers[0] - row, tl.cast(row, tl.int64)
    s, q0, q1 = product(
        keys[0], q + m * q_strides[0], q_strides, rows_left, BLOCK_N, BLOCK_M, D0, D1, HEAD_DIM, MASKED, PRECISION,
        RELOAD,
    )  # fmt: skip
    dp, do0, do1 = product(
        keys[1], dout + m * dout_strides[0], dout_strides, rows_left, BLOCK_N, BLOCK_M, E0, E1, HEAD_DIM_V, MASKED,
        PRECISION, RELOAD,
    )  # fmt: skip
    statistics = load_statistics(lse_parts + 2 * m, delta + m, rows_left, BLOCK_M, MASKED)
    bounds = (0, 0)  # not used
    if MASKED:
        bounds = row_bounds(row + tl.arange(0, BLOCK_M), limits, numbers[0], numbers[1], ENDS[0], ENDS[1])
    kept, _, dproduct = gradients_of_scores(
        s, dp, scores, bitmap, place, statistics, bounds, numbers, BLOCK_M, BLOCK_N, FLAGS, MASKED, True
    )
    if FLAGS[4]:  # each head has its own scale; otherwise it is a factor of the sum
        dproduct *= numbers[2]
    kept, dproduct = kept.to(do0.dtype), dproduct.to(q0.dtype)
    if HIDES:  # a row that sees no key here may hold anything
        q0 = finite_or(q0, True)
    dv0 = tl.dot(kept, do0, dv0, input_precision=PRECISION)
    dk0 = tl.dot(dproduct, q0, dk0, input_precision=PRECISION)
    if E1 > 0:
        dv1 = tl.dot(kept, do1, dv1, input_precision=PRECISION)
    if D1 > 0:
        if HIDES:
            q1 = finite_or(q1, True)
        dk1 = tl.dot(dproduct, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def visiting_blocks(block_bounds, num_m, col, col_last, CHUNK: tl.constexpr):
    """(lo, hi, full_lo, full_hi): the blocks of queries that see a key of col ... col_last, and those of which every
    row sees all of them (one range of those; empty if they are not adjacent)."""
    lo, hi, full_lo, full_hi, count = num_m, 0, num_m, 0, 0
    for start in range(0, num_m, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        inside = blocks < num_m
        bounds = block_bounds + 4 * blocks
        touched = (tl.load(bounds, mask=inside, other=INT_MAX) <= col_last) & (
            tl.load(bounds + 1, mask=inside, other=0) > col
        )
        full = (tl.load(bounds + 2, mask=inside, other=INT_MAX) <= col) & (
            tl.load(bounds + 3, mask=inside, other=0) > col_last
        )
        lo = tl.minimum(lo, tl.min(tl.where(touched, blocks, num_m)))
        hi = tl.maximum(hi, tl.max(tl.where(touched, blocks + 1, 0)))
        full_lo = tl.minimum(full_lo, tl.min(tl.where(full, blocks, num_m)))
        full_hi = tl.maximum(full_hi, tl.max(tl.where(full, blocks + 1, 0)))
        count += tl.sum(full.to(tl.int32))
    hi = tl.maximum(hi, lo)
    if (count == 0) | (count != full_hi - full_lo):
        full_lo, full_hi = hi, hi
    return lo, hi, full_lo, full_hi


@triton.jit(do_not_specialize=[*launch.SIZES, "num_bitmaps"])
def key_value_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    dout,          # [batch, num_heads, seqlen_q, head_dim_v]
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous
    delta,         # [batch, num_heads, seqlen_q], contiguous
    block_bounds,  # [batch, num_heads, blocks of seqlen_q, 4], contiguous
    dk,            # like k, or None
    dv,            # like v, or None
    k_start, k_end, mask, bias, alibi_slopes, softmax_scale,  # as in prefill.forward_kernel
    seed: tl.int64,
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of the transposed block mask, or None
    list_strides, num_bitmaps, dk_strides, dv_strides,
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
    # 1. which keys
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None  # any tile may hide a key
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    HIDES: tl.constexpr = EVERYWHERE or BOUNDED or counts is not None
    DIMS: tl.constexpr = (HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = (HAS_FIRST, SOFTCAP, alibi_slopes is not None, DROPOUT, LEARNED_SCALE, EXACT, PRECISION)
    ENDS: tl.constexpr = (HAS_LO, HAS_HI)
    num_n, num_m = tl.cdiv(seqlen_k, BLOCK_N), tl.cdiv(seqlen_q, BLOCK_M)
    num_heads_k = num_heads // group_size
    col, pid = tl.program_id(0) % num_n * BLOCK_N, tl.program_id(0) // num_n
    head_k, batch = pid % num_heads_k, pid // num_heads_k
    keys_left = seqlen_k - col
    b, hk, n = batch.to(tl.int64), head_k.to(tl.int64), col.to(tl.int64)

    # 2. k, v
    k += b * k_strides[0] + hk * k_strides[1] + n * k_strides[2]
    v += b * v_strides[0] + hk * v_strides[1] + n * v_strides[2]
    keys = ((k, widen(k_strides, WIDE), keys_left), (v, widen(v_strides, WIDE), keys_left))
    if not RELOAD:
        keys = (
            load_both(k, widen(k_strides, WIDE), keys_left, BLOCK_N, D0, D1, HEAD_DIM),
            load_both(v, widen(v_strides, WIDE), keys_left, BLOCK_N, E0, E1, HEAD_DIM_V),
        )
    dk0, dv0, dk1, dv1 = tl.zeros([BLOCK_N, D0], tl.float32), tl.zeros([BLOCK_N, E0], tl.float32), 0.0, 0.0
    if D1 > 0:
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if E1 > 0:
        dv1 = tl.zeros([BLOCK_N, E1], tl.float32)
    q_tile, dout_tile = widen(q_strides, WIDE), widen(dout_strides, WIDE)

    # 3. loops: the heads that share these keys, and the blocks of queries that see them
    for head in tl.range(head_k * group_size, (head_k + 1) * group_size):
        h = tl.cast(head, tl.int64)
        rows = (b * num_heads + h) * seqlen_q
        if counts is not None:
            visits = open_lists(
                (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b, h, col,
                seqlen_q, BLOCK_K, BLOCK_Q, EVERYWHERE or BOUNDED,
            )  # fmt: skip
            full_lo, full_hi, masked = 0, visits[1] * (BLOCK_Q // BLOCK_M), visits[2] * (BLOCK_Q // BLOCK_M)
        else:
            bounds_of_blocks = block_bounds + 4 * (b * num_heads + h) * num_m
            lo, hi, full_lo, full_hi = visiting_blocks(bounds_of_blocks, num_m, col, col + BLOCK_N - 1, 128)
            if EVERYWHERE:
                full_lo, full_hi = hi, hi
            blocks_before, masked = full_lo - lo, hi - full_hi + full_lo - lo
        queries = (
            q + b * q_strides[0] + h * q_strides[1], q_tile, dout + b * dout_strides[0] + h * dout_strides[1],
            dout_tile, lse_parts + 2 * rows, delta + rows,
        )  # fmt: skip
        limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
        scores = scores_of(mask, mask_strides, bias, bias_strides, b, h, 0, WIDE)
        scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
        slope = load_slope(alibi_slopes, slope_strides, b, h)
        numbers = (seqlen_q, seqlen_k, scale, softcap, slope, threshold, keep_factor, seed)
        if not EVERYWHERE:
            for index in tl.range(full_lo, full_hi):
                row = index * BLOCK_M
                if counts is not None:
                    row = unmasked_tile(index, visits, BLOCK_Q, BLOCK_M)
                dk0, dk1, dv0, dv1 = key_value_step(
                    (dk0, dk1, dv0, dv1), keys, queries, limits, scores, None, (batch, head, row, col), numbers,
                    BLOCK_M, BLOCK_N, DIMS, FLAGS, ENDS, False, False, RELOAD,
                )  # fmt: skip
        for index in tl.range(0, masked):
            bitmap = None
            if counts is not None:
                row, bitmap = masked_tile(index, visits, BLOCK_K, BLOCK_Q, BLOCK_M)
            else:
                row = tl.where(index < blocks_before, lo + index, full_hi + index - blocks_before) * BLOCK_M
            dk0, dk1, dv0, dv1 = key_value_step(
                (dk0, dk1, dv0, dv1), keys, queries, limits, scores, bitmap, (batch, head, row, col), numbers,
                BLOCK_M, BLOCK_N, DIMS, FLAGS, ENDS, True, HIDES, RELOAD,
            )  # fmt: skip

    # 4. epilogue
    if not LEARNED_SCALE:
        dk0 *= softmax_scale
        dk1 *= softmax_scale
    if DROPOUT:
        dv0 *= keep_factor
        dv1 *= keep_factor
    if dk is not None:
        dk += b * dk_strides[0] + hk * dk_strides[1] + n * dk_strides[2]
        store_columns(dk, widen(dk_strides, WIDE), dk0, keys_left, BLOCK_N, 0, D0, HEAD_DIM)
        if D1 > 0:
            store_columns(dk, widen(dk_strides, WIDE), dk1, keys_left, BLOCK_N, D0, D1, HEAD_DIM)
    if dv is not None:
        dv += b * dv_strides[0] + hk * dv_strides[1] + n * dv_strides[2]
        store_columns(dv, widen(dv_strides, WIDE), dv0, keys_left, BLOCK_N, 0, E0, HEAD_DIM_V)
        if E1 > 0:
            store_columns(dv, widen(dv_strides, WIDE), dv1, keys_left, BLOCK_N, E0, E1, HEAD_DIM_V)
