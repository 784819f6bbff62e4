"""The factor of the scores: a number, or a tensor that may be learned (temperature), one number or one a head."""

import torch

from ..checks import check_real
from . import FLOATS, Term


def _check(value):
    return None if value is None else check_real("softmax_scale", value)


def _of_heads(scores: torch.Tensor, scale) -> float | torch.Tensor:
    return scale.to(scores.dtype).view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale


def scale_scores(scores, scale, place):
    """scale * scores, for scores [..., num_heads, seqlen_q, seqlen_k]."""
    return _of_heads(scores, scale) * scores


def _derive(dscores, scores, scale, place):
    by_head = (dscores * scores).sum((0, 2, 3)) if isinstance(scale, torch.Tensor) else None
    return _of_heads(scores, scale) * dscores, by_head


def _push(tscores, scores, scale, tscale, place):
    tscores = _of_heads(scores, scale) * tscores
    return tscores if tscale is None else tscores + _of_heads(scores, tscale) * scores


TERM = Term(
    "softmax_scale", check=_check, shapes=((), ("1",), ("num_heads",)), dtypes=FLOATS, gradient=True,
    fact=("learned_scale", lambda value: isinstance(value, torch.Tensor), False), modify=scale_scores,
    derive=_derive, push=_push,
)  # fmt: skip
