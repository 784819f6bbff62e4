"""Forward pass: a program takes BLOCK_M queries of one head through the keys that they see.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867), tiled as in FlashAttention-2 (Dao, arXiv 2307.08691). Key blocks
in which every query sees every key run a loop without masks; the others, at the ends of the range, run a second one.
"""

import torch
import triton
import triton.language as tl

from . import config, launch
from .tile import (
    INT_MAX,
    LOG2E,
    bias_log2,
    dropout_keep,
    finite_or_zero,
    load_columns,
    natural_lse,
    normalizer,
    softcap_scores,
    store_columns,
    visible,
    visited_keys,
    widen,
)


@triton.jit
def load_bounds(ptr, stride, rows, seqlen_q, seqlen_k, default):
    """k_start or k_end of the rows, clamped to 0 ... seqlen_k; rows past the last one repeat it."""
    if ptr is None:
        return default + tl.zeros_like(rows)
    else:
        bounds = tl.load(ptr + tl.minimum(rows, seqlen_q - 1).to(tl.int64) * stride)
        return tl.minimum(tl.maximum(bounds, 0), seqlen_k)


@triton.jit
def load_intervals(k_start, start_stride, k_end, end_stride, rows, seqlen_q, seqlen_k):
    """(first key, one past the last) of each row; (INT_MAX, 0) where that is no key."""
    start = load_bounds(k_start, start_stride, rows, seqlen_q, seqlen_k, 0)
    end = load_bounds(k_end, end_stride, rows, seqlen_q, seqlen_k, seqlen_k)
    empty = start >= end
    return tl.where(empty, INT_MAX, start), tl.where(empty, 0, end)


@triton.jit
def load_scores(ptr, strides, rows, cols, rows_left, cols_left):
    """A tile of bias or mask from `ptr` on; 0 outside the tensor."""
    inside = (rows < rows_left) & (cols < cols_left)
    return tl.load(ptr + rows * strides[0] + cols * strides[1], mask=inside, other=0)


@triton.jit
def attend(
    acc0, acc1, l_i, m_i,
    q0, q1, k, k_strides, v, v_strides, mask, mask_strides, bias, bias_strides,
    row, col, head, batch, k_start, k_end,
    seqlen_q, seqlen_k, diagonal_lo, diagonal_hi, scale, softcap, slope, threshold, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """One block of keys from `col` on. MASKED: some query may not see some key; CLEAN: NaN and Inf in v count as 0."""
    keys_left = seqlen_k - col
    k += tl.cast(col, tl.int64) * k_strides[0]
    v += tl.cast(col, tl.int64) * v_strides[0]
    k0 = load_columns(k, k_strides, keys_left, BLOCK_N, 0, D0, HEAD_DIM, MASKED)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        k1 = load_columns(k, k_strides, keys_left, BLOCK_N, D0, D1, HEAD_DIM, MASKED)
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)

    local_rows, local_cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    rows, cols = row + local_rows, col + local_cols
    MODIFIED: tl.constexpr = SOFTCAP or ALIBI or bias is not None
    factor = scale * LOG2E
    if MASKED:
        seen = visible(
            rows, cols, seqlen_k, diagonal_lo, diagonal_hi, k_start[:, None], k_end[:, None], HAS_LO, HAS_HI,
            HAS_START, HAS_END,
        )  # fmt: skip
        if mask is not None:
            tile = mask + tl.cast(col, tl.int64) * mask_strides[1]
            seen = seen & (load_scores(tile, mask_strides, local_rows, local_cols, seqlen_q - row, keys_left) != 0)
    if MODIFIED:
        if SOFTCAP:
            s, _ = softcap_scores(s, scale, softcap)
        else:
            s = s * factor
        factor = 1.0
        if bias is not None:
            tile = bias + tl.cast(col, tl.int64) * bias_strides[1]
            added = load_scores(tile, bias_strides, local_rows, local_cols, seqlen_q - row, keys_left)
            seen = seen & (added.to(tl.float32) != float("-inf"))
            s += bias_log2(added)
        if ALIBI:
            s -= slope * tl.abs(rows + (seqlen_k - seqlen_q) - cols).to(tl.float32)

    if MASKED:
        largest = tl.max(tl.where(seen, s, float("-inf")), 1)
    else:
        largest = tl.max(s, 1)
    # A factor of 0 must not turn the -inf of an empty row into NaN.
    m_new = tl.maximum(m_i, tl.where(largest == float("-inf"), float("-inf"), largest * factor))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - shift[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(dropout_keep(row, col, head, batch, threshold, seed, BLOCK_M, BLOCK_N), p, 0.0)
    v0 = load_columns(v, v_strides, keys_left, BLOCK_N, 0, E0, HEAD_DIM_V, MASKED)
    if CLEAN:
        v0 = finite_or_zero(v0)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision=PRECISION)
    if E1 > 0:
        v1 = load_columns(v, v_strides, keys_left, BLOCK_N, E0, E1, HEAD_DIM_V, MASKED)
        if CLEAN:
            v1 = finite_or_zero(v1)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision=PRECISION)
    return acc0, acc1, l_i, m_new


