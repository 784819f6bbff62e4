"""Soft-capping: c * tanh(scores / c) (Gemma 2, arXiv 2408.00118)."""

import torch

from ..checks import check_real
from . import Term


def _check(value) -> float:
    number = check_real("softcap", value)
    if number < 0.0:
        raise ValueError(f"softcap={value!r} must be >= 0 (0 turns it off)")
    return number


def softcap_scores(scores: torch.Tensor, softcap: float, place=None) -> torch.Tensor:
    """softcap * tanh(scores / softcap); 0 turns it off."""
    return scores if softcap == 0.0 else softcap * torch.tanh(scores / softcap)


def _derive(dscores, scores, softcap, place):
    return dscores * (1.0 - torch.tanh(scores / softcap).square()), None


def _push(tscores, scores, softcap, tsoftcap, place):
    return tscores * (1.0 - torch.tanh(scores / softcap).square())


TERM = Term(
    "softcap", 0.0, check=_check, fact=("softcap", lambda value: value > 0.0, False), modify=softcap_scores,
    derive=_derive, push=_push,
)  # fmt: skip
