"""Backward pass without atomics: the same bits in every run.

    P = exp2(scores - lse)   dP = dropout(dout V^T)   delta = rowsum(dout * out) - dlse   dS = P * (dP - delta)
    dV = P^T dout            dQ = scale * dS K        dK = scale * dS^T Q                 (FlashAttention-2, arXiv 2307.08691)

`prepare_kernel` computes delta and which keys each block of queries sees; `key_value_kernel` keeps a block of keys and goes through
the queries of all heads that share it; `query_kernel` keeps a block of queries; `bias_kernel` keeps a block of the bias and
goes through what it is broadcast over.
"""

import torch
import triton
import triton.language as tl

from . import config, launch, tuning
from . import lists as block_lists
from .lists import masked_block, open_lists, unmasked_block, unmasked_count
from .tile import (
    INT_MAX,
    LOG2E,
    bias_log2,
    bits,
    dropout_keep,
    finite_or,
    key_range,
    load_columns,
    load_scale,
    load_scores,
    load_slope,
    row_bounds,
    softcap_scores,
    store_columns,
    visible,
    widen,
)


@triton.jit(do_not_specialize=launch.SIZES)
def prepare_kernel(
    out,           # [batch, num_heads, seqlen_q, head_dim_v]
    dout,          # likewise
    exact,         # [batch, num_heads, seqlen_q], contiguous: rowsum(dP * P), or None: rowsum(dout * out) will do
    dlse,          # [batch, num_heads, seqlen_q] by strides, or None
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous
    sinks,         # [num_heads], or None
    k_start,       # [batch, num_heads, seqlen_q] by strides, or None
    k_end,         # likewise
    delta,         # [batch, num_heads, seqlen_q], contiguous
    dsinks,        # likewise, or None: the part of each row
    block_bounds,  # [batch, num_heads, blocks of seqlen_q, 4], contiguous
    out_strides, dout_strides, dlse_strides, start_strides, end_strides, sink_stride,
    diagonal_lo, diagonal_hi, num_heads, seqlen_q, seqlen_k,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """delta, the rows of dsinks, and (lo, hi, common_lo, common_hi) of each block of queries: some row sees a key of
    lo ... hi - 1 and none another, every row sees all of common_lo ... common_hi - 1."""
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    row = m_block * BLOCK_M
    b, h, m = batch.to(tl.int64), head.to(tl.int64), row.to(tl.int64)
    rows, rows_left = row + tl.arange(0, BLOCK_M), seqlen_q - row

    statistics = (b * num_heads + h) * seqlen_q + rows
    if exact is not None:
        row_delta = tl.load(exact + statistics, mask=rows < seqlen_q, other=0.0)
    else:
        out += b * out_strides[0] + h * out_strides[1] + m * out_strides[2]
        dout += b * dout_strides[0] + h * dout_strides[1] + m * dout_strides[2]
        out_tile, dout_tile = widen(out_strides, WIDE), widen(dout_strides, WIDE)
        o = load_columns(out, out_tile, rows_left, BLOCK_M, 0, BLOCK_D, HEAD_DIM_V, True).to(tl.float32)
        do = load_columns(dout, dout_tile, rows_left, BLOCK_M, 0, BLOCK_D, HEAD_DIM_V, True).to(tl.float32)
        row_delta = tl.sum(o * do, 1)
    if dlse is not None:
        dlse += b * dlse_strides[0] + h * dlse_strides[1]
        row_delta -= tl.load(dlse + rows.to(tl.int64) * dlse_strides[2], mask=rows < seqlen_q, other=0.0)
    tl.store(delta + statistics, row_delta, mask=rows < seqlen_q)
    if dsinks is not None:
        sink = tl.load(sinks + h * sink_stride).to(tl.float32) * LOG2E
        top = tl.load(lse_parts + 2 * statistics, mask=rows < seqlen_q, other=0.0)
        log2_total = tl.load(lse_parts + 2 * statistics + 1, mask=rows < seqlen_q, other=float("inf"))
        p_sink = tl.exp2(sink - top - log2_total)
        tl.store(dsinks + statistics, tl.where(p_sink == 0.0, 0.0, -p_sink * row_delta), mask=rows < seqlen_q)

    if k_start is not None:
        k_start += b * start_strides[0] + h * start_strides[1]
    if k_end is not None:
        k_end += b * end_strides[0] + h * end_strides[1]
    first, last = row_bounds(
        rows, k_start, start_strides[2], k_end, end_strides[2], seqlen_q, seqlen_k, diagonal_lo, diagonal_hi,
        HAS_LO, HAS_HI,
    )  # fmt: skip
    block_bounds += 4 * ((b * num_heads + h) * num_m + m_block)
    tl.store(block_bounds, tl.min(first))
    tl.store(block_bounds + 1, tl.max(last))
    tl.store(block_bounds + 2, tl.max(first))
    tl.store(block_bounds + 3, tl.where(rows_left < BLOCK_M, 0, tl.min(last)))  # rows past the end need a check


@triton.jit
def gradients_of_scores(
    s, dp, mask, mask_strides, bias, bias_strides, bitmap, rows, cols, row, col, head, batch, top, log2_total, delta, first, last,
    seqlen_q, seqlen_k, scale, softcap, slope, threshold, keep_factor, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(weights after dropout but for its factor, dS, d(scaled product)) of a tile from its products s and dp.

    rows, cols count from row and col. `mask` and `bias` point to (row, col); top ... last are shaped as rows.
    """
    if MASKED:
        seen = visible(col + cols, first, last, HAS_FIRST)
        if mask is not None:
            seen = seen & (load_scores(mask, mask_strides, rows, cols, seqlen_q - row, seqlen_k - col) != 0)
        if bitmap is not None:
            if TRANSPOSED:
                seen = seen & bits(bitmap, cols, BLOCK_M)
            else:
                seen = seen & bits(bitmap, rows, BLOCK_N)
    slope_of_cap = 1.0
    if SOFTCAP:
        s, slope_of_cap = softcap_scores(s, scale, softcap)
    elif EXACT:
        s = s * scale * LOG2E
    elif ALIBI or bias is not None or EXACT:
        s = s * (scale * LOG2E)
    if bias is not None:
        added = load_scores(bias, bias_strides, rows, cols, seqlen_q - row, seqlen_k - col)
        seen = seen & (added.to(tl.float32) != float("-inf"))
        s += bias_log2(added)
    if ALIBI:
        s -= slope * tl.abs(row + rows + (seqlen_k - seqlen_q) - col - cols).to(tl.float32)
    if SOFTCAP or ALIBI or bias is not None or EXACT:
        p = tl.exp2((s - top) - log2_total)  # in two steps: a bias may be huge
    else:
        p = tl.exp2(s * (scale * LOG2E) - (top + log2_total))
    if MASKED:
        p = tl.where(seen, p, 0.0)
    kept = p
    if DROPOUT:
        keep = dropout_keep(row + tl.arange(0, BLOCK_M)[:, None], col, head, batch, threshold, seed, BLOCK_M, BLOCK_N)
        if TRANSPOSED:
            keep = tl.trans(keep)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_factor, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    if SOFTCAP:
        return kept, ds, tl.where(ds == 0.0, 0.0, ds * slope_of_cap)
    else:
        return kept, ds, ds


@triton.jit
def load_statistics(lse_parts, delta, offset, rows_left, BLOCK_M: tl.constexpr, CHECK: tl.constexpr):
    """(top, log2_total, delta) of BLOCK_M rows from `offset` on; rows past the end have weights of 0."""
    rows = tl.arange(0, BLOCK_M)
    inside = rows < rows_left
    lse_parts += 2 * offset
    if CHECK:
        top = tl.load(lse_parts + 2 * rows, mask=inside, other=0.0)
        log2_total = tl.load(lse_parts + 2 * rows + 1, mask=inside, other=float("inf"))
    else:
        top, log2_total = tl.load(lse_parts + 2 * rows), tl.load(lse_parts + 2 * rows + 1)
    if delta is None:
        row_delta = tl.zeros_like(top)
    elif CHECK:
        row_delta = tl.load(delta + offset + rows, mask=inside, other=0.0)
    else:
        row_delta = tl.load(delta + offset + rows)
    return top, log2_total, row_delta


@triton.jit
def key_value_step(
    dk0, dk1, dv0, dv1,
    k0, k1, v0, v1, q, q_strides, dout, dout_strides, lse_parts, delta, k_start, start_stride, k_end, end_stride,
    mask, mask_strides, bias, bias_strides, bitmap, row, col, statistics, head, batch,
    diagonal_lo, diagonal_hi, seqlen_q, seqlen_k, scale, softcap, slope, threshold, keep_factor, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, LEARNED_SCALE: tl.constexpr,
    MASKED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """The part of one block of queries in the gradients of a block of keys; scores stand as [keys, queries]."""
    rows_left, m = seqlen_q - row, tl.cast(row, tl.int64)
    q += m * q_strides[0]
    dout += m * dout_strides[0]
    q0 = load_columns(q, q_strides, rows_left, BLOCK_M, 0, D0, HEAD_DIM, MASKED)
    s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
    if D1 > 0:
        q1 = load_columns(q, q_strides, rows_left, BLOCK_M, D0, D1, HEAD_DIM, MASKED)
        s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION)
    do0 = load_columns(dout, dout_strides, rows_left, BLOCK_M, 0, E0, HEAD_DIM_V, MASKED)
    dp = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
    if E1 > 0:
        do1 = load_columns(dout, dout_strides, rows_left, BLOCK_M, E0, E1, HEAD_DIM_V, MASKED)
        dp = tl.dot(v1, tl.trans(do1), dp, input_precision=PRECISION)
    top, log2_total, row_delta = load_statistics(lse_parts, delta, statistics + m, rows_left, BLOCK_M, MASKED)
    first, last = top, top  # not used
    if MASKED:
        first, last = row_bounds(
            row + tl.arange(0, BLOCK_M), k_start, start_stride, k_end, end_stride, seqlen_q, seqlen_k, diagonal_lo,
            diagonal_hi, HAS_LO, HAS_HI,
        )  # fmt: skip
        if mask is not None:
            mask += m * mask_strides[0]
        if bias is not None:
            bias += m * bias_strides[0]
    kept, _, dproduct = gradients_of_scores(
        s, dp, mask, mask_strides, bias, bias_strides, bitmap, tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None],
        row, col, head, batch, top[None, :], log2_total[None, :], row_delta[None, :], first[None, :], last[None, :],
        seqlen_q, seqlen_k, scale, softcap, slope, threshold, keep_factor, seed, BLOCK_M, BLOCK_N, HAS_FIRST, SOFTCAP,
        ALIBI, DROPOUT, EXACT, MASKED, True,
    )  # fmt: skip
    if LEARNED_SCALE:  # each head has its own; otherwise it is a factor of the sum
        dproduct *= scale
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
    """(lo, hi, full_lo, full_hi): the blocks of queries that see a key of col ... col_last, and those of which every row
    sees all of them (one range of those; empty if they are not adjacent)."""
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
    dk,            # like k
    dv,            # like v
    k_start, k_end, mask, bias, alibi_slopes, softmax_scale,  # as in prefill.forward_kernel
    seed: tl.int64,
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of the transposed block mask (`lists.of`), or None
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
    WIDE: tl.constexpr,
):  # fmt: skip
    # 1. bounds
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    HIDES: tl.constexpr = EVERYWHERE or BOUNDED or counts is not None
    ALIBI: tl.constexpr = alibi_slopes is not None
    num_n, num_m, num_blocks = tl.cdiv(seqlen_k, BLOCK_N), tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_q, BLOCK_Q)
    STEPS: tl.constexpr = BLOCK_Q // BLOCK_M
    num_heads_k = num_heads // group_size
    n_block = tl.program_id(0) % num_n
    head_k, batch = tl.program_id(0) // num_n % num_heads_k, tl.program_id(0) // num_n // num_heads_k
    col = n_block * BLOCK_N
    keys_left = seqlen_k - col
    b, hk, n = batch.to(tl.int64), head_k.to(tl.int64), col.to(tl.int64)

    # 2. k, v
    k += b * k_strides[0] + hk * k_strides[1] + n * k_strides[2]
    v += b * v_strides[0] + hk * v_strides[1] + n * v_strides[2]
    k_tile, v_tile = widen(k_strides, WIDE), widen(v_strides, WIDE)
    q_tile, dout_tile = widen(q_strides, WIDE), widen(dout_strides, WIDE)
    mask_tile, bias_tile = widen(mask_strides, WIDE), widen(bias_strides, WIDE)
    k0 = load_columns(k, k_tile, keys_left, BLOCK_N, 0, D0, HEAD_DIM, True)
    v0 = load_columns(v, v_tile, keys_left, BLOCK_N, 0, E0, HEAD_DIM_V, True)
    dk0, dv0 = tl.zeros([BLOCK_N, D0], tl.float32), tl.zeros([BLOCK_N, E0], tl.float32)
    k1, v1, dk1, dv1 = 0.0, 0.0, 0.0, 0.0
    if D1 > 0:
        k1 = load_columns(k, k_tile, keys_left, BLOCK_N, D0, D1, HEAD_DIM, True)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if E1 > 0:
        v1 = load_columns(v, v_tile, keys_left, BLOCK_N, E0, E1, HEAD_DIM_V, True)
        dv1 = tl.zeros([BLOCK_N, E1], tl.float32)

    if counts is not None:
        bitmaps += col % BLOCK_K * (BLOCK_Q // 8)

    # 3. loops: the heads that share these keys, and the blocks of queries that see them
    for head in tl.range(head_k * group_size, (head_k + 1) * group_size):
        h = tl.cast(head, tl.int64)
        statistics = (b * num_heads + h) * seqlen_q
        if counts is not None:
            opened = open_lists((counts, indices, bitmap_ids, full_counts, full_indices), list_strides, b, h, n // BLOCK_K)
            unmasked = unmasked_count(opened, num_blocks, seqlen_q % BLOCK_Q != 0, BOUNDED)
            full_lo, full_hi, masked = 0, unmasked * STEPS, (opened[0] + opened[3] - unmasked) * STEPS
        else:
            lo, hi, full_lo, full_hi = visiting_blocks(
                block_bounds + 4 * (b * num_heads + h) * num_m, num_m, col, col + BLOCK_N - 1, 128
            )
            if EVERYWHERE:
                full_lo, full_hi = hi, hi
            blocks_before, masked = full_lo - lo, hi - full_hi + full_lo - lo
        q_head = q + b * q_strides[0] + h * q_strides[1]
        dout_head = dout + b * dout_strides[0] + h * dout_strides[1]
        start_head, end_head, mask_head, bias_head = k_start, k_end, mask, bias
        if k_start is not None:
            start_head += b * start_strides[0] + h * start_strides[1]
        if k_end is not None:
            end_head += b * end_strides[0] + h * end_strides[1]
        if mask is not None:
            mask_head += b * mask_strides[0] + h * mask_strides[1] + n * mask_strides[3]
        if bias is not None:
            bias_head += b * bias_strides[0] + h * bias_strides[1] + n * bias_strides[3]
        scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
        slope = load_slope(alibi_slopes, slope_strides, b, h)
        if not EVERYWHERE:
            for index in tl.range(full_lo, full_hi):
                row = index * BLOCK_M
                if counts is not None:
                    block = unmasked_block(index // STEPS, opened, num_blocks)
                    row = block * BLOCK_Q + index % STEPS * BLOCK_M
                dk0, dk1, dv0, dv1 = key_value_step(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, q_tile, dout_head, dout_tile, lse_parts, delta, start_head,
                    start_strides[2], end_head, end_strides[2], mask_head, mask_tile, bias_head, bias_tile, None,
                    row, col, statistics, head, batch, diagonal_lo, diagonal_hi, seqlen_q, seqlen_k, scale,
                    softcap, slope, threshold, keep_factor, seed, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1,
                    HAS_LO, HAS_HI, HAS_FIRST, SOFTCAP, ALIBI, DROPOUT, EXACT, PRECISION, LEARNED_SCALE,
                    False, False,
                )  # fmt: skip
        for index in tl.range(0, masked):
            bitmap = None
            if counts is not None:
                block, number, limit = masked_block(index // STEPS, opened, unmasked, num_blocks, num_bitmaps, BLOCK_Q)
                bitmap_start = bitmaps + number * (BLOCK_K * BLOCK_Q // 8)
                bitmap = (bitmap_start + index % STEPS * (BLOCK_M // 8), BLOCK_Q // 8, limit)
                row = block * BLOCK_Q + index % STEPS * BLOCK_M
            else:
                row = tl.where(index < blocks_before, lo + index, full_hi + index - blocks_before) * BLOCK_M
            dk0, dk1, dv0, dv1 = key_value_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, q_tile, dout_head, dout_tile, lse_parts, delta, start_head,
                start_strides[2], end_head, end_strides[2], mask_head, mask_tile, bias_head, bias_tile, bitmap,
                row, col, statistics, head, batch, diagonal_lo, diagonal_hi, seqlen_q, seqlen_k, scale,
                softcap, slope, threshold, keep_factor, seed, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1,
                HAS_LO, HAS_HI, HAS_FIRST, SOFTCAP, ALIBI, DROPOUT, EXACT, PRECISION, LEARNED_SCALE,
                True, HIDES,
            )  # fmt: skip

    # 4. epilogue
    if not LEARNED_SCALE:
        dk0 *= softmax_scale
        dk1 *= softmax_scale
    if DROPOUT:
        dv0 *= keep_factor
        dv1 *= keep_factor
    dk_tile, dv_tile = widen(dk_strides, WIDE), widen(dv_strides, WIDE)
    if dk is not None:
        dk += b * dk_strides[0] + hk * dk_strides[1] + n * dk_strides[2]
        store_columns(dk, dk_tile, dk0, keys_left, BLOCK_N, 0, D0, HEAD_DIM)
        if D1 > 0:
            store_columns(dk, dk_tile, dk1, keys_left, BLOCK_N, D0, D1, HEAD_DIM)
    if dv is not None:
        dv += b * dv_strides[0] + hk * dv_strides[1] + n * dv_strides[2]
        store_columns(dv, dv_tile, dv0, keys_left, BLOCK_N, 0, E0, HEAD_DIM_V)
        if E1 > 0:
            store_columns(dv, dv_tile, dv1, keys_left, BLOCK_N, E0, E1, HEAD_DIM_V)


@triton.jit
def query_step(
    dq0, dq1, total, dslope, dscale,
    q0, q1, do0, do1, k, k_strides, v, v_strides, mask, mask_strides, bias, bias_strides, bitmap,
    top, log2_total, delta, first, last, row, col, head, batch, seqlen_q, seqlen_k, scale, softcap, slope, threshold,
    keep_factor, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    HAS_FIRST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, QUERY: tl.constexpr, TOTAL: tl.constexpr, SLOPE: tl.constexpr,
    SCALE: tl.constexpr, MASKED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """The part of one block of keys in the gradients of a block of queries."""
    keys_left, n = seqlen_k - col, tl.cast(col, tl.int64)
    k += n * k_strides[0]
    v += n * v_strides[0]
    k0 = load_columns(k, k_strides, keys_left, BLOCK_N, 0, D0, HEAD_DIM, MASKED)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        k1 = load_columns(k, k_strides, keys_left, BLOCK_N, D0, D1, HEAD_DIM, MASKED)
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    v0 = load_columns(v, v_strides, keys_left, BLOCK_N, 0, E0, HEAD_DIM_V, MASKED)
    dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
    if E1 > 0:
        v1 = load_columns(v, v_strides, keys_left, BLOCK_N, E0, E1, HEAD_DIM_V, MASKED)
        dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
    if mask is not None:
        mask += n * mask_strides[1]
    if bias is not None:
        bias += n * bias_strides[1]
    rows, cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    _, ds, dproduct = gradients_of_scores(
        s, dp, mask, mask_strides, bias, bias_strides, bitmap, rows, cols, row, col, head, batch, top[:, None],
        log2_total[:, None], delta[:, None], first[:, None], last[:, None], seqlen_q, seqlen_k, scale, softcap, slope,
        threshold, keep_factor, seed, BLOCK_M, BLOCK_N, HAS_FIRST, SOFTCAP, ALIBI, DROPOUT, EXACT, MASKED, False,
    )  # fmt: skip
    if TOTAL:
        total += tl.sum(ds, 1)
    if SLOPE:
        dslope -= tl.sum(ds * tl.abs(row + rows + (seqlen_k - seqlen_q) - col - cols).to(tl.float32), 1)
    if SCALE:
        dscale += tl.sum(tl.where(dproduct == 0.0, 0.0, dproduct * s), 1)
    if QUERY:
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
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of the block mask (`lists.of`), or None
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
    WIDE: tl.constexpr,
):  # fmt: skip
    # 1. bounds
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None
    HIDES: tl.constexpr = EVERYWHERE or BOUNDED or counts is not None
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    ALIBI: tl.constexpr = alibi_slopes is not None
    QUERY: tl.constexpr = dq is not None
    TOTAL: tl.constexpr = totals is not None
    SLOPE: tl.constexpr = dslopes is not None
    SCALE: tl.constexpr = dscales is not None
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
    if HAS_HI:
        m_block = num_m - 1 - m_block  # causal: longest first
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    row = m_block * BLOCK_M
    b, h, hk, m = batch.to(tl.int64), head.to(tl.int64), (head // group_size).to(tl.int64), row.to(tl.int64)
    rows, rows_left = row + tl.arange(0, BLOCK_M), seqlen_q - row
    if k_start is not None:
        k_start += b * start_strides[0] + h * start_strides[1]
    if k_end is not None:
        k_end += b * end_strides[0] + h * end_strides[1]
    first, last = row_bounds(
        rows, k_start, start_strides[2], k_end, end_strides[2], seqlen_q, seqlen_k, diagonal_lo, diagonal_hi,
        HAS_LO, HAS_HI,
    )  # fmt: skip
    num_blocks = tl.cdiv(seqlen_k, BLOCK_K)
    if counts is not None:
        opened = open_lists((counts, indices, bitmap_ids, full_counts, full_indices), list_strides, b, h, m // BLOCK_Q)
        unmasked = unmasked_count(opened, num_blocks, seqlen_k % BLOCK_K != 0, BOUNDED)
        full_lo, full_hi, masked = 0, unmasked * STEPS, (opened[0] + opened[3] - unmasked) * STEPS
        bitmaps += row % BLOCK_Q * (BLOCK_K // 8)
    else:
        lo, hi, common_lo, common_hi = key_range((first, last), seqlen_k, BLOCK_N, HAS_FIRST, BOUNDED, EVERYWHERE)
        full_lo, full_hi = common_lo // BLOCK_N, common_hi // BLOCK_N
        blocks_before = tl.cdiv(common_lo - lo, BLOCK_N)
        masked = blocks_before + tl.cdiv(hi - common_hi, BLOCK_N)

    # 2. q, dout and the statistics
    q += b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
    dout += b * dout_strides[0] + h * dout_strides[1] + m * dout_strides[2]
    k += b * k_strides[0] + hk * k_strides[1]
    v += b * v_strides[0] + hk * v_strides[1]
    k_tile, v_tile = widen(k_strides, WIDE), widen(v_strides, WIDE)
    q_tile, dout_tile = widen(q_strides, WIDE), widen(dout_strides, WIDE)
    mask_tile, bias_tile = widen(mask_strides, WIDE), widen(bias_strides, WIDE)
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1] + m * mask_strides[2]
    if bias is not None:
        bias += b * bias_strides[0] + h * bias_strides[1] + m * bias_strides[2]
    scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
    slope = load_slope(alibi_slopes, slope_strides, b, h)
    q0 = load_columns(q, q_tile, rows_left, BLOCK_M, 0, D0, HEAD_DIM, True)
    do0 = load_columns(dout, dout_tile, rows_left, BLOCK_M, 0, E0, HEAD_DIM_V, True)
    q1, do1, dq0, dq1 = 0.0, 0.0, tl.zeros([BLOCK_M, D0], tl.float32), 0.0
    if D1 > 0:
        q1 = load_columns(q, q_tile, rows_left, BLOCK_M, D0, D1, HEAD_DIM, True)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if E1 > 0:
        do1 = load_columns(dout, dout_tile, rows_left, BLOCK_M, E0, E1, HEAD_DIM_V, True)
    statistics = (b * num_heads + h) * seqlen_q
    top, log2_total, row_delta = load_statistics(lse_parts, delta, statistics + m, rows_left, BLOCK_M, True)

    # 3. loops
    total, dslope, dscale = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    if not EVERYWHERE:
        for index in tl.range(full_lo, full_hi):
            col = index * BLOCK_N
            if counts is not None:
                col = unmasked_block(index // STEPS, opened, num_blocks) * BLOCK_K + index % STEPS * BLOCK_N
            dq0, dq1, total, dslope, dscale = query_step(
                dq0, dq1, total, dslope, dscale, q0, q1, do0, do1, k, k_tile, v, v_tile, mask, mask_tile, bias, bias_tile, None, top,
                log2_total, row_delta, first, last, row, col, head, batch, seqlen_q, seqlen_k, scale, softcap, slope,
                threshold, keep_factor, seed, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, HAS_FIRST,
                SOFTCAP, ALIBI, DROPOUT, EXACT, PRECISION, QUERY, TOTAL, SLOPE, SCALE,
                False, False,
            )  # fmt: skip
    for index in tl.range(0, masked):
        bitmap = None
        if counts is not None:
            block, number, limit = masked_block(index // STEPS, opened, unmasked, num_blocks, num_bitmaps, BLOCK_K)
            bitmap_start = bitmaps + number * (BLOCK_Q * BLOCK_K // 8)
            bitmap = (bitmap_start + index % STEPS * (BLOCK_N // 8), BLOCK_K // 8, limit)
            col = block * BLOCK_K + index % STEPS * BLOCK_N
        else:
            col = tl.where(index < blocks_before, lo + index * BLOCK_N, common_hi + (index - blocks_before) * BLOCK_N)
        dq0, dq1, total, dslope, dscale = query_step(
            dq0, dq1, total, dslope, dscale, q0, q1, do0, do1, k, k_tile, v, v_tile, mask, mask_tile, bias, bias_tile, bitmap, top,
            log2_total, row_delta, first, last, row, col, head, batch, seqlen_q, seqlen_k, scale, softcap, slope,
            threshold, keep_factor, seed, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, HAS_FIRST,
            SOFTCAP, ALIBI, DROPOUT, EXACT, PRECISION, QUERY, TOTAL, SLOPE, SCALE, True,
            HIDES,
        )  # fmt: skip

    # 4. epilogue
    statistics += rows
    if TOTAL:
        tl.store(totals + statistics, total, mask=rows < seqlen_q)
    if SLOPE:
        tl.store(dslopes + statistics, dslope, mask=rows < seqlen_q)
    if SCALE:
        tl.store(dscales + statistics, dscale, mask=rows < seqlen_q)
    if QUERY:
        dq += b * dq_strides[0] + h * dq_strides[1] + m * dq_strides[2]
        dq_tile = widen(dq_strides, WIDE)
        store_columns(dq, dq_tile, dq0 * scale, rows_left, BLOCK_M, 0, D0, HEAD_DIM)
        if D1 > 0:
            store_columns(dq, dq_tile, dq1 * scale, rows_left, BLOCK_M, D0, D1, HEAD_DIM)


@triton.jit(do_not_specialize=[*launch.SIZES, "batches", "heads"])
def bias_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    dout,          # [batch, num_heads, seqlen_q, head_dim_v]
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous
    delta,         # [batch, num_heads, seqlen_q], contiguous
    dbias,         # [batch or 1, num_heads or 1, seqlen_q or 1, seqlen_k or 1]; 1: summed over
    k_start, k_end, mask, bias, alibi_slopes, softmax_scale,  # as in prefill.forward_kernel
    seed: tl.int64,
    dbias_strides,
    q_strides, k_strides, v_strides, dout_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k, batches, heads,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    WIDE: tl.constexpr, ROWS_SUMMED: tl.constexpr, COLS_SUMMED: tl.constexpr,
):  # fmt: skip
    """dS summed over what the bias is broadcast over: `batches` batches, `heads` heads, rows, columns."""
    # 1. which block of the bias, and the range of what is summed over
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    ALIBI: tl.constexpr = alibi_slopes is not None
    num_m, num_n = tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_k, BLOCK_N)
    m_blocks, n_blocks = 1, 1  # of the bias
    if not ROWS_SUMMED:
        m_blocks, num_m = num_m, 1
    if not COLS_SUMMED:
        n_blocks, num_n = num_n, 1
    pid = tl.program_id(0)
    n_first, pid = pid % n_blocks, pid // n_blocks
    m_first, pid = pid % m_blocks, pid // m_blocks
    heads_of_bias = num_heads // heads
    head_first, batch_first = pid % heads_of_bias, pid // heads_of_bias
    mask_tile, bias_tile = widen(mask_strides, WIDE), widen(bias_strides, WIDE)
    local_rows, local_cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]

    # 2. loop
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in tl.range(0, batches * heads * num_m * num_n):
        col, index = (n_first + index % num_n) * BLOCK_N, index // num_n
        row, index = (m_first + index % num_m) * BLOCK_M, index // num_m
        head, batch = head_first + index % heads, batch_first + index // heads
        b, h, hk = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(head // group_size, tl.int64)
        m, n = tl.cast(row, tl.int64), tl.cast(col, tl.int64)
        rows_left, keys_left = seqlen_q - row, seqlen_k - col
        start_head, end_head, mask_head = k_start, k_end, mask
        if k_start is not None:
            start_head += b * start_strides[0] + h * start_strides[1]
        if k_end is not None:
            end_head += b * end_strides[0] + h * end_strides[1]
        first, last = row_bounds(
            row + tl.arange(0, BLOCK_M), start_head, start_strides[2], end_head, end_strides[2], seqlen_q, seqlen_k,
            diagonal_lo, diagonal_hi, HAS_LO, HAS_HI,
        )  # fmt: skip
        if (tl.min(first) < col + BLOCK_N) & (tl.max(last) > col):
            if mask is not None:
                mask_head += b * mask_strides[0] + h * mask_strides[1] + m * mask_strides[2] + n * mask_strides[3]
            bias_head = bias + b * bias_strides[0] + h * bias_strides[1] + m * bias_strides[2] + n * bias_strides[3]
            q_head = q + b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
            k_head = k + b * k_strides[0] + hk * k_strides[1] + n * k_strides[2]
            v_head = v + b * v_strides[0] + hk * v_strides[1] + n * v_strides[2]
            dout_head = dout + b * dout_strides[0] + h * dout_strides[1] + m * dout_strides[2]
            s = product(
                q_head, widen(q_strides, WIDE), rows_left, k_head,
                widen(k_strides, WIDE), keys_left, BLOCK_M, BLOCK_N, D0, D1, HEAD_DIM, PRECISION,
            )  # fmt: skip
            dp = product(
                dout_head, widen(dout_strides, WIDE), rows_left, v_head,
                widen(v_strides, WIDE), keys_left, BLOCK_M, BLOCK_N, E0, E1, HEAD_DIM_V, PRECISION,
            )  # fmt: skip
            statistics = (b * num_heads + h) * seqlen_q + m
            top, log2_total, row_delta = load_statistics(lse_parts, delta, statistics, rows_left, BLOCK_M, True)
            scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
            slope = load_slope(alibi_slopes, slope_strides, b, h)
            _, ds, _ = gradients_of_scores(
                s, dp, mask_head, mask_tile, bias_head, bias_tile, None, local_rows, local_cols, row, col, head, batch,
                top[:, None], log2_total[:, None], row_delta[:, None], first[:, None], last[:, None], seqlen_q,
                seqlen_k, scale, softcap, slope, threshold, keep_factor, seed, BLOCK_M, BLOCK_N, HAS_FIRST, SOFTCAP,
                ALIBI, DROPOUT, EXACT, True, False,
            )  # fmt: skip
            acc += ds

    # 3. epilogue
    row, col = m_first * BLOCK_M, n_first * BLOCK_N
    dbias += tl.cast(batch_first, tl.int64) * dbias_strides[0] + tl.cast(head_first, tl.int64) * dbias_strides[1]
    if ROWS_SUMMED and COLS_SUMMED:
        tl.store(dbias, tl.sum(acc))
    elif ROWS_SUMMED:
        cols = col + tl.arange(0, BLOCK_N)
        tl.store(dbias + cols.to(tl.int64) * dbias_strides[3], tl.sum(acc, 0), mask=cols < seqlen_k)
    elif COLS_SUMMED:
        rows = row + tl.arange(0, BLOCK_M)
        tl.store(dbias + rows.to(tl.int64) * dbias_strides[2], tl.sum(acc, 1), mask=rows < seqlen_q)
    else:
        dbias += tl.cast(row, tl.int64) * dbias_strides[2] + tl.cast(col, tl.int64) * dbias_strides[3]
        inside = (local_rows < seqlen_q - row) & (local_cols < seqlen_k - col)
        pointers = dbias + local_rows * dbias_strides[2] + local_cols * dbias_strides[3]
        tl.store(pointers, acc.to(dbias.dtype.element_ty), mask=inside)


@triton.jit
def product(
    a, a_strides, a_left, b, b_strides, b_left, M: tl.constexpr, N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
    DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of M and N rows of DIM columns."""
    a0, b0 = load_columns(a, a_strides, a_left, M, 0, W0, DIM, True), load_columns(b, b_strides, b_left, N, 0, W0, DIM, True)
    acc = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if W1 > 0:
        a1 = load_columns(a, a_strides, a_left, M, W0, W1, DIM, True)
        b1 = load_columns(b, b_strides, b_left, N, W0, W1, DIM, True)
        acc = tl.dot(a1, tl.trans(b1), acc, input_precision=PRECISION)
    return acc


def backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients of q, k, v, bias, alibi_slopes, sinks, softmax_scale, None where not `wanted` (backward signature of
    dispatch.Row). saved: of `prefill.forward_for_backward`."""
    out, lse_parts = saved
    want_q, want_k, want_v, want_bias, want_slopes, want_sinks, want_scale = wanted
    dq, dk, dv = (torch.empty_like(x) if want else None for x, want in zip((q, k, v), wanted, strict=False))
    rows = (problem.batch, problem.num_heads, problem.seqlen_q)

    def row_sums(want) -> torch.Tensor | None:
        return q.new_empty(rows, dtype=torch.float32) if want else None

    delta, dslopes, dsinks, dscale = row_sums(True), row_sums(want_slopes), row_sums(want_sinks), row_sums(want_scale)
    dbias = _empty_dbias(problem, terms.bias) if want_bias else None
    if out.numel():
        device = launch.device_facts(q.get_device())
        call = _Call(problem, q, k, v, dout, terms, lse_parts, device)
        exact = row_sums(any(wanted[3:]))  # out was summed in 16 bits, which these gradients would show
        if exact is not None:
            call.launch_query(None, None, exact, None, None)
        tiles = call.tiles("key_value")
        blocks = triton.cdiv(problem.seqlen_q, tiles.BLOCK_M)
        bounds = torch.empty((*rows[:2], blocks, 4), dtype=torch.int32, device=q.device)
        _prepare(problem, terms, out, lse_parts, dout, dlse, exact, delta, dsinks, bounds, tiles.BLOCK_M)
        if (want_k or want_v) and problem.seqlen_k:
            call.launch_key_value(tiles, delta, bounds, dk, dv)
        if want_q or want_slopes or want_scale:
            call.launch_query(delta, dq, None, dslopes, dscale)
        if want_bias and dbias.numel():
            call.launch_bias(delta, dbias)
    else:
        for x in (dq, dk, dv, dslopes, dsinks, dscale, dbias):
            if x is not None:
                x.zero_()
    slopes, scale = terms.alibi_slopes, terms.softmax_scale
    return (
        dq, dk, dv,
        None if dbias is None else _sum_to(dbias, terms.bias),
        None if dslopes is None else _sum_to(dslopes.sum(-1, dtype=torch.float64), slopes),
        None if dsinks is None else _sum_to(dsinks.sum((0, 2), dtype=torch.float64), terms.sinks),
        None if dscale is None else _sum_to(dscale.sum((0, 2), dtype=torch.float64), scale),
    )  # fmt: skip


def _sum_to(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.sum_to_size((1,) * (x.dim() - like.dim()) + like.shape).view(like.shape).to(like.dtype)


def _empty_dbias(problem, bias) -> torch.Tensor:
    """Sums by bias_kernel: over batches and heads in the kernel if the bias has queries and keys, else afterwards."""
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if shape[2] == 1 or shape[3] == 1:
        shape = (problem.batch, problem.num_heads, problem.seqlen_q if shape[3] == 1 else 1, shape[3])
    return torch.empty(shape, dtype=torch.float32, device=bias.device)


def _prepare(problem, terms, out, lse_parts, dout, dlse, exact, delta, dsinks, bounds, block_m) -> None:
    extras = (dlse, None if dsinks is None else terms.sinks, terms.k_start, terms.k_end)
    key = (
        "prepare", problem, block_m, exact is None, dsinks is None, out.get_device(), out.stride(), out.dtype,
        dout.stride(), launch.alignment(out, dout, *extras), launch.describe(*extras), terms.diagonal_lo,
        terms.diagonal_hi,
    )  # fmt: skip
    tensors = (out, dout, exact, dlse, lse_parts, *extras[1:], delta, dsinks, bounds)

    def plan():
        lo, hi = launch.clamp_diagonal(terms)
        arguments = (
            out.stride(), dout.stride(), launch.strides(dlse, 3), launch.strides(terms.k_start, 3),
            launch.strides(terms.k_end, 3), *launch.strides(terms.sinks, 1), lo, hi, problem.num_heads,
            problem.seqlen_q, problem.seqlen_k,
        )  # fmt: skip
        constexprs = {
            "HEAD_DIM_V": problem.head_dim_v, "BLOCK_D": triton.next_power_of_2(problem.head_dim_v), "BLOCK_M": block_m,
            "WIDE": launch.is_wide(*arguments[:2]), **launch.diagonal_flags(lo, hi),
        }  # fmt: skip
        options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        return launch.Plan(prepare_kernel, bounds.numel() // 4, arguments, constexprs, options)

    launch.run(key, tensors, plan)


class _Call:
    """What the three kernels of products have in common."""

    def __init__(self, problem, q, k, v, dout, terms, lse_parts, device):
        self.problem, self.inputs, self.terms, self.device = problem, (q, k, v, dout), terms, device
        self.lse_parts, self.lists, self.transposed = lse_parts, None, None
        if terms.block_mask is not None:
            self.lists, self.transposed = map(block_lists.of, (terms.block_mask, terms.block_mask.transpose()))
        self.extras = (terms.k_start, terms.k_end, terms.mask, terms.bias, terms.alibi_slopes)
        self.key = (
            problem, q.get_device(), *(x.stride() for x in self.inputs), launch.alignment(*self.inputs, *self.extras),
            launch.describe(*self.extras), terms.softcap, terms.diagonal_lo, terms.diagonal_hi, terms.dropout_p,
            launch.describe_scale(terms.softmax_scale), launch.precision(problem),
        )  # fmt: skip

    def launch_key_value(self, tiles, delta, bounds, dk, dv) -> None:
        def count_programs(tiles):
            return triton.cdiv(self.problem.seqlen_k, tiles.BLOCK_N) * self.problem.num_heads_k * self.problem.batch

        strides = (launch.strides(dk, 4), launch.strides(dv, 4))
        self._launch("key_value", key_value_kernel, tiles, count_programs, (delta, bounds, dk, dv), strides, self.transposed)

    def launch_query(self, delta, dq, totals, dslopes, dscale) -> None:
        tiles = self.tiles("query")

        def count_programs(tiles):
            return triton.cdiv(self.problem.seqlen_q, tiles.BLOCK_M) * self.problem.num_heads * self.problem.batch

        self._launch("query", query_kernel, tiles, count_programs, (delta, dq, totals, dslopes, dscale), (launch.strides(dq, 4),), self.lists)

    def launch_bias(self, delta, dbias) -> None:
        problem, tiles = self.problem, self.tiles("bias")
        b, h, sq, sk = dbias.shape
        rows_summed, cols_summed = sq == 1 and problem.seqlen_q > 1, sk == 1 and problem.seqlen_k > 1

        def count_programs(tiles):
            m_blocks = 1 if rows_summed else triton.cdiv(sq, tiles.BLOCK_M)
            n_blocks = 1 if cols_summed else triton.cdiv(sk, tiles.BLOCK_N)
            return m_blocks * n_blocks * b * h

        counts = (problem.batch // b, problem.num_heads // h)
        flags = {"ROWS_SUMMED": rows_summed, "COLS_SUMMED": cols_summed}
        self._launch("bias", bias_kernel, tiles, count_programs, (delta, dbias), (dbias.stride(),), None, counts, flags)

    def tiles(self, kernel: str) -> config.Config:
        tiles = tuning.tiles(kernel, self.problem, self.device)
        return config.within(tiles, self.lists.block_size) if self.lists else tiles

    def _launch(self, name, kernel, tiles, count_programs, tensors, strides, lists, counts=(), flags=None) -> None:
        """tensors: what the kernel takes between lse_parts and k_start; counts: behind all other arguments."""
        problem, terms = self.problem, self.terms
        of_lists = block_lists.key(lists) if lists else None
        key = (name, tiles, tuple(x is None for x in tensors), strides, of_lists, counts, *self.key)

        def plan(tiles):
            arguments, constexprs = launch.score_arguments(problem, *self.inputs, terms)
            constexprs["EXACT"] = problem.dtype == "float32" or problem.bias != "none" or problem.learned_scale
            if kernel is bias_kernel:
                constexprs |= {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, **flags}
                before = strides
            else:
                constexprs |= block_lists.constexprs(self.lists, tiles)
                before = (lists.strides, lists.num_bitmaps, *strides) if lists else (None, 0, *strides)
            programs = count_programs(tiles)
            return launch.Plan(kernel, programs, (*before, *arguments, *counts), constexprs, tiles.options(self.device))

        varying = (*self.extras, terms.softmax_scale, terms.seed or 0)
        if kernel is not bias_kernel:
            varying += lists.tensors if lists else (None,) * 6
        tensors = (*self.inputs, self.lse_parts, *tensors, *varying)
        if self.lists:  # tiles have to divide their blocks
            launch.run(key, tensors, lambda: plan(tiles))
        else:
            launch.run(key, tensors, lambda: launch.choose(name, problem, self.device, tensors, plan))