@triton.jit
def add_poison(
    acc0, acc1, v, v_strides, mask, mask_strides, bias, bias_strides, row, first, last, k_start, k_end,
    seqlen_q, seqlen_k, diagonal_lo, diagonal_hi,
    BLOCK_M: tl.constexpr, HEAD_DIM_V: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """Adds each NaN or Inf of v to the queries that see its key, and to no other: slow, exact, and hardly ever run."""
    local_rows = tl.arange(0, BLOCK_M)[:, None]
    rows = row + local_rows
    for col in range(first, last):
        key = v + tl.cast(col, tl.int64) * v_strides[0]
        v0 = load_columns(key, v_strides, 1, 1, 0, E0, HEAD_DIM_V, False).to(tl.float32)
        bad0 = (tl.abs(v0) < float("inf")) == 0
        found = tl.max(bad0.to(tl.int32))
        if E1 > 0:
            v1 = load_columns(key, v_strides, 1, 1, E0, E1, HEAD_DIM_V, False).to(tl.float32)
            bad1 = (tl.abs(v1) < float("inf")) == 0
            found = tl.maximum(found, tl.max(bad1.to(tl.int32)))
        if found > 0:
            seen = visible(
                rows, col, seqlen_k, diagonal_lo, diagonal_hi, k_start[:, None], k_end[:, None], HAS_LO, HAS_HI,
                HAS_START, HAS_END,
            )  # fmt: skip
            if mask is not None:
                tile = mask + tl.cast(col, tl.int64) * mask_strides[1]
                seen = seen & (load_scores(tile, mask_strides, local_rows, 0, seqlen_q - row, 1) != 0)
            if bias is not None:
                tile = bias + tl.cast(col, tl.int64) * bias_strides[1]
                added = load_scores(tile, bias_strides, local_rows, 0, seqlen_q - row, 1)
                seen = seen & (added.to(tl.float32) != float("-inf"))
            acc0 = tl.where(seen & bad0, acc0 + v0, acc0)
            if E1 > 0:
                acc1 = tl.where(seen & bad1, acc1 + v1, acc1)
    return acc0, acc1


@triton.jit(do_not_specialize=launch.SIZES)
def forward_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    out,           # [batch, num_heads, seqlen_q, head_dim_v]
    residual,      # like out, or None: what out lost in rounding
    lse,           # [batch, num_heads, seqlen_q], contiguous, or None
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous, or None: top, log2_total
    k_start,       # [batch, num_heads, seqlen_q] by strides, or None
    k_end,         # likewise
    mask,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, int8, or None
    bias,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, or None
    alibi_slopes,  # [batch, num_heads] by strides, or None
    sinks,         # [num_heads], or None
    softmax_scale,  # a number, or with LEARNED_SCALE [num_heads] by stride
    seed: tl.int64,
    q_strides, k_strides, v_strides, out_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, sink_stride, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    NEGATE: tl.constexpr, LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # 1. bounds
    HAS_START: tl.constexpr = k_start is not None or k_end is not None
    HAS_END: tl.constexpr = HAS_START
    ALIBI: tl.constexpr = alibi_slopes is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None  # any tile may hide a key
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
    if HAS_HI:
        m_block = num_m - 1 - m_block  # causal: longest first
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    row = m_block * BLOCK_M
    b, h, hk, m = batch.to(tl.int64), head.to(tl.int64), (head // group_size).to(tl.int64), row.to(tl.int64)
    rows = row + tl.arange(0, BLOCK_M)
    if HAS_START:
        if k_start is not None:
            k_start += b * start_strides[0] + h * start_strides[1]
        if k_end is not None:
            k_end += b * end_strides[0] + h * end_strides[1]
        first, last = load_intervals(k_start, start_strides[2], k_end, end_strides[2], rows, seqlen_q, seqlen_k)
    else:
        first, last = rows, rows  # not used
    lo, hi, common_lo, common_hi = visited_keys(
        row, tl.minimum(row + BLOCK_M, seqlen_q) - 1, seqlen_k, diagonal_lo, diagonal_hi, first, last, HAS_LO, HAS_HI,
        HAS_START, HAS_END,
    )  # fmt: skip
    lo = lo // BLOCK_N * BLOCK_N
    common_lo = tl.maximum(tl.cdiv(common_lo, BLOCK_N) * BLOCK_N, lo)
    common_hi = tl.maximum(common_hi, 0) // BLOCK_N * BLOCK_N
    if EVERYWHERE:
        common_hi = common_lo
    if common_hi <= common_lo:
        common_lo, common_hi = hi, hi

    # 2. q and where the rest is
    q += b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
    k += b * k_strides[0] + hk * k_strides[1]
    v += b * v_strides[0] + hk * v_strides[1]
    q_tile, k_tile, v_tile = (widen((q_strides[2], q_strides[3]), WIDE), widen((k_strides[2], k_strides[3]), WIDE),
                              widen((v_strides[2], v_strides[3]), WIDE))  # fmt: skip
    mask_tile, bias_tile = (mask_strides[2], mask_strides[3]), (bias_strides[2], bias_strides[3])
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1] + m * mask_strides[2]
        mask_tile = widen(mask_tile, WIDE)
    if bias is not None:
        bias += b * bias_strides[0] + h * bias_strides[1] + m * bias_strides[2]
        bias_tile = widen(bias_tile, WIDE)
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi_slopes + b * slope_strides[0] + h * slope_strides[1]).to(tl.float32) * LOG2E
    q0 = load_columns(q, q_tile, seqlen_q - row, BLOCK_M, 0, D0, HEAD_DIM, True)
    q1 = 0.0
    if D1 > 0:
        q1 = load_columns(q, q_tile, seqlen_q - row, BLOCK_M, D0, D1, HEAD_DIM, True)
    scale = softmax_scale
    if LEARNED_SCALE:
        scale = tl.load(softmax_scale + h * scale_stride).to(tl.float32)
    if LEARNED_SCALE or NEGATE:  # the maximum over keys needs a factor that is not negative
        q0 = tl.where(scale < 0.0, -q0, q0)
        if D1 > 0:
            q1 = tl.where(scale < 0.0, -q1, q1)
        scale = tl.abs(scale)

    # 3. loops
    acc0, acc1 = tl.zeros([BLOCK_M, E0], tl.float32), 0.0
    if E1 > 0:
        acc1 = tl.zeros([BLOCK_M, E1], tl.float32)
    l_i, m_i = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    blocks_before = (common_lo - lo) // BLOCK_N
    if common_lo == common_hi:
        blocks_before = tl.cdiv(hi - lo, BLOCK_N)
    blocks_after = tl.cdiv(hi - common_hi, BLOCK_N)
    for block in tl.range(0, blocks_before + blocks_after):
        col = tl.where(block < blocks_before, lo + block * BLOCK_N, common_hi + (block - blocks_before) * BLOCK_N)
        acc0, acc1, l_i, m_i = attend(
            acc0, acc1, l_i, m_i, q0, q1, k, k_tile, v, v_tile, mask, mask_tile, bias, bias_tile, row, col, head, batch,
            first, last, seqlen_q, seqlen_k, diagonal_lo, diagonal_hi, scale, softcap, slope, threshold, seed,
            BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, HAS_LO, HAS_HI, HAS_START, HAS_END, SOFTCAP, ALIBI,
            DROPOUT, PRECISION, True, False,
        )  # fmt: skip
    if not EVERYWHERE:
        for col in tl.range(common_lo, common_hi, BLOCK_N):
            acc0, acc1, l_i, m_i = attend(
                acc0, acc1, l_i, m_i, q0, q1, k, k_tile, v, v_tile, mask, mask_tile, bias, bias_tile, row, col, head,
                batch, first, last, seqlen_q, seqlen_k, diagonal_lo, diagonal_hi, scale, softcap, slope, threshold,
                seed, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, HAS_LO, HAS_HI, HAS_START, HAS_END,
                SOFTCAP, ALIBI, DROPOUT, PRECISION, False, False,
            )  # fmt: skip
    if EVERYWHERE or HAS_LO or HAS_HI or HAS_START:
        spoiled = tl.max(tl.where(acc0 != acc0, 1, 0))
        if E1 > 0:
            spoiled = tl.maximum(spoiled, tl.max(tl.where(acc1 != acc1, 1, 0)))
        if spoiled > 0:  # a weight of 0 times NaN or Inf behind a mask, or a NaN that is seen: once more, with care
            acc0 = tl.zeros([BLOCK_M, E0], tl.float32)
            if E1 > 0:
                acc1 = tl.zeros([BLOCK_M, E1], tl.float32)
            l_i, m_i = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
            for block in tl.range(0, blocks_before + blocks_after + (common_hi - common_lo) // BLOCK_N):
                # The same order, so that the bits of the other rows stay.
                col = tl.where(block < blocks_before, lo + block * BLOCK_N,
                               common_hi + (block - blocks_before) * BLOCK_N)  # fmt: skip
                behind = block - blocks_before - blocks_after
                col = tl.where(behind >= 0, common_lo + behind * BLOCK_N, col)
                acc0, acc1, l_i, m_i = attend(
                    acc0, acc1, l_i, m_i, q0, q1, k, k_tile, v, v_tile, mask, mask_tile, bias, bias_tile, row, col,
                    head, batch, first, last, seqlen_q, seqlen_k, diagonal_lo, diagonal_hi, scale, softcap, slope,
                    threshold, seed, BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, HAS_LO, HAS_HI,
                    HAS_START, HAS_END, SOFTCAP, ALIBI, DROPOUT, PRECISION, True, True,
                )  # fmt: skip
            acc0, acc1 = add_poison(
                acc0, acc1, v, v_tile, mask, mask_tile, bias, bias_tile, row, lo, hi, first, last, seqlen_q, seqlen_k,
                diagonal_lo, diagonal_hi, BLOCK_M, HEAD_DIM_V, E0, E1, HAS_LO, HAS_HI, HAS_START, HAS_END,
            )  # fmt: skip

    # 4. epilogue
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + h * sink_stride).to(tl.float32) * LOG2E
    factor, top, log2_total = normalizer(m_i, l_i, sink)
    if DROPOUT:
        factor *= keep_factor
    statistics = (b * num_heads + h) * seqlen_q + rows
    if lse is not None:
        tl.store(lse + statistics, natural_lse(top, log2_total), mask=rows < seqlen_q)
    if lse_parts is not None:
        tl.store(lse_parts + 2 * statistics, top, mask=rows < seqlen_q)
        tl.store(lse_parts + 2 * statistics + 1, log2_total, mask=rows < seqlen_q)
    offset = b * out_strides[0] + h * out_strides[1] + m * out_strides[2]
    out_tile = widen((out_strides[2], out_strides[3]), WIDE)
    acc0 *= factor[:, None]
    store_columns(out + offset, out_tile, acc0, seqlen_q - row, BLOCK_M, 0, E0, HEAD_DIM_V)
    if E1 > 0:
        acc1 *= factor[:, None]
        store_columns(out + offset, out_tile, acc1, seqlen_q - row, BLOCK_M, E0, E1, HEAD_DIM_V)
    if residual is not None:
        lost0 = acc0 - acc0.to(out.dtype.element_ty).to(tl.float32)
        store_columns(residual + offset, out_tile, lost0, seqlen_q - row, BLOCK_M, 0, E0, HEAD_DIM_V)
        if E1 > 0:
            lost1 = acc1 - acc1.to(out.dtype.element_ty).to(tl.float32)
            store_columns(residual + offset, out_tile, lost1, seqlen_q - row, BLOCK_M, E0, E1, HEAD_DIM_V)


