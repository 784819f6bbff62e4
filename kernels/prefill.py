"""Forward pass: a program takes BLOCK_M queries of one head through the keys that they see.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867), tiled as in FlashAttention-2 (Dao, arXiv 2307.08691). Key blocks
in which every query sees every key run a loop without masks; the others, at the ends of the range, run a second one.
"""

import torch
import triton
import triton.language as tl

from . import config, launch
from .tile import (
    LOG2E,
    bias_log2,
    dropout_keep,
    finite_or,
    key_range,
    load_columns,
    natural_lse,
    normalizer,
    row_bounds,
    softcap_scores,
    store_columns,
    visible,
    widen,
)


@triton.jit
def load_scores(ptr, strides, rows, cols, rows_left, cols_left):
    """A tile of bias or mask from `ptr` on; 0 outside the tensor."""
    inside = (rows < rows_left) & (cols < cols_left)
    return tl.load(ptr + rows * strides[0] + cols * strides[1], mask=inside, other=0)


@triton.jit
def attend(
    acc0, acc1, l_i, m_i,
    q0, q1, k, k_strides, k_descriptor, v, v_strides, v_descriptor, mask, mask_strides, bias, bias_strides,
    row, col, head, head_k, batch, first, last,
    seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, HIDES: tl.constexpr, clean,
):  # fmt: skip
    """One block of keys from `col` on. MASKED: some query may not see some key. HIDES: NaN or Inf may be there; it is 0 if `clean`."""
    keys_left = seqlen_k - col
    if k_descriptor is not None:
        k0 = k_descriptor.load([batch, head_k, tl.cast(col, tl.int32), 0]).reshape([BLOCK_N, D0])
    else:
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
        seen = visible(cols, first[:, None], last[:, None], HAS_FIRST)
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
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(dropout_keep(row, col, head, batch, threshold, seed, BLOCK_M, BLOCK_N), p, 0.0)
    if k_descriptor is not None:
        v0 = v_descriptor.load([batch, head_k, tl.cast(col, tl.int32), 0]).reshape([BLOCK_N, E0])
    else:
        v0 = load_columns(v, v_strides, keys_left, BLOCK_N, 0, E0, HEAD_DIM_V, MASKED)
    if HIDES:
        v0 = finite_or(v0, clean)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision=PRECISION)
    if E1 > 0:
        v1 = load_columns(v, v_strides, keys_left, BLOCK_N, E0, E1, HEAD_DIM_V, MASKED)
        if HIDES:
            v1 = finite_or(v1, clean)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision=PRECISION)
    return acc0, acc1, l_i, m_new


