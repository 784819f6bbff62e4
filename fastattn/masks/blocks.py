"""Sets of blocks, the arithmetic under `BlockMask`: nothing here is n x n.

A set of blocks is three tensors: `keys`, int64, ascending, each ((batch * num_heads + head) * rows + row) * columns +
column; `ids`, int64, as many: which row of `bitmaps`, or FULL (ABSENT while sets are combined); and `bitmaps`, uint8
[n, block_q, block_k / 8]. Bits past seqlen_q or seqlen_k are 0.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .intervals import Mask, diagonal_bounds

FULL, ABSENT = -1, -2
_CHUNK = 1 << 22  # (query, key) pairs that are looked at together

Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Grid(NamedTuple):
    """The blocks of a mask: sizes, and what follows from a key."""

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

    @property
    def transposed(self) -> "Grid":
        """The grid with queries and keys exchanged."""
        return Grid(self.batch, self.num_heads, self.seqlen_k, self.seqlen_q, self.block_k, self.block_q)

    def entry(self, keys: torch.Tensor) -> torch.Tensor:
        """batch * num_heads + head of each block."""
        return keys // max(self.rows * self.columns, 1)

    def row(self, keys: torch.Tensor) -> torch.Tensor:
        """Row of each block within its head."""
        return keys // max(self.columns, 1) % max(self.rows, 1)

    def column(self, keys: torch.Tensor) -> torch.Tensor:
        """Column of each block."""
        return keys % max(self.columns, 1)

    def keys(self, entry: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The inverse of the three above."""
        return (entry * self.rows + row) * self.columns + column

    def edge(self, keys: torch.Tensor) -> torch.Tensor:
        """2 where a block sticks out past seqlen_q, plus 1 where it does past seqlen_k."""
        below = (self.row(keys) + 1) * self.block_q > self.seqlen_q
        return 2 * below + 1 * ((self.column(keys) + 1) * self.block_k > self.seqlen_k)

    def area(self, keys: torch.Tensor) -> torch.Tensor:
        """Pairs of each block inside the lengths."""
        height = (self.seqlen_q - self.row(keys) * self.block_q).clamp(max=self.block_q)
        return height * (self.seqlen_k - self.column(keys) * self.block_k).clamp(max=self.block_k)

    def inside(self, device) -> torch.Tensor:
        """The bitmaps [4, block_q, block_k / 8] of the pairs inside the lengths, indexed by `edge`."""
        query, key = (torch.arange(size, device=device) for size in (self.block_q, self.block_k))
        heights = self.block_q, self.seqlen_q - (self.rows - 1) * self.block_q
        widths = self.block_k, self.seqlen_k - (self.columns - 1) * self.block_k
        return torch.stack([pack((query < h)[:, None] & (key < w)) for h in heights for w in widths])

    def no_bitmaps(self, device) -> torch.Tensor:
        """bitmaps of a set that has none."""
        return torch.empty(0, self.block_q, self.block_k // 8, dtype=torch.uint8, device=device)


# --- bits ------------------------------------------------------------------------------------------------------------


def pack(bits: torch.Tensor) -> torch.Tensor:
    """bool [..., n] -> uint8 [..., n / 8], bit j % 8 of byte j // 8 is entry j; n is a multiple of 8."""
    # 8 bytes of 0 or 1 times this number have their 8 bits, in order, in the highest byte: no two terms meet.
    packed = (bits.contiguous().view(-1).view(torch.int64) * 0x0102040810204080).view(torch.uint8)[7::8]
    return packed.reshape(*bits.shape[:-1], bits.shape[-1] // 8)


def unpack(bitmaps: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmaps.device)
    return ((bitmaps[..., None] >> shifts) & 1).bool().flatten(-2)


def popcount(bitmaps: torch.Tensor) -> torch.Tensor:
    """How many bits are set: uint8 [n, ...] -> int64 [n]."""
    x = bitmaps - ((bitmaps >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).flatten(1).sum(1)


def unique_rows(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, inverse): codes[first] are the distinct rows in order of appearance, codes[first][inverse] is codes.

    codes int64 [n, width]. By hash, and exact: the result is compared, and another hash tried if two rows collide.
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


def unique_bitmaps(bitmaps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(distinct bitmaps in order of appearance, which one each of `bitmaps` is)."""
    first, inverse = unique_rows(bitmaps.flatten(1).view(torch.int32).long())
    return bitmaps[first], inverse


# --- sets ------------------------------------------------------------------------------------------------------------


def reduce(grid: Grid, keys: torch.Tensor, ids: torch.Tensor, bitmaps: torch.Tensor) -> Blocks:
    """The same set in its one form: no bitmap is empty or complete, each is there once, in order of appearance."""
    partial = ids >= 0
    used, inverse = torch.unique(ids[partial], return_inverse=True)
    counts = popcount(bitmaps[used])[inverse]
    ids = ids.clone()
    ids[partial] = torch.where(counts == grid.area(keys[partial]), FULL, torch.where(counts == 0, ABSENT, ids[partial]))
    keys, ids = keys[ids != ABSENT], ids[ids != ABSENT]
    partial = ids >= 0
    first, inverse = unique_rows(ids[partial][:, None])
    bitmaps, same = unique_bitmaps(bitmaps[ids[partial][first]])
    ids[partial] = same[inverse]
    return keys, ids, bitmaps


def combine(bitmaps, a, b, operator: Callable, otherwise) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, bitmaps): operator(bitmaps[a], bitmaps[b]) where both are bitmaps, once a pair; elsewhere `otherwise`."""
    both = (a >= 0) & (b >= 0)
    pairs, inverse = torch.unique(a[both] * len(bitmaps) + b[both], return_inverse=True)
    made = operator(bitmaps[pairs // max(len(bitmaps), 1)], bitmaps[pairs % max(len(bitmaps), 1)])
    ids = otherwise.clone()
    ids[both] = inverse + len(bitmaps)
    return ids, torch.cat([bitmaps, made])


def align(a: Blocks, b: Blocks):
    """(keys, ids of a, ids of b, bitmaps) of the union of two sets; an id is ABSENT where a set lacks the block."""
    (keys_a, ids_a, bitmaps_a), (keys_b, ids_b, bitmaps_b) = a, b
    ids_b = torch.where(ids_b >= 0, ids_b + len(bitmaps_a), ids_b)
    keys = torch.cat([keys_a, keys_b]).unique()
    ids = [
        torch.full_like(keys, ABSENT).scatter(0, torch.searchsorted(keys, own), own_ids)
        for own, own_ids in ((keys_a, ids_a), (keys_b, ids_b))
    ]
    return keys, *ids, torch.cat([bitmaps_a, bitmaps_b])


def intersection(a: Blocks, b: Blocks) -> Blocks:
    """The pairs that are in both sets (not reduced)."""
    keys, a, b, bitmaps = align(a, b)
    seen = (a != ABSENT) & (b != ABSENT)
    a, b = a[seen], b[seen]
    return keys[seen], *combine(bitmaps, a, b, torch.bitwise_and, torch.where(a == FULL, b, a))


def union(a: Blocks, b: Blocks) -> Blocks:
    """The pairs that are in either set (not reduced)."""
    keys, a, b, bitmaps = align(a, b)
    one = torch.where(a == ABSENT, b, torch.where((b == ABSENT) | (a == FULL), a, b))
    return keys, *combine(bitmaps, a, b, torch.bitwise_or, one)


def complement(grid: Grid, blocks: Blocks) -> Blocks:
    """The pairs that are not in the set (not reduced): O(grid.size)."""
    keys, ids, bitmaps = blocks
    everywhere = torch.full((grid.size,), ABSENT, device=keys.device)
    everywhere[keys] = ids
    keys = (everywhere != FULL).nonzero()[:, 0]
    inside = len(bitmaps) + grid.edge(keys)
    bitmaps = torch.cat([bitmaps, grid.inside(keys.device)])
    full = torch.full_like(keys, FULL)
    return keys, *combine(bitmaps, inside, everywhere[keys], lambda x, y: x & ~y, full)


def transpose(grid: Grid, blocks: Blocks) -> Blocks:
    """The set with queries and keys exchanged, in grid.transposed."""
    keys, ids, bitmaps = blocks
    keys, order = grid.transposed.keys(grid.entry(keys), grid.column(keys), grid.row(keys)).sort()
    return keys, ids[order], torch.cat([pack(unpack(part).transpose(1, 2)) for part in bitmaps.split(256)])


def regroup(grid: Grid, other: Grid, blocks: Blocks) -> Blocks:
    """The set in the blocks of another grid of the same lengths (not reduced), by way of cells of 16 x 16."""
    cells = grid._replace(block_q=16, block_k=16)
    keys, ids, bitmaps = _to_cells(grid, cells, blocks)
    per_row, per_column = other.block_q // 16, other.block_k // 16
    row, column = cells.row(keys), cells.column(keys)
    block = other.keys(cells.entry(keys), row // per_row, column // per_column)
    place = row % per_row * per_column + column % per_column
    block, member = torch.unique(block, return_inverse=True)
    height = (cells.rows - other.row(block) * per_row).clamp(max=per_row)
    width = (cells.columns - other.column(block) * per_column).clamp(max=per_column)
    full = torch.bincount(member[ids == FULL], minlength=len(block)) == height * width
    number = (~full).cumsum(0) - 1
    made = torch.zeros(int((~full).sum()), per_row * per_column, 16, 2, dtype=torch.uint8, device=keys.device)
    ids = torch.where(ids == FULL, len(bitmaps) + cells.edge(keys), ids)
    mixed = ~full[member]
    made[number[member][mixed], place[mixed]] = torch.cat([bitmaps, cells.inside(keys.device)])[ids[mixed]]
    made = made.view(-1, per_row, per_column, 16, 2).transpose(2, 3)
    return block, torch.where(full, FULL, number), made.reshape(-1, other.block_q, other.block_k // 8)


def _to_cells(grid: Grid, cells: Grid, blocks: Blocks) -> Blocks:
    keys, ids, bitmaps = blocks
    per_row, per_column = grid.block_q // 16, grid.block_k // 16
    step = torch.arange(per_row * per_column, device=keys.device)
    row = grid.row(keys)[:, None] * per_row + step // per_column
    column = grid.column(keys)[:, None] * per_column + step % per_column
    inside = (row < cells.rows) & (column < cells.columns)
    keys = cells.keys(grid.entry(keys)[:, None], row, column)[inside]
    ids = torch.where(ids[:, None] == FULL, FULL, ids[:, None] * len(step) + step)[inside]
    bitmaps = bitmaps.view(-1, per_row, 16, per_column, 2).transpose(2, 3).reshape(-1, 16, 2)
    return keys, ids, bitmaps


# --- lists -----------------------------------------------------------------------------------------------------------


def to_lists(grid: Grid, keys: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """Counts [B, H, rows], columns [B, H, rows, longest], and each of `values` laid out as the columns; int32."""
    shape = grid.batch, grid.num_heads, grid.rows
    row = keys // max(grid.columns, 1)
    counts = torch.bincount(row, minlength=grid.batch * grid.num_heads * grid.rows)
    longest = int(counts.max()) if counts.numel() else 0
    places = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[row] + row * longest
    lists = [counts.view(shape).int()]
    for value in (grid.column(keys), *values):
        padded = torch.zeros(*shape, longest, dtype=torch.int32, device=keys.device)
        padded.view(-1)[places] = value.int()
        lists.append(padded)
    return lists


def listed(counts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Which places of `columns` hold a block."""
    return torch.arange(columns.shape[-1], device=columns.device) < counts[..., None]


def from_lists(grid: Grid, counts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The keys of the listed blocks, ascending if every list is."""
    row = torch.arange(counts.numel(), device=counts.device).view(counts.shape)
    return (row[..., None] * grid.columns + columns)[listed(counts, columns)]


# --- where sets come from --------------------------------------------------------------------------------------------


def evaluate(grid: Grid, keys: torch.Tensor, fn: Callable, alike: torch.Tensor | None = None) -> Blocks:
    """The pairs of the blocks `keys` for which fn(batch, head, query, key) is True (not reduced).

    alike: int64 [len(keys)], equal for blocks that look the same: one of them is evaluated.
    """
    if alike is not None:
        first, inverse = unique_rows(torch.stack([alike, grid.edge(keys)], 1))
        _, ids, bitmaps = evaluate(grid, keys[first], fn)
        return keys, ids[inverse], bitmaps
    inside = grid.inside(keys.device)
    query, key = (torch.arange(size, device=keys.device) for size in (grid.block_q, grid.block_k))
    ids, bitmaps, count = [], [grid.no_bitmaps(keys.device)], 0
    for part in keys.split(max(_CHUNK // (grid.block_q * grid.block_k), 1)):
        place = part[:, None, None]
        entry = grid.entry(place)
        i = (grid.row(place) * grid.block_q + query[:, None]).clamp(max=grid.seqlen_q - 1)
        j = (grid.column(place) * grid.block_k + key).clamp(max=grid.seqlen_k - 1)
        seen = fn(entry // max(grid.num_heads, 1), entry % max(grid.num_heads, 1), i, j)
        seen = check_predicate(seen, (len(part), grid.block_q, grid.block_k))
        distinct, inverse = unique_bitmaps(pack(seen) & inside[grid.edge(part)])
        ids.append(inverse + count)
        bitmaps.append(distinct)
        count += len(distinct)
    return keys, torch.cat(ids), torch.cat(bitmaps)


def check_predicate(seen, shape) -> torch.Tensor:
    if not isinstance(seen, torch.Tensor) or seen.dtype != torch.bool:
        kind = seen.dtype if isinstance(seen, torch.Tensor) else type(seen).__name__
        raise TypeError(f"the mask_mod returned {kind}; it must return a bool tensor, True = attend")
    try:
        return seen.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"the mask_mod returned shape {tuple(seen.shape)}; it must broadcast its four index tensors, to {shape}"
        ) from error


def intervals(mask: Mask, seqlen_q: int, seqlen_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First key and one past the last of each row, int64 [batch|1, num_heads|1, seqlen_q]; (seqlen_k, 0) if empty."""
    bounds = [bound for bound in (mask.k_start, mask.k_end) if bound is not None]
    lo, hi = diagonal_bounds(mask.windows, seqlen_q, seqlen_k)
    query = torch.arange(seqlen_q, device=bounds[0].device if bounds else None).view(1, 1, -1)
    start, end = (query + lo).clamp(min=0), (query + hi + 1).clamp(max=seqlen_k)
    for bound in bounds:
        if bound.shape[2] not in (1, seqlen_q):
            raise ValueError(f"the mask has key intervals of shape {tuple(bound.shape)}, but seqlen_q={seqlen_q}")
    start = start if mask.k_start is None else torch.maximum(start, mask.k_start)
    end = end if mask.k_end is None else torch.minimum(end, mask.k_end)
    start, end = torch.broadcast_tensors(start, end)
    empty = start >= end
    return start.masked_fill(empty, seqlen_k), end.masked_fill(empty, 0)


def interval_blocks(grid: Grid, start: torch.Tensor, end: torch.Tensor, keys: torch.Tensor | None = None) -> Blocks:
    """The pairs with start <= key < end (bounds from `intervals`), in the blocks `keys` if given (not reduced)."""
    device = start.device
    if grid.size == 0:
        keys = torch.empty(0, dtype=torch.int64, device=device)
        return keys, keys, grid.no_bitmaps(device)
    row = torch.arange(grid.rows * grid.block_q, device=device).clamp(max=grid.seqlen_q - 1)
    start, end = (bound[..., row].reshape(-1, grid.block_q) for bound in (start, end))
    if keys is None:
        first, last = start.amin(1) // grid.block_k, -(-end.amax(1) // grid.block_k)
        count = (last - first).clamp(min=0)
        row = torch.arange(len(count), device=device).repeat_interleave(count)
        place = torch.arange(len(row), device=device) - (count.cumsum(0) - count)[row]
        keys = row * grid.columns + first[row] + place
    row, origin = keys // grid.columns, grid.column(keys) * grid.block_k
    full = (start.amax(1)[row] <= origin) & (end.amin(1)[row] >= (origin + grid.block_k).clamp(max=grid.seqlen_k))
    ids = torch.full_like(keys, FULL)
    bitmaps, count = [grid.no_bitmaps(device)], 0
    query = torch.arange(grid.block_q, device=device)
    for part in (~full).nonzero()[:, 0].split(max(_CHUNK // 32 // grid.block_q, 1)):
        r, o = row[part][:, None], origin[part][:, None]
        low, high = (start[row[part]] - o).clamp(0, grid.block_k), (end[row[part]] - o).clamp(0, grid.block_k)
        outside = (low >= high) | (r % grid.rows * grid.block_q + query >= grid.seqlen_q)
        low, high = low.masked_fill(outside, 0), high.masked_fill(outside, 0)
        distinct, inverse = unique_rows(low * (grid.block_k + 1) + high)
        ids[part] = inverse + count
        bitmaps.append(_interval_bitmaps(grid, low[distinct], high[distinct]))
        count += len(distinct)
    return keys, ids, torch.cat(bitmaps)


def _interval_bitmaps(grid: Grid, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """uint8 [n, block_q, block_k / 8] with bits low ... high - 1 of each row set."""
    byte = torch.arange(0, grid.block_k, 8, device=low.device)
    low, high = (low[..., None] - byte).clamp(0, 8), (high[..., None] - byte).clamp(0, 8)
    return ((1 << high) - (1 << low)).to(torch.uint8)


def full_blocks(grid: Grid, keys: torch.Tensor) -> Blocks:
    """These blocks as a whole."""
    return keys, torch.full_like(keys, FULL), grid.no_bitmaps(keys.device)


def pair_blocks(grid: Grid, query: torch.Tensor, key: torch.Tensor) -> Blocks:
    """The set of distinct pairs (query[n], key[n]), one head (not reduced)."""
    keys, ids = torch.unique(query // grid.block_q * grid.columns + key // grid.block_k, return_inverse=True)
    bitmaps = torch.zeros(len(keys), grid.block_q, grid.block_k // 8, dtype=torch.uint8, device=query.device)
    byte = (ids * grid.block_q + query % grid.block_q) * (grid.block_k // 8) + key % grid.block_k // 8
    bitmaps.view(-1).index_add_(0, byte, (1 << key % 8).to(torch.uint8))
    return keys, torch.arange(len(keys), device=query.device), bitmaps


def product_blocks(grid: Grid, query: torch.Tensor, key: torch.Tensor) -> Blocks:
    """The pairs of a query in the set `query` (bool [seqlen_q]) and a key in `key` (bool [seqlen_k]) (not reduced)."""
    rows = torch.nn.functional.pad(query, (0, grid.rows * grid.block_q - grid.seqlen_q)).view(grid.rows, grid.block_q)
    columns = torch.nn.functional.pad(key, (0, grid.columns * grid.block_k - grid.seqlen_k)).view(
        grid.columns, grid.block_k
    )
    row, column = rows.any(1).nonzero()[:, 0], columns.any(1).nonzero()[:, 0]
    first_row, row_id = unique_rows(rows[row].long())
    first_column, column_id = unique_rows(columns[column].long())
    keys = (row[:, None] * grid.columns + column).flatten()
    ids = (row_id[:, None] * len(first_column) + column_id).flatten()
    selected = pack(columns[column[first_column]])
    bitmaps = torch.where(rows[row[first_row]][:, None, :, None], selected[None, :, None, :], 0).flatten(0, 1)
    return keys, ids, bitmaps.to(torch.uint8)
