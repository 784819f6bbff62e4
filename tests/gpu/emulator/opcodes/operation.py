"""An instruction that makes a value of values."""

from collections.abc import Callable
from typing import NamedTuple

from ..faults import Unknown

FLOATS, SIGNED, UNSIGNED = ("f16", "f32", "f64"), ("s16", "s32", "s64"), ("u16", "u32", "u64")
INTEGERS, BITS = SIGNED + UNSIGNED, ("b16", "b32", "b64", "pred")
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


class Operation(NamedTuple):
    """function(arrays of the types `operands`) -> array of the type of the result"""

    function: Callable
    result: str
    operands: tuple[str, ...]


def same(function: Callable, type: str, operands: int) -> Operation:
    return Operation(function, type, (type,) * operands)


def only(modifiers: tuple[str, ...], *known: str) -> set[str]:
    """The modifiers, all of which have to be known."""
    if unknown := set(modifiers) - set(known):
        raise Unknown("modifier ." + ", .".join(sorted(unknown)))
    return set(modifiers)


def one_of(type: str, known: tuple[str, ...]) -> str:
    if type not in known:
        raise Unknown(f"type .{type}")
    return type
