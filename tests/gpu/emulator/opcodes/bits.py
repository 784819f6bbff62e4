"""Bits: logic, shifts, fields, bytes."""

import numpy as np

from ..parsing import Immediate
from ..registers import immediate
from .operation import BITS, SIGNED, Operation, one_of, same


def _logic(function, operands: int = 2):
    def family(modifiers):
        (type,) = modifiers
        return same(function, one_of(type, BITS), operands)

    return family


def _shift(function):
    """Counts of the width and more shift everything out."""

    def family(modifiers):
        (type,) = modifiers

        def shift(x, count):
            width = 8 * x.dtype.itemsize
            inside = np.minimum(count, np.uint32(width - 1)).astype(x.dtype)
            beyond = x >> x.dtype.type(width - 1) if type in SIGNED else x.dtype.type(0)
            return np.where(count < width, function(x, inside), beyond)

        return Operation(shift, type, (type, "u32"))

    return family


def _field(modifiers):
    """Bits of the width from a position on, extended by their highest where signed."""
    (type,) = modifiers

    def extract(x, position, width):
        position, width = (np.minimum(n & np.uint32(255), np.uint32(32)).astype(np.int64) for n in (position, width))
        wide = x.astype(np.int64)  # extended by the sign, which is what lies beyond the highest bit
        found = (wide >> position) & ((np.int64(1) << width) - 1)
        if type == "s32":
            sign = (found >> np.maximum(width - 1, 0)) & (width > 0)
            found = found - (sign << width)
        return found.astype(x.dtype)

    return Operation(extract, one_of(type, ("s32", "u32")), (type, "u32", "u32"))


def _permute(modifiers):
    """Four of the eight bytes of a and b, by the nibbles of the selector; its highest bits repeat the bytes' signs."""
    one_of(modifiers, (("b32",),))

    def permute(a, b, selector):
        pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.uint32(0)
        for place in range(4):
            nibble = selector >> np.uint32(4 * place)
            byte = (pair >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(
                255
            )
            sign = np.where(byte >= 128, np.uint32(255), np.uint32(0))
            result = result | np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * place)
        return result

    return same(permute, "b32", 3)


def without_unused(sources: list) -> list:
    """Those of prmt, with 0 for what a constant selector does not select: the compiler leaves it undefined."""
    a, b, selector = sources
    if not isinstance(selector, Immediate):
        return sources
    selected = {int(immediate(selector.text, "u32")) >> 4 * place & 7 for place in range(4)}
    return [a if min(selected) < 4 else Immediate("0"), b if max(selected) >= 4 else Immediate("0"), selector]


FAMILIES = {
    "and": _logic(np.bitwise_and),
    "or": _logic(np.bitwise_or),
    "xor": _logic(np.bitwise_xor),
    "not": _logic(np.invert, 1),
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "bfe": _field,
    "prmt": _permute,
}
