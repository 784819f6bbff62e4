"""Gradients of k and v: a program keeps a block of keys and goes through the queries of all heads that share it."""

import triton
import triton.language as tl

from . import launch
from .backward_tile import gradients_of_scores, load_statistics, product
from .bounds import INT_MAX, limits_of, row_bounds
from .lists import masked_tile, open_lists, unmasked_tile
from .rows import lengths_of, row_number, rows_of, skip
from .scores import flags_of, terms_of
from .state import Bounds, Dims, HeadQueries, KeyGradients, Place, Tile
from .tile import empty_both, finite_or, load_factor, store_both


@triton.jit
def key_value_step(
    gradients, of_k, of_v, queries, row, col, place, terms, lengths, bitmap, TILE: tl.constexpr, DIMS: tl.constexpr,
    FLAGS: tl.constexpr, MASKED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """`gradients` with the part of the block of queries from `row` on; scores stand as [keys, queries].

    of_k, of_v  factors, of the keys from `col` on. The others as in `gradients_of_scores`
    MASKED      some query may not see some key. HIDES: NaN or Inf may be there
    """
    left, m = lengths.queries - row, tl.cast(row, tl.int64)
    s, q0, q1 = product(
        of_k, skip(queries.q, m), left, TILE.BLOCK_N, TILE.BLOCK_M, DIMS.D0, DIMS.D1, DIMS.HEAD_DIM, MASKED, TILE
    )
    dp, do0, do1 = product(
        of_v, skip(queries.dout, m), left, TILE.BLOCK_N, TILE.BLOCK_M, DIMS.E0, DIMS.E1, DIMS.HEAD_DIM_V, MASKED, TILE
    )
    statistics = load_statistics(queries.lse_parts + 2 * m, queries.delta + m, left, TILE.BLOCK_M, MASKED)
    bounds = Bounds(0, 0)  # not used
    if MASKED:
        rows = row + tl.arange(0, TILE.BLOCK_M)
        bounds = row_bounds(rows, queries.limits, lengths, FLAGS.HAS_LO, FLAGS.HAS_HI)
    found = gradients_of_scores(
        s, dp, place, row, col, terms, lengths, bitmap, statistics, bounds, TILE, FLAGS, MASKED, True
    )  # fmt: skip
    dproduct = found.product
    if FLAGS.SCALE_APART:  # each head has its own scale; otherwise it is a factor of the sum
        dproduct *= terms.scale
    kept, dproduct = found.kept.to(do0.dtype), dproduct.to(q0.dtype)
    if HIDES:  # a row that sees no key here may hold anything
        q0 = finite_or(q0, True)
    dk1, dv1 = gradients.dk1, gradients.dv1
    dv0 = tl.dot(kept, do0, gradients.dv0, input_precision=TILE.PRECISION)
    dk0 = tl.dot(dproduct, q0, gradients.dk0, input_precision=TILE.PRECISION)
    if DIMS.E1 > 0:
        dv1 = tl.dot(kept, do1, dv1, input_precision=TILE.PRECISION)
    if DIMS.D1 > 0:
        if HIDES:
            q1 = finite_or(q1, True)
        dk1 = tl.dot(dproduct, q1, dk1, input_precision=TILE.PRECISION)
    return KeyGradients(dk0, dv0, dk1, dv1)


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
    # 1. what is known when this is compiled; which keys
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, RELOAD, PRECISION)
    DIMS: tl.constexpr = Dims(HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = flags_of(
        k_start, k_end, mask, bias, alibi_slopes, counts, HAS_LO, HAS_HI, SOFTCAP, DROPOUT, LEARNED_SCALE, EXACT
    )
    EVERYWHERE: tl.constexpr = FLAGS.EVERYWHERE
    HIDES: tl.constexpr = FLAGS.HIDES
    num_n, num_m = tl.cdiv(seqlen_k, BLOCK_N), tl.cdiv(seqlen_q, BLOCK_M)
    num_heads_k = num_heads // group_size
    col, pid = tl.program_id(0) % num_n * BLOCK_N, tl.program_id(0) // num_n
    head_k, batch = pid % num_heads_k, pid // num_heads_k
    lengths = lengths_of(batch, seqlen_q, seqlen_k)
    left = lengths.keys - col
    b, hk, n = batch.to(tl.int64), head_k.to(tl.int64), col.to(tl.int64)

    # 2. k, v
    of_k, of_v = rows_of(k, k_strides, b, hk, n, WIDE), rows_of(v, v_strides, b, hk, n, WIDE)
    of_k = load_factor(of_k, left, BLOCK_N, D0, D1, HEAD_DIM, RELOAD)
    of_v = load_factor(of_v, left, BLOCK_N, E0, E1, HEAD_DIM_V, RELOAD)
    dk0, dk1 = empty_both(BLOCK_N, D0, D1)
    dv0, dv1 = empty_both(BLOCK_N, E0, E1)
    gradients = KeyGradients(dk0, dv0, dk1, dv1)

    # 3. loops: the heads that share these keys, and the blocks of queries that see them
    for head in tl.range(head_k * group_size, (head_k + 1) * group_size):
        h, place = tl.cast(head, tl.int64), Place(batch, head_k, head)
        statistics = row_number(b, h, 0, num_heads, seqlen_q)
        if counts is not None:
            visits = open_lists(
                (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b, h, col,
                lengths.queries, BLOCK_K, BLOCK_Q, EVERYWHERE or FLAGS.BOUNDED,
            )  # fmt: skip
            full_lo, full_hi, masked = 0, visits.unmasked * (BLOCK_Q // BLOCK_M), visits.masked * (BLOCK_Q // BLOCK_M)
        else:
            bounds_of_blocks = block_bounds + 4 * (b * num_heads + h) * num_m
            lo, hi, full_lo, full_hi = visiting_blocks(bounds_of_blocks, num_m, col, col + BLOCK_N - 1, 128)
            if EVERYWHERE:
                full_lo, full_hi = hi, hi
            blocks_before, masked = full_lo - lo, hi - full_hi + full_lo - lo
        queries = HeadQueries(
            rows_of(q, q_strides, b, h, 0, WIDE, LOOP=True), rows_of(dout, dout_strides, b, h, 0, WIDE, LOOP=True),
            lse_parts + 2 * statistics, delta + statistics,
            limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h),
        )  # fmt: skip
        of_mask = rows_of(mask, mask_strides, b, h, 0, WIDE)
        of_bias = rows_of(bias, bias_strides, b, h, 0, WIDE)
        terms = terms_of(
            of_mask, of_bias, alibi_slopes, slope_strides, softmax_scale, scale_stride, softcap, threshold, keep_factor,
            seed, b, h, LEARNED_SCALE,
        )  # fmt: skip
        if not EVERYWHERE:
            for index in tl.range(full_lo, full_hi):
                row = index * BLOCK_M
                if counts is not None:
                    row = unmasked_tile(index, visits, BLOCK_Q, BLOCK_M)
                gradients = key_value_step(
                    gradients, of_k, of_v, queries, row, col, place, terms, lengths, None, TILE, DIMS, FLAGS, False,
                    False,
                )  # fmt: skip
        for index in tl.range(0, masked):
            bitmap = None
            if counts is not None:
                row, bitmap = masked_tile(index, visits, BLOCK_K, BLOCK_Q, BLOCK_M)
            else:
                row = tl.where(index < blocks_before, lo + index, full_hi + index - blocks_before) * BLOCK_M
            gradients = key_value_step(
                gradients, of_k, of_v, queries, row, col, place, terms, lengths, bitmap, TILE, DIMS, FLAGS, True, HIDES
            )

    # 4. epilogue
    dk0, dv0, dk1, dv1 = gradients
    if not LEARNED_SCALE:
        dk0 *= softmax_scale
        dk1 *= softmax_scale
    if DROPOUT:
        dv0 *= keep_factor
        dv1 *= keep_factor
    if dk is not None:
        store_both(rows_of(dk, dk_strides, b, hk, n, WIDE), dk0, dk1, left, BLOCK_N, D0, D1, HEAD_DIM)
    if dv is not None:
        store_both(rows_of(dv, dv_strides, b, hk, n, WIDE), dv0, dv1, left, BLOCK_N, E0, E1, HEAD_DIM_V)
