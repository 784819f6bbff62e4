"""Forward pass of few queries: a program takes a range of keys and all queries of the heads that share them.

The rows of a tile are the queries of a whole group of heads, so that a key is read once. Where that makes too few programs,
the keys are split and `combine_kernel` puts the parts together (Flash-Decoding; Dao, Haziza, Massa, Sizov, 2023). How many
splits follows from heads, lengths and the device, never from the batch.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import launch, tuning
from .prefill import add_poison, attend, fresh_state, is_spoiled, positive_scale, store_rows
from .tile import LOG2E, key_range, load_columns, load_scale, load_slope, natural_lse, normalizer, row_bounds


@triton.jit(do_not_specialize=[*launch.SIZES, "keys_per_split", "num_splits", "batch_size"])
def decode_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    out,           # [batch, num_heads, seqlen_q, head_dim_v]; SPLIT: float32 [num_splits, ...] contiguous, not normalized
    lse,           # [batch, num_heads, seqlen_q], contiguous, or None
    maximum,       # SPLIT: [num_splits, batch, num_heads, seqlen_q], contiguous; else None
    total,         # likewise
    k_start, k_end, mask, bias, alibi_slopes, softmax_scale,  # as in prefill.forward_kernel
    seed: tl.int64,
    sinks,         # [num_heads], or None
    keys_per_split, num_splits, batch_size, sink_stride,
    q_strides, k_strides, v_strides, out_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    MOVE_SIGN: tl.constexpr, LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    # 1. bounds
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None
    HIDES: tl.constexpr = EVERYWHERE or BOUNDED
    TILE: tl.constexpr = (BLOCK_M, BLOCK_N)
    DIMS: tl.constexpr = (HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = (HAS_FIRST, SOFTCAP, alibi_slopes is not None, DROPOUT, LEARNED_SCALE, PRECISION)
    num_rows, num_heads_k = group_size * seqlen_q, num_heads // group_size
    num_m = tl.cdiv(num_rows, BLOCK_M)
    split, pid = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    row, pid = pid % num_m * BLOCK_M, pid // num_m
    head_k, batch = pid % num_heads_k, pid // num_heads_k
    b, hk = batch.to(tl.int64), head_k.to(tl.int64)
    local_rows, rows_left = tl.arange(0, BLOCK_M), num_rows - row
    packed = tl.minimum(row + local_rows, num_rows - 1)
    heads, rows = head_k * group_size + packed // seqlen_q, packed % seqlen_q
    h, m = heads.to(tl.int64), rows.to(tl.int64)
    if k_start is not None:
        k_start += b * start_strides[0] + h * start_strides[1]
    if k_end is not None:
        k_end += b * end_strides[0] + h * end_strides[1]
    bounds = row_bounds(
        rows, k_start, start_strides[2], k_end, end_strides[2], seqlen_q, seqlen_k, diagonal_lo, diagonal_hi,
        HAS_LO, HAS_HI,
    )  # fmt: skip
    lo, hi, common_lo, common_hi = key_range(bounds, seqlen_k, BLOCK_N, HAS_FIRST, BOUNDED, EVERYWHERE)
    lo, hi = tl.maximum(lo, split * keys_per_split), tl.minimum(hi, (split + 1) * keys_per_split)
    hi = tl.maximum(lo, hi)
    common_lo, common_hi = tl.maximum(tl.minimum(common_lo, hi), lo), tl.maximum(tl.minimum(common_hi, hi), lo)

    # 2. q, and where the rest is: pointers of [BLOCK_M, 1], since heads change within a tile
    q += (b * q_strides[0] + h * q_strides[1] + m * q_strides[2])[:, None]
    k += b * k_strides[0] + hk * k_strides[1]
    v += b * v_strides[0] + hk * v_strides[1]
    wide = tl.full([], 0, tl.int64) if WIDE else 0
    k_tile, v_tile = (k_strides[2] + wide, k_strides[3] + wide), (v_strides[2] + wide, v_strides[3] + wide)
    keys = (k, k_tile, None, v, v_tile, None)
    place = (batch, head_k, heads[:, None], rows[:, None], local_rows[:, None], rows_left)
    if mask is not None:
        mask += (b * mask_strides[0] + h * mask_strides[1] + m * mask_strides[2])[:, None]
    if bias is not None:
        bias += (b * bias_strides[0] + h * bias_strides[1] + m * bias_strides[2])[:, None]
    scores = (mask, (0, mask_strides[3] + wide), bias, (0, bias_strides[3] + wide), None)
    q0 = load_columns(q, (0, q_strides[3] + wide), rows_left, BLOCK_M, 0, D0, HEAD_DIM, True)
    q1 = 0.0
    if D1 > 0:
        q1 = load_columns(q, (0, q_strides[3] + wide), rows_left, BLOCK_M, D0, D1, HEAD_DIM, True)
    if LEARNED_SCALE:
        scale = load_scale(softmax_scale, scale_stride, h, True)[:, None]
    else:
        scale = softmax_scale
        if MOVE_SIGN:
            q0, q1, scale = positive_scale(scale, q0, q1, D1)
    slope = load_slope(alibi_slopes, slope_strides, b, h[:, None])
    numbers = (seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed)

    # 3. loops, as in prefill.forward_kernel
    blocks_before = tl.cdiv(common_lo - lo, BLOCK_N)
    blocks = blocks_before + tl.cdiv(hi - common_hi, BLOCK_N)
    state = fresh_state(BLOCK_M, DIMS)
    clean, again = False, True
    while again:
        if not EVERYWHERE:
            for col in tl.range(common_lo, common_hi, BLOCK_N):
                state = attend(
                    state, q0, q1, keys, place, bounds, scores, numbers, col, clean, TILE, DIMS, FLAGS, False, False
                )
        for block in tl.range(0, blocks):
            col = tl.where(block < blocks_before, lo + block * BLOCK_N, common_hi + (block - blocks_before) * BLOCK_N)
            state = attend(
                state, q0, q1, keys, place, bounds, scores, numbers, col, clean, TILE, DIMS, FLAGS, True, HIDES
            )
        again = False
        if HIDES:
            again = is_spoiled(state[0], state[1], E1) & (clean == 0)
            if again:
                clean = True
                state = fresh_state(BLOCK_M, DIMS)
    if HIDES:
        if clean:
            acc0, acc1 = add_poison(state[0], state[1], keys, place, bounds, scores, lo, hi, DIMS, HAS_FIRST)
            state = (acc0, acc1, state[2], state[3])

    # 4. epilogue
    inside = row + local_rows < num_rows
    statistics = (b * num_heads + h) * seqlen_q + m
    if SPLIT:
        statistics += tl.cast(split, tl.int64) * batch_size * num_heads * seqlen_q
        tl.store(maximum + statistics, state[3], mask=inside)
        tl.store(total + statistics, state[2], mask=inside)
        out += statistics[:, None] * HEAD_DIM_V
        cols = tl.arange(0, E0)[None, :]
        tl.store(out + cols, state[0], mask=inside[:, None] & (cols < HEAD_DIM_V))
        if E1 > 0:
            cols = E0 + tl.arange(0, E1)[None, :]
            tl.store(out + cols, state[1], mask=inside[:, None] & (cols < HEAD_DIM_V))
    else:
        sink = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if sinks is not None:
            sink = tl.load(sinks + h * sink_stride).to(tl.float32) * LOG2E
        out += (b * out_strides[0] + h * out_strides[1] + m * out_strides[2])[:, None]
        store_rows(
            state, sink, out, (0, out_strides[3] + wide), None, lse, None, statistics, inside, rows_left, keep_factor,
            BLOCK_M, DIMS, DROPOUT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_splits", "num_rows", "num_heads", "seqlen_q"])
def combine_kernel(
    parts,    # [num_splits, batch, num_heads, seqlen_q, head_dim_v], contiguous
    maximum,  # [num_splits, batch, num_heads, seqlen_q], contiguous, of scores in log2 units
    total,    # likewise, of 2^(score - maximum)
    sinks,    # [num_heads], or None
    out,      # [batch, num_heads, seqlen_q, head_dim_v]
    lse,      # [batch, num_heads, seqlen_q], contiguous, or None
    sink_stride, out_strides, keep_factor, num_splits, num_rows, num_heads, seqlen_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query: its splits weighted by what their softmax is worth in the whole."""
    r = tl.program_id(0).to(tl.int64)
    row, h, b = r % seqlen_q, r // seqlen_q % num_heads, r // seqlen_q // num_heads
    cols = tl.arange(0, BLOCK_D)
    m_i, l_i, acc = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_splits, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        inside = splits < num_splits
        index = splits.to(tl.int64) * num_rows + r
        m = tl.load(maximum + index, mask=inside, other=float("-inf"))
        l = tl.load(total + index, mask=inside, other=0.0)
        part = tl.load(
            parts + index[:, None] * HEAD_DIM_V + cols[None, :], mask=inside[:, None] & (cols < HEAD_DIM_V)[None, :],
            other=0.0,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(m))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight, alpha = tl.exp2(m - shift), tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(l * weight)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        m_i = m_new
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + h * sink_stride).to(tl.float32) * LOG2E
    factor, top, log2_total = normalizer(m_i, l_i, sink)
    if lse is not None:
        tl.store(lse + r + tl.arange(0, 1), natural_lse(top, log2_total))
    out += b * out_strides[0] + h * out_strides[1] + row * out_strides[2] + cols.to(tl.int64) * out_strides[3]
    tl.store(out, (acc * factor * keep_factor).to(out.dtype.element_ty), mask=cols < HEAD_DIM_V)