@triton.jit
def add_poison(
    acc0, acc1, v, v_strides, mask, mask_strides, bias, bias_strides, row, lo, hi, first, last, seqlen_q,
    BLOCK_M: tl.constexpr, HEAD_DIM_V: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """Adds each NaN or Inf of v to the queries that see its key, and to no other: slow, exact, and hardly ever run."""
    local_rows = tl.arange(0, BLOCK_M)[:, None]
    rows = row + local_rows
    for col in range(lo, hi):
        key = v + tl.cast(col, tl.int64) * v_strides[0]
        v0 = load_columns(key, v_strides, 1, 1, 0, E0, HEAD_DIM_V, False).to(tl.float32)
        bad0 = (tl.abs(v0) < float("inf")) == 0
        found = tl.max(bad0.to(tl.int32))
        if E1 > 0:
            v1 = load_columns(key, v_strides, 1, 1, E0, E1, HEAD_DIM_V, False).to(tl.float32)
            bad1 = (tl.abs(v1) < float("inf")) == 0
            found = tl.maximum(found, tl.max(bad1.to(tl.int32)))
        if found > 0:
            seen = visible(col, first[:, None], last[:, None], HAS_FIRST)
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
    lse,           # [batch, num_heads, seqlen_q], contiguous, or None
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous, or None: top, log2_total
    k_start,       # [batch, num_heads, seqlen_q] by strides, or None
    k_end,         # likewise
    mask,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, int8, or None
    bias,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, or None
    alibi_slopes,  # [batch, num_heads] by strides, or None
    softmax_scale,  # a number, or with LEARNED_SCALE [num_heads] by stride
    seed: tl.int64,
    sinks,         # [num_heads], or None
    k_descriptor,  # tensor descriptor of k in blocks of [1, 1, BLOCK_N, D0], or None
    v_descriptor,  # likewise
    sink_stride,
    q_strides, k_strides, v_strides, out_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    MOVE_SIGN: tl.constexpr, LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # 1. bounds
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    ALIBI: tl.constexpr = alibi_slopes is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None  # any tile may hide a key
    HIDES: tl.constexpr = EVERYWHERE or BOUNDED
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
    if HAS_HI:
        m_block = num_m - 1 - m_block  # causal: longest first
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    row = m_block * BLOCK_M
    head_k = head // group_size
    b, h, hk, m = batch.to(tl.int64), head.to(tl.int64), head_k.to(tl.int64), row.to(tl.int64)
    rows = row + tl.arange(0, BLOCK_M)
    if k_start is not None:
        k_start += b * start_strides[0] + h * start_strides[1]
    if k_end is not None:
        k_end += b * end_strides[0] + h * end_strides[1]
    first, last = row_bounds(
        rows, k_start, start_strides[2], k_end, end_strides[2], seqlen_q, seqlen_k, diagonal_lo, diagonal_hi,
        HAS_LO, HAS_HI,
    )  # fmt: skip
    lo, hi, common_lo, common_hi = key_range(first, last, seqlen_k, BLOCK_N, HAS_FIRST, BOUNDED, EVERYWHERE)

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
    if LEARNED_SCALE or MOVE_SIGN:  # the online maximum needs a positive factor
        sign = tl.where(scale > 0.0, 1.0, tl.where(scale < 0.0, -1.0, scale * 0.0))
        q0 = (q0 * sign).to(q0.dtype)
        if D1 > 0:
            q1 = (q1 * sign).to(q1.dtype)
        scale = tl.where(scale == 0.0, 1.0, tl.abs(scale))

    # 3. loops
    blocks_before = tl.cdiv(common_lo - lo, BLOCK_N)
    blocks = blocks_before + tl.cdiv(hi - common_hi, BLOCK_N)
    acc0, acc1 = tl.zeros([BLOCK_M, E0], tl.float32), 0.0
    if E1 > 0:
        acc1 = tl.zeros([BLOCK_M, E1], tl.float32)
    l_i, m_i = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    clean, again = False, True
    while again:
        if not EVERYWHERE:
            for col in tl.range(common_lo, common_hi, BLOCK_N):
                acc0, acc1, l_i, m_i = attend(
                    acc0, acc1, l_i, m_i, q0, q1, k, k_tile, k_descriptor, v, v_tile, v_descriptor, mask, mask_tile, bias,
                bias_tile, row, col, head, head_k, batch, first, last, seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed, BLOCK_M,
                    BLOCK_N, HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, HAS_FIRST, SOFTCAP, ALIBI, DROPOUT, PRECISION,
                    False, False, clean,
                )  # fmt: skip
        for block in tl.range(0, blocks):
            col = tl.where(block < blocks_before, lo + block * BLOCK_N, common_hi + (block - blocks_before) * BLOCK_N)
            acc0, acc1, l_i, m_i = attend(
                acc0, acc1, l_i, m_i, q0, q1, k, k_tile, k_descriptor, v, v_tile, v_descriptor, mask, mask_tile, bias,
                bias_tile, row, col, head, head_k, batch, first, last, seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed, BLOCK_M, BLOCK_N,
                HEAD_DIM, HEAD_DIM_V, D0, D1, E0, E1, HAS_FIRST, SOFTCAP, ALIBI, DROPOUT, PRECISION,
                True, HIDES, clean,
            )  # fmt: skip
        again = False
        if HIDES:
            spoiled = tl.max(tl.where(acc0 != acc0, 1, 0))
            if E1 > 0:
                spoiled = tl.maximum(spoiled, tl.max(tl.where(acc1 != acc1, 1, 0)))
            again = (spoiled > 0) & (clean == 0)
            if again:
                clean = True
                acc0 = tl.zeros([BLOCK_M, E0], tl.float32)
                if E1 > 0:
                    acc1 = tl.zeros([BLOCK_M, E1], tl.float32)
                l_i, m_i = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HIDES:
        if clean:
            acc0, acc1 = add_poison(
                acc0, acc1, v, v_tile, mask, mask_tile, bias, bias_tile, row, lo, hi, first, last, seqlen_q, BLOCK_M, HEAD_DIM_V, E0, E1, HAS_FIRST,
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


def forward(problem, q, k, v, terms):
    """Forward pass without gradients (kernel signature of dispatch.Row)."""
    return _forward(problem, q, k, v, terms, False)[:2]


def forward_for_backward(problem, q, k, v, terms):
    """(out, lse or None, saved): saved is what `backward.backward` wants, out and lse_parts (see `forward_kernel`)."""
    out, lse, lse_parts = _forward(problem, q, k, v, terms, True)
    return out, lse, (out, lse_parts)


def _forward(problem, q, k, v, terms, for_backward: bool):
    """(out, lse, lse_parts), None where not needed; `out` follows q's memory order."""
    out = launch.empty_out(problem, q)
    shape = (problem.batch, problem.num_heads, problem.seqlen_q)
    lse = q.new_empty(shape, dtype=torch.float32) if problem.lse else None
    lse_parts = q.new_empty((*shape, 2), dtype=torch.float32) if for_backward else None
    if out.numel() == 0:
        return out, lse, lse_parts
    extras = (terms.k_start, terms.k_end, terms.mask, terms.bias, terms.alibi_slopes, terms.sinks)
    tensors = (
        q, k, v, out, lse, lse_parts, *extras[:5], terms.softmax_scale, terms.seed or 0, terms.sinks
    )  # fmt: skip
    key = (
        "prefill", problem, for_backward, q.get_device(), q.stride(), k.stride(), v.stride(),
        launch.alignment(q, k, v, *extras), launch.describe(*extras), terms.softcap, terms.diagonal_lo,
        terms.diagonal_hi, terms.dropout_p, launch.describe_scale(terms.softmax_scale), launch.precision(problem),
    )  # fmt: skip
    launch.run(key, tensors, lambda: _plan(problem, q, k, v, out, terms))
    return out, lse, lse_parts


def _plan(problem, q, k, v, out, terms):
    device = launch.device_facts(q.get_device())
    tiles = config.prefill(problem, device)
    arguments, constexprs = launch.score_arguments(problem, q, k, v, out, terms)
    move_sign = not constexprs["LEARNED_SCALE"] and terms.softmax_scale <= 0.0
    constexprs |= {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "MOVE_SIGN": move_sign}
    grid = (triton.cdiv(problem.seqlen_q, tiles.BLOCK_M) * problem.num_heads * problem.batch,)
    widths = [(constexprs["D0"], constexprs["D1"]), (constexprs["E0"], constexprs["E1"])]
    descriptors = launch.descriptors(device, k, v, tiles.BLOCK_N, widths)
    return forward_kernel, grid, (*launch.strides(terms.sinks, 1), *arguments), constexprs, tiles.options(device), descriptors
