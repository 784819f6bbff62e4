"""Forward pass: a program takes BLOCK_M queries of one head through the keys that they see, or that a block mask lists.

FlashAttention-2 (Dao, arXiv 2307.08691), with masks as ranges of keys or lists of blocks:
what no query sees is not visited.
"""

import triton
import triton.language as tl

from . import launch, lists
from .attend import attend_lists, attend_range, store_rows
from .lists import open_lists
from .tile import LOG2E, key_range, limits_of, load_both, load_scale, load_slope, row_bounds, scores_of, widen


@triton.jit(do_not_specialize=[*launch.SIZES, "num_bitmaps"])
def forward_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    out,           # [batch, num_heads, seqlen_q, head_dim_v]
    out_exact,     # likewise, float32 and contiguous, or None: out before it was rounded to 16 bits
    lse,           # [batch, num_heads, seqlen_q], contiguous, or None
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous, or None: top, log2_total (`tile.normalizer`)
    k_start,       # [batch, num_heads, seqlen_q] by strides, or None
    k_end,         # likewise
    mask,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, bool, or None
    bias,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, or None
    alibi_slopes,  # [batch, num_heads] by strides, or None
    softmax_scale,  # a number, or with LEARNED_SCALE [num_heads] by stride
    seed: tl.int64,
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of a block mask (`lists.of`), or None
    sinks,         # [num_heads], or None
    k_descriptor,  # tensor descriptor of k in blocks of [1, 1, BLOCK_N, D0], or None
    v_descriptor,  # likewise
    list_strides, num_bitmaps, sink_stride,
    q_strides, k_strides, v_strides, out_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    ANY_SIGN: tl.constexpr, LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    RELOAD: tl.constexpr,
):  # fmt: skip
    # 1. bounds
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    BOUNDED: tl.constexpr = HAS_FIRST or HAS_HI or k_end is not None
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None  # any tile may hide a key
    TILE: tl.constexpr = (BLOCK_M, BLOCK_N, RELOAD)
    DIMS: tl.constexpr = (HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = (HAS_FIRST, SOFTCAP, alibi_slopes is not None, DROPOUT, ANY_SIGN, PRECISION)
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
    if HAS_HI and counts is None:
        m_block = num_m - 1 - m_block  # causal: longest first
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    row, head_k = m_block * BLOCK_M, head // group_size
    b, h, hk, m = batch.to(tl.int64), head.to(tl.int64), head_k.to(tl.int64), row.to(tl.int64)
    rows, rows_left = row + tl.arange(0, BLOCK_M), seqlen_q - row
    limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
    bounds = row_bounds(rows, limits, seqlen_q, seqlen_k, HAS_LO, HAS_HI)

    # 2. q, and where the rest is
    q += b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
    k += b * k_strides[0] + hk * k_strides[1]
    v += b * v_strides[0] + hk * v_strides[1]
    keys = (k, widen(k_strides, WIDE), k_descriptor, v, widen(v_strides, WIDE), v_descriptor)
    place = (batch, head_k, head, rows[:, None], tl.arange(0, BLOCK_M)[:, None], rows_left)
    scores = scores_of(mask, mask_strides, bias, bias_strides, b, h, m, WIDE)
    of_q = (q, widen(q_strides, WIDE), rows_left)
    if not RELOAD:
        of_q = load_both(q, widen(q_strides, WIDE), rows_left, BLOCK_M, D0, D1, HEAD_DIM)
    scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
    slope = load_slope(alibi_slopes, slope_strides, b, h)
    numbers = (seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed)

    # 3. loops
    if counts is None:
        visited = key_range(bounds, seqlen_k, BLOCK_N, HAS_FIRST, BOUNDED, EVERYWHERE)
        state = attend_range(
            of_q, keys, place, bounds, scores, numbers, visited, TILE, DIMS, FLAGS, EVERYWHERE, EVERYWHERE or BOUNDED
        )
    else:
        visits = open_lists(
            (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b, h, row,
            seqlen_k, BLOCK_Q, BLOCK_K, EVERYWHERE or BOUNDED,
        )  # fmt: skip
        state = attend_lists(
            of_q, keys, place, bounds, scores, numbers, visits, BLOCK_Q, BLOCK_K, TILE, DIMS, FLAGS,
            EVERYWHERE or BOUNDED,
        )  # fmt: skip

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
    """(out, lse or None, saved): saved is what `backward.backward` wants, out in float32 and lse_parts."""
    out, lse, *saved = _forward(problem, q, k, v, terms, True)
    return out, lse, saved


def _forward(problem, q, k, v, terms, for_backward: bool):
    """(out, lse or None, out in float32, lse_parts), the last two for a backward pass."""
    out, lse, out_exact, lse_parts = launch.empty_results(problem, q, for_backward)
    if out.numel():
        of_mask = lists.of(terms.block_mask)
        extras = (terms.k_start, terms.k_end, terms.mask, terms.bias, terms.alibi_slopes, terms.softmax_scale)
        of_blocks = of_mask.tensors if of_mask else lists.NOTHING
        tensors = (q, k, v, out, out_exact, lse, lse_parts, *extras, terms.seed or 0, *of_blocks, terms.sinks)
        key = (for_backward, of_mask and of_mask.key, *launch.call_key(problem, q, k, v, terms))

        def plan():
            device = launch.device_facts(q.get_device())

            def plan_with(tiles):
                return _plan(problem, q, k, v, out, terms, of_mask, device, tiles)

            return launch.choose("prefill", problem, device, tensors, plan_with, of_mask and of_mask.block_size)

        launch.run(launch.of(key), "prefill", tensors, plan)
    return out, lse, out if out_exact is None else out_exact, lse_parts


def _plan(problem, q, k, v, out, terms, of_mask, device, tiles) -> launch.Plan:
    arguments, constexprs = launch.score_arguments(problem, q, k, v, out, terms)
    constexprs |= lists.constexprs(of_mask, tiles)
    constexprs |= {"ANY_SIGN": launch.is_of_any_sign(terms.softmax_scale), "RELOAD": tiles.reload}
    of_blocks = (of_mask.strides, of_mask.num_bitmaps) if of_mask else (None, 0)
    programs = triton.cdiv(problem.seqlen_q, tiles.BLOCK_M) * problem.num_heads * problem.batch
    return launch.Plan(
        forward_kernel, programs, (*of_blocks, *launch.strides(terms.sinks, 1), *arguments), constexprs,
        tiles.options(device), launch.descriptors(device, k, v, tiles.BLOCK_N, constexprs),
    )  # fmt: skip
