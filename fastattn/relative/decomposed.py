"""ViTDet's and SAM's bias: a vector for each row offset and each column offset, times the query."""

import math

import torch

from ..checks import one_line
from ..scores.relative import Rewriting
from .arguments import check_grid, check_table


class Decomposed(Rewriting):
    name = "decomposed"

    def __init__(self, tables: tuple[torch.Tensor, ...], grid_q: tuple[int, ...], grid_k: tuple[int, ...]):
        self.tables, self.grid_q, self.grid_k = tables, grid_q, grid_k

    def attend(self, attention, bind, q, k, v, options):
        """Every bias is a product of a query with one row and one column of tables, so it is a few more columns of q,
        and of k: 1 where the key's row or column is."""
        self.check(q, k, options)
        scale = options["softmax_scale"]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        factor = scale.view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
        columns = torch.cat([self.products(q, axis) for axis in range(len(self.tables))], -1) / factor
        q = torch.cat([q, columns.to(q.dtype)], -1)
        k = torch.cat([k, self.places(k)], -1)
        return attention(q, k, v, **options | {"bias": None, "softmax_scale": scale})

    def products(self, q: torch.Tensor, axis: int) -> torch.Tensor:
        """[batch, num_heads, seqlen_q, side of the keys' grid]: each query times the vectors of its offsets."""
        table, (side_q, side_k) = self.tables[axis], (self.grid_q[axis], self.grid_k[axis])
        step_q, step_k = max(side_k / side_q, 1.0), max(side_q / side_k, 1.0)
        at_q, at_k = torch.arange(side_q)[:, None] * step_q, torch.arange(side_k)[None] * step_k
        offsets = (at_q - at_k + (side_k - 1) * step_k).long().to(table.device)
        vectors = table.to(q.dtype)[offsets]  # [side_q, side_k, head_dim]
        before, after = math.prod(self.grid_q[:axis]), math.prod(self.grid_q[axis + 1 :])
        rows = q.unflatten(2, (before, side_q, after))
        return torch.einsum("bhxiyd,ijd->bhxiyj", rows, vectors).flatten(2, 4)

    def places(self, k: torch.Tensor) -> torch.Tensor:
        """[batch, num_heads_k, seqlen_k, sum of sides]: 1 at the place of a key along each axis."""
        grid = torch.meshgrid(*[torch.arange(side, device=k.device) for side in self.grid_k], indexing="ij")
        ones = [
            (at.flatten()[:, None] == torch.arange(side, device=k.device)).to(k.dtype)
            for at, side in zip(grid, self.grid_k, strict=True)
        ]
        return torch.cat(ones, -1).expand(*k.shape[:2], -1, -1)

    def check(self, q, k, options) -> None:
        for name, x, grid in (("q", q, self.grid_q), ("k", k, self.grid_k)):
            if not isinstance(x, torch.Tensor) or x.dim() != 4:
                raise TypeError(f"{name}={one_line(x)} must be a tensor [batch, num_heads, seqlen, head_dim]")
            if x.shape[2] != math.prod(grid):
                sides = " x ".join(map(str, grid))
                raise ValueError(f"decomposed: {name} has seqlen={x.shape[2]}; a grid of {sides} has {math.prod(grid)}")
        if q.shape[3] != self.tables[0].shape[1]:
            raise ValueError(
                f"decomposed: the tables have {self.tables[0].shape[1]} columns; q has head_dim={q.shape[3]}"
            )
        if options["softcap"]:
            raise ValueError(f"decomposed: softcap={options['softcap']!r} would act on the bias too; it must be 0")
        if not isinstance(options["softmax_scale"], torch.Tensor) and options["softmax_scale"] == 0:
            raise ValueError("decomposed: softmax_scale=0 would hide the bias; it must not be 0")


def decomposed(*tables: torch.Tensor, grid, grid_k=None) -> Rewriting:
    """ViTDet's bias (MViTv2, arXiv 2112.01526; ViTDet, arXiv 2203.16527; SAM, arXiv 2304.02643): a vector for each
    offset along each axis of a grid, times the query,

        scores[i, j] = softmax_scale * q_i . k_j + q_i . rel_h[row_i - row_j] + q_i . rel_w[column_i - column_j]

    tables   rel_h, rel_w, one for each axis: float [2 * side - 1, head_dim], entry offset + side - 1; may be learned.
             Between grids of different sides, as in MViTv2: [2 * max(side, side_k) - 1, head_dim], and offsets are
             stretched as there
    grid     (h, w) of the queries, which are h * w tokens row by row; one int is a square
    grid_k   (h, w) of the keys; None: grid

    q and k become h_k + w_k columns wider, at most 512 in all (other calls are refused as any wider head is); no n x n
    tensor. The bias is that of q before softmax_scale, as in the models. softcap is refused. Raises TypeError or
    ValueError that names the argument.
    """
    if not tables:
        raise TypeError("decomposed takes a table for each axis of the grid, rel_h and rel_w")
    grid = check_grid("decomposed", "grid", grid, len(tables))
    grid_k = grid if grid_k is None else check_grid("decomposed", "grid_k", grid_k, len(tables))
    for number, (table, side, side_k) in enumerate(zip(tables, grid, grid_k, strict=True)):
        check_table("decomposed", f"table {number}", table, "[2 * side - 1, head_dim]")
        rows = 2 * max(side, side_k) - 1
        if table.shape != (rows, tables[0].shape[1]):
            raise ValueError(
                f"decomposed: table {number} has shape {tuple(table.shape)}; for sides {side} and {side_k} it must be "
                f"[{rows}, {tables[0].shape[1]}] (interpolate tables of other sizes first)"
            )
    return Decomposed(tables, grid, grid_k)
