"""ALiBi: scores fall with the distance of query and key (arXiv 2108.12409)."""

import torch

from . import FLOATS, Place, Term, is_given


def alibi_bias(slopes: torch.Tensor, place: Place) -> torch.Tensor:
    """-slope * |i + query_start - j|, [batch|1, num_heads, seqlen_q, seqlen_k]; slopes [num_heads] or [batch, ...]."""
    slopes = slopes if slopes.dim() == 2 else slopes[None]
    query = torch.arange(place.seqlen_q, device=slopes.device)[:, None] + place.query_start
    key = torch.arange(place.seqlen_k, device=slopes.device)[None, :]
    return -slopes[:, :, None, None] * (query - key).abs().to(slopes.dtype)


def add_alibi(scores, slopes, place):
    """scores with the bias of `alibi_bias`."""
    return scores + alibi_bias(slopes.to(scores.dtype), place)


def _derive(dscores, scores, slopes, place):
    distance = alibi_bias(torch.ones_like(slopes, dtype=scores.dtype), place)
    return dscores, (dscores * distance).sum((-1, -2))


def _push(tscores, scores, slopes, tslopes, place):
    return tscores if tslopes is None else add_alibi(tscores, tslopes, place)


TERM = Term(
    "alibi_slopes", shapes=(("num_heads",), ("batch", "num_heads")), dtypes=FLOATS, gradient=True,
    fact=("alibi", is_given, False), modify=add_alibi, derive=_derive, push=_push,
)  # fmt: skip
