"""A bias of each distance between query and key: a vector of diagonals, added to the scores. An entry of -inf masks.

`fastattn.relative` makes these vectors; entry i - j + seqlen_k - 1 belongs to query i and key j.
"""

import torch

from . import FLOATS, Term, is_given


def spread(vector: torch.Tensor | None, place) -> torch.Tensor | None:
    """The vector [..., seqlen_q + seqlen_k - 1] as scores [..., seqlen_q, seqlen_k], n x n where it is copied."""
    if vector is None:
        return None
    if place.seqlen_q == 0:
        return vector[..., :0, None].expand(*vector.shape[:-1], 0, place.seqlen_k)
    if place.seqlen_k == 0:
        return vector[..., None, :0].expand(*vector.shape[:-1], place.seqlen_q, 0)
    return vector.unfold(-1, place.seqlen_k, 1).flip(-1)


def sum_diagonals(scores: torch.Tensor) -> torch.Tensor:
    """[..., seqlen_q, seqlen_k] -> [..., seqlen_q + seqlen_k - 1], the transpose of `spread`."""
    rows, columns = scores.shape[-2:]
    if 0 in (rows, columns):
        return scores.new_zeros(*scores.shape[:-2], max(rows + columns - 1, 0))
    # In rows that are one shorter, each lies one place further right: diagonals are columns.
    width = rows + columns - 1
    skewed = torch.nn.functional.pad(scores.flip(-1), (0, rows)).flatten(-2)[..., : rows * width]
    return skewed.unflatten(-1, (rows, width)).sum(-2)


def add_relative(scores, vector, place):
    """scores with the bias of `spread`."""
    return scores + spread(vector.to(scores.dtype), place)


def _derive(dscores, scores, vector, place):
    return dscores, sum_diagonals(dscores)


def _push(tscores, scores, vector, tvector, place):
    return tscores if tvector is None else add_relative(tscores, tvector, place)


class RelativeBias:
    """A bias of the scores that follows from the positions of queries and keys, made by a function of
    `fastattn.relative`."""

    name = ""

    def terms(self, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensor of a call, by the name of its term: "relative", or "bias"."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"fastattn.relative.{self.name}(...)"


class Rewriting(RelativeBias):
    """One that depends on q and k, and becomes other calls of `attention`."""

    def attend(self, attention, bind, q, k, v, options: dict):
        """What `attention(q, k, v, **options)` returns, where options["bias"] is this object; bind: as `api.bind`."""
        raise NotImplementedError

    def terms(self, q, k):
        raise TypeError(f"bias={self!r} follows from q and k: of all functions, only fastattn.attention takes it")


TERM = Term(
    "relative",
    shapes=(
        ("1", "num_diagonals"), ("num_heads", "num_diagonals"), ("batch", "1", "num_diagonals"),
        ("batch", "num_heads", "num_diagonals"),
    ),
    dtypes=FLOATS, gradient=True, fact=("relative", is_given, False), modify=add_relative, derive=_derive, push=_push,
    argument="bias",
)  # fmt: skip