def forward(problem, q, k, v, terms, for_backward: bool = False):
    """(out, lse or None, lse_parts or None, residual or None); `out` follows q's memory order.

    lse_parts, residual: with for_backward, what `backward.backward` wants (see `forward_kernel`).
    """
    out = launch.empty_out(problem, q)
    shape = (problem.batch, problem.num_heads, problem.seqlen_q)
    lse = q.new_empty(shape, dtype=torch.float32) if problem.lse else None
    lse_parts = q.new_empty((*shape, 2), dtype=torch.float32) if for_backward else None
    residual = torch.empty_like(out) if for_backward and q.element_size() == 2 else None
    if out.numel() == 0:
        return out, lse, lse_parts, residual
    extras = terms[4:7] + terms[8:11]  # k_start, k_end, mask, bias, alibi_slopes, sinks
    tensors = (q, k, v, out, residual, lse, lse_parts, *extras, terms.softmax_scale, terms.seed or 0)
    key = (
        "prefill", problem, for_backward, q.get_device(), q.stride(), k.stride(), v.stride(),
        launch.alignment(q, k, v, *extras), launch.describe(*extras), terms.softcap, terms.diagonal_lo,
        terms.diagonal_hi, terms.dropout_p, launch.describe_scale(terms.softmax_scale), launch.precision(problem),
    )  # fmt: skip
    launch.run(key, tensors, lambda: _plan(problem, q, k, v, out, terms))
    return out, lse, lse_parts, residual


def _plan(problem, q, k, v, out, terms):
    device = launch.device_facts(q.get_device())
    tiles = config.prefill(problem, device)
    arguments, constexprs = launch.score_arguments(problem, q, k, v, out, terms)
    constexprs |= {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N}
    grid = (triton.cdiv(problem.seqlen_q, tiles.BLOCK_M) * problem.num_heads * problem.batch,)
    return forward_kernel, grid, arguments, constexprs, tiles.options(device)
