"""What the forward kernels share: the online softmax over tiles of keys, and how its result is stored.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867), tiled as in FlashAttention-2 (Dao, arXiv 2307.08691).
Blocks in which every query sees every key run a loop without masks; the others run a second one.
"""

import triton
import triton.language as tl

from .bounds import bit, masked_block, masked_blocks, visible
from .lists import masked_tile, unmasked_tile
from .rows import is_quantized, k_rows, v_rows
from .score_dropout import dropout_keep
from .scores import hide_biased, hide_masked, multiplied, seen_in, shifted
from .softmax import LOG2E, natural_lse, normalizer
from .state import Rows, Softmax, Window
from .tile import (
    empty_both,
    finite_or,
    like_factor,
    load_columns,
    load_described,
    load_scale_of_keys,
    product_of_chunks,
    store_both,
)


@triton.jit
def attend(
    state, queries, keys, terms, lengths, bitmap, col, clean, TILE: tl.constexpr, DIMS: tl.constexpr,
    FLAGS: tl.constexpr, MASKED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """`state` after one more block of keys, from `col` on; `bitmap` is of these keys, or None.

    MASKED: some query may not see some key. HIDES: NaN or Inf may be there, and counts as 0 if `clean`.
    """
    place, left, n = queries.place, lengths.keys - col, tl.cast(col, tl.int64)
    cols = tl.arange(0, TILE.BLOCK_N)[None, :]
    window = Window(queries.rows, queries.local_rows, cols, queries.left, left, col)

    QUANTIZED: tl.constexpr = is_quantized(keys)

    # loads before the product: of two layouts the compiler keeps the later one for the running maximum and sum
    added = None
    if MASKED:
        seen = seen_in(queries.bounds, terms, bitmap, window, 0, n, TILE, FLAGS, False)
        if terms.bias.ptr is not None:
            seen, added = hide_biased(seen, terms, window, 0, n)

    rows = k_rows(keys, n, TILE.BLOCK_N)
    if TILE.RELOAD:
        s = product_of_chunks(
            queries.factor, rows, left, TILE.BLOCK_M, TILE.BLOCK_N, DIMS.D0, DIMS.D1, DIMS.HEAD_DIM, TILE.PRECISION
        )
    else:
        k0 = load_described(rows, keys.k_descriptor, place, col, left, TILE.BLOCK_N, DIMS.D0, DIMS.HEAD_DIM, MASKED)
        k0 = like_factor(k0, queries.factor, TILE.RELOAD)
        s = tl.dot(queries.factor.x0, tl.trans(k0), input_precision=TILE.PRECISION)
        if DIMS.D1 > 0:
            k1 = load_columns(rows, left, TILE.BLOCK_N, DIMS.D0, DIMS.D1, DIMS.HEAD_DIM, MASKED)
            k1 = like_factor(k1, queries.factor, TILE.RELOAD)
            s = tl.dot(queries.factor.x1, tl.trans(k1), s, input_precision=TILE.PRECISION)
    if QUANTIZED:
        s *= load_scale_of_keys(keys.cache.k, keys.cache.pages, n, left, TILE.BLOCK_N)

    factor = terms.scale * LOG2E
    if FLAGS.MODIFIED:
        s, _ = multiplied(s, terms, FLAGS)
        s = shifted(s, added, terms, window, lengths, FLAGS)
        factor = 1.0
    if MASKED:
        s = tl.where(seen, s, float("-inf"))

    m_new = tl.maximum(state.maximum, tl.max(s, 1) * factor)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - shift[:, None])
    alpha = tl.exp2(state.maximum - shift)
    total = state.total * alpha + tl.sum(p, 1)
    if FLAGS.DROPOUT:
        keep = dropout_keep(queries.rows, col, place.heads, place.batch, terms, False, TILE.BLOCK_M, TILE.BLOCK_N)
        p = tl.where(keep, p, 0.0)

    if QUANTIZED:
        scale = load_scale_of_keys(keys.cache.v, keys.cache.pages, n, left, TILE.BLOCK_N)
        p *= finite_or(scale, clean) if HIDES else scale

    rows = v_rows(keys, n, TILE.BLOCK_N)
    v0 = load_described(rows, keys.v_descriptor, place, col, left, TILE.BLOCK_N, DIMS.E0, DIMS.HEAD_DIM_V, MASKED)
    v0 = like_factor(v0, queries.factor, TILE.RELOAD)
    if HIDES:
        v0 = finite_or(v0, clean)
    p = p.to(v0.dtype)
    acc0, acc1 = tl.dot(p, v0, state.acc0 * alpha[:, None], input_precision=TILE.PRECISION), state.acc1
    if DIMS.E1 > 0:
        v1 = load_columns(rows, left, TILE.BLOCK_N, DIMS.E0, DIMS.E1, DIMS.HEAD_DIM_V, MASKED)
        v1 = like_factor(v1, queries.factor, TILE.RELOAD)
        if HIDES:
            v1 = finite_or(v1, clean)
        acc1 = tl.dot(p, v1, state.acc1 * alpha[:, None], input_precision=TILE.PRECISION)
    return Softmax(acc0, acc1, total, m_new)


