"""Where a row lies in memory, and how long its sequence is: asked here, by every kernel.

Dense tensors answer with strides, by tile (`GATHERED` False) or, where the rows of a tile are of several heads, with
a pointer for each row. So do the keys of a paged cache (`paged`). Packed sequences and gathered rows would be further
answers of the same functions.
"""

import triton
import triton.language as tl

from .state import Cache, Held, Lengths, Pages, Rows


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
def cache_of(
    block_table, table_strides, num_blocks, num_pages, page_size, k_strides, v_strides, k_scale, k_scale_strides,
    v_scale, v_scale_strides, batch, head, WIDE: tl.constexpr,
):  # fmt: skip
    """How the keys of a sequence are held, by these arguments of `decode_kernel`; None where k and v are plain."""
    pages, k_rows, v_rows = None, None, None
    if block_table is not None:
        pages = Pages(block_table + batch * table_strides[0], table_strides[1], num_blocks, num_pages, page_size)
        batch = batch * 0  # pages are first in a paged cache, and not sequences
    if k_scale is not None:
        k_rows = rows_of(k_scale, k_scale_strides, batch, head, 0, WIDE)
        v_rows = rows_of(v_scale, v_scale_strides, batch, head, 0, WIDE)
    if block_table is None and k_scale is None:
        return None
    else:
        return Cache(
            pages, Held(k_strides[0], k_rows, k_scale_strides[0]), Held(v_strides[0], v_rows, v_scale_strides[0])
        )


@triton.jit
def is_quantized(keys):
    """Whether k and v are int8 with scales."""
    if keys.cache is None:
        return False
    else:
        return keys.cache.k.scale is not None


@triton.jit
def paged(rows, n, pages, page_stride, N: tl.constexpr):
    """N rows of keys from the n-th (in 64 bits) on, wherever their `Pages` are; whatever the table holds, these are."""
    if pages is None:
        return skip(rows, n)
    else:
        at = n + tl.arange(0, N)
        entry = at // pages.size
        page = tl.load(pages.table + entry * pages.step, mask=entry < pages.length, other=0).to(tl.int64)
        page = tl.minimum(tl.maximum(page, 0), pages.count - 1)
        offsets = page * page_stride + at % pages.size * rows.row_stride
        return Rows(rows.ptr + offsets[:, None], 0, rows.col_stride)


@triton.jit
def k_rows(keys, n, N: tl.constexpr):
    """N keys from the n-th on."""
    if keys.cache is None:
        return skip(keys.k, n)
    else:
        return paged(keys.k, n, keys.cache.pages, keys.cache.k.page_stride, N)


@triton.jit
def v_rows(keys, n, N: tl.constexpr):
    """The values of N keys from the n-th on."""
    if keys.cache is None:
        return skip(keys.v, n)
    else:
        return paged(keys.v, n, keys.cache.pages, keys.cache.v.page_stride, N)


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
