"""Gradient of q: a program keeps a block of queries and goes through the keys that they see.

Also the sums of each row that delta and the gradients of alibi_slopes and softmax_scale consist of.
"""

import triton
import triton.language as tl

from . import launch
from .backward_tile import gradients_of_scores, load_statistics, product, window_of
from .bounds import key_range, limits_of, masked_block, masked_blocks, row_bounds
from .lists import masked_tile, open_lists, unmasked_tile
from .rows import block_of_queries, lengths_of, row_number, rows_of, skip
from .scores import add_row_sums, flags_of, terms_of
from .state import Dims, Keys, Place, QuerySums, RowSums, Tile
from .tile import empty_both, finite_or, load_factor, store_columns


@triton.jit
def query_step(
    sums, of_q, of_dout, statistics, bounds, keys, row, col, place, terms, lengths, bitmap, TILE: tl.constexpr,
    DIMS: tl.constexpr, FLAGS: tl.constexpr, WANTED: tl.constexpr, WANT_Q: tl.constexpr, MASKED: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """`sums` with the part of the block of keys from `col` on.

    of_q, of_dout  factors, of the queries from `row` on. The others as in `gradients_of_scores`
    MASKED         some query may not see some key. HIDES: NaN or Inf may be there
    """
    left, n = lengths.keys - col, tl.cast(col, tl.int64)
    s, k0, k1 = product(
        of_q, skip(keys.k, n), left, TILE.BLOCK_M, TILE.BLOCK_N, DIMS.D0, DIMS.D1, DIMS.HEAD_DIM, MASKED, TILE
    )
    dp, _, _ = product(
        of_dout, skip(keys.v, n), left, TILE.BLOCK_M, TILE.BLOCK_N, DIMS.E0, DIMS.E1, DIMS.HEAD_DIM_V, MASKED, TILE
    )
    found = gradients_of_scores(
        s, dp, place, row, col, terms, lengths, bitmap, statistics, bounds, TILE, FLAGS, MASKED, False
    )  # fmt: skip
    window = window_of(row, col, lengths, TILE.BLOCK_M, TILE.BLOCK_N, False)
    rows = add_row_sums(sums.rows, s, found, window, lengths, WANTED)
    dq0, dq1 = sums.dq0, sums.dq1
    if WANT_Q:
        if HIDES:  # a key that no row here sees may hold anything
            k0 = finite_or(k0, True)
        dproduct = found.product.to(k0.dtype)
        dq0 = tl.dot(dproduct, k0, dq0, input_precision=TILE.PRECISION)
        if DIMS.D1 > 0:
            if HIDES:
                k1 = finite_or(k1, True)
            dq1 = tl.dot(dproduct, k1, dq1, input_precision=TILE.PRECISION)
    return QuerySums(dq0, dq1, rows)


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
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of a block mask (`lists.lists_of`), or None
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
    # 1. what is known when this is compiled; which queries, and the keys that they see
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, RELOAD, PRECISION)
    DIMS: tl.constexpr = Dims(HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = flags_of(
        k_start, k_end, mask, bias, alibi_slopes, counts, HAS_LO, HAS_HI, SOFTCAP, DROPOUT, LEARNED_SCALE, EXACT
    )
    HIDES: tl.constexpr = FLAGS.HIDES
    WANTED: tl.constexpr = RowSums(totals is not None, dslopes is not None, dscales is not None)
    WANT_Q: tl.constexpr = dq is not None
    batch, head, m_block = block_of_queries(num_heads, seqlen_q, BLOCK_M, HAS_HI)
    lengths, row = lengths_of(batch, seqlen_q, seqlen_k), m_block * BLOCK_M
    b, h, hk, m = batch.to(tl.int64), head.to(tl.int64), (head // group_size).to(tl.int64), row.to(tl.int64)
    rows, left = row + tl.arange(0, BLOCK_M), lengths.queries - row
    limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
    bounds = row_bounds(rows, limits, lengths, HAS_LO, HAS_HI)
    if counts is not None:
        visits = open_lists(
            (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b, h, row,
            lengths.keys, BLOCK_Q, BLOCK_K, FLAGS.EVERYWHERE or FLAGS.BOUNDED,
        )  # fmt: skip
        full_lo, full_hi, masked = 0, visits.unmasked * (BLOCK_K // BLOCK_N), visits.masked * (BLOCK_K // BLOCK_N)
    else:
        visited = key_range(bounds, lengths.keys, BLOCK_N, FLAGS)
        full_lo, full_hi = visited.common_lo // BLOCK_N, visited.common_hi // BLOCK_N
        before, masked = masked_blocks(visited, BLOCK_N)

    # 2. q, dout and the statistics; where the rest is
    of_q, of_dout = rows_of(q, q_strides, b, h, m, WIDE), rows_of(dout, dout_strides, b, h, m, WIDE)
    keys = Keys(rows_of(k, k_strides, b, hk, 0, WIDE), None, rows_of(v, v_strides, b, hk, 0, WIDE), None, None)
    of_mask = rows_of(mask, mask_strides, b, h, 0, WIDE)
    of_bias = rows_of(bias, bias_strides, b, h, 0, WIDE)
    terms = terms_of(
        of_mask, of_bias, alibi_slopes, slope_strides, softmax_scale, scale_stride, softcap, threshold, keep_factor,
        seed, b, h, LEARNED_SCALE,
    )  # fmt: skip
    of_q = load_factor(of_q, left, BLOCK_M, D0, D1, HEAD_DIM, RELOAD)
    of_dout = load_factor(of_dout, left, BLOCK_M, E0, E1, HEAD_DIM_V, RELOAD)
    place, number = Place(batch, head // group_size, head), row_number(b, h, m, num_heads, seqlen_q)
    if delta is not None:
        delta += number
    statistics = load_statistics(lse_parts + 2 * number, delta, left, BLOCK_M, True)

    # 3. loops
    dq0, dq1 = empty_both(BLOCK_M, D0, D1)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    sums = QuerySums(dq0, dq1, RowSums(zeros, zeros, zeros))
    if not FLAGS.EVERYWHERE:
        for index in tl.range(full_lo, full_hi):
            col = index * BLOCK_N
            if counts is not None:
                col = unmasked_tile(index, visits, BLOCK_K, BLOCK_N)
            sums = query_step(
                sums, of_q, of_dout, statistics, bounds, keys, row, col, place, terms, lengths, None, TILE, DIMS, FLAGS,
                WANTED, WANT_Q, False, False,
            )  # fmt: skip
    for index in tl.range(0, masked):
        bitmap = None
        if counts is not None:
            col, bitmap = masked_tile(index, visits, BLOCK_Q, BLOCK_K, BLOCK_N)
        else:
            col = masked_block(index, before, visited, BLOCK_N)
        sums = query_step(
            sums, of_q, of_dout, statistics, bounds, keys, row, col, place, terms, lengths, bitmap, TILE, DIMS, FLAGS,
            WANTED, WANT_Q, True, HIDES,
        )  # fmt: skip

    # 4. epilogue
    number += tl.arange(0, BLOCK_M)
    if totals is not None:
        tl.store(totals + number, sums.rows.total, mask=rows < seqlen_q)
    if dslopes is not None:
        tl.store(dslopes + number, sums.rows.slope, mask=rows < seqlen_q)
    if dscales is not None:
        tl.store(dscales + number, sums.rows.scale, mask=rows < seqlen_q)
    if dq is not None:
        of_dq = rows_of(dq, dq_strides, b, h, m, WIDE)
        store_columns(of_dq, sums.dq0 * terms.scale, left, BLOCK_M, 0, D0, HEAD_DIM)
        if D1 > 0:
            store_columns(of_dq, sums.dq1 * terms.scale, left, BLOCK_M, D0, D1, HEAD_DIM)