@triton.jit
def fresh_state(BLOCK_M: tl.constexpr, DIMS: tl.constexpr):
    """The state before the first key."""
    acc0, acc1 = empty_both(BLOCK_M, DIMS.E0, DIMS.E1)
    return Softmax(acc0, acc1, tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32))


@triton.jit
def is_spoiled(state, E1: tl.constexpr):
    """Whether there is a NaN: a weight of 0 times NaN or Inf behind a mask, or one that is seen."""
    spoiled = tl.max(tl.where(state.acc0 != state.acc0, 1, 0))
    if E1 > 0:
        spoiled = tl.maximum(spoiled, tl.max(tl.where(state.acc1 != state.acc1, 1, 0)))
    return spoiled > 0


@triton.jit
def add_poison(
    acc0, acc1, queries, keys, terms, bitmap, lo, hi, DIMS: tl.constexpr, HAS_FIRST: tl.constexpr
):  # fmt: skip
    """Adds each NaN or Inf of v to the queries that see its key, and to no other: slow, exact, and hardly ever run.

    Arguments as in `attend`; with a bitmap, lo ... hi - 1 are the keys of its block.
    """
    QUANTIZED: tl.constexpr = is_quantized(keys)
    for key in range(lo, hi):
        col, n = tl.cast(key, tl.int32), tl.cast(key, tl.int64)
        row, scale = v_rows(keys, n, 1), 1.0
        if QUANTIZED:
            scale = load_scale_of_keys(keys.cache.v, keys.cache.pages, n, 1, 1)
        v0 = load_columns(row, 1, 1, 0, DIMS.E0, DIMS.HEAD_DIM_V, False).to(tl.float32) * scale
        bad0 = (tl.abs(v0) < float("inf")) == 0
        found = tl.max(bad0.to(tl.int32))
        if DIMS.E1 > 0:
            v1 = load_columns(row, 1, 1, DIMS.E0, DIMS.E1, DIMS.HEAD_DIM_V, False).to(tl.float32) * scale
            bad1 = (tl.abs(v1) < float("inf")) == 0
            found = tl.maximum(found, tl.max(bad1.to(tl.int32)))
        if found > 0:
            seen = visible(col, queries.bounds.first[:, None], queries.bounds.last[:, None], HAS_FIRST)
            window = Window(queries.rows, queries.local_rows, 0, queries.left, 1, col)
            seen = hide_masked(seen, terms, window, 0, n)
            if terms.bias.ptr is not None:
                seen, _ = hide_biased(seen, terms, window, 0, n)
            if bitmap is not None:
                seen = seen & bit(bitmap, queries.local_rows, col - lo)
            acc0 = tl.where(seen & bad0, acc0 + v0, acc0)
            if DIMS.E1 > 0:
                acc1 = tl.where(seen & bad1, acc1 + v1, acc1)
    return acc0, acc1


