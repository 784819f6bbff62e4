"""Predicates and what they choose."""

import numpy as np

from ..registers import TYPES, reader, writer
from .conversions import from_bfloat16
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
    if type == "bf16":
        function = _compare((*modifiers[:-1], "f32")).function
        return Operation(lambda a, b: function(from_bfloat16(a), from_bfloat16(b)), "pred", (type, type))
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


def _compare_both(instruction, modifiers):
    """setp of two 16-bit floats in a register: a predicate for the lower half and one for the upper."""
    comparison, type = modifiers
    if not type.endswith("x2"):
        return None
    both, *sources = instruction.operands
    dtype = TYPES[type.removesuffix("x2")]
    function = _compare((comparison, type.removesuffix("x2"))).function
    writers, readers = [writer(part) for part in both.parts], [reader(source, type) for source in sources]

    def step(machine):
        a, b = (np.array(machine.of_all(read(machine)))[:, None].view(dtype) for read in readers)
        for half, write in enumerate(writers):
            write(machine, function(np.array(a[:, half]), np.array(b[:, half])))

    return step


STEPS = {"setp": _compare_both}
FAMILIES = {"setp": _compare, "selp": _select}
