"""Score modifications, a file each: its `Term` (the row of `fastattn.terms.TERMS`) and what it does, in plain torch.

The order is scale, softcap, bias, ALiBi, then the mask, the softmax with its sinks, and dropout.
"""

from collections.abc import Callable
from typing import NamedTuple

FLOATS = ("float16", "bfloat16", "float32", "float64")
SCORES = ("batch", "num_heads", "seqlen_q", "seqlen_k")


class Place(NamedTuple):
    """Where scores [batch, num_heads, seqlen_q, seqlen_k] stand: query 0 is at key position `query_start`."""

    query_start: int
    seqlen_q: int
    seqlen_k: int


class Term(NamedTuple):
    """Something that a call adds to q, k and v: a field of `fastattn.terms.Terms`.

    name      of the field; the argument of `attention`, unless `argument` is another name for error messages
    neutral   the value that changes nothing
    check     value -> value as kernels take it, for what is no tensor; raises TypeError or ValueError. None: a tensor
    shapes    the shapes that a tensor may have, in names of the Problem's sizes; (): never a tensor
    broadcast whether it may also broadcast to the (only) shape
    dtypes    names of the dtypes that a tensor may have
    gradient  whether a tensor may want a gradient
    fact      (field of the Problem, value of the term -> its value, its default); None: kernels are not chosen by it
    modify    (scores, value, Place) -> scores, for the reference; None: it does not act on scores
    derive    (dscores after, scores before, value, Place) -> (dscores before, gradient of the value before it is summed
              to its shape, or None): the explicit derivative of `modify`
    push      (tangent of the scores before, scores before, value, tangent of the value or None, Place) -> tangent of
              the scores after: the forward-mode derivative of `modify`
    """

    name: str
    neutral: object = None
    check: Callable | None = None
    shapes: tuple[tuple[str, ...], ...] = ()
    broadcast: bool = False
    dtypes: tuple[str, ...] = ()
    gradient: bool = False
    fact: tuple | None = None
    modify: Callable | None = None
    derive: Callable | None = None
    push: Callable | None = None
    argument: str | None = None


def is_given(value) -> bool:
    """The fact of a term that is a tensor or None."""
    return value is not None
