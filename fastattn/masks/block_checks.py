"""What is asked of a BlockMask and of the lists that one is built from; errors name the argument and the entry."""

import weakref
from typing import TYPE_CHECKING

import torch

from ..checks import check_int, one_line
from . import blocks
from .blocks import Grid

if TYPE_CHECKING:
    from .block_mask import BlockMask

BlockSize = int | tuple[int, int]

made: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
"""Address of kv_num_blocks -> the mask that passed `check_mask`, for as long as somebody has it."""


def check_block_size(block_size) -> tuple[int, int]:
    """(block_q, block_k) of an int or a pair; TypeError or ValueError unless multiples of 16 in 16 ... 256."""
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(type(size) is int for size in sizes):
        raise TypeError(f"block_size={one_line(block_size)} must be an int or a pair (block_q, block_k) of ints")
    if not all(16 <= size <= 256 and size % 16 == 0 for size in sizes):
        raise ValueError(f"block_size={block_size!r} must consist of multiples of 16 in 16 ... 256")
    return tuple(sizes)


def check_lengths(seqlen_q, seqlen_k) -> tuple[int, int]:
    """(seqlen_q, seqlen_k); raises unless they are ints >= 0."""
    return check_int("seqlen_q", seqlen_q), check_int("seqlen_k", seqlen_k)


def shared_grid(seqlen_q, seqlen_k, block_size) -> Grid:
    """The checked grid of a mask that all batches and heads share; seqlen_k=None is seqlen_q."""
    return Grid(
        1, 1, *check_lengths(seqlen_q, seqlen_q if seqlen_k is None else seqlen_k), *check_block_size(block_size)
    )


def check_same_grid(a: "BlockMask", b: "BlockMask") -> None:
    if not isinstance(b, type(a)):
        raise TypeError(f"a BlockMask is needed, got {type(b).__name__}")
    for attribute in ("seq_lengths", "BLOCK_SIZE", "device"):
        mine, other = getattr(a, attribute), getattr(b, attribute)
        if mine != other:
            raise ValueError(f"the masks have {attribute} {mine} and {other}; build both with the same")


def check_integers(name: str, tensor, dim: int, bound: int) -> None:
    """TypeError unless an integer tensor, ValueError unless of `dim` dimensions and 0 <= entries < bound."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be int32 or int64")
    if tensor.dim() != dim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {dim} dimension{'s' * (dim > 1)}")
    _raise_at(name, tensor, (tensor < 0) | (tensor >= bound), f"must be in 0 ... {bound - 1}")


def _raise_at(name: str, tensor: torch.Tensor, wrong: torch.Tensor, rule: str) -> None:
    """ValueError that shows the first wrong entry, if there is one."""
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name}[{', '.join(map(str, place))}] is {int(tensor[place])}; it {rule}")


def check_dense(mask) -> None:
    """TypeError unless a bool tensor of four dimensions."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], got {got}")


def check_pairs(queries: torch.Tensor, keys: torch.Tensor, columns: int) -> torch.Tensor:
    """Pairs as ascending query * columns + key; ValueError unless each is listed once."""
    if queries.shape != keys.shape:
        raise ValueError(f"queries has {len(queries)} entries and keys {len(keys)}; they must be as many")
    pairs = (queries.long() * columns + keys).sort().values
    if (twice := pairs[1:][pairs[1:] == pairs[:-1]]).numel():
        query, key = divmod(int(twice[0]), columns)
        raise ValueError(f"queries, keys: the pair {query}, {key} is listed twice; list it once")
    return pairs


def check_compressed(indptr, indices, rows: int, columns: int) -> torch.Tensor:
    """The row of each entry of a compressed list; raises unless it is in range and ascends in each row."""
    check_integers("indices", indices, 1, columns)
    check_integers("indptr", indptr, 1, len(indices) + 1)
    if len(indptr) != rows + 1:
        raise ValueError(f"indptr has {len(indptr)} entries; for {rows} rows it must have {rows + 1}")
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices):
        raise ValueError(
            f"indptr runs from {int(indptr[0])} to {int(indptr[-1])}; it must run from 0 to the length of indices, "
            f"{len(indices)}"
        )
    _raise_at("indptr", indptr[1:], indptr[1:] < indptr[:-1], "must not be less than the one before it")
    row = torch.arange(rows, device=indptr.device).repeat_interleave(indptr.diff())
    wrong = torch.zeros_like(row, dtype=torch.bool)
    wrong[1:] = (row[1:] == row[:-1]) & (indices[1:] <= indices[:-1])
    _raise_at("indices", indices, wrong, "must be greater than the one before it in its row: ascending, each once")
    return row


