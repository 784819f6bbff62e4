"""What the forward kernels share: the online softmax over tiles of keys, and how its result is stored.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867), tiled as in FlashAttention-2 (Dao, arXiv 2307.08691).
Blocks in which every query sees every key run a loop without masks; the others run a second one.
"""

import triton
import triton.language as tl

from .lists import masked_tile, unmasked_tile
from .tile import (
    LOG2E,
    bias_log2,
    bit,
    bits,
    dropout_keep,
    finite_or,
    load_columns,
    load_scores,
    natural_lse,
    normalizer,
    product_of_chunks,
    softcap_scores,
    store_columns,
    visible,
)


@triton.jit
def attend(
    state, q, keys, place, bounds, scores, bitmap, numbers, col, clean,
    TILE: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, MASKED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """`state` after one more block of keys, from `col` on.

    q        its one or two tiles of columns or, with RELOAD, for `tile.product_of_chunks`
    keys     (k, strides, descriptor or None, v, strides, descriptor or None) of the head
    place    (batch, key head, query heads, positions of the queries, their places in the tile, how many are left);
             [M, 1] or, of heads, one
    bounds   (first, last) of the keys that each query sees
    scores   (mask, strides, bias, strides), pointers to the first query, or None
    bitmap   for `tile.bits`, from `col` on, or None
    MASKED   some query may not see some key. HIDES: NaN or Inf may be there, and counts as 0 if `clean`
    """
    acc0, acc1, l_i, m_i = state
    k, k_strides, k_descriptor, v, v_strides, v_descriptor = keys
    batch, head_k, heads, rows, local_rows, rows_left = place
    mask, mask_strides, bias, bias_strides = scores
    seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed = numbers
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    RELOAD: tl.constexpr = TILE[2]
    HEAD_DIM: tl.constexpr = DIMS[0]
    D0: tl.constexpr = DIMS[1]
    D1: tl.constexpr = DIMS[2]
    HEAD_DIM_V: tl.constexpr = DIMS[3]
    E0: tl.constexpr = DIMS[4]
    E1: tl.constexpr = DIMS[5]
    HAS_FIRST: tl.constexpr = FLAGS[0]
    SOFTCAP: tl.constexpr = FLAGS[1]
    ALIBI: tl.constexpr = FLAGS[2]
    DROPOUT: tl.constexpr = FLAGS[3]
    ANY_SIGN: tl.constexpr = FLAGS[4]
    PRECISION: tl.constexpr = FLAGS[5]
    MODIFIED: tl.constexpr = SOFTCAP or ALIBI or ANY_SIGN or bias is not None  # else the scale is left to the maximum
    keys_left, n = seqlen_k - col, tl.cast(col, tl.int64)
    local_cols = tl.arange(0, BLOCK_N)[None, :]

    # loads before the product: of two layouts the compiler keeps the later one for the running maximum and sum
    if MASKED:
        seen = visible(local_cols, bounds[0][:, None] - col, bounds[1][:, None] - col, HAS_FIRST)
        if mask is not None:
            tile = mask + n * mask_strides[1]
            seen = seen & (load_scores(tile, mask_strides, local_rows, local_cols, rows_left, keys_left) != 0)
        if bitmap is not None:
            seen = seen & bits(bitmap, local_rows, BLOCK_N)
        if bias is not None:
            tile = bias + n * bias_strides[1]
            added = load_scores(tile, bias_strides, local_rows, local_cols, rows_left, keys_left)
            seen = seen & (added.to(tl.float32) != float("-inf"))

    if RELOAD:
        tile = k + n * k_strides[0]
        s = product_of_chunks(q, tile, k_strides, keys_left, BLOCK_M, BLOCK_N, D0, D1, HEAD_DIM, PRECISION)
    else:
        if k_descriptor is not None:
            k0 = k_descriptor.load([batch, head_k, tl.cast(col, tl.int32), 0]).reshape([BLOCK_N, D0])
        else:
            k0 = load_columns(k + n * k_strides[0], k_strides, keys_left, BLOCK_N, 0, D0, HEAD_DIM, MASKED)
        s = tl.dot(q[0], tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_columns(k + n * k_strides[0], k_strides, keys_left, BLOCK_N, D0, D1, HEAD_DIM, MASKED)
            s = tl.dot(q[1], tl.trans(k1), s, input_precision=PRECISION)

    factor = scale * LOG2E
    if MODIFIED:
        if SOFTCAP:
            s, _ = softcap_scores(s, scale, softcap)
        elif ANY_SIGN:
            s = s * scale * LOG2E  # as in the backward pass, for the gradient of the scale
        else:
            s = s * factor
        factor = 1.0
        if bias is not None:
            s += bias_log2(added)
        if ALIBI:
            s -= slope * tl.abs(rows + (seqlen_k - seqlen_q) - (col + local_cols)).to(tl.float32)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))

    m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(dropout_keep(rows, col, heads, batch, threshold, seed, BLOCK_M, BLOCK_N), p, 0.0)

    if v_descriptor is not None:
        v0 = v_descriptor.load([batch, head_k, tl.cast(col, tl.int32), 0]).reshape([BLOCK_N, E0])
    else:
        v0 = load_columns(v + n * v_strides[0], v_strides, keys_left, BLOCK_N, 0, E0, HEAD_DIM_V, MASKED)
    if HIDES:
        v0 = finite_or(v0, clean)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision=PRECISION)
    if E1 > 0:
        v1 = load_columns(v + n * v_strides[0], v_strides, keys_left, BLOCK_N, E0, E1, HEAD_DIM_V, MASKED)
        if HIDES:
            v1 = finite_or(v1, clean)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision=PRECISION)
    return acc0, acc1, l_i, m_new


