"""Forward pass: a program takes BLOCK_M queries of one head through the keys that they see.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867), tiled as in FlashAttention-2 (Dao, arXiv 2307.08691). Key blocks
in which every query sees every key run a loop without masks; the others, at the ends of the range, run a second one.
"""

import triton
import triton.language as tl

from . import launch
from .tile import (
    LOG2E,
    bias_log2,
    bit,
    bits,
    dropout_keep,
    finite_or,
    key_range,
    load_columns,
    load_scale,
    load_scores,
    load_slope,
    natural_lse,
    normalizer,
    row_bounds,
    softcap_scores,
    store_columns,
    visible,
    widen,
)


@triton.jit
def attend(
    state, q0, q1, keys, place, bounds, scores, numbers, col, clean,
    TILE: tl.constexpr, DIMS: tl.constexpr, FLAGS: tl.constexpr, MASKED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """`state` after one more block of keys, from `col` on.

    keys     (k, strides, descriptor or None, v, strides, descriptor or None) of the head
    place    (batch, key head, query heads, positions of the queries, their places in the tile, how many are left);
             [M, 1] or, of heads, one
    bounds   (first, last) of the keys that each query sees
    scores   (mask, strides, bias, strides, bitmap), pointers to the first query, or None; bitmap (`tile.bits`) from `col` on
    MASKED   some query may not see some key. HIDES: NaN or Inf may be there, and counts as 0 if `clean`
    """
    acc0, acc1, l_i, m_i = state
    k, k_strides, k_descriptor, v, v_strides, v_descriptor = keys
    batch, head_k, heads, rows, local_rows, rows_left = place
    mask, mask_strides, bias, bias_strides, bitmap = scores
    seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed = numbers
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
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
    SCALE_OF_ROWS: tl.constexpr = FLAGS[4]
    PRECISION: tl.constexpr = FLAGS[5]
    MODIFIED: tl.constexpr = SOFTCAP or ALIBI or SCALE_OF_ROWS or bias is not None
    keys_left, n = seqlen_k - col, tl.cast(col, tl.int64)
    local_cols = tl.arange(0, BLOCK_N)[None, :]

    # loads before the product: of two layouts the compiler keeps the later one for the running maximum and sum
    if MASKED:
        seen = visible(col + local_cols, bounds[0][:, None], bounds[1][:, None], HAS_FIRST)
        if mask is not None:
            tile = mask + n * mask_strides[1]
            seen = seen & (load_scores(tile, mask_strides, local_rows, local_cols, rows_left, keys_left) != 0)
        if bitmap is not None:
            seen = seen & bits(bitmap, local_rows, BLOCK_N)
        if bias is not None:
            tile = bias + n * bias_strides[1]
            added = load_scores(tile, bias_strides, local_rows, local_cols, rows_left, keys_left)
            seen = seen & (added.to(tl.float32) != float("-inf"))

    if k_descriptor is not None:
        k0 = k_descriptor.load([batch, head_k, tl.cast(col, tl.int32), 0]).reshape([BLOCK_N, D0])
    else:
        k0 = load_columns(k + n * k_strides[0], k_strides, keys_left, BLOCK_N, 0, D0, HEAD_DIM, MASKED)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        k1 = load_columns(k + n * k_strides[0], k_strides, keys_left, BLOCK_N, D0, D1, HEAD_DIM, MASKED)
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)

    factor = scale * LOG2E
    if MODIFIED:
        if SOFTCAP:
            s, _ = softcap_scores(s, scale, softcap)
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
def add_poison(acc0, acc1, keys, place, bounds, scores, lo, hi, DIMS: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Adds each NaN or Inf of v to the queries that see its key, and to no other: slow, exact, and hardly ever run.

    Arguments as in `attend`; with a bitmap, lo ... hi - 1 are the keys of its block.
    """
    _, _, _, v, v_strides, _ = keys
    _, _, _, _, local_rows, rows_left = place
    mask, mask_strides, bias, bias_strides, bitmap = scores
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
def store_rows(
    state, sink, out, out_strides, lse, lse_parts, statistics, inside, rows_left, keep_factor, BLOCK_M: tl.constexpr,
    DIMS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Normalizes and stores a tile: `out` points to its first row, `statistics` numbers the rows of lse."""
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
    store_columns(out, out_strides, acc0 * factor[:, None], rows_left, BLOCK_M, 0, E0, HEAD_DIM_V)
    if E1 > 0:
        store_columns(out, out_strides, acc1 * factor[:, None], rows_left, BLOCK_M, E0, E1, HEAD_DIM_V)


@triton.jit
def positive_scale(scale, q0, q1, D1: tl.constexpr):
    """(q0, q1, scale) with the sign of scale moved to q: the online maximum needs a positive factor."""
    sign = tl.where(scale > 0.0, 1.0, tl.where(scale < 0.0, -1.0, scale * 0.0))
    q0 = (q0 * sign).to(q0.dtype)
    if D1 > 0:
        q1 = (q1 * sign).to(q1.dtype)
    return q0, q1, tl.where(scale == 0.0, 1.0, tl.abs(scale))


@triton.jit(do_not_specialize=launch.SIZES)
def forward_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    out,           # [batch, num_heads, seqlen_q, head_dim_v]
    lse,           # [batch, num_heads, seqlen_q], contiguous, or None
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous, or None: top, log2_total (`tile.normalizer`)
    k_start,       # [batch, num_heads, seqlen_q] by strides, or None
    k_end,         # likewise
    mask,          # [batch, num_heads, seqlen_q, seqlen_k] by strides, bool, or None
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
    EVERYWHERE: tl.constexpr = mask is not None or bias is not None  # any tile may hide a key
    HIDES: tl.constexpr = EVERYWHERE or BOUNDED
    TILE: tl.constexpr = (BLOCK_M, BLOCK_N)
    DIMS: tl.constexpr = (HEAD_DIM, D0, D1, HEAD_DIM_V, E0, E1)
    FLAGS: tl.constexpr = (HAS_FIRST, SOFTCAP, alibi_slopes is not None, DROPOUT, False, PRECISION)
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
    if HAS_HI:
        m_block = num_m - 1 - m_block  # causal: longest first
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    row, head_k = m_block * BLOCK_M, head // group_size
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
    lo, hi, common_lo, common_hi = key_range(bounds, seqlen_k, BLOCK_N, HAS_FIRST, BOUNDED, EVERYWHERE)

    # 2. q, and where the rest is
    q += b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
    k += b * k_strides[0] + hk * k_strides[1]
    v += b * v_strides[0] + hk * v_strides[1]
    keys = (k, widen(k_strides, WIDE), k_descriptor, v, widen(v_strides, WIDE), v_descriptor)
    place = (batch, head_k, head, rows[:, None], tl.arange(0, BLOCK_M)[:, None], rows_left)
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1] + m * mask_strides[2]
    if bias is not None:
        bias += b * bias_strides[0] + h * bias_strides[1] + m * bias_strides[2]
    scores = (mask, widen(mask_strides, WIDE), bias, widen(bias_strides, WIDE), None)
    q0 = load_columns(q, widen(q_strides, WIDE), rows_left, BLOCK_M, 0, D0, HEAD_DIM, True)
    q1 = 0.0
    if D1 > 0:
        q1 = load_columns(q, widen(q_strides, WIDE), rows_left, BLOCK_M, D0, D1, HEAD_DIM, True)
    scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
    if LEARNED_SCALE or MOVE_SIGN:
        q0, q1, scale = positive_scale(scale, q0, q1, D1)
    slope = load_slope(alibi_slopes, slope_strides, b, h)
    numbers = (seqlen_q, seqlen_k, scale, softcap, slope, threshold, seed)

    # 3. loops: with masks, without masks (in this order they take fewer registers); both once more if a NaN that a mask
    # hides got in
    blocks_before = tl.cdiv(common_lo - lo, BLOCK_N)
    blocks = blocks_before + tl.cdiv(hi - common_hi, BLOCK_N)
    state = fresh_state(BLOCK_M, DIMS)
    clean, again = False, True
    while again:
        if HIDES:
            for block in tl.range(0, blocks):
                col = tl.where(
                    block < blocks_before, lo + block * BLOCK_N, common_hi + (block - blocks_before) * BLOCK_N
                )
                state = attend(
                    state, q0, q1, keys, place, bounds, scores, numbers, col, clean, TILE, DIMS, FLAGS, True, True
                )
        elif blocks > 0:  # the last keys, fewer than BLOCK_N
            last = hi // BLOCK_N * BLOCK_N
            state = attend(
                state, q0, q1, keys, place, bounds, scores, numbers, last, clean, TILE, DIMS, FLAGS, True, False
            )
        if not EVERYWHERE:
            for col in tl.range(common_lo, common_hi, BLOCK_N):
                state = attend(
                    state, q0, q1, keys, place, bounds, scores, numbers, col, clean, TILE, DIMS, FLAGS, False, False
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
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + h * sink_stride).to(tl.float32) * LOG2E
    out += b * out_strides[0] + h * out_strides[1] + m * out_strides[2]
    statistics = (b * num_heads + h) * seqlen_q + rows
    store_rows(
        state, sink, out, widen(out_strides, WIDE), lse, lse_parts, statistics, rows < seqlen_q, rows_left, keep_factor,
        BLOCK_M, DIMS, DROPOUT,
    )  # fmt: skip


