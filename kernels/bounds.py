"""Masks as ranges of keys: of a query, of a block of queries; and what is visible in a tile."""

import triton
import triton.language as tl

from .state import Bounds, KeyRange, Limits

INT_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, batch, head):
    """What bounds the keys of a head's queries; k_start, k_end may be None."""
    if k_start is not None:
        k_start += batch * start_strides[0] + head * start_strides[1]
    if k_end is not None:
        k_end += batch * end_strides[0] + head * end_strides[1]
    return Limits(k_start, start_strides[2], k_end, end_strides[2], diagonal_lo, diagonal_hi)


@triton.jit
def row_bounds(rows, limits, lengths, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr):
    """The keys that each row sees. Rows past the end repeat the last one.

    Whatever k_start and k_end hold, the bounds are in 0 ... the number of keys.
    """
    rows = tl.minimum(rows, lengths.queries - 1)
    first, last = tl.zeros_like(rows), tl.zeros_like(rows) + lengths.keys
    if HAS_LO:
        first = tl.maximum(first, rows + limits.diagonal_lo)
    if HAS_HI:
        last = tl.minimum(last, rows + limits.diagonal_hi + 1)
    if limits.k_start is not None:
        first = tl.maximum(first, tl.load(limits.k_start + rows.to(tl.int64) * limits.start_stride))
    if limits.k_end is not None:
        last = tl.minimum(last, tl.load(limits.k_end + rows.to(tl.int64) * limits.end_stride))
    empty = first >= last
    return Bounds(tl.where(empty, INT_MAX, first), tl.where(empty, 0, last))


@triton.jit
def key_range(bounds, seqlen_k, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr):
    """The keys of a block of queries with these bounds."""
    lo, hi, common_lo, common_hi = 0, seqlen_k, 0, seqlen_k
    if FLAGS.HAS_FIRST:
        lo, common_lo = tl.min(bounds.first), tl.max(bounds.first)
    if FLAGS.BOUNDED:
        hi, common_hi = tl.max(bounds.last), tl.min(bounds.last)
    lo = tl.minimum(lo, hi) // BLOCK_N * BLOCK_N
    common_hi = common_hi // BLOCK_N * BLOCK_N
    common_lo = tl.minimum(tl.cdiv(tl.minimum(common_lo, hi), BLOCK_N) * BLOCK_N, common_hi)
    if FLAGS.EVERYWHERE:
        common_hi = common_lo
    if common_lo == common_hi:
        common_lo, common_hi = hi, hi
    return KeyRange(lo, hi, common_lo, common_hi)


@triton.jit
def share_of_range(visited, split, keys_per_split):
    """The keys of a `KeyRange` that a split takes: those of its place among all keys."""
    lo, hi = tl.maximum(visited.lo, split * keys_per_split), tl.minimum(visited.hi, (split + 1) * keys_per_split)
    hi = tl.maximum(lo, hi)
    common_lo = tl.maximum(tl.minimum(visited.common_lo, hi), lo)
    common_hi = tl.maximum(tl.minimum(visited.common_hi, hi), lo)
    return KeyRange(lo, hi, common_lo, common_hi)


@triton.jit
def masked_blocks(visited, BLOCK_N: tl.constexpr):
    """(how many blocks of keys before the common ones need a mask, how many before and after them)"""
    before = tl.cdiv(visited.common_lo - visited.lo, BLOCK_N)
    return before, before + tl.cdiv(visited.hi - visited.common_hi, BLOCK_N)


@triton.jit
def masked_block(index, before, visited, BLOCK_N: tl.constexpr):
    """First key of one of `masked_blocks`."""
    return tl.where(index < before, visited.lo + index * BLOCK_N, visited.common_hi + (index - before) * BLOCK_N)


@triton.jit
def visible(cols, first, last, HAS_FIRST: tl.constexpr):
    """Which keys the bounds of the rows leave; first, last shaped as rows. Without HAS_FIRST, first is 0."""
    if HAS_FIRST:  # one comparison for two, which is false for all of (INT_MAX, 0) as well
        return (cols - first).to(tl.uint32) < (last - first).to(tl.uint32)
    else:
        return cols < last


@triton.jit
def bits(bitmap, rows, N: tl.constexpr):
    """The first N bits of each row (bit j % 8 of byte j // 8 is j), as a bool [M, N]: a byte is loaded once.

    rows: [M, 1]. What is not read is True."""
    octets = tl.arange(0, N // 8)[None, :]
    inside = rows * 0 + octets * 8 < bitmap.limit
    byte = tl.load(bitmap.ptr + rows * bitmap.stride + octets, mask=inside, other=255).to(tl.int32)
    return tl.reshape((byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, [rows.shape[0], N]) != 0


@triton.jit
def bit(bitmap, rows, col):
    """Bit `col` of each row, as `bits`."""
    byte = tl.load(bitmap.ptr + rows * bitmap.stride + col // 8, mask=rows * 0 + col < bitmap.limit, other=255)
    return ((byte.to(tl.int32) >> (col % 8)) & 1) != 0
