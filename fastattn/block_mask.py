"""`BlockMask`: which blocks of keys each block of queries visits, as lists, and a bitmap where a block is seen in part.

A block of queries and keys is full (every pair is seen: no mask is applied), partial (one bit a pair) or absent.
Equal bitmaps are stored once, so a causal mask of any length has one. The lists have the names and the layout of
torch's FlexAttention. Nothing here is n x n but `to_dense` and `from_dense`.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from . import blocks
from .block_checks import (
    BlockSize,
    check_block_size,
    check_compressed,
    check_int,
    check_integers,
    check_lengths,
    check_lists,
    check_mask,
    check_same_grid,
    shared_grid,
)  # fmt: skip
from .blocks import FULL, Blocks, Grid
from .masks import Mask


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which keys each query sees, block by block. Build it with a class method or with `fastattn.patterns`.

    int32 tensors on one device; B is batch or 1, H is num_heads or 1 (1: shared by all), rows and columns are the
    numbers of blocks of queries and of keys:

    kv_num_blocks       [B, H, rows]: how many partial blocks a block of queries visits
    kv_indices          [B, H, rows, longest]: their columns, ascending; what follows the count is not read
    full_kv_num_blocks  [B, H, rows], full_kv_indices [B, H, rows, longest]: the same for full blocks
    kv_bitmaps          shape of kv_indices: which of `bitmaps` belongs to a partial block
    bitmaps             uint8 [num_bitmaps, block_q, block_k / 8]: bit j % 8 of byte j // 8 is key j of the block
    BLOCK_SIZE          (block_q, block_k), multiples of 16 in 16 ... 256
    seq_lengths         (seqlen_q, seqlen_k); they need not be multiples of the block size

    Bits past seqlen_q or seqlen_k are 0, and a block is full if all pairs inside the lengths are seen. A block is
    listed at most once. Anything else raises ValueError (TypeError for a wrong type), in time O(lists). The tensors
    must not be changed afterwards. Memory: 4 bytes times rows times the longest list, for three lists, and
    block_q * block_k / 8 bytes a bitmap.

    `a & b`, `a | b`, `~a` combine masks of equal lengths and block size, batch and heads broadcast; `a & Mask(...)`
    intersects with an interval mask. The same pattern leads to the same tensors, however it was built, but == is
    identity: see `equal`.
    """

    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    kv_bitmaps: torch.Tensor
    bitmaps: torch.Tensor
    BLOCK_SIZE: tuple[int, int]
    seq_lengths: tuple[int, int]
    _cache: dict = field(default_factory=dict, init=False)

    def __post_init__(self):
        object.__setattr__(self, "BLOCK_SIZE", check_block_size(self.BLOCK_SIZE))
        object.__setattr__(self, "seq_lengths", check_lengths(*self.seq_lengths))
        check_mask(self)

    # --- builders ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_mask(
        cls, mask: Mask, *, seqlen_q: int, seqlen_k: int | None = None, block_size: BlockSize = 128
    ) -> "BlockMask":
        """The blocks of an interval mask: causal, window, padding, documents, prefix-LM and what `&` makes of them.

        Interval arithmetic on blocks, in time O(seqlen + visited blocks): combine intervals as `Mask`s, then build.
        """
        if not isinstance(mask, Mask):
            raise TypeError(f"mask must be a Mask, got {type(mask).__name__} (a bool tensor goes to from_dense)")
        grid = shared_grid(seqlen_q, seqlen_k, block_size)
        start, end = blocks.intervals(mask, grid.seqlen_q, grid.seqlen_k)
        grid = grid._replace(batch=start.shape[0], num_heads=start.shape[1])
        return build(grid, blocks.interval_blocks(grid, start, end))

    @classmethod
    def from_mask_mod(
        cls,
        fn: Callable,
        *,
        batch: int = 1,
        num_heads: int = 1,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block_size: BlockSize = 128,
        device: torch.device | str | None = None,
    ) -> "BlockMask":
        """The blocks of a predicate fn(batch, head, query, key) -> bool: FlexAttention's mask_mod.

        fn gets int64 tensors that broadcast against each other, a few blocks at a time, in order of block rows:
        O(seqlen_q * seqlen_k) time, O(1) memory. Indices are always inside the lengths. Where a pattern that is
        quick to build encloses it, `where` looks at far fewer blocks.
        """
        grid = shared_grid(seqlen_q, seqlen_k, block_size)
        grid = grid._replace(batch=check_int("batch", batch), num_heads=check_int("num_heads", num_heads))
        return build(grid, blocks.evaluate(grid, torch.arange(grid.size, device=device), fn))

    @classmethod
    def from_dense(cls, mask: torch.Tensor, *, block_size: BlockSize = 128) -> "BlockMask":
        """The blocks of a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], True = attend."""
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
            raise TypeError(
                "mask must be a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], got "
                + (f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__)
            )
        batch, num_heads, seqlen_q, seqlen_k = mask.shape
        return cls.from_mask_mod(
            lambda b, h, i, j: mask[b, h, i, j], batch=batch, num_heads=num_heads, seqlen_q=seqlen_q,
            seqlen_k=seqlen_k, block_size=block_size, device=mask.device,
        )  # fmt: skip

    @classmethod
    def from_tokens(cls, queries: torch.Tensor, keys: torch.Tensor, *, block_size: BlockSize = 128) -> "BlockMask":
        """The queries of one set see the keys of another: bool tensors [seqlen_q] and [seqlen_k], True = in the set."""
        for name, tokens in (("queries", queries), ("keys", keys)):
            if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.bool or tokens.dim() != 1:
                raise TypeError(f"{name} must be a bool tensor [seqlen], True = in the set")
        grid = shared_grid(len(queries), len(keys), block_size)
        return build(grid, blocks.product_blocks(grid, queries, keys))

    @classmethod
    def from_bsr(
        cls,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block_size: BlockSize = 128,
    ) -> "BlockMask":
        """Full blocks in compressed rows: row r visits columns indices[indptr[r] : indptr[r + 1]], ascending.

        indptr int [rows + 1] with rows = ceil(seqlen_q / block_q), indices int [indptr[-1]]. One pattern for all
        heads; `cat` puts several together.
        """
        grid = shared_grid(seqlen_q, seqlen_k, block_size)
        keys = check_compressed(indptr, indices, grid.rows, grid.columns) * grid.columns + indices
        return build(grid, blocks.full_blocks(grid, keys))

    @classmethod
    def from_csr(
        cls,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block_size: BlockSize = 128,
    ) -> "BlockMask":
        """Tokens in compressed rows: query i sees keys indices[indptr[i] : indptr[i + 1]], ascending.

        indptr int [seqlen_q + 1], indices int [indptr[-1]]. Each block that holds a pair takes a bitmap, unless it
        equals another's: scattered neighbours (graphs) waste both memory and time as blocks.
        """
        grid = shared_grid(seqlen_q, seqlen_k, block_size)
        query = check_compressed(indptr, indices, grid.seqlen_q, grid.seqlen_k)
        return build(grid, blocks.pair_blocks(grid, query, indices.long()))

    @classmethod
    def from_coo(
        cls,
        queries: torch.Tensor,
        keys: torch.Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block_size: BlockSize = 128,
        of_blocks: bool = False,
    ) -> "BlockMask":
        """Pairs: query queries[n] sees key keys[n]; with of_blocks, numbers of blocks instead, which are full then.

        int tensors of one length; any order, no pair twice. Memory as in `from_csr` for tokens.
        """
        grid = shared_grid(seqlen_q, seqlen_k, block_size)
        sizes = (grid.rows, grid.columns) if of_blocks else (grid.seqlen_q, grid.seqlen_k)
        check_integers("queries", queries, 1, sizes[0])
        check_integers("keys", keys, 1, sizes[1])
        if queries.shape != keys.shape:
            raise ValueError(f"queries has {len(queries)} entries and keys {len(keys)}; they must be as many")
        pairs = (queries.long() * sizes[1] + keys).sort().values
        if (twice := pairs[1:][pairs[1:] == pairs[:-1]]).numel():
            query, key = divmod(int(twice[0]), sizes[1])
            raise ValueError(f"queries, keys: the pair {query}, {key} is listed twice; list it once")
        if of_blocks:
            return build(grid, blocks.full_blocks(grid, pairs))
        return build(grid, blocks.pair_blocks(grid, queries.long(), keys.long()))

    @classmethod
    def from_flex(cls, block_mask) -> "BlockMask":
        """The blocks of a torch.nn.attention.flex_attention.BlockMask.

        Its mask_mod is evaluated here and now, on the partial blocks alone, with index tensors that broadcast.
        """
        partial = block_mask.kv_num_blocks, block_mask.kv_indices
        full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        grid = shared_grid(*block_mask.seq_lengths, block_mask.BLOCK_SIZE)
        grid = grid._replace(batch=partial[0].shape[0], num_heads=partial[0].shape[1])
        keys, ids, bitmaps = blocks.evaluate(grid, check_lists(grid, *partial, "kv"), block_mask.mask_mod)
        whole = keys[:0] if full[0] is None else check_lists(grid, *full, "full_kv")
        return build(grid, blocks.union((keys, ids, bitmaps), blocks.full_blocks(grid, whole)))

    @classmethod
    def cat(cls, masks: Sequence["BlockMask"], dim: int = 1) -> "BlockMask":
        """One mask of masks for some heads (dim=1) or batch entries (dim=0) each; equal lengths and block size."""
        if dim not in (0, 1):
            raise ValueError(f"dim={dim!r} must be 0 (batch) or 1 (num_heads)")
        if not masks:
            raise ValueError("masks is empty; at least one mask is needed")
        sizes = [mask.shape[dim] for mask in masks]
        others = {mask.shape[1 - dim] for mask in masks} - {1}
        if len(others) > 1:
            raise ValueError(f"the masks have {('num_heads', 'batch')[dim]} {sorted(others)}; they must be equal or 1")
        other = others.pop() if others else 1
        shape = (sum(sizes), other) if dim == 0 else (other, sum(sizes))
        grid = masks[0]._grid._replace(batch=shape[0], num_heads=shape[1])
        parts, offset, count = [], 0, 0
        for mask, size in zip(masks, sizes, strict=True):
            check_same_grid(masks[0], mask)
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
        return build(grid, (keys, ids[order], bitmaps))

    # --- algebra -----------------------------------------------------------------------------------------------------

    def __and__(self, other: "BlockMask | Mask") -> "BlockMask":
        """The pairs that both masks allow, in time O(visited blocks)."""
        if isinstance(other, Mask):
            start, end = (bound.to(self.device) for bound in blocks.intervals(other, *self.seq_lengths))
            grid = self._broadcast(start.shape[:2])
            start, end = (bound.expand(grid.batch, grid.num_heads, -1) for bound in (start, end))
            mine = self._blocks(grid)
            return build(grid, blocks.intersection(mine, blocks.interval_blocks(grid, start, end, mine[0])))
        if not isinstance(other, BlockMask):
            return NotImplemented
        grid = self._aligned(other)
        return build(grid, blocks.intersection(self._blocks(grid), other._blocks(grid)))

    __rand__ = __and__

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """The pairs that either mask allows, in time O(visited blocks)."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        grid = self._aligned(other)
        return build(grid, blocks.union(self._blocks(grid), other._blocks(grid)))

    def __invert__(self) -> "BlockMask":
        """The pairs that this mask does not allow, in time O(all blocks): a sparse mask has a dense complement."""
        return build(self._grid, blocks.complement(self._grid, self._blocks()))

    def __bool__(self) -> bool:
        raise TypeError("a BlockMask has no truth value: combine masks with & and |, test `is not None`")

    def where(self, fn: Callable, *, by_distance: bool = False) -> "BlockMask":
        """The pairs of this mask for which fn(batch, head, query, key) is True as well.

        fn as in `from_mask_mod`; it is evaluated on the visited blocks. by_distance: its value depends on key - query
        alone, so that one block for each distance is enough.
        """
        grid, mine = self._grid, self._blocks()
        keys = mine[0]
        alike = grid.column(keys) * grid.block_k - grid.row(keys) * grid.block_q if by_distance else None
        return build(grid, blocks.intersection(mine, blocks.evaluate(grid, keys, fn, alike)))

    def reblock(self, block_size: BlockSize) -> "BlockMask":
        """The same mask in blocks of another size, in time O(visited pairs / 256)."""
        block_q, block_k = check_block_size(block_size)
        grid = self._grid._replace(block_q=block_q, block_k=block_k)
        return build(grid, blocks.regroup(self._grid, grid, self._blocks()))

    def equal(self, other: "BlockMask") -> bool:
        """Whether both masks let every query see the same keys (batch and heads broadcast), in time O(lists)."""
        grid = self._aligned(other)
        (keys, ids, bitmaps), (other_keys, other_ids, other_bitmaps) = self._blocks(grid), other._blocks(grid)
        return (
            torch.equal(keys, other_keys)
            and torch.equal(ids == FULL, other_ids == FULL)
            and torch.equal(bitmaps[ids[ids != FULL]], other_bitmaps[other_ids[ids != FULL]])
        )

    def transpose(self) -> "BlockMask":
        """The mask with queries and keys exchanged: its kv_* say which queries see a block of keys. Cached."""
        if "transpose" not in self._cache:
            mask = build(self._grid.transposed, blocks.transpose(self._grid, self._blocks()))
            self._cache["transpose"], mask._cache["transpose"] = mask, self
        return self._cache["transpose"]

    # torch's names for the lists of the transpose
    q_num_blocks = property(lambda self: self.transpose().kv_num_blocks)
    q_indices = property(lambda self: self.transpose().kv_indices)
    full_q_num_blocks = property(lambda self: self.transpose().full_kv_num_blocks)
    full_q_indices = property(lambda self: self.transpose().full_kv_indices)

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch or 1, num_heads or 1, seqlen_q, seqlen_k)."""
        return (*self.kv_num_blocks.shape[:2], *self.seq_lengths)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.kv_indices.device

    @cached_property
    def _described(self) -> tuple:
        """What a call depends on."""
        return self.shape, self.BLOCK_SIZE, self.device

    @property
    def nbytes(self) -> int:
        """Memory of all lists and bitmaps."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def visited_pairs(self) -> int:
        """(query, key) pairs that are seen, over this mask's own batch and heads."""
        keys, ids, bitmaps = self._blocks()
        return int(self._grid.area(keys[ids == FULL]).sum() + blocks.popcount(bitmaps)[ids[ids != FULL]].sum())

    @property
    def density(self) -> float:
        """Share of the pairs that is seen."""
        batch, num_heads, seqlen_q, seqlen_k = self.shape
        return self.visited_pairs / max(batch * num_heads * seqlen_q * seqlen_k, 1)

    @property
    def block_density(self) -> float:
        """Share of the blocks that is visited: what a kernel's time follows."""
        return int(self.kv_num_blocks.sum() + self.full_kv_num_blocks.sum()) / max(self._grid.size, 1)

    def __repr__(self) -> str:
        shape, size = "x".join(map(str, self.shape)), "x".join(map(str, self.BLOCK_SIZE))
        full, partial = int(self.full_kv_num_blocks.sum()), int(self.kv_num_blocks.sum())
        return (
            f"BlockMask({shape}, blocks of {size}: {full} full, {partial} partial with {len(self.bitmaps)} bitmaps, "
            f"density {100 * self.density:.3g} %)"
        )

    # --- other forms -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """The six tensors by name."""
        names = "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "kv_bitmaps", "bitmaps"
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> "BlockMask":
        """The mask on another device; itself if it is there."""
        if self.device == torch.device(device):
            return self
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return BlockMask(**moved, BLOCK_SIZE=self.BLOCK_SIZE, seq_lengths=self.seq_lengths)

    def to_dense(self) -> torch.Tensor:
        """The mask as a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], True = attend. O(n^2) memory."""
        grid, (keys, ids, bitmaps) = self._grid, self._blocks()
        dense = torch.zeros(grid.size, grid.block_q, grid.block_k, dtype=torch.bool, device=self.device)
        dense[keys[ids == FULL]] = True
        dense[keys[ids != FULL]] = blocks.unpack(bitmaps)[ids[ids != FULL]]
        dense = dense.view(*self.shape[:2], grid.rows, grid.columns, grid.block_q, grid.block_k).transpose(3, 4)
        dense = dense.reshape(*self.shape[:2], grid.rows * grid.block_q, grid.columns * grid.block_k)
        return dense[:, :, : grid.seqlen_q, : grid.seqlen_k].contiguous()

    @property
    def mask_mod(self) -> Callable:
        """FlexAttention's mask_mod(b, h, q_idx, kv_idx) of this mask: looks up the block, in a table, and the bit."""
        if "mask_mod" not in self._cache:
            table, bitmaps = self._table()
            shared, (block_q, block_k) = [size == 1 for size in self.shape[:2]], self.BLOCK_SIZE

            def mask_mod(b, h, q_idx, kv_idx):
                b, h = b * 0 if shared[0] else b, h * 0 if shared[1] else h
                byte = bitmaps[table[b, h, q_idx // block_q, kv_idx // block_k], q_idx % block_q, kv_idx % block_k // 8]
                return ((byte.int() >> (kv_idx % 8)) & 1) > 0

            self._cache["mask_mod"] = mask_mod
        return self._cache["mask_mod"]

    def to_flex(self, mask_mod: Callable | None = None):
        """The torch.nn.attention.flex_attention.BlockMask of the same blocks.

        mask_mod: a function equal to this mask, if there is one that FlexAttention computes faster than it looks up.
        Compiled for the CPU, FlexAttention of torch 2.13 needs torch.compile(..., dynamic=False) for the look-up.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        missing = self._grid.columns, self.kv_indices.shape[-1], self.full_kv_indices.shape[-1]
        pad = torch.nn.functional.pad  # torch takes the number of columns from the width of a list
        return FlexBlockMask.from_kv_blocks(
            self.kv_num_blocks,
            pad(self.kv_indices, (0, missing[0] - missing[1])),
            self.full_kv_num_blocks,
            pad(self.full_kv_indices, (0, missing[0] - missing[2])),
            BLOCK_SIZE=self.BLOCK_SIZE,
            mask_mod=self.mask_mod if mask_mod is None else mask_mod,
            seq_lengths=self.seq_lengths,
        )

    def plot(self, ax=None, *, batch: int = 0, head: int = 0, pixels: int = 1024):
        """A picture of the pattern: queries down, keys across, dark = seen. Returns matplotlib Axes (`ax` or new ones).

        A pixel is a pair if no length exceeds `pixels`, else one or several blocks, as dark as the share that is seen.
        """
        import matplotlib.pyplot as plt

        one = self._head(batch, head)
        picture = one.to_dense()[0, 0] if max(self.seq_lengths) <= pixels else one._shares(pixels)
        ax = plt.figure().add_subplot() if ax is None else ax
        ax.imshow(
            picture.cpu().float().numpy(), cmap="Greys", vmin=0.0, vmax=1.0, interpolation="none", aspect="auto",
            extent=(0, self.seq_lengths[1], self.seq_lengths[0], 0),
        )  # fmt: skip
        ax.set(xlabel="key", ylabel="query", title=f"density {100 * one.density:.3g} %")
        return ax

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _grid(self) -> Grid:
        return Grid(*self.kv_num_blocks.shape[:2], *self.seq_lengths, *self.BLOCK_SIZE)

    def _blocks(self, grid: Grid | None = None) -> Blocks:
        """The visited blocks; in a `grid` of more batches or heads, shared lists are repeated."""
        grid = grid or self._grid
        shape = grid.batch, grid.num_heads
        counts, columns, full_counts, full_columns, ids, bitmaps = self.tensors().values()
        counts, full_counts = (x.expand(*shape, -1) for x in (counts, full_counts))
        columns, full_columns, ids = (x.expand(*shape, -1, -1) for x in (columns, full_columns, ids))
        full = blocks.from_lists(grid, full_counts, full_columns)
        keys, order = torch.cat([blocks.from_lists(grid, counts, columns), full]).sort()
        ids = torch.cat([ids[blocks.listed(counts, columns)].long(), torch.full_like(full, FULL)])
        return keys, ids[order], bitmaps

    def _broadcast(self, shape) -> Grid:
        mine = self.shape[:2]
        if any(a != b and 1 not in (a, b) for a, b in zip(mine, shape, strict=True)):
            raise ValueError(f"the masks have (batch, num_heads) {mine} and {tuple(shape)}; they must be equal or 1")
        batch, num_heads = (b if a == 1 else a for a, b in zip(mine, shape, strict=True))
        return self._grid._replace(batch=batch, num_heads=num_heads)

    def _aligned(self, other: "BlockMask") -> Grid:
        check_same_grid(self, other)
        return self._broadcast(other.shape[:2])

    def _head(self, batch: int, head: int) -> "BlockMask":
        for name, index, size in (("batch", batch, self.shape[0]), ("head", head, self.shape[1])):
            if not 0 <= index < size:
                raise ValueError(f"{name}={index} must be in 0 ... {size - 1}")
        one = {
            name: tensor if name == "bitmaps" else tensor[batch : batch + 1, head : head + 1]
            for name, tensor in self.tensors().items()
        }
        return BlockMask(**one, BLOCK_SIZE=self.BLOCK_SIZE, seq_lengths=self.seq_lengths)

    def _table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which bitmap each block has, int32 [B, H, rows, columns], and the bitmaps with a full and an empty one."""
        grid, (keys, ids, bitmaps) = self._grid, self._blocks()
        table = torch.full((grid.size,), len(bitmaps) + 1, dtype=torch.int32, device=self.device)
        table[keys] = torch.where(ids == FULL, len(bitmaps), ids).int()
        one = bitmaps.new_ones(1, *bitmaps.shape[1:])
        return table.view(*self.shape[:2], grid.rows, grid.columns), torch.cat([bitmaps, one * 255, one * 0])

    def _shares(self, pixels: int) -> torch.Tensor:
        """The share of pairs that is seen, [<= pixels, <= pixels], a pixel being some blocks of one head."""
        grid, (keys, ids, bitmaps) = self._grid, self._blocks()
        height, width = min(grid.rows, pixels), min(grid.columns, pixels)
        seen = grid.area(keys)
        seen[ids != FULL] = blocks.popcount(bitmaps)[ids[ids != FULL]]
        pixel = grid.row(keys) * height // grid.rows * width + grid.column(keys) * width // grid.columns
        total = torch.zeros(height * width, dtype=torch.int64, device=self.device).index_add(0, pixel, seen)
        tokens = [
            torch.bincount(torch.arange(n, device=self.device) // block * size // count, minlength=size)
            for n, block, size, count in (
                (grid.seqlen_q, grid.block_q, height, grid.rows),
                (grid.seqlen_k, grid.block_k, width, grid.columns),
            )
        ]
        return total.view(height, width) / (tokens[0][:, None] * tokens[1])


_converted: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def is_flex(mask) -> bool:
    """Whether `mask` is a torch.nn.attention.flex_attention.BlockMask; imports nothing."""
    module = sys.modules.get("torch.nn.attention.flex_attention")
    return module is not None and isinstance(mask, module.BlockMask)


def from_flex(mask) -> BlockMask:
    """`BlockMask.from_flex`, once for every object."""
    if mask not in _converted:
        _converted[mask] = BlockMask.from_flex(mask)
    return _converted[mask]


def build(grid: Grid, found: Blocks) -> BlockMask:
    """The BlockMask of a set of blocks."""
    keys, ids, bitmaps = blocks.reduce(grid, *found)
    counts, columns, bitmap_ids = blocks.to_lists(grid, keys[ids != FULL], ids[ids != FULL])
    full = blocks.to_lists(grid, keys[ids == FULL])
    return BlockMask(
        counts, columns, *full, bitmap_ids, bitmaps, (grid.block_q, grid.block_k), (grid.seqlen_q, grid.seqlen_k)
    )