def forward(problem, q, k, v, terms):
    """Forward pass without gradients (kernel signature of dispatch.Row)."""
    return _forward(problem, q, k, v, terms, False)[:2]


def forward_for_backward(problem, q, k, v, terms):
    """(out, lse or None, saved): saved is what `backward.backward` wants, out and lse_parts (see `forward_kernel`)."""
    out, lse, lse_parts = _forward(problem, q, k, v, terms, True)
    return out, lse, (out, lse_parts)


def _forward(problem, q, k, v, terms, for_backward: bool):
    """(out, lse, lse_parts), None where not needed; `out` follows q's memory order."""
    out, lse, lse_parts = launch.empty_results(problem, q, for_backward)
    if out.numel():
        extras = (terms.k_start, terms.k_end, terms.mask, terms.bias, terms.alibi_slopes)
        tensors = (q, k, v, out, lse, lse_parts, *extras, terms.softmax_scale, terms.seed or 0, terms.sinks)
        key = ("prefill", for_backward, *launch.call_key(problem, q, k, v, terms))

        def plan():
            device = launch.device_facts(q.get_device())
            return launch.choose("prefill", problem, device, tensors, lambda t: _plan(problem, q, k, v, out, terms, t))

        launch.run(key, tensors, plan)
    return out, lse, lse_parts


def _plan(problem, q, k, v, out, terms, tiles) -> launch.Plan:
    device = launch.device_facts(q.get_device())
    arguments, constexprs = launch.score_arguments(problem, q, k, v, out, terms)
    constexprs |= {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N}
    constexprs["MOVE_SIGN"] = not problem.learned_scale and terms.softmax_scale <= 0.0
    programs = triton.cdiv(problem.seqlen_q, tiles.BLOCK_M) * problem.num_heads * problem.batch
    return launch.Plan(
        forward_kernel, programs, (*launch.strides(terms.sinks, 1), *arguments), constexprs, tiles.options(device),
        launch.descriptors(device, k, v, tiles.BLOCK_N, constexprs),
    )  # fmt: skip
