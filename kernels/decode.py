"""Forward pass of few queries: a program takes a range of keys and all queries of the heads that share them.

The rows of a tile are the queries of a whole group of heads, so that a key is read once. Where that makes too few
programs, the keys are split and `combine_kernel` puts the parts together (Flash-Decoding; Dao, Haziza, Massa, Sizov,
2023). How many splits follows from heads, lengths and the device, never from the batch. A split takes a range of keys
or, of a block mask, a part of the blocks that are listed for its rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import outputs
from . import config, launch, lists, tuning
from .attend import attend_lists, attend_range, store_rows
from .bounds import key_range, limits_of, row_bounds, share_of_range
from .lists import open_lists, share_of_visits
from .rows import cache_of, lengths_of, row_number, rows_of
from .scores import flags_of, terms_of
from .softmax import load_sink, natural_lse, normalizer
from .state import Dims, Keys, Place, Queries, Tile
from .tile import load_factor

_COUNTS = ["num_blocks", "num_pages", "num_bitmaps", "keys_per_split", "num_splits", "batch_size"]


@triton.jit(do_not_specialize=[*launch.SIZES, *_COUNTS])
def decode_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    out,           # [batch, num_heads, seqlen_q, head_dim_v]; SPLIT: the parts that `combine_kernel` reads
    lse,           # [batch, num_heads, seqlen_q], contiguous, or None
    k_start, k_end, mask, bias, alibi_slopes, softmax_scale,  # as in prefill.forward_kernel
    seed: tl.int64,
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of a block mask (`lists.lists_of`), or None
    sinks,         # [num_heads], or None
    block_table, k_scale, v_scale,  # as in `Cache`
    table_strides, num_blocks, num_pages, page_size, k_scale_strides, v_scale_strides,
    list_strides, num_bitmaps, keys_per_split, num_splits, batch_size, sink_stride,
    q_strides, k_strides, v_strides, out_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    ANY_SIGN: tl.constexpr, LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    SPLIT: tl.constexpr, RELOAD: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    # 1. what is known when this is compiled; which queries, and the keys that they see
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, RELOAD, PRECISION)
    DIMS: tl.constexpr = Dims(HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = flags_of(
        k_start, k_end, mask, bias, alibi_slopes, counts, HAS_LO, HAS_HI, SOFTCAP, DROPOUT, ANY_SIGN, False
    )
    heads_in_tile = 1 if ALONE else group_size
    num_rows, num_groups = heads_in_tile * seqlen_q, num_heads // heads_in_tile
    num_m = tl.cdiv(num_rows, BLOCK_M)
    split, pid = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    row, pid = pid % num_m * BLOCK_M, pid // num_m
    group, batch = pid % num_groups, pid // num_groups
    head, head_k = group * heads_in_tile, group // group_size if ALONE else group
    lengths = lengths_of(batch, seqlen_q, seqlen_k)
    b, hk = batch.to(tl.int64), head_k.to(tl.int64)
    local_rows, left = tl.arange(0, BLOCK_M), num_rows - row
    packed = tl.minimum(row + local_rows, num_rows - 1)
    heads, rows = head + packed // seqlen_q, packed % seqlen_q
    h, m = heads.to(tl.int64), rows.to(tl.int64)
    limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
    bounds = row_bounds(rows, limits, lengths, HAS_LO, HAS_HI)
    visited = share_of_range(key_range(bounds, lengths.keys, BLOCK_N, FLAGS), split, keys_per_split)

    # 2. q, and where the rest is: heads change within a tile
    of_q = rows_of(q, q_strides, b, h, m, WIDE, True)
    cache = cache_of(
        block_table, table_strides, num_blocks, num_pages, page_size, k_strides, v_strides, k_scale, k_scale_strides,
        v_scale, v_scale_strides, b, hk, WIDE,
    )  # fmt: skip
    in_cache = b
    if block_table is not None:
        in_cache = b * 0
    of_k, of_v = rows_of(k, k_strides, in_cache, hk, 0, WIDE), rows_of(v, v_strides, in_cache, hk, 0, WIDE)
    keys = Keys(of_k, None, of_v, None, cache)
    place, positions = Place(batch, head_k, heads[:, None]), rows[:, None]
    of_mask = rows_of(mask, mask_strides, b, h, m, WIDE, True)
    of_bias = rows_of(bias, bias_strides, b, h, m, WIDE, True)
    factor = load_factor(of_q, left, BLOCK_M, D0, D1, HEAD_DIM, RELOAD)
    terms = terms_of(
        of_mask, of_bias, alibi_slopes, slope_strides, softmax_scale, scale_stride, softcap, threshold, keep_factor,
        seed, b, h[:, None], LEARNED_SCALE,
    )  # fmt: skip

    # 3. loops
    if counts is None:
        queries = Queries(factor, place, positions, local_rows[:, None], left, bounds)
        state = attend_range(queries, keys, terms, lengths, visited, TILE, DIMS, FLAGS)
    else:
        EVERYWHERE: tl.constexpr = FLAGS.EVERYWHERE or FLAGS.BOUNDED
        start = row if ALONE else 0  # all queries are of one line where heads share a tile
        visits = open_lists(
            (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b,
            head.to(tl.int64), start, lengths.keys, BLOCK_Q, BLOCK_K, EVERYWHERE,
        )  # fmt: skip
        visits = share_of_visits(visits, split, num_splits, keys_per_split, BLOCK_K)
        queries = Queries(factor, place, positions, positions - start, lengths.queries, bounds)
        state = attend_lists(
            queries, keys, terms, lengths, visits, BLOCK_Q, BLOCK_K, TILE, DIMS, FLAGS, EVERYWHERE
        )  # fmt: skip

    # 4. epilogue
    inside = row + local_rows < num_rows
    statistics = row_number(b, h, m, num_heads, seqlen_q)
    if SPLIT:
        rows_of_split = tl.cast(batch_size, tl.int64) * num_heads * seqlen_q
        maximum = out + rows_of_split * num_splits * HEAD_DIM_V
        total = maximum + rows_of_split * num_splits
        statistics += split * rows_of_split
        tl.store(maximum + statistics, state.maximum, mask=inside)
        tl.store(total + statistics, state.total, mask=inside)
        out += statistics[:, None] * HEAD_DIM_V
        cols = tl.arange(0, E0)[None, :]
        tl.store(out + cols, state.acc0, mask=inside[:, None] & (cols < HEAD_DIM_V))
        if E1 > 0:
            cols = E0 + tl.arange(0, E1)[None, :]
            tl.store(out + cols, state.acc1, mask=inside[:, None] & (cols < HEAD_DIM_V))
    else:
        sink = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if sinks is not None:
            sink = load_sink(sinks, sink_stride, h)
        store_rows(
            state, sink, rows_of(out, out_strides, b, h, m, WIDE, True), None, lse, None, statistics, inside, left,
            keep_factor, BLOCK_M, DIMS, DROPOUT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_splits", "num_rows", "num_heads", "seqlen_q"])
def combine_kernel(
    parts,  # float32, one after another: [num_splits, batch, num_heads, seqlen_q, head_dim_v], not normalized; then
            # the largest score in log2 units and the sum of 2^(score - it), [num_splits, batch, num_heads, seqlen_q]
    sinks,  # [num_heads], or None
    out,    # [batch, num_heads, seqlen_q, head_dim_v]
    lse,    # [batch, num_heads, seqlen_q], contiguous, or None
    sink_stride, out_strides, keep_factor, num_splits, num_rows, num_heads, seqlen_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query: its splits weighted by what their softmax is worth in the whole."""
    r = tl.program_id(0).to(tl.int64)
    row, h, b = r % seqlen_q, r // seqlen_q % num_heads, r // seqlen_q // num_heads
    cols = tl.arange(0, BLOCK_D)
    maximum = parts + tl.cast(num_rows, tl.int64) * num_splits * HEAD_DIM_V
    total = maximum + tl.cast(num_rows, tl.int64) * num_splits
    m_i, l_i, acc = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_splits, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        inside = splits < num_splits
        index = splits.to(tl.int64) * num_rows + r
        m = tl.load(maximum + index, mask=inside, other=float("-inf"))
        sums = tl.load(total + index, mask=inside, other=0.0)
        part = tl.load(
            parts + index[:, None] * HEAD_DIM_V + cols[None, :], mask=inside[:, None] & (cols < HEAD_DIM_V)[None, :],
            other=0.0,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(m))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight, alpha = tl.exp2(m - shift), tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(sums * weight)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        m_i = m_new
    sink = float("-inf")
    if sinks is not None:
        sink = load_sink(sinks, sink_stride, h)
    factor, top, log2_total = normalizer(m_i, l_i, sink)
    if lse is not None:
        tl.store(lse + r + tl.arange(0, 1), natural_lse(top, log2_total))
    out += b * out_strides[0] + h * out_strides[1] + row * out_strides[2] + cols.to(tl.int64) * out_strides[3]
    tl.store(out, (acc * factor * keep_factor).to(out.dtype.element_ty), mask=cols < HEAD_DIM_V)


