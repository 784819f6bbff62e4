"""Parts of a `BlockMask`: rows of queries and columns of keys, cut where its blocks end."""

import torch

from ..masks.block_mask import BlockMask, build
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
