"""The lists of a `BlockMask` inside a kernel, and how they get there. Whatever they hold, no kernel reads out of bounds.

For the gradients of k and v the lists are those of `BlockMask.transpose()`: "line" is a block of keys then, and the entries are
blocks of queries.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch


@triton.jit
def open_lists(lists, strides, batch, head, line):
    """(partial count, indices, bitmap numbers, full count, indices) of one line of blocks."""
    counts, indices, bitmap_ids, full_counts, full_indices = lists
    partial_strides, full_strides, longest, full_longest = strides
    offset = batch * partial_strides[0] + head * partial_strides[1] + line * partial_strides[2]
    full_offset = batch * full_strides[0] + head * full_strides[1] + line * full_strides[2]
    count, full_count = tl.load(counts + offset), tl.load(full_counts + full_offset)
    return (
        tl.minimum(tl.maximum(count, 0), longest), indices + offset * longest, bitmap_ids + offset * longest,
        tl.minimum(tl.maximum(full_count, 0), full_longest), full_indices + full_offset * full_longest,
    )  # fmt: skip


@triton.jit
def unmasked_count(opened, num_blocks, is_ragged, BOUNDED: tl.constexpr):
    """How many of the full blocks need no mask at all: not the last one if it reaches past the end."""
    if BOUNDED:
        return 0
    else:
        last = tl.load(opened[4] + opened[3] - 1, mask=opened[3] > 0, other=-1)
        return opened[3] - tl.where(is_ragged & (last >= num_blocks - 1), 1, 0)


@triton.jit
def unmasked_block(index, opened, num_blocks):
    return tl.minimum(tl.maximum(tl.load(opened[4] + index), 0), num_blocks - 1)


@triton.jit
def masked_block(index, opened, unmasked, num_blocks, num_bitmaps, BITS: tl.constexpr):
    """(block, number of its bitmap, bits to read in a row of it: 0 if it is full) of entry `index` of the loop with masks:
    partial blocks, and then the full ones that the other loop left."""
    count, indices, bitmap_ids, _, full_indices = opened
    whole = index >= count
    partial = tl.load(indices + index, mask=index < count, other=0)
    full = tl.load(full_indices + unmasked + index - count, mask=whole, other=0)
    block = tl.where(whole, full, partial)
    number = tl.load(bitmap_ids + index, mask=index < count, other=0)
    block, number = tl.minimum(tl.maximum(block, 0), num_blocks - 1), tl.minimum(tl.maximum(number, 0), num_bitmaps - 1)
    return block, number.to(tl.int64), tl.where(whole, 0, BITS)


class Lists(NamedTuple):
    """Arguments of a kernel for a block mask (or for its transpose)."""

    tensors: tuple
    strides: tuple
    num_bitmaps: int
    block_size: tuple[int, int]


def of(block_mask) -> Lists:
    """The lists as a kernel takes them; one line in a list is contiguous."""
    partial = (block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.kv_bitmaps)
    full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    tensors = tuple(x.contiguous() for x in (*partial, *full, block_mask.bitmaps))
    strides = (
        launch.strides(tensors[0], 3), launch.strides(tensors[3], 3), tensors[1].shape[-1], tensors[4].shape[-1]
    )  # fmt: skip
    return Lists(tensors, strides, len(block_mask.bitmaps), tuple(block_mask.BLOCK_SIZE))


def key(lists: Lists) -> tuple:
    """What a launch depends on of the lists."""
    return lists.strides, lists.num_bitmaps, lists.block_size, launch.alignment(*lists.tensors)


def constexprs(lists: Lists | None, tiles) -> dict:
    block_q, block_k = lists.block_size if lists else (tiles.BLOCK_M, tiles.BLOCK_N)
    return {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "BLOCK_Q": block_q, "BLOCK_K": block_k}
