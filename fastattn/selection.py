"""Which blocks of keys matter for these queries, estimated before attention runs; and what was lost, exactly."""

import math

import torch

from .api import attention
from .checks import check_flag, check_int, check_real, one_line
from .masks.block_checks import BlockSize, check_block_size
from .masks.block_mask import BlockMask, build
from .masks.blocks import Grid, full_blocks
from .masks.graphs import in_graphs
from .masks.intervals import Mask
from .scores.scale import TERM as scale_term

METHODS = ("mean_pool", "antidiagonal", "vertical_slash")
STRIDE = 16  # side of antidiagonal's cells
LAST_QUERIES = 64  # that vertical_slash looks at
_CELLS = 1 << 17  # scores of antidiagonal at a time


@in_graphs(lambda given: ((given["q"].shape[2], given["k"].shape[2]), given["block_size"]))
@torch.no_grad()
def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    method: str = "mean_pool",
    top_k: int | None = None,
    coverage: float | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    block_size: BlockSize = 128,
) -> BlockMask:
    """For every block of queries of every head, the blocks of keys with the largest estimated softmax mass.

    q, k           [batch, num_heads, seqlen_q, head_dim], [batch, num_heads_k, seqlen_k, head_dim] as in `attention`
    method         "mean_pool": the score of two blocks is that of their mean query and mean key;
                   "antidiagonal": scores of cells of 16 x 16, each the mean over its antidiagonal, softmax over cells
                   (XAttention, arXiv 2503.16428), for every other cell of queries: 1.6 % of the multiplications
                   of dense attention;
                   "vertical_slash": what the last 64 queries see, by key and by distance, is taken for all queries
                   (MInference, arXiv 2407.02490); needs causal=True
    top_k          how many blocks of keys a block of queries visits (fewer where there are fewer), or
    coverage       the estimated share of the softmax mass that they must reach, in (0, 1]; give one of the two
    causal         a query sees keys up to its own position (bottom-right); its own block is always visited
    softmax_scale  default head_dim ** -0.5

    Returns a BlockMask [batch, num_heads, seqlen_q, seqlen_k]: visited blocks whole, cut at the diagonal if causal. No
    gradient. The same tensors give the same mask (for the same number of threads). Memory O(blocks of queries x
    blocks of keys) for one head at a time, and the visited lists.

    Raises ValueError or TypeError that names the argument.
    """
    softmax_scale = scale_term.check(softmax_scale)
    _check(q, k, method, top_k, coverage, causal)
    (batch, num_heads, seqlen_q, head_dim), (_, num_heads_k, seqlen_k, _) = q.shape, k.shape
    grid = Grid(1, 1, seqlen_q, seqlen_k, *check_block_size(block_size))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    estimate = {"mean_pool": _mean_pool, "antidiagonal": _antidiagonal, "vertical_slash": _vertical_slash}[method]
    visible, own = _visible(grid, causal, q.device)
    found = [torch.empty(0, dtype=torch.int64, device=q.device)]
    for entry in range(batch * num_heads if grid.size else 0):
        b, h = divmod(entry, num_heads)
        queries, keys = q[b, h].to(torch.float32), k[b, h * num_heads_k // num_heads].to(torch.float32)
        mass = estimate(grid, queries, keys, scale, visible, causal)
        found.append(_choose(mass, visible, own, top_k, coverage).flatten().nonzero()[:, 0] + entry * grid.size)
    mask = build(grid._replace(batch=batch, num_heads=num_heads), full_blocks(grid, torch.cat(found)))
    return mask & Mask.causal() if causal else mask


def coverage(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: BlockMask | Mask | torch.Tensor,
    *,
    within: BlockMask | Mask | torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """The share of each query's softmax mass that `mask` keeps, [batch, num_heads, seqlen_q], in lse's dtype.

    exp(lse with the mask - lse without), from two passes of `attention` over a single value column: exact up to
    rounding, O(seqlen) memory wherever `attention` is. 1: nothing is lost; a query that sees no key even without
    `mask` loses nothing.

    within   what counts as everything, for instance a padding mask; it is combined with `mask` by `&`
    options  of `attention`, for both passes: causal, window_size, softmax_scale, softcap, alibi_slopes, bias, sinks
             (a sink's share counts as kept)
    """
    value = k[..., :1]
    try:
        kept = mask if within is None else mask & within
    except TypeError:
        kinds = f"{type(mask).__name__} and {type(within).__name__}"
        raise TypeError(
            f"mask and within are a {kinds}; give two that `&` combines (to_dense turns masks into tensors)"
        ) from None
    lse, total = (attention(q, k, value, mask=m, return_lse=True, **options)[1] for m in (kept, within))
    return torch.exp(lse - total).clamp(max=1.0).masked_fill(total == -math.inf, 1.0)


# --- estimates: q [seqlen_q, head_dim] and k [seqlen_k, head_dim] of a head -> share [rows, columns] ------------------


def _mean_pool(grid: Grid, q, k, scale: float, visible: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = _means(q, grid.block_q) @ _means(k, grid.block_k).T * scale
    scores = scores + _sizes(grid.seqlen_k, grid.block_k, k.device).log()
    return torch.softmax(scores.masked_fill(~visible, -math.inf), 1).nan_to_num()


def _antidiagonal(grid: Grid, q, k, scale: float, visible: torch.Tensor, causal: bool) -> torch.Tensor:
    """Some rows at a time, and only keys up to the last that they may see."""
    q, k = _cells(q, grid.block_q), _cells(k, grid.block_k, backwards=True)
    last = (torch.arange(len(q), device=q.device) + 1) * STRIDE - 1 + grid.seqlen_k - grid.seqlen_q
    q, last = (x.view(grid.rows, grid.block_q // STRIDE, -1)[:, ::2] for x in (q, last))  # every other cell
    per_row, per_column = q.shape[1], grid.block_k // STRIDE
    weight = _sizes(grid.seqlen_k, STRIDE, k.device).log()
    weight = torch.nn.functional.pad(weight, (0, len(k) - len(weight)), value=-math.inf)
    first_key = torch.arange(len(k), device=k.device) * STRIDE
    share = torch.zeros_like(visible, dtype=torch.float32)
    step = max(_CELLS // (per_row * len(k)), 1)
    for row in range(0, grid.rows, step):
        rows = slice(row, row + step)
        columns = int(visible[rows].any(0).sum())  # visible columns are the first ones
        keys = columns * per_column
        scores = torch.addmm(weight[:keys], q[rows].flatten(0, 1), k[:keys].T, alpha=scale / STRIDE)
        if causal:
            scores = scores.masked_fill(first_key[:keys] > last[rows].flatten(0, 1), -math.inf)
        mass = torch.softmax(scores, 1).nan_to_num()
        share[rows, :columns] = mass.view(len(mass) // per_row, per_row, columns, per_column).sum((1, 3)) / per_row
    return share


def _vertical_slash(grid: Grid, q, k, scale: float, visible: torch.Tensor, causal: bool) -> torch.Tensor:
    """Each weight of the last queries is split between its column and its diagonal, in proportion to their sums.

    Matrices are [queries, keys backwards]: one row further down, a diagonal is one column further left.
    """
    last, seqlen_k = q[-LAST_QUERIES:] * scale, len(k)
    count = len(last)
    back = torch.arange(seqlen_k, device=q.device)  # columns; the distance is back - (count - 1 - row)
    future = back < (count - 1 - torch.arange(count, device=q.device))[:, None]
    weight = torch.softmax((last @ k.flip(0).T).masked_fill_(future, -math.inf), 1).nan_to_num_()

    column, diagonal = weight.sum(0), _diagonal_sums(weight)
    both = (column + diagonal.unfold(0, seqlen_k, 1)).clamp_(min=torch.finfo(weight.dtype).tiny)
    on_column = torch.div(column, both, out=both).mul_(weight)  # in place: most of the time is page faults
    diagonal = (diagonal - _diagonal_sums(on_column))[count - 1 :].clamp(min=0.0) / count
    column = on_column.sum(0).flip(0) / count

    share = torch.nn.functional.pad(column, (0, -seqlen_k % grid.block_k)).view(-1, grid.block_k).sum(1)
    share = (share + _diagonals_in_blocks(grid, diagonal)) * visible
    return share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)


def _diagonal_sums(matrix: torch.Tensor) -> torch.Tensor:
    """[rows + columns - 1]: entry n is the sum of matrix[i, n - i]."""
    rows, columns = matrix.shape
    skewed = torch.nn.functional.pad(matrix, (0, rows)).flatten()[: rows * (rows + columns - 1)]
    return skewed.view(rows, rows + columns - 1).sum(0)


def _diagonals_in_blocks(grid: Grid, share: torch.Tensor) -> torch.Tensor:
    """[rows, columns]: the mean over a block's queries of the share at the distances of its keys; share [distances]."""
    below = torch.nn.functional.pad(share.double().cumsum(0), (1, 0))  # of all distances < n
    below = torch.nn.functional.pad(below.cumsum(0), (1, 0))  # and that summed over all < n
    first = torch.arange(grid.rows, device=share.device)[:, None] * grid.block_q + grid.seqlen_k - grid.seqlen_q
    first = first - torch.arange(grid.columns, device=share.device) * grid.block_k + 1

    def sums(position):
        beyond = (position - len(below) + 1).clamp(min=0)  # from there on, each adds everything
        return below[position.clamp(0, len(below) - 1)] + beyond * share.double().sum()

    total = sums(first + grid.block_q) - sums(first) - sums(first + grid.block_q - grid.block_k)
    return ((total + sums(first - grid.block_k)) / grid.block_q).to(share.dtype)


def _means(x: torch.Tensor, block: int) -> torch.Tensor:
    """[blocks, head_dim] of x [seqlen, head_dim]; the last block may be short."""
    whole = len(x) // block * block
    means = x[:whole].view(-1, block, x.shape[1]).mean(1)
    return means if whole == len(x) else torch.cat([means, x[whole:].mean(0, keepdim=True)])


def _cells(x: torch.Tensor, block: int, backwards: bool = False) -> torch.Tensor:
    """[cells, STRIDE * head_dim] of x [seqlen, head_dim]; the last token fills the last block."""
    x = torch.cat([x, x[-1:].expand(-len(x) % block, -1)]) if len(x) % block else x
    cells = x.unflatten(0, (-1, STRIDE))
    return (cells.flip(1) if backwards else cells).flatten(1)


def _sizes(seqlen: int, block: int, device) -> torch.Tensor:
    """Tokens in each block, float32."""
    first = torch.arange(0, seqlen, block, device=device)
    return (seqlen - first).clamp(max=block).to(torch.float32)


# --- choice ----------------------------------------------------------------------------------------------------------


def _visible(grid: Grid, causal: bool, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(which blocks a query may see at all [rows, columns], each row's own column): without causal, all and None."""
    if not causal:
        return torch.ones(grid.rows, grid.columns, dtype=torch.bool, device=device), None
    offset = grid.seqlen_k - grid.seqlen_q
    first = torch.arange(grid.rows, device=device) * grid.block_q
    last = (first + grid.block_q).clamp(max=grid.seqlen_q) - 1 + offset
    columns = torch.arange(grid.columns, device=device) * grid.block_k
    # The column of the first position: whoever is in the row sees a key of it.
    return columns <= last[:, None], (first + offset).clamp(min=0)[:, None] // grid.block_k


def _choose(share: torch.Tensor, visible: torch.Tensor, own: torch.Tensor | None, top_k, coverage) -> torch.Tensor:
    """bool [rows, columns]: the blocks with the largest share, the own one first."""
    rank = share.masked_fill(~visible, -1.0)
    rank = rank if own is None else rank.scatter(1, own, 2.0)
    order = rank.argsort(dim=1, descending=True, stable=True)
    if top_k is not None:
        keep = (torch.arange(share.shape[1], device=share.device) < top_k).expand_as(share)
    else:
        sorted_share = share.gather(1, order).double()
        keep = sorted_share.cumsum(1) - sorted_share < coverage
    return torch.zeros_like(visible).scatter(1, order, keep) & visible


def _check(q, k, method, top_k, coverage, causal) -> None:
    check_flag("causal", causal)
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise TypeError(f"{name} must be a float tensor [batch, num_heads, seqlen, head_dim]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; batch and head_dim must be equal, and num_heads a "
            "multiple of num_heads_k"
        )
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method={one_line(method)} must be one of {', '.join(METHODS)}")
    if method == "vertical_slash" and not causal:
        raise ValueError("method='vertical_slash' needs causal=True: it learns nothing about later keys")
    if (top_k is None) == (coverage is None):
        raise ValueError(f"top_k={one_line(top_k)}, coverage={one_line(coverage)}: give one of the two")
    if top_k is not None:
        check_int("top_k", top_k, 1)
    elif not 0.0 < check_real("coverage", coverage) <= 1.0:
        raise ValueError(f"coverage={coverage!r} must be a number in (0, 1]")