class Cache(NamedTuple):
    """How k and v are held that are no plain tensors of [batch, num_heads_k, seqlen_k, head_dim].

    block_table       int32 [batch, blocks], the pages of each sequence; k and v are [num_pages, num_heads_k, page_size,
                      head_dim] then. Entries that no visible key has may hold anything
    k_scale, v_scale  float32 [batch, num_heads_k, seqlen_k] (in pages: [num_pages, num_heads_k, page_size]), what the
                      numbers of each key and value are multiplied by; k and v are int8 then
    """

    block_table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


PLAIN = Cache()


def forward(problem, q, k, v, terms, cache=PLAIN):
    """Forward pass of few queries, without gradients (kernel signature of dispatch.Row), on a plain or other cache."""
    out, lse, *_ = outputs.empty_results(problem, q, False)
    if not out.numel():
        return out, lse
    of_mask = lists.lists_of(terms.block_mask)
    of_cache = () if cache is PLAIN else (len(k), launch.facts_of(*cache))
    key = ("decode", of_mask and of_mask.key, *of_cache, *launch.call_key(problem, q, k, v, terms))
    launches = launch.launches_of(key)
    if "splits" not in launches:
        launches["splits"] = splits_of(problem, of_mask, launch.device_facts(q.get_device()))
    splits = _, num_splits = launches["splits"]
    parts = empty_parts(problem, q, num_splits) if num_splits > 1 else None
    extras = (terms.k_start, terms.k_end, terms.mask, terms.bias, terms.alibi_slopes, terms.softmax_scale)
    of_blocks, to_write = of_mask.tensors if of_mask else lists.NOTHING, out if parts is None else parts
    tensors = (q, k, v, to_write, lse, *extras, terms.seed or 0, *of_blocks, terms.sinks, *cache)

    def plan():
        device, shared = launch.device_facts(q.get_device()), as_shared(problem, of_mask)

        def plan_with(tiles):
            return _plan(problem, shared, q, k, v, out, terms, of_mask, cache, splits, device, tiles)

        results = (out,) if parts is None else _rows_of_parts(parts, problem.head_dim_v)
        return launch.plan_with_best_tiles(
            "decode", shared, device, tensors, plan_with, (*results, lse), of_mask and of_mask.block_size
        )

    launch.run(launches, "decode", tensors, plan)
    if num_splits > 1:
        of_parts = (parts, terms.sinks, out, lse)
        launch.run(launches, "combine", of_parts, lambda: _plan_to_combine(problem, out, terms, num_splits))
    return out, lse