@triton.jit
def attend_range(
    queries, keys, terms, lengths, visited, TILE: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr,
    SPECIALIZE: tl.constexpr = False,
):  # fmt: skip
    """The state after the keys of a `KeyRange`. SPECIALIZE: `Config.specialize`."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    HIDES: tl.constexpr = FLAGS.HIDES
    before, blocks = masked_blocks(visited, BLOCK_N)
    state = fresh_state(TILE.BLOCK_M, DIMS)
    clean, again = False, True
    while again:  # once more if a NaN that a mask hides got in; with masks first, which takes fewer registers
        if HIDES:
            for block in tl.range(0, blocks):
                col = masked_block(block, before, visited, BLOCK_N)
                state = attend(state, queries, keys, terms, lengths, None, col, clean, TILE, DIMS, FLAGS, True, True)
        elif blocks > 0:  # the last keys, fewer than BLOCK_N
            last = visited.hi // BLOCK_N * BLOCK_N
            state = attend(state, queries, keys, terms, lengths, None, last, clean, TILE, DIMS, FLAGS, True, False)
        if not FLAGS.EVERYWHERE:
            for col in tl.range(visited.common_lo, visited.common_hi, BLOCK_N, warp_specialize=SPECIALIZE):
                state = attend(state, queries, keys, terms, lengths, None, col, clean, TILE, DIMS, FLAGS, False, False)
        again = False
        if HIDES:
            again = is_spoiled(state, DIMS.E1) & (clean == 0)
            if again:
                clean = True
                state = fresh_state(TILE.BLOCK_M, DIMS)
    if HIDES:
        if clean:
            acc0, acc1 = add_poison(
                state.acc0, state.acc1, queries, keys, terms, None, visited.lo, visited.hi, DIMS, FLAGS.HAS_FIRST
            )
            state = Softmax(acc0, acc1, state.total, state.maximum)
    return state


@triton.jit
def attend_lists(
    queries, keys, terms, lengths, visits, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
    DIMS: tl.constexpr, FLAGS: tl.constexpr, EVERYWHERE: tl.constexpr,
):  # fmt: skip
    """The state after the blocks of a block mask: full ones, then those with a bitmap. EVERYWHERE: all have one."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    state = fresh_state(TILE.BLOCK_M, DIMS)
    clean, again = False, True
    while again:
        if not EVERYWHERE:
            for step in tl.range(0, visits.unmasked * STEPS):
                col = unmasked_tile(step, visits, BLOCK_K, BLOCK_N)
                state = attend(state, queries, keys, terms, lengths, None, col, clean, TILE, DIMS, FLAGS, False, False)
        for step in tl.range(0, visits.masked * STEPS):
            col, bitmap = masked_tile(step, visits, BLOCK_Q, BLOCK_K, BLOCK_N)
            state = attend(state, queries, keys, terms, lengths, bitmap, col, clean, TILE, DIMS, FLAGS, True, True)
        again = is_spoiled(state, DIMS.E1) & (clean == 0)
        if again:
            clean = True
            state = fresh_state(TILE.BLOCK_M, DIMS)
    if clean:
        acc0, acc1 = state.acc0, state.acc1
        for index in range(0, visits.masked):
            lo, bitmap = masked_tile(index, visits, BLOCK_Q, BLOCK_K, BLOCK_K)
            hi = tl.minimum(lo + BLOCK_K, lengths.keys)
            acc0, acc1 = add_poison(acc0, acc1, queries, keys, terms, bitmap, lo, hi, DIMS, FLAGS.HAS_FIRST)
        state = Softmax(acc0, acc1, state.total, state.maximum)
    return state


@triton.jit
def store_rows(
    state, sink, out, out_exact, lse, lse_parts, statistics, inside, left, keep_factor, BLOCK_M: tl.constexpr,
    DIMS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Normalizes and stores a tile: `out` is its rows, `statistics` numbers rows of what is contiguous."""
    factor, top, log2_total = normalizer(state.maximum, state.total, sink)
    if DROPOUT:
        factor *= keep_factor
    if lse is not None:
        tl.store(lse + statistics, natural_lse(top, log2_total), mask=inside)
    if lse_parts is not None:
        tl.store(lse_parts + 2 * statistics, top, mask=inside)
        tl.store(lse_parts + 2 * statistics + 1, log2_total, mask=inside)
    factor = factor[:, None]
    store_both(out, state.acc0, state.acc1, left, BLOCK_M, DIMS.E0, DIMS.E1, DIMS.HEAD_DIM_V, factor)
    if out_exact is not None:
        exact = Rows(out_exact + statistics[:, None] * DIMS.HEAD_DIM_V, 0, 1)
        store_both(exact, state.acc0, state.acc1, left, BLOCK_M, DIMS.E0, DIMS.E1, DIMS.HEAD_DIM_V, factor)