def check_lists(grid: Grid, counts: torch.Tensor, columns: torch.Tensor, name: str) -> torch.Tensor:
    """The keys of a pair of lists; raises unless they are in range and ascend in each row."""
    longest = columns.shape[-1]
    _raise_at(f"{name}_num_blocks", counts, (counts < 0) | (counts > longest), f"must be in 0 ... {longest}")
    listed = blocks.listed(counts, columns)
    outside = listed & ((columns < 0) | (columns >= grid.columns))
    _raise_at(f"{name}_indices", columns, outside, f"must be in 0 ... {grid.columns - 1}")
    wrong = torch.zeros_like(listed)
    wrong[..., 1:] = listed[..., 1:] & (columns[..., 1:] <= columns[..., :-1])
    _raise_at(f"{name}_indices", columns, wrong, "must be greater than the one before it: ascending, each once")
    return blocks.from_lists(grid, counts, columns)


def check_mask(mask: "BlockMask") -> None:
    """Raise unless `mask` is what the docstring of BlockMask says."""
    for name, tensor in mask.tensors().items():
        dtype = torch.uint8 if name == "bitmaps" else torch.int32
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
        if tensor.device != mask.device:
            raise ValueError(f"{name} is on {tensor.device}, kv_indices on {mask.device}; they must be on one device")
        object.__setattr__(mask, name, tensor.contiguous())
    _check_shapes(mask)
    grid = mask._grid
    partial = check_lists(grid, mask.kv_num_blocks, mask.kv_indices, "kv")
    full = check_lists(grid, mask.full_kv_num_blocks, mask.full_kv_indices, "full_kv")
    keys = torch.cat([partial, full]).sort().values
    if (twice := keys[1:][keys[1:] == keys[:-1]]).numel():
        row, column = int(grid.row(twice[0])), int(grid.column(twice[0]))
        raise ValueError(f"the block in row {row}, column {column} is listed as partial and as full; list it once")
    listed = blocks.listed(mask.kv_num_blocks, mask.kv_indices)
    outside = listed & ((mask.kv_bitmaps < 0) | (mask.kv_bitmaps >= len(mask.bitmaps)))
    _raise_at("kv_bitmaps", mask.kv_bitmaps, outside, f"must be in 0 ... {len(mask.bitmaps) - 1}")
    _check_edges(grid, partial, mask.kv_bitmaps[listed].long(), mask.bitmaps)


def _check_shapes(mask: "BlockMask") -> None:
    for name, dim in (("kv_num_blocks", 3), ("kv_indices", 4), ("full_kv_indices", 4), ("bitmaps", 3)):
        if getattr(mask, name).dim() != dim:
            raise ValueError(f"{name} has shape {tuple(getattr(mask, name).shape)}; it must have {dim} dimensions")
    shape = *mask.kv_num_blocks.shape[:2], mask._grid.rows
    expected = {
        "kv_num_blocks": shape,
        "kv_indices": (*shape, mask.kv_indices.shape[3]),
        "full_kv_num_blocks": shape,
        "full_kv_indices": (*shape, mask.full_kv_indices.shape[3]),
        "kv_bitmaps": tuple(mask.kv_indices.shape),
        "bitmaps": (len(mask.bitmaps), mask.BLOCK_SIZE[0], mask.BLOCK_SIZE[1] // 8),
    }
    for name, tensor in mask.tensors().items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with seq_lengths={mask.seq_lengths} and "
                f"BLOCK_SIZE={mask.BLOCK_SIZE} it must be {expected[name]}"
            )


def _check_edges(grid: Grid, keys: torch.Tensor, ids: torch.Tensor, bitmaps: torch.Tensor) -> None:
    """ValueError if a bitmap has a bit past the lengths in some block that uses it."""
    edge = grid.edge(keys)
    used = torch.unique(ids[edge > 0] * 4 + edge[edge > 0])
    wrong = (bitmaps[used // 4] & ~grid.inside(bitmaps.device)[used % 4]).flatten(1).bool().any(1)
    if bool(wrong.any()):
        raise ValueError(
            f"bitmaps[{int(used[wrong][0]) // 4}] has a bit set past seqlen_q or seqlen_k in a block at the edge; "
            "clear it"
        )