def empty_parts(problem, q: torch.Tensor, num_splits: int) -> torch.Tensor:
    """What the splits write and `combine_kernel` reads."""
    size = num_splits * problem.batch * problem.num_heads * problem.seqlen_q * (problem.head_dim_v + 2)
    return q.new_empty(size, dtype=torch.float32)


def _rows_of_parts(parts: torch.Tensor, head_dim_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sums of values [splits and rows, head_dim_v], the largest scores and sums of weights)"""
    end = parts.numel() // (head_dim_v + 2) * head_dim_v
    return parts[:end].view(-1, head_dim_v), parts[end:]


def _plan(problem, shared, q, k, v, out, terms, of_mask, cache, splits, device, tiles) -> launch.Plan:
    arguments, constexprs = launch.score_arguments(problem, q, k, v, out, terms)
    keys_per_split, num_splits = splits
    constexprs |= lists.constexprs(of_mask, tiles)
    constexprs |= {"ANY_SIGN": launch.is_of_any_sign(terms.softmax_scale), "RELOAD": tiles.reload}
    constexprs |= {"SPLIT": num_splits > 1, "ALONE": shared is not problem}
    of_blocks = (of_mask.strides, of_mask.num_bitmaps) if of_mask else (None, 0)
    arguments = (
        *_cache_arguments(k, cache), *of_blocks, keys_per_split, num_splits, problem.batch,
        *launch.strides(terms.sinks, 1), *arguments,
    )  # fmt: skip
    programs = num_splits * row_blocks(shared, tiles) * shared.num_heads_k * problem.batch
    return launch.Plan(decode_kernel, programs, arguments, constexprs, tiles.options(device))


def _cache_arguments(k, cache: Cache) -> tuple:
    """From table_strides to v_scale_strides."""
    of_scales = [launch.strides(x if x is None else x[..., None], 4) for x in cache[1:]]
    table = cache.block_table
    if table is None:
        return (0, 0), 0, 0, 1, *of_scales
    return table.stride(), table.shape[1], len(k), k.shape[2], *of_scales


def _plan_to_combine(problem, out, terms, num_splits) -> launch.Plan:
    num_rows = problem.batch * problem.num_heads * problem.seqlen_q
    arguments = (
        *launch.strides(terms.sinks, 1), out.stride(), 1.0 / (1.0 - terms.dropout_p), num_splits, num_rows,
        problem.num_heads, problem.seqlen_q,
    )  # fmt: skip
    width = triton.next_power_of_2(problem.head_dim_v)
    constexprs = {"HEAD_DIM_V": problem.head_dim_v, "BLOCK_D": width, "CHUNK": 16}
    # as of delta: the lanes that hold one sum agree on it
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    return launch.Plan(combine_kernel, num_rows, arguments, constexprs, options)


def row_blocks(problem, tiles) -> int:
    return triton.cdiv(problem.group_size * problem.seqlen_q, tiles.BLOCK_M)


def as_shared(problem, of_mask: lists.Lists | None):
    """`problem` with the heads of keys that programs are made for: one for each head where a group cannot share tiles,
    since the lists of a block mask are of heads, or of more lines of queries than one."""
    if of_mask is None:
        return problem
    (partial, full, *_), (block_q, _) = of_mask.strides, of_mask.block_size
    is_shared = partial[1] == full[1] == 0 and problem.seqlen_q <= block_q
    return problem if is_shared else problem._replace(num_heads_k=problem.num_heads)


def splits_of(problem, of_mask: lists.Lists | None, device) -> tuple[int, int]:
    """`split_keys`; for a block mask, whose splits are parts of lists, (the least keys in a split, how many)."""
    if of_mask is None:
        return split_keys(problem, device)
    shared = as_shared(problem, of_mask)
    _, num_splits = split_keys(shared, device, of_mask.block_size)
    return least_keys(shared), num_splits


def least_keys(problem) -> int:
    """Of a split: keys and values are at least twice of what it writes, whose numbers have 32 bits."""
    return max(256, 2 * problem.group_size * problem.seqlen_q)


def split_keys(problem, device, block_size=None) -> tuple[int, int]:
    """(keys in a split, number of splits): two programs a multiprocessor for one sequence."""
    tiles = tuning.tiles("decode", problem, device)
    if block_size:
        tiles = config.within(tiles, block_size)
    programs = row_blocks(problem, tiles) * problem.num_heads_k
    wanted = max(1, 2 * device.num_sms // programs)
    keys = max(least_keys(problem), triton.cdiv(problem.seqlen_k, wanted))
    keys = triton.cdiv(keys, tiles.BLOCK_N) * tiles.BLOCK_N
    return keys, max(1, triton.cdiv(problem.seqlen_k, keys))


def declines(problem, device) -> str | None:
    """None if these few queries of long keys have twice as many programs with split keys as in `prefill`, whose
    programs would leave half of the multiprocessors idle; else why not. A batch changes no bits of a sequence."""
    programs = triton.cdiv(problem.seqlen_q, tuning.tiles("prefill", problem, device).BLOCK_M) * problem.num_heads
    if 2 * programs > device.num_sms:
        return f"seqlen_q={problem.seqlen_q} ({programs} programs of prefill for {device.num_sms} multiprocessors)"
    _, num_splits = split_keys(problem, device)
    split = num_splits * row_blocks(problem, tuning.tiles("decode", problem, device)) * problem.num_heads_k
    if num_splits == 1 or split < 2 * programs:
        return f"seqlen_k={problem.seqlen_k} (split, {split} programs; in prefill, {programs})"
    return None
