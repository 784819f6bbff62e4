"""`BlockMask`: which blocks of keys each block of queries visits, as lists, and a bitmap where a block is seen in part.

A block of queries and keys is full (every pair is seen: no mask is applied), partial (one bit a pair) or absent.
Equal bitmaps are stored once, so a causal mask of any length has one. The lists have the names and the layout of
torch's FlexAttention. Nothing here is n x n but `to_dense` and `from_dense`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from . import block_checks, blocks, flex, picture
from .block_checks import BlockSize
from .blocks import FULL, Blocks, Grid
from .concatenation import concatenated
from .intervals import Mask


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
        object.__setattr__(self, "BLOCK_SIZE", block_checks.check_block_size(self.BLOCK_SIZE))
        object.__setattr__(self, "seq_lengths", block_checks.check_lengths(*self.seq_lengths))
        block_checks.check_mask(self)
        block_checks.made[self.kv_num_blocks.data_ptr()] = self

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
        grid = block_checks.shared_grid(seqlen_q, seqlen_k, block_size)
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
        grid = block_checks.shared_grid(seqlen_q, seqlen_k, block_size)
        grid = grid._replace(
            batch=block_checks.check_int("batch", batch), num_heads=block_checks.check_int("num_heads", num_heads)
        )
        return build(grid, blocks.evaluate(grid, torch.arange(grid.size, device=device), fn))

    @classmethod
    def from_dense(cls, mask: torch.Tensor, *, block_size: BlockSize = 128) -> "BlockMask":
        """The blocks of a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], True = attend."""
        block_checks.check_dense(mask)
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
        grid = block_checks.shared_grid(len(queries), len(keys), block_size)
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
        grid = block_checks.shared_grid(seqlen_q, seqlen_k, block_size)
        keys = block_checks.check_compressed(indptr, indices, grid.rows, grid.columns) * grid.columns + indices
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
        grid = block_checks.shared_grid(seqlen_q, seqlen_k, block_size)
        query = block_checks.check_compressed(indptr, indices, grid.seqlen_q, grid.seqlen_k)
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
        grid = block_checks.shared_grid(seqlen_q, seqlen_k, block_size)
        sizes = (grid.rows, grid.columns) if of_blocks else (grid.seqlen_q, grid.seqlen_k)
        block_checks.check_integers("queries", queries, 1, sizes[0])
        block_checks.check_integers("keys", keys, 1, sizes[1])
        pairs = block_checks.check_pairs(queries, keys, sizes[1])
        if of_blocks:
            return build(grid, blocks.full_blocks(grid, pairs))
        return build(grid, blocks.pair_blocks(grid, queries.long(), keys.long()))

    @classmethod
    def from_flex(cls, block_mask) -> "BlockMask":
        """The blocks of a torch.nn.attention.flex_attention.BlockMask.

        Its mask_mod is evaluated here and now, on the partial blocks alone, with index tensors that broadcast.
        """
        return build(*flex.blocks_of(block_mask))

    @classmethod
    def cat(cls, masks: Sequence["BlockMask"], dim: int = 1) -> "BlockMask":
        """One mask of masks for some heads (dim=1) or batch entries (dim=0) each; equal lengths and block size."""
        return build(*concatenated(masks, dim))

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
        block_q, block_k = block_checks.check_block_size(block_size)
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
    def described(self) -> tuple:
        """(shape, block size, device): what the plan of a call depends on."""
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
            self._cache["mask_mod"] = flex.mask_mod(self)
        return self._cache["mask_mod"]

    def to_flex(self, mask_mod: Callable | None = None):
        """The torch.nn.attention.flex_attention.BlockMask of the same blocks.

        mask_mod: a function equal to this mask, if there is one that FlexAttention computes faster than it looks up.
        Compiled for the CPU, FlexAttention of torch 2.13 needs torch.compile(..., dynamic=False) for the look-up.
        """
        return flex.to_flex(self, self.mask_mod if mask_mod is None else mask_mod)

    def plot(self, ax=None, *, batch: int = 0, head: int = 0, pixels: int = 1024):
        """A picture of the pattern: queries down, keys across, dark = seen. Returns matplotlib Axes (`ax` or new ones).

        A pixel is a pair if no length exceeds `pixels`, else one or several blocks, as dark as the share that is seen.
        """
        return picture.plot(self, ax, batch, head, pixels)

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
        block_checks.check_same_grid(self, other)
        return self._broadcast(other.shape[:2])


def build(grid: Grid, found: Blocks) -> BlockMask:
    """The BlockMask of a set of blocks."""
    keys, ids, bitmaps = blocks.reduce(grid, *found)
    counts, columns, bitmap_ids = blocks.to_lists(grid, keys[ids != FULL], ids[ids != FULL])
    full = blocks.to_lists(grid, keys[ids == FULL])
    return BlockMask(
        counts, columns, *full, bitmap_ids, bitmaps, (grid.block_q, grid.block_k), (grid.seqlen_q, grid.seqlen_k)
    )
