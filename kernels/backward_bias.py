"""Gradient of a bias: a program keeps a block of the bias and goes through what it is broadcast over."""

import triton
import triton.language as tl

from . import launch
from .backward_tile import gradients_of_scores, load_statistics, product
from .lists import find_tile, open_lists
from .tile import limits_of, load_both, load_scale, load_slope, row_bounds, scores_of, widen


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
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps,  # of a block mask (`lists.of`), or None
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
    # 1. which block of the bias, and the range of what is summed over
    HAS_FIRST: tl.constexpr = HAS_LO or k_start is not None
    FLAGS: tl.constexpr = (HAS_FIRST, SOFTCAP, alibi_slopes is not None, DROPOUT, LEARNED_SCALE, EXACT, PRECISION)
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
        rows_left, keys_left = seqlen_q - row, seqlen_k - col
        limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
        bounds = row_bounds(row + tl.arange(0, BLOCK_M), limits, seqlen_q, seqlen_k, HAS_LO, HAS_HI)
        is_visited, bitmap = (tl.min(bounds[0]) < col + BLOCK_N) & (tl.max(bounds[1]) > col), None
        if counts is not None:
            visits = open_lists(
                (counts, indices, bitmap_ids, full_counts, full_indices, bitmaps), list_strides, num_bitmaps, b, h, row,
                seqlen_k, BLOCK_Q, BLOCK_K, True,
            )  # fmt: skip
            is_listed, bitmap = find_tile(col, visits, BLOCK_Q, BLOCK_K, 128)
            is_visited = is_visited & is_listed
        if is_visited:
            scores = scores_of(mask, mask_strides, bias, bias_strides, b, h, 0, WIDE)
            q_head = q + b * q_strides[0] + h * q_strides[1] + m * q_strides[2]
            k_head = k + b * k_strides[0] + hk * k_strides[1] + n * k_strides[2]
            v_head = v + b * v_strides[0] + hk * v_strides[1] + n * v_strides[2]
            dout_head = dout + b * dout_strides[0] + h * dout_strides[1] + m * dout_strides[2]
            of_q = (q_head, widen(q_strides, WIDE), rows_left)
            if not RELOAD:
                of_q = load_both(q_head, widen(q_strides, WIDE), rows_left, BLOCK_M, D0, D1, HEAD_DIM)
            s, _, _ = product(
                of_q, k_head, widen(k_strides, WIDE), keys_left, BLOCK_M, BLOCK_N, D0, D1, HEAD_DIM, True, PRECISION,
                RELOAD,
            )  # fmt: skip
            of_dout = (dout_head, widen(dout_strides, WIDE), rows_left)
            if not RELOAD:
                of_dout = load_both(dout_head, widen(dout_strides, WIDE), rows_left, BLOCK_M, E0, E1, HEAD_DIM_V)
            dp, _, _ = product(
                of_dout, v_head, widen(v_strides, WIDE), keys_left, BLOCK_M, BLOCK_N, E0, E1, HEAD_DIM_V, True,
                PRECISION, RELOAD,
            )  # fmt: skip
            of_row = (b * num_heads + h) * seqlen_q + m
            statistics = load_statistics(lse_parts + 2 * of_row, delta + of_row, rows_left, BLOCK_M, True)
            scale = load_scale(softmax_scale, scale_stride, h, LEARNED_SCALE)
            slope = load_slope(alibi_slopes, slope_strides, b, h)
            _, ds, _ = gradients_of_scores(
                s, dp, scores, bitmap, (batch, head, row, col), statistics, bounds,
                (seqlen_q, seqlen_k, scale, softcap, slope, threshold, keep_factor, seed), BLOCK_M, BLOCK_N, FLAGS,
                True, False,
            )  # fmt: skip
            acc += ds

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
