"""Predicates and what they choose."""

import numpy as np

from ..registers import TYPES
from .operation import FLOATS, Operation, one_of

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def unordered(a, b):
    return np.isnan(a) | np.isnan(b)


def _compare(modifiers) -> Operation:
    """Of floats, a comparison is False where there is a NaN, or with a u behind its name True."""
    comparison, *_, type = modifiers
    if len(modifiers) != 2:
        one_of("of setp", ())
    if type not in FLOATS:
        function = _COMPARE[comparison]
    elif comparison in ("nan", "num"):
        function = unordered if comparison == "nan" else lambda a, b: ~unordered(a, b)
    elif comparison in _COMPARE:
        function = lambda a, b: _COMPARE[comparison](a, b) & ~unordered(a, b)  # noqa: E731
    else:
        function = lambda a, b: _COMPARE[comparison.removesuffix("u")](a, b) | unordered(a, b)  # noqa: E731
    return Operation(function, "pred", (type, type))


def _select(modifiers) -> Operation:
    (type,) = modifiers
    one_of(type, tuple(TYPES))
    return Operation(lambda a, b, chosen: np.where(chosen, a, b), type, (type, type, "pred"))


FAMILIES = {"setp": _compare, "selp": _select}
