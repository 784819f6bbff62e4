"""`BlockMask`: which blocks of keys each block of queries visits, as lists, and a bitmap where a block is seen in part.

A block of queries and keys is full (every pair is seen: no mask is applied), partial (one bit a pair) or absent.
Equal bitmaps are stored once, so a causal mask of any length has one. The lists have the names and the layout of
torch's FlexAttention. Nothing here is n x n but `to_dense`.

Inside this file a set of blocks is a sorted int64 tensor of keys, ((batch * num_heads + head) * rows + row) * columns
+ column, with an id each: a row of `bitmaps`, or FULL.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .masks import Mask, diagonal_bounds

FULL, ABSENT = -1, -2
_CHUNK = 1 << 22  # (query, key) pairs that are evaluated at once


class Grid(NamedTuple):
    """The blocks of a mask: sizes, and the arithmetic of keys."""

    batch: int
    num_heads: int
    seqlen_q: int
    seqlen_k: int
    block_q: int
    block_k: int

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.seqlen_q // self.block_q)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.seqlen_k // self.block_k)

    @property
    def size(self) -> int:
        """Blocks over all batches and heads."""
        return self.batch * self.num_heads * self.rows * self.columns

    def row_and_column(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row (within its head) and column of each block."""
        return keys // self.columns % self.rows, keys % self.columns

    def edge(self, keys: torch.Tensor) -> torch.Tensor:
        """2 where a block sticks out past seqlen_q, plus 1 where it does past seqlen_k."""
        row, column = self.row_and_column(keys)
        return 2 * ((row + 1) * self.block_q > self.seqlen_q) + 1 * ((column + 1) * self.block_k > self.seqlen_k)

    def area(self, keys: torch.Tensor) -> torch.Tensor:
        """Pairs of each block that lie inside the lengths."""
        row, column = self.row_and_column(keys)
        height = (self.seqlen_q - row * self.block_q).clamp(max=self.block_q)
        return height * (self.seqlen_k - column * self.block_k).clamp(max=self.block_k)

    def inside(self, device) -> torch.Tensor:
        """Bitmaps [4, block_q, block_k / 8] of the pairs inside the lengths, by `edge`."""
        query, key = (torch.arange(size, device=device) for size in (self.block_q, self.block_k))
        heights = self.block_q, self.seqlen_q - (self.rows - 1) * self.block_q
        widths = self.block_k, self.seqlen_k - (self.columns - 1) * self.block_k
        return torch.stack([pack((query < h)[:, None] & (key < w)) for h in heights for w in widths])


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which keys each query sees, block by block. Build it with a class method or `fastattn.patterns`.

    int32 tensors, on one device; B is batch or 1, H is num_heads or 1 (1: shared by all):

    kv_num_blocks       [B, H, rows]: how many partial blocks a block of queries visits
    kv_indices          [B, H, rows, longest]: their block columns, ascending; what follows the count is not read
    full_kv_num_blocks  [B, H, rows], full_kv_indices [B, H, rows, longest]: the same for full blocks
    kv_bitmaps          shape of kv_indices: the row of `bitmaps` that belongs to a partial block
    bitmaps             uint8 [num_bitmaps, block_q, block_k / 8]: bit j % 8 of byte j // 8 is key j of the block
    BLOCK_SIZE          (block_q, block_k), multiples of 16 in 16 ... 256
    seq_lengths         (seqlen_q, seqlen_k); they need not be multiples of the block size

    A bit past seqlen_q or seqlen_k is 0; a block is full if every pair inside the lengths is seen. A block is listed
    at most once. Anything else raises ValueError (TypeError for a wrong type), at a cost in the size of the lists.
    Memory: 4 bytes times rows times the longest list, three times, and block_q * block_k / 8 bytes a bitmap.

    `a & b`, `a | b`, `~a` combine masks of equal lengths and block size, broadcasting batch and heads; `a & Mask(...)`
    intersects with an interval mask. A BlockMask is not changed after it is built; equality is identity, see `equal`.
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
        object.__setattr__(self, "seq_lengths", _check_lengths(*self.seq_lengths))
        _check(self)

    # --- builders ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_mask(
        cls, mask: Mask, *, seqlen_q: int, seqlen_k: int | None = None, block_size: int | tuple[int, int] = 128
    ) -> "BlockMask":
        """The blocks of an interval mask (causal, window, padding, documents, prefix-LM and what `&` makes of them).

        Interval arithmetic on blocks: O(seqlen + blocks) time, so combine intervals as `Mask`s before building.
        """
        if not isinstance(mask, Mask):
            raise TypeError(f"mask must be a Mask, got {type(mask).__name__} (a bool tensor: BlockMask.from_dense)")
        seqlen_q, seqlen_k = _check_lengths(seqlen_q, seqlen_q if seqlen_k is None else seqlen_k)
        start, end = _intervals(mask, seqlen_q, seqlen_k)
        grid = Grid(*start.shape[:2], seqlen_q, seqlen_k, *check_block_size(block_size))
        return _assemble(grid, *_interval_blocks(grid, start, end))

    @classmethod
    def from_mask_mod(
        cls,
        fn: Callable,
        *,
        batch: int = 1,
        num_heads: int = 1,
        seqlen_q: int,
        seqlen_k: int | None = None,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> "BlockMask":
        """The blocks of a predicate fn(batch, head, query, key) -> bool, FlexAttention's mask_mod.

        fn gets int64 tensors that broadcast against each other and is called once for every few blocks, in order of
        block rows: O(seqlen_q * seqlen_k) time, O(1) memory. Indices are always inside the lengths.
        """
        seqlen_q, seqlen_k = _check_lengths(seqlen_q, seqlen_q if seqlen_k is None else seqlen_k)
        for name, value in (("batch", batch), ("num_heads", num_heads)):
            _check_int(name, value, 0)
        grid = Grid(batch, num_heads, seqlen_q, seqlen_k, *check_block_size(block_size))
        return _assemble(grid, *evaluate(grid, torch.arange(grid.size, device=device), fn))

    @classmethod
    def from_dense(cls, mask: torch.Tensor, *, block_size: int | tuple[int, int] = 128) -> "BlockMask":
        """The blocks of a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], True = attend."""
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
            raise TypeError(
                "mask must be a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], got "
                + (f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__)
            )
        batch, num_heads, seqlen_q, seqlen_k = mask.shape
        return cls.from_mask_mod(
            lambda b, h, i, j: mask[b, h, i, j],
            batch=batch, num_heads=num_heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_size=block_size,
            device=mask.device,
        )  # fmt: skip

    @classmethod
    def from_bsr(
        cls,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block_size: int | tuple[int, int] = 128,
    ) -> "BlockMask":
        """Full blocks in block-compressed rows: row r visits columns indices[indptr[r] : indptr[r + 1]], ascending.

        indptr int [rows + 1], indices int [indptr[-1]], rows = ceil(seqlen_q / block_q). One list for all heads: see
        `cat` for a mask a head.
        """
        grid = _shared_grid(seqlen_q, seqlen_k, block_size)
        row = _check_compressed(indptr, indices, grid.rows, grid.columns)
        keys = row * grid.columns + indices
        return _assemble(grid, keys, torch.full_like(keys, FULL), _no_bitmaps(grid, keys.device))

    @classmethod
    def from_csr(
        cls,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block_size: int | tuple[int, int] = 128,
    ) -> "BlockMask":
        """Single tokens in compressed rows: query i sees keys indices[indptr[i] : indptr[i + 1]], ascending.

        indptr int [seqlen_q + 1], indices int [indptr[-1]]. Every block that holds a pair gets a bitmap: for scattered
        neighbours (graphs) `attention_csr` needs less memory and time.
        """
        grid = _shared_grid(seqlen_q, seqlen_k, block_size)
        return _from_pairs(grid, _check_compressed(indptr, indices, seqlen_q, seqlen_k), indices.long())

    @classmethod
    def from_coo(
        cls,
        queries: torch.Tensor,
        keys: torch.Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block_size: int | tuple[int, int] = 128,
    ) -> "BlockMask":
        """Single pairs: query queries[n] sees key keys[n]; int tensors of one length, pairs in any order but distinct."""
        grid = _shared_grid(seqlen_q, seqlen_k, block_size)
        _check_integers("queries", queries, 1, seqlen_q)
        _check_integers("keys", keys, 1, seqlen_k)
        if queries.shape != keys.shape:
            raise ValueError(f"queries has {len(queries)} entries and keys {len(keys)}; they must be as many")
        pairs = (queries.long() * seqlen_k + keys).sort().values
        if bool((pairs[1:] == pairs[:-1]).any()):
            twice = int(pairs[1:][pairs[1:] == pairs[:-1]][0])
            raise ValueError(f"the pair (query {twice // seqlen_k}, key {twice % seqlen_k}) is there twice; drop one")
        return _from_pairs(grid, pairs // max(seqlen_k, 1), pairs % max(seqlen_k, 1))

    @classmethod
    def from_flex(cls, block_mask) -> "BlockMask":
        """The blocks of a torch.nn.attention.flex_attention.BlockMask.

        Its mask_mod is evaluated here on the partial blocks, with index tensors that broadcast, and never again.
        """
        lists = block_mask.kv_num_blocks, block_mask.kv_indices
        full = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        seqlens = _check_lengths(*block_mask.seq_lengths)
        grid = Grid(*lists[0].shape[:2], *seqlens, *check_block_size(block_mask.BLOCK_SIZE))
        partial = _listed(grid, *lists, "kv")
        whole = partial[:0] if full[0] is None else _listed(grid, *full, "full_kv")
        partial, ids, bitmaps = evaluate(grid, partial, block_mask.mask_mod)
        keys, order = torch.cat([partial, whole]).sort()
        return _assemble(grid, keys, torch.cat([ids, torch.full_like(whole, FULL)])[order], bitmaps)

    @classmethod
    def cat(cls, masks: Sequence["BlockMask"], dim: int = 1) -> "BlockMask":
        """Masks of single heads (dim=1) or of single batch entries (dim=0) as one; equal lengths and block size."""
        if dim not in (0, 1):
            raise ValueError(f"dim={dim!r} must be 0 (batch) or 1 (num_heads)")
        if not masks:
            raise ValueError("masks is empty; cat needs at least one mask")
        other = torch.broadcast_shapes(*[(mask.shape[1 - dim],) for mask in masks])[0]
        sizes = [mask.shape[dim] for mask in masks]
        shape = (sum(sizes), other) if dim == 0 else (other, sum(sizes))
        grid = masks[0]._grid._replace(batch=shape[0], num_heads=shape[1])
        per_head, keys, ids, bitmaps, offset, shift = grid.rows * grid.columns, [], [], [], 0, 0
        for mask, size in zip(masks, sizes, strict=True):
            _check_same_grid(masks[0], mask)
            part = grid._replace(**{"batch" if dim == 0 else "num_heads": size})
            part_keys, part_ids = mask._blocks(part)
            entry, block = part_keys // max(per_head, 1), part_keys % max(per_head, 1)
            b, h = entry // max(part.num_heads, 1), entry % max(part.num_heads, 1)
            b, h = (b + offset, h) if dim == 0 else (b, h + offset)
            keys.append((b * grid.num_heads + h) * per_head + block)
            ids.append(torch.where(part_ids >= 0, part_ids + shift, part_ids))
            bitmaps.append(mask.bitmaps)
            offset, shift = offset + size, shift + len(mask.bitmaps)
        keys, order = torch.cat(keys).sort()
        return _assemble(grid, keys, torch.cat(ids)[order], torch.cat(bitmaps))

    # --- algebra -----------------------------------------------------------------------------------------------------

    def __and__(self, other: "BlockMask | Mask") -> "BlockMask":
        """The pairs that both masks allow; O(visited blocks)."""
        if isinstance(other, Mask):
            return self._within(other)
        if not isinstance(other, BlockMask):
            return NotImplemented
        grid, keys, a, b, bitmaps = _aligned(self, other)
        seen = (a != ABSENT) & (b != ABSENT)
        keys, a, b = keys[seen], a[seen], b[seen]
        ids, bitmaps = _combine(bitmaps, a, b, torch.bitwise_and, torch.where(a == FULL, b, a))
        return _assemble(grid, keys, ids, bitmaps)

    __rand__ = __and__

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """The pairs that either mask allows; O(visited blocks)."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        grid, keys, a, b, bitmaps = _aligned(self, other)
        one = torch.where(a == ABSENT, b, torch.where((b == ABSENT) | (a == FULL), a, b))
        ids, bitmaps = _combine(bitmaps, a, b, torch.bitwise_or, one)
        return _assemble(grid, keys, ids, bitmaps)

    def __invert__(self) -> "BlockMask":
        """The pairs that this mask does not allow; O(all blocks), as the complement of a sparse mask is not sparse."""
        grid, (keys, ids) = self._grid, self._blocks()
        everywhere = torch.full((grid.size,), ABSENT, device=self.device)
        everywhere[keys] = ids
        keys = (everywhere != FULL).nonzero()[:, 0]
        ids, bitmaps = everywhere[keys], torch.cat([self.bitmaps, grid.inside(self.device)])
        inside = len(self.bitmaps) + grid.edge(keys)
        ids, bitmaps = _combine(bitmaps, inside, ids, lambda x, y: x & ~y, torch.full_like(ids, FULL))
        return _assemble(grid, keys, ids, bitmaps)

    def __bool__(self) -> bool:
        raise TypeError("a BlockMask has no truth value: combine masks with & and |, test `is not None`")

    def _within(self, mask: Mask) -> "BlockMask":
        start, end = _intervals(mask, *self.seq_lengths)
        shape = torch.broadcast_shapes(start.shape[:2], self.shape[:2])
        grid = self._grid._replace(batch=shape[0], num_heads=shape[1])
        keys, ids = self._blocks(grid)
        start, end = (bound.to(self.device).expand(*shape, -1) for bound in (start, end))
        keys_too, others, bitmaps = _interval_blocks(grid, start, end, keys)
        others = torch.where(others >= 0, others + len(self.bitmaps), others)
        kept = torch.isin(keys, keys_too, assume_unique=True)
        ids = ids[kept]
        bitmaps = torch.cat([self.bitmaps, bitmaps])
        ids, bitmaps = _combine(bitmaps, ids, others, torch.bitwise_and, torch.where(ids == FULL, others, ids))
        return _assemble(grid, keys_too, ids, bitmaps)

    def equal(self, other: "BlockMask") -> bool:
        """Whether both masks let every query see the same keys (batch and heads broadcast); O(visited blocks)."""
        _, _, a, b, bitmaps = _aligned(self, other)
        partial = (a >= 0) & (b >= 0)
        same = torch.equal(a[~partial], b[~partial])
        return same and torch.equal(bitmaps[a[partial]], bitmaps[b[partial]])

    def transpose(self) -> "BlockMask":
        """The same mask with queries and keys exchanged: its kv_* lists say which queries see a block of keys. Cached."""
        if "transpose" not in self._cache:
            grid = self._grid
            keys, ids = self._blocks()
            row, column = grid.row_and_column(keys)
            entry = keys // max(grid.rows * grid.columns, 1)
            turned = grid._replace(
                seqlen_q=grid.seqlen_k, seqlen_k=grid.seqlen_q, block_q=grid.block_k, block_k=grid.block_q
            )
            keys, order = ((entry * turned.rows + column) * turned.columns + row).sort()
            bitmaps = [pack(unpack(part).transpose(1, 2)) for part in self.bitmaps.split(256)]
            mask = _assemble(turned, keys, ids[order], torch.cat(bitmaps))
            mask._cache["transpose"] = self
            self._cache["transpose"] = mask
        return self._cache["transpose"]

    @property
    def q_num_blocks(self) -> torch.Tensor:
        """Partial blocks of queries that see a block of keys, [B, H, columns]; the three others likewise."""
        return self.transpose().kv_num_blocks

    @property
    def q_indices(self) -> torch.Tensor:
        return self.transpose().kv_indices

    @property
    def full_q_num_blocks(self) -> torch.Tensor:
        return self.transpose().full_kv_num_blocks

    @property
    def full_q_indices(self) -> torch.Tensor:
        return self.transpose().full_kv_indices

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch or 1, num_heads or 1, seqlen_q, seqlen_k)."""
        return (*self.kv_num_blocks.shape[:2], *self.seq_lengths)

    @property
    def device(self) -> torch.device:
        return self.kv_indices.device

    @property
    def nbytes(self) -> int:
        """Memory of all lists and bitmaps."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def visited_pairs(self) -> int:
        """(query, key) pairs that are seen, over this mask's own batch and heads."""
        keys, ids = self._blocks()
        counts = popcount(self.bitmaps)
        return int(self._grid.area(keys[ids == FULL]).sum() + counts[ids[ids >= 0]].sum())

    @property
    def density(self) -> float:
        """Share of all pairs that is seen."""
        return self.visited_pairs / max(self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3], 1)

    @property
    def block_density(self) -> float:
        """Share of all blocks that is visited: what a kernel's time follows."""
        return int(self.kv_num_blocks.sum() + self.full_kv_num_blocks.sum()) / max(self._grid.size, 1)

    def __repr__(self) -> str:
        shape, blocks = "x".join(map(str, self.shape)), "x".join(map(str, self.BLOCK_SIZE))
        full, partial = int(self.full_kv_num_blocks.sum()), int(self.kv_num_blocks.sum())
        return (
            f"BlockMask({shape}, blocks {blocks}: {full} full, {partial} partial with {len(self.bitmaps)} bitmaps, "
            f"density {100 * self.density:.3g} %)"
        )

    # --- to other forms ----------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask on another device (itself, if it is there)."""
        if self.device == torch.device(device):
            return self
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return BlockMask(**moved, BLOCK_SIZE=self.BLOCK_SIZE, seq_lengths=self.seq_lengths)

    def to_dense(self) -> torch.Tensor:
        """The mask as a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], True = attend. O(n^2) memory."""
        grid, (keys, ids) = self._grid, self._blocks()
        blocks = torch.zeros(grid.size, grid.block_q, grid.block_k, dtype=torch.bool, device=self.device)
        blocks[keys[ids == FULL]] = True
        blocks[keys[ids >= 0]] = unpack(self.bitmaps)[ids[ids >= 0]]
        blocks = blocks.view(grid.batch, grid.num_heads, grid.rows, grid.columns, grid.block_q, grid.block_k)
        dense = blocks.transpose(3, 4).reshape(
            grid.batch, grid.num_heads, grid.rows * grid.block_q, grid.columns * grid.block_k
        )
        return dense[:, :, : grid.seqlen_q, : grid.seqlen_k]

    def mask_mod(self, b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        """FlexAttention's mask_mod of this mask: looks the pair up. A table of rows x columns is made once."""
        if "table" not in self._cache:
            grid, (keys, ids) = self._grid, self._blocks()
            table = torch.full((grid.size,), len(self.bitmaps) + 1, device=self.device)
            table[keys] = torch.where(ids == FULL, len(self.bitmaps), ids)
            bits = torch.cat([self.bitmaps, self.bitmaps.new_full((1, *self.bitmaps.shape[1:]), 255)])
            bits = torch.cat([bits, torch.zeros_like(bits[:1])])
            shape = grid.batch, grid.num_heads, grid.rows, grid.columns
            self._cache["table"] = table.int().view(shape), bits
        table, bits = self._cache["table"]
        block_q, block_k = self.BLOCK_SIZE
        b, h = (b if self.shape[0] > 1 else b * 0), (h if self.shape[1] > 1 else h * 0)
        byte = bits[table[b, h, q_idx // block_q, kv_idx // block_k], q_idx % block_q, kv_idx % block_k // 8]
        return (byte >> (kv_idx % 8).to(torch.uint8)) & 1 > 0

    def to_flex(self, mask_mod: Callable | None = None):
        """A torch.nn.attention.flex_attention.BlockMask of the same blocks.

        mask_mod: a predicate equal to this mask, where FlexAttention computes it faster than it looks a pair up.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        if mask_mod is None:
            index = torch.zeros((), dtype=torch.int64, device=self.device)
            if self._grid.size:
                self.mask_mod(index, index, index, index)  # the table, before anybody traces
            mask_mod = self.mask_mod
        columns = self._grid.columns  # torch takes the number of columns from the width of the list
        lists = [
            torch.nn.functional.pad(tensor, (0, columns - tensor.shape[-1])) if tensor.dim() == 4 else tensor
            for tensor in (self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices)
        ]
        return FlexBlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=self.BLOCK_SIZE, mask_mod=mask_mod, seq_lengths=self.seq_lengths
        )

    def plot(self, ax=None, *, batch: int = 0, head: int = 0, pixels: int = 1024):
        """A picture: queries down, keys across, dark = seen. Returns the matplotlib Axes (`ax`, or new ones).

        One pixel a pair if the mask is at most `pixels` long, else the share that is seen of each pixel's blocks.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            ax = plt.figure().add_subplot()
        one = self._head(batch, head)
        picture = one.to_dense()[0, 0] if max(self.seq_lengths) <= pixels else one._shares(pixels)
        extent = (0, self.seq_lengths[1], self.seq_lengths[0], 0)
        ax.imshow(picture.cpu().float().numpy(), cmap="Greys", vmin=0, vmax=1, extent=extent, aspect="auto")
        ax.set(xlabel="key", ylabel="query", title=f"density {100 * one.density:.3g} %")
        return ax

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _grid(self) -> Grid:
        return Grid(*self.kv_num_blocks.shape[:2], *self.seq_lengths, *self.BLOCK_SIZE)

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "kv_bitmaps", "bitmaps"
        return {name: getattr(self, name) for name in names}

    def _blocks(self, grid: Grid | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, ids) of the visited blocks, in a grid of as many batches and heads or of more (they broadcast)."""
        grid = grid or self._grid
        lists = [
            tensor.expand(grid.batch, grid.num_heads, *tensor.shape[2:])
            for tensor in list(self._tensors().values())[:5]
        ]
        partial, full = _keys(grid, lists[0], lists[1]), _keys(grid, lists[2], lists[3])
        ids = lists[4][_listed_positions(lists[0], lists[1])].long()
        keys, order = torch.cat([partial, full]).sort()
        return keys, torch.cat([ids, torch.full_like(full, FULL)])[order]

    def _head(self, batch: int, head: int) -> "BlockMask":
        for name, index, size in (("batch", batch, self.shape[0]), ("head", head, self.shape[1])):
            if not 0 <= index < size:
                raise ValueError(f"{name}={index} is out of range; the mask has {size}")
        lists = {
            name: tensor[batch : batch + 1, head : head + 1] if name != "bitmaps" else tensor
            for name, tensor in self._tensors().items()
        }
        return BlockMask(**lists, BLOCK_SIZE=self.BLOCK_SIZE, seq_lengths=self.seq_lengths)

    def _shares(self, pixels: int) -> torch.Tensor:
        """The share of seen pairs [<= pixels, <= pixels] of the blocks that fall into each pixel."""
        grid, (keys, ids) = self._grid, self._blocks()
        height, width = min(grid.rows, pixels), min(grid.columns, pixels)
        counts = torch.cat([popcount(self.bitmaps), self.bitmaps.new_zeros(1, dtype=torch.int64)])
        seen = torch.where(ids == FULL, grid.area(keys), counts[ids.clamp(min=-1)])

        def pixel(keys):
            row, column = grid.row_and_column(keys)
            return row * height // grid.rows * width + column * width // grid.columns

        total = torch.zeros(height * width, dtype=torch.float64, device=self.device)
        share = total.index_add(0, pixel(keys), seen.double())
        rows = torch.bincount(torch.arange(grid.rows, device=self.device) * height // grid.rows)
        columns = torch.bincount(torch.arange(grid.columns, device=self.device) * width // grid.columns)
        return share.view(height, width) / (rows[:, None] * columns * grid.block_q * grid.block_k)


# --- bits ------------------------------------------------------------------------------------------------------------


def pack(bits: torch.Tensor) -> torch.Tensor:
    """bool [..., n] -> uint8 [..., n / 8], bit j % 8 of byte j // 8 is entry j; n is a multiple of 8."""
    # 8 bytes of 0 or 1 times this number have their 8 bits, in order, in the highest byte: no two terms meet.
    packed = (bits.flatten().view(torch.int64) * 0x0102040810204080).view(torch.uint8)[7::8]
    return packed.reshape(*bits.shape[:-1], bits.shape[-1] // 8)


def unpack(bytes_: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bytes_.device)
    return ((bytes_[..., None] >> shifts) & 1).bool().flatten(-2)


def popcount(bitmaps: torch.Tensor) -> torch.Tensor:
    """How many bits are set: uint8 [n, ...] -> int64 [n]."""
    x = bitmaps - ((bitmaps >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).flatten(1).sum(1)


def unique_rows(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, inverse): codes[first] are the distinct rows in order of appearance, codes[first][inverse] is codes.

    codes int64 [n, width]. By hash, and exact: the result is compared, another hash is tried if two rows collide.
    """
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randint(-(2**63), 2**63 - 1, (codes.shape[1],), generator=generator).to(codes.device) | 1
        values, inverse = torch.unique((codes * factors).sum(1), return_inverse=True)
        places = torch.arange(len(codes), device=codes.device)
        first = torch.full_like(values, len(codes)).scatter_reduce(0, inverse, places, "amin")
        first, order = first.sort()
        inverse = order.argsort()[inverse]
        if torch.equal(codes[first][inverse], codes):
            return first, inverse


def _unique_bitmaps(bitmaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, inverse = unique_rows(bitmaps.flatten(1).view(torch.int32).long())
    return bitmaps[first], inverse


def _no_bitmaps(grid: Grid, device) -> torch.Tensor:
    return torch.empty(0, grid.block_q, grid.block_k // 8, dtype=torch.uint8, device=device)


# --- sets of blocks --------------------------------------------------------------------------------------------------


def _assemble(grid: Grid, keys: torch.Tensor, ids: torch.Tensor, bitmaps: torch.Tensor) -> BlockMask:
    """The BlockMask of a sorted set of blocks: empty ones dropped, complete ones full, each bitmap once, in order."""
    partial = ids >= 0
    used, inverse = torch.unique(ids[partial], return_inverse=True)
    counts = popcount(bitmaps[used])[inverse]
    full = ~partial
    full[partial] = counts == grid.area(keys[partial])
    keep = ~full
    keep[partial] &= counts > 0
    first, kv_bitmaps = unique_rows(ids[keep][:, None])
    bitmaps, same = _unique_bitmaps(bitmaps[ids[keep][first]])
    kv_num_blocks, kv_indices, places = _lists(grid, keys[keep])
    padded = torch.zeros_like(kv_indices)
    padded.view(-1)[places] = same[kv_bitmaps].int()
    full_kv_num_blocks, full_kv_indices, _ = _lists(grid, keys[full])
    return BlockMask(
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, padded, bitmaps,
        (grid.block_q, grid.block_k), (grid.seqlen_q, grid.seqlen_k),
    )  # fmt: skip


def _lists(grid: Grid, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(counts [B, H, rows], columns [B, H, rows, longest], the place of each key in the flattened columns)."""
    shape = grid.batch, grid.num_heads, grid.rows
    row = keys // max(grid.columns, 1)
    counts = torch.bincount(row, minlength=grid.batch * grid.num_heads * grid.rows)
    longest = int(counts.max()) if counts.numel() else 0
    places = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[row] + row * longest
    columns = torch.zeros(*shape, longest, dtype=torch.int32, device=keys.device)
    columns.view(-1)[places] = (keys % max(grid.columns, 1)).int()
    return counts.view(shape).int(), columns, places


def _listed_positions(counts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return torch.arange(columns.shape[-1], device=columns.device) < counts[..., None]


def _keys(grid: Grid, counts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The inverse of `_lists`: ascending keys."""
    row = torch.arange(counts.numel(), device=counts.device).view(counts.shape)
    return (row[..., None] * grid.columns + columns)[_listed_positions(counts, columns)]


def _combine(bitmaps, a, b, operator, otherwise) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, bitmaps): operator(bitmaps[a], bitmaps[b]) where both are bitmaps, once a pair; elsewhere `otherwise`."""
    both = (a >= 0) & (b >= 0)
    pairs, inverse = torch.unique(a[both] * len(bitmaps) + b[both], return_inverse=True)
    made = operator(bitmaps[pairs // max(len(bitmaps), 1)], bitmaps[pairs % max(len(bitmaps), 1)])
    ids = otherwise.clone()
    ids[both] = inverse + len(bitmaps)
    return ids, torch.cat([bitmaps, made])


def _aligned(a: BlockMask, b: BlockMask):
    """(grid, keys, ids of a, ids of b, bitmaps): the union of two sets of blocks; ids are ABSENT where one has none."""
    _check_same_grid(a, b)
    shape = _broadcast(a, b)
    grid = a._grid._replace(batch=shape[0], num_heads=shape[1])
    (keys_a, ids_a), (keys_b, ids_b) = a._blocks(grid), b._blocks(grid)
    ids_b = torch.where(ids_b >= 0, ids_b + len(a.bitmaps), ids_b)
    keys = torch.cat([keys_a, keys_b]).unique()
    ids = [
        torch.full_like(keys, ABSENT).scatter(0, torch.searchsorted(keys, own), own_ids)
        for own, own_ids in ((keys_a, ids_a), (keys_b, ids_b))
    ]
    return grid, keys, *ids, torch.cat([a.bitmaps, b.bitmaps])


def _broadcast(a: BlockMask, b: BlockMask) -> tuple[int, int]:
    try:
        return torch.broadcast_shapes(a.shape[:2], b.shape[:2])
    except RuntimeError as error:
        raise ValueError(
            f"the masks have (batch, num_heads) {a.shape[:2]} and {b.shape[:2]}; they must be equal or 1"
        ) from error


# --- builders --------------------------------------------------------------------------------------------------------


def evaluate(grid: Grid, keys: torch.Tensor, fn: Callable, alike: torch.Tensor | None = None):
    """(keys, ids, bitmaps) of fn(batch, head, query, key) -> bool on the blocks `keys`.

    alike: int64 [len(keys)], equal for blocks that look the same; each distinct one is evaluated once.
    """
    if alike is not None:
        first, inverse = unique_rows(torch.stack([alike, grid.edge(keys)], 1))
        _, ids, bitmaps = evaluate(grid, keys[first], fn)
        return keys, ids[inverse], bitmaps
    inside = grid.inside(keys.device)
    query, key = (torch.arange(size, device=keys.device) for size in (grid.block_q, grid.block_k))
    ids, bitmaps, count = [], [], 0
    for part in keys.split(max(_CHUNK // (grid.block_q * grid.block_k), 1)):
        row, column = grid.row_and_column(part[:, None, None])
        entry = part[:, None, None] // max(grid.rows * grid.columns, 1)
        i = (row * grid.block_q + query[:, None]).clamp(max=grid.seqlen_q - 1)
        j = (column * grid.block_k + key).clamp(max=grid.seqlen_k - 1)
        seen = _check_predicate(
            fn(entry // grid.num_heads, entry % grid.num_heads, i, j), (len(part), grid.block_q, grid.block_k)
        )
        found, inverse = _unique_bitmaps(pack(seen) & inside[grid.edge(part)])
        ids.append(inverse + count)
        bitmaps.append(found)
        count += len(found)
    return keys, torch.cat([keys[:0], *ids]), torch.cat([_no_bitmaps(grid, keys.device), *bitmaps])


def _check_predicate(seen, shape) -> torch.Tensor:
    if not isinstance(seen, torch.Tensor) or seen.dtype != torch.bool:
        kind = seen.dtype if isinstance(seen, torch.Tensor) else type(seen).__name__
        raise TypeError(f"the mask_mod returned {kind}; it must return a bool tensor, True = attend")
    try:
        return seen.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"the mask_mod returned shape {tuple(seen.shape)}; it must broadcast its four index tensors, here to {shape}"
        ) from error


def _intervals(mask: Mask, seqlen_q: int, seqlen_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First key and one past the last of each row, int64 [batch|1, num_heads|1, seqlen_q]; (seqlen_k, 0) if empty."""
    bounds = [bound for bound in (mask.k_start, mask.k_end) if bound is not None]
    device = bounds[0].device if bounds else None
    lo, hi = diagonal_bounds(mask.windows, seqlen_q, seqlen_k)
    query = torch.arange(seqlen_q, device=device).view(1, 1, -1)
    start, end = (query + lo).clamp(min=0), (query + hi + 1).clamp(max=seqlen_k)
    try:
        start = start if mask.k_start is None else torch.maximum(start, mask.k_start)
        end = end if mask.k_end is None else torch.minimum(end, mask.k_end)
        start, end = torch.broadcast_tensors(start, end)
        start, end = start.expand(-1, -1, seqlen_q), end.expand(-1, -1, seqlen_q)
    except RuntimeError as error:
        shapes = " and ".join(str(tuple(bound.shape)) for bound in bounds)
        raise ValueError(f"the mask has key intervals of shape {shapes}; seqlen_q={seqlen_q}") from error
    empty = start >= end
    return start.masked_fill(empty, seqlen_k), end.masked_fill(empty, 0)


def _interval_blocks(grid: Grid, start: torch.Tensor, end: torch.Tensor, keys: torch.Tensor | None = None):
    """(keys, ids, bitmaps) of the blocks in which a row sees keys start ... end - 1, among `keys` if given."""
    device = start.device
    row = torch.arange(grid.rows * grid.block_q, device=device).clamp(max=grid.seqlen_q - 1)
    start, end = (bound[..., row].reshape(-1, grid.block_q) for bound in (start, end))
    first, last = start.amin(1) if len(start) else start[:, 0], end.amax(1) if len(end) else end[:, 0]
    if keys is None:
        first, last = first // grid.block_k, -(-last // grid.block_k)
        count = (last - first).clamp(min=0)
        row = torch.arange(len(count), device=device).repeat_interleave(count)
        place = torch.arange(len(row), device=device) - (count.cumsum(0) - count)[row]
        keys = row * grid.columns + first[row] + place
    if not len(keys):
        return keys, keys, _no_bitmaps(grid, device)
    row, origin = keys // grid.columns, keys % grid.columns * grid.block_k
    full = (start.amax(1)[row] <= origin) & (end.amin(1)[row] >= (origin + grid.block_k).clamp(max=grid.seqlen_k))
    ids = torch.full_like(keys, FULL)
    bitmaps, count, visited = [_no_bitmaps(grid, device)], 0, torch.ones_like(full)
    query = torch.arange(grid.block_q, device=device)
    for part in (~full).nonzero()[:, 0].split(max(_CHUNK // 8 // grid.block_q, 1)):
        r, o = row[part], origin[part][:, None]
        low, high = (start[r] - o).clamp(0, grid.block_k), (end[r] - o).clamp(0, grid.block_k)
        outside = (low >= high) | (r[:, None] % grid.rows * grid.block_q + query >= grid.seqlen_q)
        low, high = low.masked_fill(outside, 0), high.masked_fill(outside, 0)
        visited[part] = ~outside.all(1)
        code = low * (grid.block_k + 1) + high
        distinct, inverse = unique_rows(code)
        ids[part] = inverse + count
        bitmaps.append(_interval_bitmaps(grid, low[distinct], high[distinct]))
        count += len(distinct)
    return keys[visited], ids[visited], torch.cat(bitmaps)


def _interval_bitmaps(grid: Grid, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """uint8 [n, block_q, block_k / 8] with bits low ... high - 1 of each row set."""
    byte = torch.arange(0, grid.block_k, 8, device=low.device)
    low, high = (low[..., None] - byte).clamp(0, 8), (high[..., None] - byte).clamp(0, 8)
    return ((1 << high) - (1 << low)).to(torch.uint8)


def _from_pairs(grid: Grid, query: torch.Tensor, key: torch.Tensor) -> BlockMask:
    """The BlockMask of distinct pairs."""
    block = query // grid.block_q * grid.columns + key // grid.block_k
    keys, ids = torch.unique(block, return_inverse=True)
    bitmaps = torch.zeros(len(keys), grid.block_q, grid.block_k // 8, dtype=torch.uint8, device=query.device)
    byte = (ids * grid.block_q + query % grid.block_q) * (grid.block_k // 8) + key % grid.block_k // 8
    bitmaps.view(-1).index_add_(0, byte, (1 << key % 8).to(torch.uint8))
    return _assemble(grid, keys, torch.arange(len(keys), device=query.device), bitmaps)


def _shared_grid(seqlen_q, seqlen_k, block_size) -> Grid:
    return Grid(1, 1, *_check_lengths(seqlen_q, seqlen_k), *check_block_size(block_size))


# --- checks ----------------------------------------------------------------------------------------------------------


def check_block_size(block_size) -> tuple[int, int]:
    """(block_q, block_k) of an int or a pair; TypeError or ValueError unless multiples of 16 in 16 ... 256."""
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(type(size) is int for size in sizes):
        raise TypeError(f"block_size={block_size!r} must be an int or a pair (block_q, block_k) of ints")
    if not all(16 <= size <= 256 and size % 16 == 0 for size in sizes):
        raise ValueError(f"block_size={block_size!r}: sizes must be multiples of 16 in 16 ... 256")
    return tuple(sizes)


def _check_lengths(seqlen_q, seqlen_k) -> tuple[int, int]:
    for name, value in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
        _check_int(name, value, 0)
    return seqlen_q, seqlen_k


def _check_int(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int")
    if value < least:
        raise ValueError(f"{name}={value} must be >= {least}")


def _check_same_grid(a: BlockMask, b: BlockMask) -> None:
    for name, attribute in (("seq_lengths", "seq_lengths"), ("block sizes", "BLOCK_SIZE"), ("devices", "device")):
        mine, other = getattr(a, attribute), getattr(b, attribute)
        if mine != other:
            raise ValueError(f"the masks have {name} {mine} and {other}; build both with the same")


def _check_integers(name: str, tensor, dim: int, bound: int) -> None:
    """TypeError unless an integer tensor of `dim` dimensions, ValueError unless 0 <= entries < bound."""
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


def _check_compressed(indptr, indices, rows: int, columns: int) -> torch.Tensor:
    """The row of each entry of a compressed list; raises unless it is in range and ascending in each row."""
    _check_integers("indices", indices, 1, columns)
    _check_integers("indptr", indptr, 1, len(indices) + 1)
    if len(indptr) != rows + 1:
        raise ValueError(f"indptr has {len(indptr)} entries; {rows} rows need {rows + 1}")
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices):
        raise ValueError(
            f"indptr runs from {int(indptr[0])} to {int(indptr[-1])}; it must run from 0 to len(indices)={len(indices)}"
        )
    _raise_at("indptr", indptr, torch.cat([indptr[:1] < 0, indptr[1:] < indptr[:-1]]), "must not decrease")
    row = torch.arange(rows, device=indptr.device).repeat_interleave(indptr.diff())
    _check_ascending("indices", indices, row)
    return row


def _check_ascending(name: str, columns: torch.Tensor, row: torch.Tensor) -> None:
    wrong = (row[1:] == row[:-1]) & (columns[1:] <= columns[:-1])
    _raise_at(
        name, columns, torch.cat([wrong[:0].new_zeros(min(len(columns), 1)), wrong]), "must ascend in a row, each once"
    )


def _check(mask: BlockMask) -> None:
    """Raise unless every list is in range, ascending and free of repetitions; see `BlockMask`."""
    for name, tensor in mask._tensors().items():
        expected = torch.uint8 if name == "bitmaps" else torch.int32
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != expected:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {expected}")
        if tensor.device != mask.kv_indices.device:
            raise ValueError(f"{name} is on {tensor.device}, kv_indices on {mask.kv_indices.device}; move one")
        object.__setattr__(mask, name, tensor.contiguous())
    if mask.kv_num_blocks.dim() != 3:
        raise ValueError(
            f"kv_num_blocks has shape {tuple(mask.kv_num_blocks.shape)}; it must be [batch|1, heads|1, rows]"
        )
    grid = mask._grid
    shape = (grid.batch, grid.num_heads, grid.rows)
    expected = {
        "kv_num_blocks": shape,
        "full_kv_num_blocks": shape,
        "kv_indices": (*shape, mask.kv_indices.shape[-1]),
        "full_kv_indices": (*shape, mask.full_kv_indices.shape[-1]),
        "kv_bitmaps": tuple(mask.kv_indices.shape),
        "bitmaps": (len(mask.bitmaps), grid.block_q, grid.block_k // 8),
    }
    for name, tensor in mask._tensors().items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with seq_lengths={mask.seq_lengths} and "
                f"BLOCK_SIZE={mask.BLOCK_SIZE} it must be {expected[name]}"
            )
    partial = _listed(grid, mask.kv_num_blocks, mask.kv_indices, "kv")
    full = _listed(grid, mask.full_kv_num_blocks, mask.full_kv_indices, "full_kv")
    keys = torch.cat([partial, full]).sort().values
    if bool((keys[1:] == keys[:-1]).any()):
        row, column = (int(x[0]) for x in grid.row_and_column(keys[1:][keys[1:] == keys[:-1]]))
        raise ValueError(f"block (row {row}, column {column}) is listed as partial and as full; list it once")
    listed = _listed_positions(mask.kv_num_blocks, mask.kv_indices)
    wrong = listed & ((mask.kv_bitmaps < 0) | (mask.kv_bitmaps >= len(mask.bitmaps)))
    _raise_at("kv_bitmaps", mask.kv_bitmaps, wrong, f"must be in 0 ... {len(mask.bitmaps) - 1}")
    _check_edges(grid, partial, mask.kv_bitmaps[listed], mask.bitmaps)


def _listed(grid: Grid, counts: torch.Tensor, columns: torch.Tensor, name: str) -> torch.Tensor:
    """Keys of the blocks in a pair of lists, which are checked."""
    _raise_at(
        f"{name}_num_blocks",
        counts,
        (counts < 0) | (counts > columns.shape[-1]),
        f"must be in 0 ... {columns.shape[-1]}",
    )
    listed = _listed_positions(counts, columns)
    _raise_at(
        f"{name}_indices", columns, listed & ((columns < 0) | (columns >= grid.columns)),
        f"must be in 0 ... {grid.columns - 1}",
    )  # fmt: skip
    wrong = torch.zeros_like(listed)
    wrong[..., 1:] = listed[..., 1:] & (columns[..., 1:] <= columns[..., :-1])
    _raise_at(f"{name}_indices", columns, wrong, "must be greater than the one before it: ascending, each block once")
    return _keys(grid, counts, columns)


def _check_edges(grid: Grid, keys: torch.Tensor, ids: torch.Tensor, bitmaps: torch.Tensor) -> None:
    edge = grid.edge(keys)
    codes = torch.unique(ids[edge > 0].long() * 4 + edge[edge > 0])
    if not len(codes):
        return
    outside = bitmaps[codes // 4] & ~grid.inside(keys.device)[codes % 4]
    if bool(outside.any()):
        bad = int((codes // 4)[outside.flatten(1).any(1)][0])
        raise ValueError(f"bitmaps[{bad}] has a bit set past seqlen_q or seqlen_k in a block at the edge; clear it")
