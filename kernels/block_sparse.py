"""Forward and backward over the lists of a `BlockMask`: what no list names is not visited.

As prefill.py and backward.py, but the next tile comes from a list: full blocks run the loop without masks, partial blocks the
one with masks, which reads their bitmap, one bit a pair. The gradients of k and v go through the lists of
`BlockMask.transpose()`. Bounds that the call has besides (causal, window, intervals) are applied in the loop with masks.
"""

import triton
import triton.language as tl

from . import config, launch, lists, tuning
from .lists import masked_block, open_lists, unmasked_block, unmasked_count
from .prefill import add_poison, attend, fresh_state, is_spoiled, positive_scale, store_rows
from .tile import LOG2E, load_columns, load_scale, load_slope, row_bounds, widen


@triton.jit(do_not_specialize=[*launch.SIZES, "num_bitmaps"])
def forward_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    out,           # [batch, num_heads, seqlen_q, head_dim_v]
    out_exact,     # likewise, float32 and contiguous, or None: out before it was rounded to 16 bits
    lse,           # [batch, num_heads, seqlen_q], contiguous, or None
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous, or None
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of the block mask (`lists.of`)
    k_start, k_end, alibi_slopes, softmax_scale,  # as in prefill.forward_kernel
    seed: tl.int64,
    sinks,         # [num_heads], or None
    k_descriptor, v_descriptor,  # as in prefill.forward_kernel
    list_strides, num_bitmaps, sink_stride,
    q_strides, k_strides, v_strides, out_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    MOVE_SIGN: tl.constexpr, LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # 1. bounds and lists
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    TILE: tl.constexpr = (BLOCK_M, BLOCK_N)
    DIMS: tl.constexpr = (HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = (HAS_FIRST, SOFTCAP, alibi_slopes is not None, DROPOUT, LEARNED_SCALE, PRECISION)
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    num_m, num_blocks = tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_k, BLOCK_K)
    row = tl.program_id(0) % num_m * BLOCK_M
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    head_k = head // group_size
    b, h, hk, m = batch.to(tl.int64), head.to(tl.int64), head_k.to(tl.int64), row.to(tl.int64)
    rows, rows_left = row + tl.arange(0, BLOCK_M), seqlen_q - row
    if k_start is not None:
        k_start += b * start_strides[0] + h * start_strides[1]
    if k_end is not None:
        k_end += b * end_strides[0] + h * end_strides[1]
    bounds = row_bounds(
        rows, k_start, start_strides[2], k_end, end_strides[2], seqlen_q, seqlen_k, diagonal_lo, diagonal_hi,
        HAS_LO, HAS_HI,
    )  # fmt: skip
    opened = open_lists((counts, indices, bitmap_ids, full_counts, full_indices), list_strides, b, h, m // BLOCK_Q)
    unmasked = unmasked_count(opened, num_blocks, seqlen_k % BLOCK_K != 0, BOUNDED)
    masked = opened[0] + opened[3] - unmasked
    bitmaps += row % BLOCK_Q * (BLOCK_K // 8)

    # 2. q, and where the rest is
    q += b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
    k += b * k_strides[0] + hk * k_strides[1]
    v += b * v_strides[0] + hk * v_strides[1]
    keys = (k, widen(k_strides, WIDE), k_descriptor, v, widen(v_strides, WIDE), v_descriptor)
    place = (batch, head_k, head, rows[:, None], tl.arange(0, BLOCK_M)[:, None], rows_left)
    no_scores = (None, (0, 0), None, (0, 0), None)
    q0 = load_columns(q, widen(q_strides, WIDE), rows_left, BLOCK_M, 0, D0, HEAD_DIM, True)
    q1 = 0.0
    if D1 > 0:
        q1 = load_columns(q, widen(q_strides, WIDE), rows_left, BLOCK_M, D0, D1, HEAD_DIM, True)
    scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
    if LEARNED_SCALE or MOVE_SIGN:
        q0, q1, scale = positive_scale(scale, q0, q1, D1)
    slope = load_slope(alibi_slopes, slope_strides, b, h)
    numbers = (seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed)

    # 3. loops, as in prefill.forward_kernel
    state = fresh_state(BLOCK_M, DIMS)
    clean, again = False, True
    while again:
        if not BOUNDED:
            for step in tl.range(0, unmasked * STEPS):
                block = unmasked_block(step // STEPS, opened, num_blocks)
                state = attend(
                    state, q0, q1, keys, place, bounds, no_scores, numbers, block * BLOCK_K + step % STEPS * BLOCK_N,
                    clean, TILE, DIMS, FLAGS, False, False,
                )  # fmt: skip
        for step in tl.range(0, masked * STEPS):
            block, bitmap, limit = masked_block(step // STEPS, opened, unmasked, num_blocks, num_bitmaps, BLOCK_K)
            bitmap_start = bitmaps + bitmap * (BLOCK_Q * BLOCK_K // 8) + step % STEPS * (BLOCK_N // 8)
            scores = (None, (0, 0), None, (0, 0), (bitmap_start, BLOCK_K // 8, limit))
            state = attend(
                state, q0, q1, keys, place, bounds, scores, numbers, block * BLOCK_K + step % STEPS * BLOCK_N, clean,
                TILE, DIMS, FLAGS, True, True,
            )  # fmt: skip
        again = is_spoiled(state[0], state[1], E1) & (clean == 0)
        if again:
            clean = True
            state = fresh_state(BLOCK_M, DIMS)
    if clean:
        acc0, acc1 = state[0], state[1]
        for index in range(0, masked):
            block, bitmap, limit = masked_block(index, opened, unmasked, num_blocks, num_bitmaps, BLOCK_K)
            bitmap_start = bitmaps + bitmap * (BLOCK_Q * BLOCK_K // 8)
            scores = (None, (0, 0), None, (0, 0), (bitmap_start, BLOCK_K // 8, limit))
            lo = block * BLOCK_K
            hi = tl.minimum(lo + BLOCK_K, seqlen_k)
            acc0, acc1 = add_poison(acc0, acc1, keys, place, bounds, scores, lo, hi, DIMS, HAS_FIRST)
        state = (acc0, acc1, state[2], state[3])

    # 4. epilogue
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + h * sink_stride).to(tl.float32) * LOG2E
    out += b * out_strides[0] + h * out_strides[1] + m * out_strides[2]
    statistics = (b * num_heads + h) * seqlen_q + rows
    store_rows(
        state, sink, out, widen(out_strides, WIDE), out_exact, lse, lse_parts, statistics, rows < seqlen_q, rows_left,
        keep_factor, BLOCK_M, DIMS, DROPOUT,
    )  # fmt: skip


def forward(problem, q, k, v, terms):
    """Forward pass without gradients (kernel signature of dispatch.Row)."""
    return _forward(problem, q, k, v, terms, False)[:2]


def forward_for_backward(problem, q, k, v, terms):
    """(out, lse or None, saved for the backward pass), as in prefill.py."""
    out, lse, *saved = _forward(problem, q, k, v, terms, True)
    return out, lse, saved


def _forward(problem, q, k, v, terms, for_backward: bool):
    out, lse, out_exact, lse_parts = launch.empty_results(problem, q, for_backward)
    if out.numel():
        of_mask = lists.of(terms.block_mask)
        extras = (terms.k_start, terms.k_end, terms.alibi_slopes, terms.softmax_scale, terms.seed or 0, terms.sinks)
        tensors = (q, k, v, out, out_exact, lse, lse_parts, *of_mask.tensors, *extras)
        key = ("block_sparse", for_backward, *lists.key(of_mask), *launch.call_key(problem, q, k, v, terms))
        launch.run(key, tensors, lambda: _plan(problem, q, k, v, out, terms, of_mask))
    return out, lse, out if out_exact is None else out_exact, lse_parts


def _plan(problem, q, k, v, out, terms, of_mask) -> launch.Plan:
    device = launch.device_facts(q.get_device())
    tiles = config.within(tuning.tiles("prefill", problem, device), of_mask.block_size)
    arguments, constexprs = launch.score_arguments(problem, q, k, v, out, terms)
    constexprs |= lists.constexprs(of_mask, tiles)
    constexprs["MOVE_SIGN"] = not problem.learned_scale and terms.softmax_scale <= 0.0
    arguments = (of_mask.strides, of_mask.num_bitmaps, *launch.strides(terms.sinks, 1), *arguments)
    programs = triton.cdiv(problem.seqlen_q, tiles.BLOCK_M) * problem.num_heads * problem.batch
    return launch.Plan(
        forward_kernel, programs, arguments, constexprs, tiles.options(device),
        launch.descriptors(device, k, v, tiles.BLOCK_N, constexprs),
    )  # fmt: skip
