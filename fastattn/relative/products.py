"""Products of rows with a vector of each distance, and where they stand among scores.

A table has a vector for each of some distances in a row, beyond which its first and its last go on: entry n of all
distances has row clamp(n - first, 0, rows - 1). What a block of rows sees of it is multiplied, the rest is copied.
"""

from typing import NamedTuple

import torch

_ALIGNED = 16  # numbers, a line of a cache


class Span(NamedTuple):
    """`rows` rows of a table from `start` on belong to columns from `at` on; other columns, up to `end`, are like the
    first or the last of these."""

    start: int
    rows: int
    at: int
    end: int


def span(first: int, rows: int, entry: int, width: int) -> Span:
    """For columns of the entries from `entry` on, `width` of them."""
    low, high = (min(max(x - first, 0), rows - 1) for x in (entry, entry + width - 1))
    return Span(low, high - low + 1, min(max(first + low - entry, 0), width - 1), width)


class Buffers:
    """Memory of blocks, by name, kept while they have one shape. It is 0 at first."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype):
        self.like, self.dtype, self.kept = like, dtype, {}

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of this shape, whose rows begin at lines of a cache."""
        if name not in self.kept or self.kept[name].shape != shape:
            width = -(-shape[-1] // _ALIGNED) * _ALIGNED
            self.kept[name] = self.like.new_zeros(*shape[:-1], width, dtype=self.dtype)[..., : shape[-1]]
        return self.kept[name]


def multiply(x: torch.Tensor, vectors: torch.Tensor, at: Span, out: torch.Tensor) -> None:
    """out [n, rows, at.end] = products of x [n, rows, head_dim] with the vectors [n, at.rows, head_dim] of its
    columns."""
    end = at.at + at.rows
    middle = out[..., at.at : end]
    torch.bmm(x, vectors.mT, out=middle)
    out[..., : at.at] = middle[..., :1]
    out[..., end:] = middle[..., -1:]


def multiply_back(dout: torch.Tensor, x: torch.Tensor, vectors: torch.Tensor, at: Span) -> tuple:
    """Gradients of x and of the vectors from that of the products."""
    end = at.at + at.rows
    middle = dout[..., at.at : end]
    dx, dvectors = torch.bmm(middle, vectors), torch.bmm(middle.mT, x)
    for row, columns in ((0, dout[..., : at.at]), (-1, dout[..., end:])):
        if columns.shape[-1]:
            total = columns.sum(-1, keepdim=True)
            dx.addcmul_(total, vectors[:, row, None])
            dvectors[:, row] += (total * x).sum(1)
    return dx, dvectors


def skew(products: torch.Tensor) -> torch.Tensor:
    """[..., rows, rows + keys - 1] by distance -> [..., rows, keys] by key, of which entry (r, j) was j - r + rows - 1;
    a view: each row starts one place further left than the one before."""
    rows, width = products.shape[-2:]
    *strides, step, one = products.stride()
    shape = *products.shape[:-1], width - rows + 1
    return products.as_strided(shape, (*strides, step - one, one), products.storage_offset() + (rows - 1) * one)
