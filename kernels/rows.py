"""Where a row lies in memory, and how long its sequence is: asked here, by every kernel.

Dense tensors answer with strides, by tile (`GATHERED` False) or, where the rows of a tile are of several heads, with
a pointer for each row. Packed sequences, page tables and gathered rows are further answers of the same functions.
"""

import triton
import triton.language as tl

from .state import Lengths, Rows


@triton.jit
def lengths_of(batch, seqlen_q, seqlen_k):
    """How many queries and keys sequence `batch` has."""
    return Lengths(seqlen_q, seqlen_k)


@triton.jit
def query_start(lengths):
    """Position of query 0 among the keys: the ends of both are aligned."""
    return lengths.keys - lengths.queries


@triton.jit
def widen(strides, WIDE: tl.constexpr):
    """The last two strides, as int64 where 32 bits cannot hold an offset inside a tile."""
    if WIDE:
        return tl.cast(strides[2], tl.int64), tl.cast(strides[3], tl.int64)
    else:
        return strides[2], strides[3]


@triton.jit
def rows_of(
    ptr, strides, batch, head, first, WIDE: tl.constexpr, GATHERED: tl.constexpr = False, LOOP: tl.constexpr = False
):
    """Rows of a head from `first` on, of a tensor or None with these strides of batch, head, row, column.

    batch, head, first are int64. GATHERED: head and first are [M] and say where each row is. LOOP: head changes in a
    loop, and the batch does not."""
    row_stride, col_stride = widen(strides, WIDE)
    if ptr is None:
        return Rows(None, row_stride, col_stride)
    elif GATHERED:
        offsets = batch * strides[0] + head * strides[1] + first * strides[2]
        return Rows(ptr + offsets[:, None], 0, col_stride)
    elif LOOP:
        return Rows(ptr + batch * strides[0] + head * strides[1] + first * strides[2], row_stride, col_stride)
    else:
        return Rows(ptr + (batch * strides[0] + head * strides[1] + first * strides[2]), row_stride, col_stride)


@triton.jit
def skip(rows, n):
    """The rows from the n-th on."""
    return Rows(rows.ptr + n * rows.row_stride, rows.row_stride, rows.col_stride)


@triton.jit
def row_number(batch, head, row, num_heads, seqlen_q):
    """Where a query's number is in a contiguous [batch, num_heads, seqlen_q]."""
    return (batch * num_heads + head) * seqlen_q + row


@triton.jit
def block_of_queries(num_heads, seqlen_q, BLOCK_M: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(batch, head, block) of this program, where each takes a block of BLOCK_M queries of a head."""
    num_m = tl.cdiv(seqlen_q, BLOCK_M)
    m_block = tl.program_id(0) % num_m
    if LAST_FIRST:
        m_block = num_m - 1 - m_block  # causal: longest first
    head, batch = tl.program_id(0) // num_m % num_heads, tl.program_id(0) // num_m // num_heads
    return batch, head, m_block
