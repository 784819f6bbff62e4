"""The lists of a `BlockMask` inside a kernel, and how they get there. Whatever they hold, no kernel leaves its tensors.

A "line" is a block of queries, whose lists name blocks of keys. For the gradients of k and v the lists are those of
`BlockMask.transpose()`: lines are blocks of keys then, and the lists name blocks of queries. ACROSS and ALONG are the
sizes of a block in the direction of a line's own positions and of those that its lists name.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import triton
import triton.language as tl

from . import launch
from .state import Bitmap, Listed, Visits


@triton.jit
def open_lists(
    lists, strides, num_bitmaps, batch, head, start, length, ACROSS: tl.constexpr, ALONG: tl.constexpr,
    EVERYWHERE: tl.constexpr,
):  # fmt: skip
    """The visits of the tile that begins at `start`.

    The last block needs a mask if it reaches past `length`, and with EVERYWHERE each does.
    """
    counts, indices, bitmap_ids, full_counts, full_indices, bitmaps = lists
    partial_strides, full_strides, longest, full_longest = strides
    line = start // ACROSS
    offset = batch * partial_strides[0] + head * partial_strides[1] + line * partial_strides[2]
    full_offset = batch * full_strides[0] + head * full_strides[1] + line * full_strides[2]
    count = tl.minimum(tl.maximum(tl.load(counts + offset), 0), longest)
    full_count = tl.minimum(tl.maximum(tl.load(full_counts + full_offset), 0), full_longest)
    indices += offset * longest
    bitmap_ids += offset * longest
    full_indices += full_offset * full_longest
    whole, unmasked = length // ALONG, 0
    if not EVERYWHERE:
        last = tl.load(full_indices + full_count - 1, mask=full_count > 0, other=-1)
        unmasked = tl.where(whole == 0, 0, full_count - tl.where(last >= whole, 1, 0))
    bitmaps += start % ACROSS * (ALONG // 8)
    listed = Listed(count, indices, bitmap_ids, full_count, full_indices)
    masked = count + full_count - unmasked
    return Visits(listed, unmasked, masked, whole, tl.cdiv(length, ALONG), bitmaps, num_bitmaps)


@triton.jit
def share_of_visits(visits, split, num_splits, least_keys, ALONG: tl.constexpr):
    """The blocks of `Visits` that a split takes: as many as the others, of least_keys keys at least, so that the last
    splits may have none."""
    listed = visits.listed
    size = tl.maximum(tl.cdiv(visits.unmasked + visits.masked, num_splits), tl.cdiv(least_keys, ALONG))
    before = split * size
    unmasked_before = tl.minimum(before, visits.unmasked)
    masked_before = tl.minimum(before - unmasked_before, visits.masked)
    unmasked = tl.minimum(size, visits.unmasked - unmasked_before)
    masked = tl.minimum(size - unmasked, visits.masked - masked_before)
    partial_before = tl.minimum(masked_before, listed.count)
    full_before = unmasked_before + masked_before - partial_before
    listed = Listed(
        listed.count - partial_before, listed.indices + partial_before, listed.bitmap_ids + partial_before,
        listed.full_count - full_before, listed.full_indices + full_before,
    )  # fmt: skip
    return Visits(listed, unmasked, masked, visits.whole, visits.blocks, visits.bitmaps, visits.count)


@triton.jit
def unmasked_tile(step, visits, ALONG: tl.constexpr, BLOCK: tl.constexpr):
    """First position of a tile of BLOCK in the loop without masks, in which a block takes ALONG / BLOCK steps."""
    STEPS: tl.constexpr = ALONG // BLOCK
    block = tl.load(visits.listed.full_indices + step // STEPS)
    return tl.minimum(tl.maximum(block, 0), visits.whole - 1) * ALONG + step % STEPS * BLOCK


@triton.jit
def masked_tile(step, visits, ACROSS: tl.constexpr, ALONG: tl.constexpr, BLOCK: tl.constexpr):
    """(first position, bitmap) of a tile in the loop with masks: partial blocks, then the full ones that the other
    loop left, whose bitmap is not read."""
    listed = visits.listed
    STEPS: tl.constexpr = ALONG // BLOCK
    index, offset = step // STEPS, step % STEPS * BLOCK
    is_full = index >= listed.count
    partial = tl.load(listed.indices + index, mask=index < listed.count, other=0)
    full = tl.load(listed.full_indices + visits.unmasked + index - listed.count, mask=is_full, other=0)
    block = tl.minimum(tl.maximum(tl.where(is_full, full, partial), 0), visits.blocks - 1)
    number = tl.load(listed.bitmap_ids + index, mask=index < listed.count, other=0)
    return block * ALONG + offset, bitmap_of(number, is_full, offset, visits, ACROSS, ALONG)


@triton.jit
def bitmap_of(number, is_full, offset, visits, ACROSS: tl.constexpr, ALONG: tl.constexpr):
    """Bitmap `number` from the tile's row and `offset` on; of a full block, nothing is read."""
    number = tl.minimum(tl.maximum(number, 0), visits.count - 1).to(tl.int64)
    start = visits.bitmaps + number * (ACROSS * ALONG // 8) + offset // 8
    return Bitmap(start, ALONG // 8, tl.where(is_full | (visits.count == 0), 0, ALONG))


@triton.jit
def find_tile(start, visits, ACROSS: tl.constexpr, ALONG: tl.constexpr, CHUNK: tl.constexpr):
    """(whether the lists name the block of the tile from position `start` on, its bitmap)"""
    listed = visits.listed
    block, place, is_full = start // ALONG, -1, False
    for first in range(0, listed.count, CHUNK):
        at = first + tl.arange(0, CHUNK)
        found = tl.load(listed.indices + at, mask=at < listed.count, other=-1) == block
        place = tl.maximum(place, tl.max(tl.where(found, at, -1)))
    for first in range(0, listed.full_count, CHUNK):
        at = first + tl.arange(0, CHUNK)
        found = tl.load(listed.full_indices + at, mask=at < listed.full_count, other=-1) == block
        is_full = is_full | (tl.max(found.to(tl.int32)) > 0)
    number = tl.load(listed.bitmap_ids + place, mask=place >= 0, other=0)
    return is_full | (place >= 0), bitmap_of(number, is_full, start % ALONG, visits, ACROSS, ALONG)


class Lists(NamedTuple):
    """Arguments of a kernel for a block mask (or for its transpose); key: what a launch depends on of them."""

    tensors: tuple
    strides: tuple
    num_bitmaps: int
    block_size: tuple[int, int]
    key: tuple


_known: WeakKeyDictionary = WeakKeyDictionary()
NOTHING = (None,) * 6
"""In place of the tensors, where there is no block mask."""


def lists_of(block_mask) -> Lists | None:
    """The lists as a kernel takes them, made once for a mask; None of None."""
    if block_mask is None:
        return None
    found = _known.get(block_mask)
    if found is None:
        partial = (block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.kv_bitmaps)
        full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        tensors = (*partial, *full, block_mask.bitmaps)  # contiguous: BlockMask sees to it
        counts = (launch.strides(tensors[0], 3), launch.strides(tensors[3], 3))
        strides = (*counts, tensors[1].shape[-1], tensors[4].shape[-1])
        facts = (strides, len(block_mask.bitmaps), tuple(block_mask.BLOCK_SIZE))
        found = _known[block_mask] = Lists(tensors, *facts, (*facts, launch.alignment(*tensors)))
    return found


def constexprs(lists: Lists | None, tiles) -> dict:
    """Sizes of tiles and blocks."""
    block_q, block_k = lists.block_size if lists else (tiles.BLOCK_M, tiles.BLOCK_N)
    return {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "BLOCK_Q": block_q, "BLOCK_K": block_k}
