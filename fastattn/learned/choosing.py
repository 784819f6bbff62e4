"""Which `attention` a kind of learned attention ends in."""

import torch

from .. import api
from ..checks import one_line
from . import normalized


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options):
    """`fastattn.learned.attention` where normalizer or top_k is given, else `fastattn.attention`."""
    is_learned = options.get("normalizer", "softmax") != "softmax" or options.get("top_k") is not None
    if is_learned:
        return normalized.attention(q, k, v, **options)
    return api.attention(q, k, v, **{x: y for x, y in options.items() if x not in ("normalizer", "top_k")})


def refuse(kind: str, options: dict, why: dict) -> None:
    """TypeError that names the first option which this kind of attention has no meaning for; why: by name."""
    for name, reason in why.items():
        if options.get(name) is not None:
            raise TypeError(f"{kind}_attention has no {name}, got {one_line(options[name])}: {reason}")
