"""Parts of a `BlockMask`: rows of queries and columns of keys, cut where its blocks end."""

from collections.abc import Sequence

import torch

from ..masks.block_mask import BlockMask, build
from ..masks.blocks import FULL
from .shards import Run, Shards


def cut(mask: BlockMask, queries: Run, keys: Run) -> BlockMask | None:
    """The mask of these rows and columns, None if no pair is seen; ValueError unless blocks end there. Kept with it."""
    key = "cut", queries, keys
    if key not in mask._cache:
        mask._cache[key] = _cut(mask, queries, keys)
    return mask._cache[key]


def local_rows(mask: BlockMask, shards: Shards, rank: int) -> BlockMask:
    """The rows of a rank of a mask for the whole sequence, in the order in which the rank holds them."""
    grid, found = mask._grid, []
    keys, ids, bitmaps = mask._blocks()
    local = grid._replace(seqlen_q=shards.lengths[rank])
    offset = 0
    for start, stop in shards.runs[rank]:
        _check_cut((start, stop), grid.block_q, grid.seqlen_q, "query")
        if offset % grid.block_q:
            raise ValueError(_rule(offset, grid.block_q, "query"))
        row = grid.row(keys) - start // grid.block_q
        inside = (row >= 0) & (row < -(-(stop - start) // grid.block_q))
        moved = row[inside] + offset // grid.block_q
        found.append((local.keys(grid.entry(keys)[inside], moved, grid.column(keys)[inside]), ids[inside]))
        offset += stop - start
    none = keys[:0], ids[:0]
    keys, ids = (torch.cat(x) for x in zip(none, *found, strict=True))
    order = keys.argsort()
    return build(local, (keys[order], ids[order], bitmaps))


def joined_rows(masks: Sequence[BlockMask], shards: Shards, share: int, shares: int) -> BlockMask:
    """The mask of the rows of all ranks, by their positions, from that of each; of heads, the share-th of `shares`."""
    local = masks[0]._grid
    heads = local.num_heads if local.num_heads == 1 else local.num_heads // shares
    grid = local._replace(num_heads=heads, seqlen_q=shards.seqlen)
    first = 0 if local.num_heads == 1 else share * heads
    found, bitmaps, count = [tuple(x[:0] for x in masks[0]._blocks()[:2])], [], 0
    for rank, mask in enumerate(masks):
        mine, (keys, ids, bits) = mask._grid, mask._blocks()
        entry, row, offset = mine.entry(keys), mine.row(keys), 0
        batch, head = entry // mine.num_heads, entry % mine.num_heads - first
        for start, stop in shards.runs[rank]:
            if offset % grid.block_q or start % grid.block_q:
                raise ValueError(_rule(start if start % grid.block_q else offset, grid.block_q, "query"))
            inside = (row >= offset // grid.block_q) & (row < -(-(offset + stop - start) // grid.block_q))
            inside &= (head >= 0) & (head < heads)
            moved = row[inside] + (start - offset) // grid.block_q
            place = grid.keys(batch[inside] * heads + head[inside], moved, mine.column(keys)[inside])
            found.append((place, torch.where(ids[inside] == FULL, FULL, ids[inside] + count)))
            offset += stop - start
        bitmaps.append(bits)
        count += len(bits)
    places, ids = (torch.cat(x) for x in zip(*found, strict=True))
    order = places.argsort()
    return build(grid, (places[order], ids[order], torch.cat(bitmaps)))


def _cut(mask: BlockMask, queries: Run, keys: Run) -> BlockMask | None:
    grid = mask._grid
    _check_cut(queries, grid.block_q, grid.seqlen_q, "query")
    _check_cut(keys, grid.block_k, grid.seqlen_k, "key")
    found, ids, bitmaps = mask._blocks()
    first, start = queries[0] // grid.block_q, keys[0] // grid.block_k
    part = grid._replace(seqlen_q=queries[1] - queries[0], seqlen_k=keys[1] - keys[0])
    row, column = grid.row(found) - first, grid.column(found) - start
    inside = (row >= 0) & (row < part.rows) & (column >= 0) & (column < part.columns)
    if not bool(inside.any()):
        return None
    kept = part.keys(grid.entry(found)[inside], row[inside], column[inside])
    return build(part, (kept, ids[inside], bitmaps))


def _check_cut(run: Run, block: int, seqlen: int, name: str) -> None:
    for end in run:
        if end % block and end != seqlen:
            raise ValueError(_rule(end, block, name))


def _rule(end: int, block: int, name: str) -> str:
    return (
        f"mask is a BlockMask with {name} blocks of {block}, and a shard ends at {end}: cut shards at multiples of its "
        f"blocks, fastattn.parallel.Shards.contiguous(seqlen, ranks, multiple={block})"
    )
