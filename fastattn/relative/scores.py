"""Scores of positions of a block: products of queries and keys with a vector of each distance, and their gradients."""

from typing import NamedTuple

import torch

from .arguments import compute_dtype
from .products import Buffers, Span, multiply, multiply_back, skew, span

_KEYS = 128  # whose products with vectors of distances are made at a time


class At(NamedTuple):
    """Where a block stands: (start, end) of each."""

    batch: tuple[int, int]
    heads_k: tuple[int, int]
    heads: tuple[int, int]
    rows: tuple[int, int]
    keys: tuple[int, int]


class Tables(NamedTuple):
    """Vectors of distances, as `products` knows them: tensors by name, and the entry of the first row of two of them.

    "r"       [num_heads|1, rows, head_dim], for queries: entry key - query + seqlen_q - 1
    "s"       the same for keys: entry query - key + seqlen_k - 1
    "u", "w"  [num_heads|1, head_dim]: what is added to q before it meets k, and "r"
    """

    tensors: dict[str, torch.Tensor]
    firsts: dict[str, int]


class Scores:
    """softmax_scale * ((q_i + w) . r[distance] + k_j . s[distance]) of the blocks of a call.

    Blocks are given as their tensors by name, "softmax_scale" among them where it is one.
    """

    def __init__(self, tables: Tables, scale, seqlen_q: int, seqlen_k: int, like: torch.Tensor):
        self.firsts, self.scale, self.real = tables.firsts, scale, compute_dtype(like)
        self.seqlen_q, self.seqlen_k = seqlen_q, seqlen_k

    def of(self, x: dict, at: At, buffers: Buffers) -> torch.Tensor:
        """[batch, num_heads, rows, keys], in a buffer."""
        products = buffers.get("products", *x["q"].shape[:3], _length(at.rows) + _length(at.keys) - 1)
        found = skew(products)
        with torch.autocast(products.device.type, enabled=False):
            if "r" in x:
                rows, columns = self.rows(x, "r"), self.columns_of_queries(x, at)
                multiply(self.scaled(x, rows), self.vectors(x, "r", columns), columns, products.flatten(0, 1))
            else:
                products.zero_()
            for keys in self.key_ranges(x, at) if "s" in x else ():
                columns, rows = self.columns_of_keys(x, at, keys), self.scaled(x, self.rows(x, "s", at, keys))
                vectors, part = self.vectors(x, "s", columns), found[..., keys[0] - at.keys[0] : keys[1] - at.keys[0]]
                if columns.rows == 1:
                    part += torch.bmm(vectors, rows.mT).view(*part.shape[:2], 1, -1)
                    continue
                by_distance = buffers.get("of keys", *part.shape[:2], part.shape[3], columns.end)
                multiply(rows, vectors, columns, by_distance.flatten(0, 1))
                part += skew(by_distance).mT
        return found

    def add_gradients(self, x: dict, at: At, dscores: torch.Tensor, into: dict, buffers: Buffers) -> None:
        """Adds to `into`, by name, what the gradient of `of` says of the tensors."""
        with torch.autocast(dscores.device.type, enabled=False):
            if "r" in x:
                rows, columns = self.rows(x, "r"), self.columns_of_queries(x, at)
                dproducts = buffers.get("gradient", *x["q"].shape[:3], columns.end)
                skew(dproducts).copy_(dscores)  # what is not of the view stays 0
                self.add_products(x, "r", rows, columns, dproducts, into)
            for keys in self.key_ranges(x, at) if "s" in x else ():
                columns, rows = self.columns_of_keys(x, at, keys), self.rows(x, "s", at, keys)
                part = dscores[..., keys[0] - at.keys[0] : keys[1] - at.keys[0]]
                if columns.rows == 1:
                    dproducts, columns = part.sum(2)[..., None], Span(columns.start, 1, 0, 1)
                else:
                    dproducts = buffers.get("gradient of keys", *part.shape[:2], part.shape[3], columns.end)
                    skew(dproducts).copy_(part.mT)
                into_keys = {name: y[:, :, keys[0] - at.keys[0] : keys[1] - at.keys[0]] if name == "k" else y
                             for name, y in into.items()}  # fmt: skip
                self.add_products(x, "s", rows, columns, dproducts, into_keys)

    def add_products(self, x: dict, name: str, rows, columns: Span, dproducts, into: dict) -> None:
        """Gradients of what products of `rows` with a table are made of."""
        vectors, factor = self.vectors(x, name, columns), self.factor(x)
        dx, dvectors = multiply_back(dproducts.flatten(0, 1), self.scaled(x, rows), vectors, columns)
        dx = dx.view(rows.shape)
        if "softmax_scale" in into:
            into["softmax_scale"] += (dx * rows).sum((0, 2, 3)).sum_to_size(into["softmax_scale"].shape)
        dx *= factor
        for of_rows in ("q", "w") if name == "r" else ("k",):
            if of_rows in into:
                into[of_rows] += dx.sum((0, 2)).sum_to_size(into["w"].shape) if of_rows == "w" else dx
        if name in into:
            dtable = into[name].narrow(1, columns.start, columns.rows)
            dtable += dvectors.view(*rows.shape[:2], *dvectors.shape[1:]).sum(0).sum_to_size(dtable.shape)

    def rows(self, x: dict, name: str, at: At | None = None, keys: tuple[int, int] | None = None) -> torch.Tensor:
        """[batch, num_heads, rows, head_dim]: what is multiplied with a table, before softmax_scale."""
        if name == "s":
            return x["k"][:, :, keys[0] - at.keys[0] : keys[1] - at.keys[0]].to(self.real)
        q = x["q"].to(self.real)
        return q + x["w"][:, None].to(self.real) if "w" in x else q

    def factor(self, x: dict):
        """softmax_scale, a number or a tensor that broadcasts to rows."""
        scale = x.get("softmax_scale", self.scale)
        return scale.to(self.real).view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale

    def scaled(self, x: dict, rows: torch.Tensor) -> torch.Tensor:
        """[batch * num_heads, rows, head_dim]"""
        return (rows * self.factor(x)).flatten(0, 1)

    def vectors(self, x: dict, name: str, columns: Span) -> torch.Tensor:
        """[batch * num_heads, columns.rows, head_dim]: what of a table the columns are made of."""
        table = x[name].narrow(1, columns.start, columns.rows).to(self.real)
        return table.expand(*x["q"].shape[:2], -1, -1).reshape(-1, *table.shape[1:])

    def columns_of_queries(self, x: dict, at: At) -> Span:
        """Those of the products of a block's queries with "r"."""
        entry, width = at.keys[0] - at.rows[1] + self.seqlen_q, _length(at.rows) + _length(at.keys) - 1
        return span(self.firsts["r"], x["r"].shape[1], entry, width)

    def columns_of_keys(self, x: dict, at: At, keys: tuple[int, int]) -> Span:
        """Those of the products of some keys with "s"."""
        entry, width = at.rows[0] - keys[1] + self.seqlen_k, _length(at.rows) + _length(keys) - 1
        return span(self.firsts["s"], x["s"].shape[1], entry, width)

    def key_ranges(self, x: dict, at: At) -> list[tuple[int, int]]:
        """The keys of a block as ranges: those for which all queries have the last row of "s", some at a time of those
        for which they have several rows, those with the first row."""
        (start, end), (first, last), rows = at.rows, at.keys, x["s"].shape[1]
        behind = min(max(start + self.seqlen_k - self.firsts["s"] - rows + 1, first), last)
        ahead = min(max(end + self.seqlen_k - 2 - self.firsts["s"], behind), last)
        steps = [*range(behind, ahead, _KEYS), ahead]
        bounds = [first, *steps, last]
        return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def _length(of: tuple[int, int]) -> int:
    return of[1] - of[0]
