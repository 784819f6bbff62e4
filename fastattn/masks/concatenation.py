"""Block masks of some heads or batch entries each, put together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..checks import one_line
from .block_checks import check_same_grid
from .blocks import Blocks, Grid

if TYPE_CHECKING:
    from .block_mask import BlockMask


def concatenated(masks: Sequence["BlockMask"], dim: int) -> tuple[Grid, Blocks]:
    """The grid and the blocks of `BlockMask.cat`."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim not in (0, 1):
        raise ValueError(f"dim={one_line(dim)} must be 0 (batch) or 1 (num_heads)")
    if not isinstance(masks, Sequence):
        raise TypeError(f"masks must be a sequence of BlockMasks, got {one_line(masks)}")
    if not masks:
        raise ValueError("masks is empty; at least one mask is needed")
    for mask in masks:
        if not hasattr(mask, "seq_lengths"):
            raise TypeError(f"masks must consist of BlockMasks, got {one_line(mask)}")
        check_same_grid(masks[0], mask)
    sizes = [mask.shape[dim] for mask in masks]
    others = {mask.shape[1 - dim] for mask in masks} - {1}
    if len(others) > 1:
        raise ValueError(f"the masks have {('num_heads', 'batch')[dim]} {sorted(others)}; they must be equal or 1")
    other = others.pop() if others else 1
    shape = (sum(sizes), other) if dim == 0 else (other, sum(sizes))
    grid = masks[0]._grid._replace(batch=shape[0], num_heads=shape[1])
    parts, offset, count = [], 0, 0
    for mask, size in zip(masks, sizes, strict=True):
        part = grid._replace(**{("batch", "num_heads")[dim]: size})
        keys, ids, bitmaps = mask._blocks(part)
        entry = part.entry(keys)
        batch, head = entry // max(part.num_heads, 1), entry % max(part.num_heads, 1)
        batch, head = (batch + offset, head) if dim == 0 else (batch, head + offset)
        keys = grid.keys(batch * grid.num_heads + head, part.row(keys), part.column(keys))
        parts.append((keys, torch.where(ids >= 0, ids + count, ids), bitmaps))
        offset, count = offset + size, count + len(bitmaps)
    keys, ids, bitmaps = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    keys, order = keys.sort()
    return grid, (keys, ids[order], bitmaps)
