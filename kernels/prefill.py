"""Forward pass: a program takes BLOCK_M queries of one head through the keys that they see, or that a block mask lists.

FlashAttention-2 (Dao, arXiv 2307.08691), with masks as ranges of keys or lists of blocks:
what no query sees is not visited.
"""

import triton
import triton.language as tl

from .. import outputs
from . import launch, lists
from .attend import attend_lists, attend_range, store_rows
from .bounds import key_range, limits_of, row_bounds
from .lists import open_lists
from .rows import block_of_queries, lengths_of, row_number, rows_of
from .scores import flags_of, terms_of
from .softmax import load_sink
from .state import Dims, Keys, Place, Queries, Tile
from .tile import load_factor


@triton.jit(do_not_specialize=[*launch.SIZES, "num_bitmaps"])
def forward_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    out,           # [batch, num_heads, seqlen_q, head_dim_v]
    out_exact,     # likewise, float32 and contiguous, or None: out before it was rounded to 16 bits
    lse,           # [batch, num_heads, seqlen_q], contiguous, or None
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous, or None: top, log2_total (`softmax.normalizer`)
    k_start,       # [batch, num_heads, seqlen_q] by strides, or None
    k_end,         # likewise
    mask,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, bool, or None
    bias,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, or None
    alibi_slopes,  # [batch, num_heads] by strides, or None
    softmax_scale,  # a number, or with LEARNED_SCALE [num_heads] by stride
    seed: tl.int64,
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of a block mask (`lists.lists_of`), or None
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
    RELOAD: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    # 1. what is known when this is compiled; which queries, and the keys that they see
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, RELOAD, PRECISION)
    DIMS: tl.constexpr = Dims(HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = flags_of(
        k_start, k_end, mask, bias, alibi_slopes, counts, HAS_LO, HAS_HI, SOFTCAP, DROPOUT, ANY_SIGN, False
    )
    batch, head, m_block = block_of_queries(num_heads, seqlen_q, BLOCK_M, HAS_HI and counts is None)
    lengths = lengths_of(batch, seqlen_q, seqlen_k)
    row, head_k = m_block * BLOCK_M, head // group_size
    b, h, hk, m = batch.to(tl.int64), head.to(tl.int64), head_k.to(tl.int64), row.to(tl.int64)
    rows, left = row + tl.arange(0, BLOCK_M), lengths.queries - row
    limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
    bounds = row_bounds(rows, limits, lengths, HAS_LO, HAS_HI)

    # 2. q, and where the rest is
    of_q = rows_of(q, q_strides, b, h, m, WIDE)
    keys = Keys(
        rows_of(k, k_strides, b, hk, 0, WIDE), k_descriptor, rows_of(v, v_strides, b, hk, 0, WIDE), v_descriptor, None
    )  # fmt: skip
    place, positions, places = Place(batch, head_k, head), rows[:, None], tl.arange(0, BLOCK_M)[:, None]
    of_mask = rows_of(mask, mask_strides, b, h, m, WIDE)
    of_bias = rows_of(bias, bias_strides, b, h, m, WIDE)
    factor = load_factor(of_q, left, BLOCK_M, D0, D1, HEAD_DIM, RELOAD)
    terms = terms_of(
        of_mask, of_bias, alibi_slopes, slope_strides, softmax_scale, scale_stride, softcap, threshold, keep_factor,
        seed, b, h, LEARNED_SCALE,
    )  # fmt: skip
    queries = Queries(factor, place, positions, places, left, bounds)

    # 3. loops
    if counts is None:
        visited = key_range(bounds, lengths.keys, BLOCK_N, FLAGS)
        state = attend_range(queries, keys, terms, lengths, visited, TILE, DIMS, FLAGS, SPECIALIZE)
    else:
        EVERYWHERE: tl.constexpr = FLAGS.EVERYWHERE or FLAGS.BOUNDED
        visits = open_lists(
            (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b, h, row,
            lengths.keys, BLOCK_Q, BLOCK_K, EVERYWHERE,
        )  # fmt: skip
        state = attend_lists(
            queries, keys, terms, lengths, visits, BLOCK_Q, BLOCK_K, TILE, DIMS, FLAGS, EVERYWHERE
        )  # fmt: skip

    # 4. epilogue
    sink = float("-inf")
    if sinks is not None:
        sink = load_sink(sinks, sink_stride, h)
    of_out = rows_of(out, out_strides, b, h, m, WIDE)
    statistics = row_number(b, h, rows, num_heads, seqlen_q)
    store_rows(
        state, sink, of_out, out_exact, lse, lse_parts, statistics, rows < seqlen_q,
        left, keep_factor, BLOCK_M, DIMS, DROPOUT,
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
    exact = not outputs.ROUNDED_DELTA
    out, lse, out_exact, lse_parts = outputs.empty_results(problem, q, for_backward, exact=exact)
    if out.numel():
        of_mask = lists.lists_of(terms.block_mask)
        extras = (terms.k_start, terms.k_end, terms.mask, terms.bias, terms.alibi_slopes, terms.softmax_scale)
        of_blocks = of_mask.tensors if of_mask else lists.NOTHING
        tensors = (q, k, v, out, out_exact, lse, lse_parts, *extras, terms.seed or 0, *of_blocks, terms.sinks)
        key = (for_backward, of_mask and of_mask.key, *launch.call_key(problem, q, k, v, terms))

        def plan():
            device = launch.device_facts(q.get_device())

            def plan_with(tiles):
                return _plan(problem, q, k, v, out, terms, of_mask, device, tiles)

            return launch.plan_with_best_tiles(
                "prefill", problem, device, tensors, plan_with, (out, out_exact, lse, lse_parts),
                of_mask and of_mask.block_size,
            )  # fmt: skip

        launch.run(launch.launches_of(key), "prefill", tensors, plan)
    return out, lse, out if out_exact is None else out_exact, lse_parts


def _plan(problem, q, k, v, out, terms, of_mask, device, tiles) -> launch.Plan:
    arguments, constexprs = launch.score_arguments(problem, q, k, v, out, terms)
    constexprs |= lists.constexprs(of_mask, tiles)
    constexprs |= {"ANY_SIGN": launch.is_of_any_sign(terms.softmax_scale)}
    specialize = tiles.specialize and launch.has_descriptors(device, k, v, constexprs)
    constexprs |= {"RELOAD": tiles.reload, "SPECIALIZE": specialize}
    of_blocks = (of_mask.strides, of_mask.num_bitmaps) if of_mask else (None, 0)
    programs = triton.cdiv(problem.seqlen_q, tiles.BLOCK_M) * problem.num_heads * problem.batch
    return launch.Plan(
        forward_kernel, programs, (*of_blocks, *launch.strides(terms.sinks, 1), *arguments), constexprs,
        tiles.options(device), launch.descriptors(device, k, v, tiles.BLOCK_N, constexprs),
    )  # fmt: skip
