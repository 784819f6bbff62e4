"""The dense bias, added to the scores. An entry of -inf masks: see `fastattn.reference`."""

from ..checks import dtype_name
from . import FLOATS, SCORES, Term


def add_bias(scores, bias, place):
    """scores + bias, which broadcasts."""
    return scores + bias.to(scores.dtype)


def _derive(dscores, scores, bias, place):
    return dscores, dscores


def _push(tscores, scores, bias, tbias, place):
    return tscores if tbias is None else add_bias(tscores, tbias, place)


TERM = Term(
    "bias", shapes=(SCORES,), broadcast=True, dtypes=FLOATS, gradient=True,
    fact=("bias", lambda value: "none" if value is None else dtype_name(value.dtype), "none"), modify=add_bias,
    derive=_derive, push=_push,
)  # fmt: skip