@triton.jit
def fresh_state(BLOCK_M: tl.constexpr, DIMS: tl.constexpr):
    """(acc0, acc1, l_i, m_i) before the first key."""
    E0: tl.constexpr = DIMS[4]
    E1: tl.constexpr = DIMS[5]
    acc0, acc1 = tl.zeros([BLOCK_M, E0], tl.float32), 0.0
    if E1 > 0:
        acc1 = tl.zeros([BLOCK_M, E1], tl.float32)
    return acc0, acc1, tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)


@triton.jit
def is_spoiled(acc0, acc1, E1: tl.constexpr):
    """Whether there is a NaN: a weight of 0 times NaN or Inf behind a mask, or one that is seen."""
    spoiled = tl.max(tl.where(acc0 != acc0, 1, 0))
    if E1 > 0:
        spoiled = tl.maximum(spoiled, tl.max(tl.where(acc1 != acc1, 1, 0)))
    return spoiled > 0


@triton.jit
def add_poison(acc0, acc1, keys, place, bounds, scores, bitmap, lo, hi, DIMS: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Adds each NaN or Inf of v to the queries that see its key, and to no other: slow, exact, and hardly ever run.

    Arguments as in `attend`; with a bitmap, lo ... hi - 1 are the keys of its block.
    """
    _, _, _, v, v_strides, _ = keys
    _, _, _, _, local_rows, rows_left = place
    mask, mask_strides, bias, bias_strides = scores
    HEAD_DIM_V: tl.constexpr = DIMS[3]
    E0: tl.constexpr = DIMS[4]
    E1: tl.constexpr = DIMS[5]
    for key in range(lo, hi):
        col, n = tl.cast(key, tl.int32), tl.cast(key, tl.int64)
        v0 = load_columns(v + n * v_strides[0], v_strides, 1, 1, 0, E0, HEAD_DIM_V, False).to(tl.float32)
        bad0 = (tl.abs(v0) < float("inf")) == 0
        found = tl.max(bad0.to(tl.int32))
        if E1 > 0:
            v1 = load_columns(v + n * v_strides[0], v_strides, 1, 1, E0, E1, HEAD_DIM_V, False).to(tl.float32)
            bad1 = (tl.abs(v1) < float("inf")) == 0
            found = tl.maximum(found, tl.max(bad1.to(tl.int32)))
        if found > 0:
            seen = visible(col, bounds[0][:, None], bounds[1][:, None], HAS_FIRST)
            if mask is not None:
                tile = mask + n * mask_strides[1]
                seen = seen & (load_scores(tile, mask_strides, local_rows, 0, rows_left, 1) != 0)
            if bias is not None:
                tile = bias + n * bias_strides[1]
                added = load_scores(tile, bias_strides, local_rows, 0, rows_left, 1)
                seen = seen & (added.to(tl.float32) != float("-inf"))
            if bitmap is not None:
                seen = seen & bit(bitmap, local_rows, col - lo)
            acc0 = tl.where(seen & bad0, acc0 + v0, acc0)
            if E1 > 0:
                acc1 = tl.where(seen & bad1, acc1 + v1, acc1)
    return acc0, acc1


@triton.jit
def attend_range(
    q, keys, place, bounds, scores, numbers, key_range,
    TILE: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, EVERYWHERE: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """`state` after the keys of `tile.key_range`; arguments as in `attend`. EVERYWHERE: any tile may hide a key."""
    lo, hi, common_lo, common_hi = key_range
    BLOCK_N: tl.constexpr = TILE[1]
    blocks_before = tl.cdiv(common_lo - lo, BLOCK_N)
    blocks = blocks_before + tl.cdiv(hi - common_hi, BLOCK_N)
    state = fresh_state(TILE[0], DIMS)
    clean, again = False, True
    while again:  # once more if a NaN that a mask hides got in; with masks first, which takes fewer registers
        if HIDES:
            for block in tl.range(0, blocks):
                col = tl.where(
                    block < blocks_before, lo + block * BLOCK_N, common_hi + (block - blocks_before) * BLOCK_N
                )
                state = attend(
                    state, q, keys, place, bounds, scores, None, numbers, col, clean, TILE, DIMS, FLAGS, True, True
                )
        elif blocks > 0:  # the last keys, fewer than BLOCK_N
            last = hi // BLOCK_N * BLOCK_N
            state = attend(
                state, q, keys, place, bounds, scores, None, numbers, last, clean, TILE, DIMS, FLAGS, True, False
            )
        if not EVERYWHERE:
            for col in tl.range(common_lo, common_hi, BLOCK_N):
                state = attend(
                    state, q, keys, place, bounds, scores, None, numbers, col, clean, TILE, DIMS, FLAGS, False,
                    False,
                )  # fmt: skip
        again = False
        if HIDES:
            again = is_spoiled(state[0], state[1], DIMS[5]) & (clean == 0)
            if again:
                clean = True
                state = fresh_state(TILE[0], DIMS)
    if HIDES:
        if clean:
            acc0, acc1 = add_poison(state[0], state[1], keys, place, bounds, scores, None, lo, hi, DIMS, FLAGS[0])
            state = (acc0, acc1, state[2], state[3])
    return state


@triton.jit
def attend_lists(
    q, keys, place, bounds, scores, numbers, visits, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, EVERYWHERE: tl.constexpr,
):  # fmt: skip
    """`state` after the blocks of a block mask (`lists.open_lists`): full ones, then those with a bitmap."""
    BLOCK_N: tl.constexpr = TILE[1]
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    seqlen_k, unmasked, masked = numbers[1], visits[1], visits[2]
    state = fresh_state(TILE[0], DIMS)
    clean, again = False, True
    while again:
        if not EVERYWHERE:
            for step in tl.range(0, unmasked * STEPS):
                col = unmasked_tile(step, visits, BLOCK_K, BLOCK_N)
                state = attend(
                    state, q, keys, place, bounds, scores, None, numbers, col, clean, TILE, DIMS, FLAGS, False,
                    False,
                )  # fmt: skip
        for step in tl.range(0, masked * STEPS):
            col, bitmap = masked_tile(step, visits, BLOCK_Q, BLOCK_K, BLOCK_N)
            state = attend(
                state, q, keys, place, bounds, scores, bitmap, numbers, col, clean, TILE, DIMS, FLAGS, True, True
            )
        again = is_spoiled(state[0], state[1], DIMS[5]) & (clean == 0)
        if again:
            clean = True
            state = fresh_state(TILE[0], DIMS)
    if clean:
        acc0, acc1 = state[0], state[1]
        for index in range(0, masked):
            lo, bitmap = masked_tile(index, visits, BLOCK_Q, BLOCK_K, BLOCK_K)
            hi = tl.minimum(lo + BLOCK_K, seqlen_k)
            acc0, acc1 = add_poison(acc0, acc1, keys, place, bounds, scores, bitmap, lo, hi, DIMS, FLAGS[0])
        state = (acc0, acc1, state[2], state[3])
    return state


@triton.jit
def store_rows(
    state, sink, out, out_strides, out_exact, lse, lse_parts, statistics, inside, rows_left, keep_factor,
    BLOCK_M: tl.constexpr, DIMS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Normalizes and stores a tile: `out` points to its first row, `statistics` numbers rows of what is contiguous."""
    acc0, acc1, l_i, m_i = state
    HEAD_DIM_V: tl.constexpr = DIMS[3]
    E0: tl.constexpr = DIMS[4]
    E1: tl.constexpr = DIMS[5]
    factor, top, log2_total = normalizer(m_i, l_i, sink)
    if DROPOUT:
        factor *= keep_factor
    if lse is not None:
        tl.store(lse + statistics, natural_lse(top, log2_total), mask=inside)
    if lse_parts is not None:
        tl.store(lse_parts + 2 * statistics, top, mask=inside)
        tl.store(lse_parts + 2 * statistics + 1, log2_total, mask=inside)
    acc0 *= factor[:, None]
    store_columns(out, out_strides, acc0, rows_left, BLOCK_M, 0, E0, HEAD_DIM_V)
    if E1 > 0:
        acc1 *= factor[:, None]
        store_columns(out, out_strides, acc1, rows_left, BLOCK_M, E0, E1, HEAD_DIM_V)
    if out_exact is not None:
        out_exact += statistics[:, None] * HEAD_DIM_V
        store_columns(out_exact, (0, 1), acc0, rows_left, BLOCK_M, 0, E0, HEAD_DIM_V)
        if E1 > 0:
            store_columns(out_exact, (0, 1), acc1, rows_left, BLOCK_M, E0, E1, HEAD_DIM_V)
