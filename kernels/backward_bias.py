"""Gradient of a bias: a program keeps a block of the bias and goes through what it is broadcast over."""

import triton
import triton.language as tl

from . import launch
from .backward_tile import gradients_of_scores, load_statistics, product
from .bounds import limits_of, row_bounds
from .lists import find_tile, open_lists
from .rows import lengths_of, row_number, rows_of
from .scores import flags_of, terms_of
from .state import Place, Tile
from .tile import load_factor


@triton.jit(do_not_specialize=[*launch.SIZES, "num_bitmaps", "batches", "heads"])
def bias_kernel(
    q,             # [batch, num_heads, seqlen_q, head_dim]
    k,             # [batch, num_heads_k, seqlen_k, head_dim]
    v,             # [batch, num_heads_k, seqlen_k, head_dim_v]
    dout,          # [batch, num_heads, seqlen_q, head_dim_v]
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous
    delta,         # [batch, num_heads, seqlen_q], contiguous
    dbias,         # [batch or 1, num_heads or 1, seqlen_q or 1, seqlen_k or 1]; 1: summed over
    k_start, k_end, mask, bias, alibi_slopes, softmax_scale,  # as in prefill.forward_kernel
    seed: tl.int64,
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of a block mask (`lists.lists_of`), or None
    list_strides, num_bitmaps, dbias_strides,
    q_strides, k_strides, v_strides, dout_strides, start_strides, end_strides, mask_strides, bias_strides,
    slope_strides, scale_stride,
    softcap, diagonal_lo, diagonal_hi, threshold: tl.int64, keep_factor,
    num_heads, group_size, seqlen_q, seqlen_k, batches, heads,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEARNED_SCALE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    WIDE: tl.constexpr, RELOAD: tl.constexpr, ROWS_SUMMED: tl.constexpr, COLS_SUMMED: tl.constexpr,
):  # fmt: skip
    """dS summed over what the bias is broadcast over: `batches` batches, `heads` heads, rows, columns."""
    # 1. what is known when this is compiled; which block of the bias, and the range of what is summed over
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, RELOAD, PRECISION)
    FLAGS: tl.constexpr = flags_of(
        k_start, k_end, mask, bias, alibi_slopes, counts, HAS_LO, HAS_HI, SOFTCAP, DROPOUT, LEARNED_SCALE, EXACT
    )
    num_m, num_n = tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_k, BLOCK_N)
    m_blocks, n_blocks = 1, 1  # of the bias
    if not ROWS_SUMMED:
        m_blocks, num_m = num_m, 1
    if not COLS_SUMMED:
        n_blocks, num_n = num_n, 1
    pid = tl.program_id(0)
    n_first, pid = pid % n_blocks, pid // n_blocks
    m_first, pid = pid % m_blocks, pid // m_blocks
    head_first, batch_first = pid % (num_heads // heads), pid // (num_heads // heads)

    # 2. loop
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in tl.range(0, batches * heads * num_m * num_n):
        col, index = (n_first + index % num_n) * BLOCK_N, index // num_n
        row, index = (m_first + index % num_m) * BLOCK_M, index // num_m
        head, batch = head_first + index % heads, batch_first + index // heads
        b, h, hk = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(head // group_size, tl.int64)
        m, n = tl.cast(row, tl.int64), tl.cast(col, tl.int64)
        lengths = lengths_of(batch, seqlen_q, seqlen_k)
        rows_left, keys_left = lengths.queries - row, lengths.keys - col
        limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
        bounds = row_bounds(row + tl.arange(0, BLOCK_M), limits, lengths, HAS_LO, HAS_HI)
        is_visited, bitmap = (tl.min(bounds.first) < col + BLOCK_N) & (tl.max(bounds.last) > col), None
        if counts is not None:
            visits = open_lists(
                (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b, h, row,
                lengths.keys, BLOCK_Q, BLOCK_K, True,
            )  # fmt: skip
            is_listed, bitmap = find_tile(col, visits, BLOCK_Q, BLOCK_K, 128)
            is_visited = is_visited & is_listed
        if is_visited:
            of_mask = rows_of(mask, mask_strides, b, h, 0, WIDE)
            of_bias = rows_of(bias, bias_strides, b, h, 0, WIDE)
            of_q = rows_of(q, q_strides, b, h, m, WIDE, LOOP=True)
            of_k = rows_of(k, k_strides, b, hk, n, WIDE, LOOP=True)
            of_v = rows_of(v, v_strides, b, hk, n, WIDE, LOOP=True)
            of_dout = rows_of(dout, dout_strides, b, h, m, WIDE, LOOP=True)
            of_q = load_factor(of_q, rows_left, BLOCK_M, D0, D1, HEAD_DIM, RELOAD)
            s, _, _ = product(of_q, of_k, keys_left, BLOCK_M, BLOCK_N, D0, D1, HEAD_DIM, True, TILE)
            of_dout = load_factor(of_dout, rows_left, BLOCK_M, E0, E1, HEAD_DIM_V, RELOAD)
            dp, _, _ = product(of_dout, of_v, keys_left, BLOCK_M, BLOCK_N, E0, E1, HEAD_DIM_V, True, TILE)
            number = row_number(b, h, m, num_heads, seqlen_q)
            statistics = load_statistics(lse_parts + 2 * number, delta + number, rows_left, BLOCK_M, True)
            terms = terms_of(
                of_mask, of_bias, alibi_slopes, slope_strides, softmax_scale, scale_stride, softcap, threshold,
                keep_factor, seed, b, h, LEARNED_SCALE,
            )  # fmt: skip
            acc += gradients_of_scores(
                s, dp, Place(batch, head // group_size, head), row, col, terms, lengths, bitmap, statistics, bounds,
                TILE, FLAGS, True, False,
            ).scores  # fmt: skip

    # 3. epilogue
    row, col = m_first * BLOCK_M, n_first * BLOCK_N
    dbias += tl.cast(batch_first, tl.int64) * dbias_strides[0] + tl.cast(head_first, tl.int64) * dbias_strides[1]
    if ROWS_SUMMED and COLS_SUMMED:
        tl.store(dbias, tl.sum(acc))
    elif ROWS_SUMMED:
        cols = col + tl.arange(0, BLOCK_N)
        tl.store(dbias + cols.to(tl.int64) * dbias_strides[3], tl.sum(acc, 0), mask=cols < seqlen_k)
    elif COLS_SUMMED:
        rows = row + tl.arange(0, BLOCK_M)
        tl.store(dbias + rows.to(tl.int64) * dbias_strides[2], tl.sum(acc, 1), mask=rows < seqlen_q)
    else:
        local_rows, local_cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        dbias += tl.cast(row, tl.int64) * dbias_strides[2] + tl.cast(col, tl.int64) * dbias_strides[3]
        inside = (local_rows < seqlen_q - row) & (local_cols < seqlen_k - col)
        pointers = dbias + local_rows * dbias_strides[2] + local_cols * dbias_strides[3]
        tl.store(pointers, acc.to(dbias.dtype.element_ty), mask=inside)