def forward(problem, q, k, v, terms):
    """Forward pass of few queries, without gradients (kernel signature of dispatch.Row)."""
    out, lse, *_ = launch.empty_results(problem, q, False)
    if not out.numel():
        return out, lse
    device = launch.device_facts(q.get_device())
    tiles = tuning.tiles("decode", problem, device)
    keys_per_split, num_splits = split_keys(problem, tiles, device)
    parts = maximum = total = None
    if num_splits > 1:
        rows = (num_splits, problem.batch, problem.num_heads, problem.seqlen_q)
        parts = torch.empty((*rows, problem.head_dim_v), dtype=torch.float32, device=q.device)
        maximum, total = (torch.empty(rows, dtype=torch.float32, device=q.device) for _ in range(2))
    extras = (terms.k_start, terms.k_end, terms.mask, terms.bias, terms.alibi_slopes)
    tensors = (
        q, k, v, out if parts is None else parts, lse, maximum, total, *extras, terms.softmax_scale, terms.seed or 0,
        terms.sinks,
    )  # fmt: skip
    key = ("decode", *launch.call_key(problem, q, k, v, terms))

    def plan(tiles):
        arguments, constexprs = launch.score_arguments(problem, q, k, v, out, terms)
        constexprs |= {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "SPLIT": num_splits > 1}
        constexprs["MOVE_SIGN"] = not problem.learned_scale and terms.softmax_scale <= 0.0
        arguments = (keys_per_split, num_splits, problem.batch, *launch.strides(terms.sinks, 1), *arguments)
        programs = num_splits * row_blocks(problem, tiles) * problem.num_heads_k * problem.batch
        return launch.Plan(decode_kernel, programs, arguments, constexprs, tiles.options(device))

    launch.run(key, tensors, lambda: launch.choose("decode", problem, device, tensors, plan))
    if num_splits > 1:
        _combine(problem, parts, maximum, total, terms, out, lse)
    return out, lse


