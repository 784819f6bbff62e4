"""FlexAttention's block masks: recognised and converted once, and made from ours."""

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.compiler import is_dynamo_compiling

from . import blocks
from .block_checks import check_lists, shared_grid
from .blocks import FULL, Blocks, Grid

if TYPE_CHECKING:
    from .block_mask import BlockMask

_converted: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def is_flex(mask) -> bool:
    """Whether `mask` is a torch.nn.attention.flex_attention.BlockMask; imports nothing."""
    module = sys.modules.get("torch.nn.attention.flex_attention")
    return module is not None and isinstance(mask, module.BlockMask)


def converted(mask, convert: Callable) -> "BlockMask":
    """convert(mask), once for every object (in a graph, for every call)."""
    if is_dynamo_compiling():
        return convert(mask)
    if mask not in _converted:
        _converted[mask] = convert(mask)
    return _converted[mask]


def blocks_of(mask) -> tuple[Grid, Blocks]:
    """The blocks of FlexAttention's mask; its mask_mod is evaluated on the partial blocks alone."""
    partial = mask.kv_num_blocks, mask.kv_indices
    full = mask.full_kv_num_blocks, mask.full_kv_indices
    grid = shared_grid(*mask.seq_lengths, mask.BLOCK_SIZE)
    grid = grid._replace(batch=partial[0].shape[0], num_heads=partial[0].shape[1])
    keys, ids, bitmaps = blocks.evaluate(grid, check_lists(grid, *partial, "kv"), mask.mask_mod)
    whole = keys[:0] if full[0] is None else check_lists(grid, *full, "full_kv")
    return grid, blocks.union((keys, ids, bitmaps), blocks.full_blocks(grid, whole))


def to_flex(mask: "BlockMask", mask_mod: Callable):
    """FlexAttention's mask of the same blocks."""
    try:
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
    except ImportError:
        raise ImportError(f"torch {torch.__version__} has no FlexAttention; it came with torch 2.5") from None

    columns, pad = mask._grid.columns, torch.nn.functional.pad  # torch takes their number from the width of a list
    return FlexBlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        pad(mask.kv_indices, (0, columns - mask.kv_indices.shape[-1])),
        mask.full_kv_num_blocks,
        pad(mask.full_kv_indices, (0, columns - mask.full_kv_indices.shape[-1])),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=mask.seq_lengths,
    )


def mask_mod(mask: "BlockMask") -> Callable:
    """FlexAttention's predicate of a mask: looks up the block, in a table, and the bit."""
    table, bitmaps = _table(mask)
    shared, (block_q, block_k) = [size == 1 for size in mask.shape[:2]], mask.BLOCK_SIZE

    def mask_mod(b, h, q_idx, kv_idx):
        b, h = b * 0 if shared[0] else b, h * 0 if shared[1] else h
        byte = bitmaps[table[b, h, q_idx // block_q, kv_idx // block_k], q_idx % block_q, kv_idx % block_k // 8]
        return ((byte.int() >> (kv_idx % 8)) & 1) > 0

    return mask_mod


def _table(mask: "BlockMask") -> tuple[torch.Tensor, torch.Tensor]:
    """Which bitmap each block has, int32 [B, H, rows, columns], and the bitmaps with a full and an empty one."""
    grid, (keys, ids, bitmaps) = mask._grid, mask._blocks()
    table = torch.full((grid.size,), len(bitmaps) + 1, dtype=torch.int32, device=mask.device)
    table[keys] = torch.where(ids == FULL, len(bitmaps), ids).int()
    one = bitmaps.new_ones(1, *bitmaps.shape[1:])
    return table.view(*mask.shape[:2], grid.rows, grid.columns), torch.cat([bitmaps, one * 255, one * 0])
