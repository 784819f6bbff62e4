"""The first kernel of the backward pass: what each query needs, and which keys each block of queries sees."""

import triton
import triton.language as tl

from . import launch
from .bounds import limits_of, row_bounds
from .rows import block_of_queries, lengths_of, row_number, rows_of
from .softmax import load_sink
from .tile import load_columns


@triton.jit(do_not_specialize=launch.SIZES)
def delta_kernel(
    out,           # [batch, num_heads, seqlen_q, head_dim_v], not rounded to 16 bits
    dout,          # [batch, num_heads, seqlen_q, head_dim_v]
    exact,         # [batch, num_heads, seqlen_q], contiguous: rowsum(dP * P), or None: rowsum(dout * out) will do
    dlse,          # [batch, num_heads, seqlen_q] by strides, or None
    lse_parts,     # [batch, num_heads, seqlen_q, 2], contiguous
    sinks,         # [num_heads], or None
    k_start,       # [batch, num_heads, seqlen_q] by strides, or None
    k_end,         # likewise
    delta,         # [batch, num_heads, seqlen_q], contiguous
    dsinks,        # likewise, or None: the part of each row
    block_bounds,  # [batch, num_heads, blocks of seqlen_q, 4], contiguous
    out_strides, dout_strides, dlse_strides, start_strides, end_strides, sink_stride,
    diagonal_lo, diagonal_hi, num_heads, seqlen_q, seqlen_k,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """delta, the rows of dsinks, and (lo, hi, common_lo, common_hi) of each block of queries: some row sees a key of
    lo ... hi - 1 and none another, every row sees all of common_lo ... common_hi - 1."""
    batch, head, m_block = block_of_queries(num_heads, seqlen_q, BLOCK_M, False)
    lengths, row = lengths_of(batch, seqlen_q, seqlen_k), m_block * BLOCK_M
    b, h, m = batch.to(tl.int64), head.to(tl.int64), row.to(tl.int64)
    rows, left = row + tl.arange(0, BLOCK_M), lengths.queries - row

    statistics = row_number(b, h, rows, num_heads, seqlen_q)
    if exact is not None:
        row_delta = tl.load(exact + statistics, mask=rows < seqlen_q, other=0.0)
    else:
        of_out, of_dout = rows_of(out, out_strides, b, h, m, WIDE), rows_of(dout, dout_strides, b, h, m, WIDE)
        o = load_columns(of_out, left, BLOCK_M, 0, BLOCK_D, HEAD_DIM_V, True).to(tl.float32)
        do = load_columns(of_dout, left, BLOCK_M, 0, BLOCK_D, HEAD_DIM_V, True).to(tl.float32)
        row_delta = tl.sum(o * do, 1)
    if dlse is not None:
        dlse += b * dlse_strides[0] + h * dlse_strides[1]
        row_delta -= tl.load(dlse + rows.to(tl.int64) * dlse_strides[2], mask=rows < seqlen_q, other=0.0)
    tl.store(delta + statistics, row_delta, mask=rows < seqlen_q)
    if dsinks is not None:
        sink = load_sink(sinks, sink_stride, h)
        top = tl.load(lse_parts + 2 * statistics, mask=rows < seqlen_q, other=0.0)
        log2_total = tl.load(lse_parts + 2 * statistics + 1, mask=rows < seqlen_q, other=float("inf"))
        p_sink = tl.exp2(sink - top - log2_total)
        tl.store(dsinks + statistics, tl.where(p_sink == 0.0, 0.0, -p_sink * row_delta), mask=rows < seqlen_q)

    limits = limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, b, h)
    bounds = row_bounds(rows, limits, lengths, HAS_LO, HAS_HI)
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    block_bounds += 4 * ((b * num_heads + h) * num_m + m_block)
    tl.store(block_bounds, tl.min(bounds.first))
    tl.store(block_bounds + 1, tl.max(bounds.last))
    tl.store(block_bounds + 2, tl.max(bounds.first))
    tl.store(block_bounds + 3, tl.where(left < BLOCK_M, 0, tl.min(bounds.last)))  # rows past the end need a check