def _combine(problem, parts, maximum, total, terms, out, lse) -> None:
    def plan():
        num_splits, *rows = maximum.shape
        arguments = (
            *launch.strides(terms.sinks, 1), out.stride(), 1.0 / (1.0 - terms.dropout_p), num_splits,
            rows[0] * rows[1] * rows[2], problem.num_heads, problem.seqlen_q,
        )  # fmt: skip
        constexprs = {"HEAD_DIM_V": problem.head_dim_v, "BLOCK_D": triton.next_power_of_2(problem.head_dim_v), "CHUNK": 16}
        options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        return launch.Plan(combine_kernel, out.numel() // problem.head_dim_v, arguments, constexprs, options)

    key = (
        "combine", problem, out.get_device(), out.stride(), terms.dropout_p, maximum.shape[0],
        launch.alignment(terms.sinks), launch.describe(terms.sinks),
    )  # fmt: skip
    launch.run(key, (parts, maximum, total, terms.sinks, out, lse), plan)


def row_blocks(problem, tiles) -> int:
    return triton.cdiv(problem.group_size * problem.seqlen_q, tiles.BLOCK_M)


@lru_cache(maxsize=4096)
def split_keys(problem, tiles, device) -> tuple[int, int]:
    """(keys in a split, number of splits): two programs a multiprocessor for one sequence, splits of 256 keys at least."""
    programs = row_blocks(problem, tiles) * problem.num_heads_k
    wanted = max(1, 2 * device.num_sms // programs)
    keys = max(256, triton.cdiv(problem.seqlen_k, wanted))
    keys = triton.cdiv(keys, tiles.BLOCK_N) * tiles.BLOCK_N
    return keys, max(1, triton.cdiv(problem.seqlen_k, keys))
