"""Comparisons of each lane: a mask, in which inactive lanes have 0."""

import numpy as np

from ..parsing import EXEC, VCC, Register
from ..registers import TYPES, reader
from . import parts


def _ordered(function):
    return lambda a, b: function(a, b) & ~(np.isnan(a) | np.isnan(b))


def _not(function):
    return lambda a, b: ~function(a, b)


_is_ordered = lambda a, b: ~(np.isnan(a) | np.isnan(b))  # noqa: E731
COMPARISONS = {
    "lt": np.less, "eq": np.equal, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": np.not_equal, "lg": _ordered(np.not_equal), "o": _is_ordered, "u": _not(_is_ordered),
    "nge": _not(np.greater_equal), "nlg": _not(_ordered(np.not_equal)), "ngt": _not(np.greater),
    "nle": _not(np.less_equal), "neq": np.not_equal, "nlt": _not(np.less),
}  # fmt: skip


def in_classes(x: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """A bit for each of: signaling NaN, quiet NaN, -inf, -normal, -subnormal, -0, and from +0 on the other way."""
    bits = x.view(f"u{x.dtype.itemsize}")
    quiet = np.finfo(x.dtype).nmant - 1
    magnitude, negative = np.abs(x), np.signbit(x)
    size = np.select([magnitude == 0, magnitude < np.finfo(x.dtype).tiny, np.isfinite(x)], [0, 1, 2], 3)
    number = np.where(negative, 5 - size, 6 + size)
    number = np.where(np.isnan(x), (bits >> bits.dtype.type(quiet)) & bits.dtype.type(1), number)
    return (classes.astype(np.int64) >> number.astype(np.int64) & 1) == 1


def comparison_of(opcode: str):
    """(function, types of the operands) of v_cmp_lt_f32 and the like."""
    _, _, name, type = opcode.split("_")
    if name == "class":
        return in_classes, (type, "u32")
    return COMPARISONS[name], (type, type)


def step(instruction, lanes):
    name, operands = instruction.opcode, instruction.operands
    if not name.startswith("v_cmp"):
        return None
    function, types = comparison_of(name.replace("cmpx", "cmp"))
    is_exec = name.startswith("v_cmpx")
    sources = operands[-2:]
    destination = Register("s", EXEC if is_exec else VCC) if len(operands) == 2 else operands[0]
    if is_exec and destination.number != EXEC:
        raise KeyError("v_cmpx that writes another mask")
    modifiers = dict(instruction.modifiers)
    readers = [reader(source, type) for source, type in zip(sources, types, strict=True)]
    readers, _ = parts.of_registers(readers, sources, types, destination, TYPES["u32"], modifiers)
    if modifiers:
        raise KeyError(f"modifiers {modifiers}")

    def compare(machine):
        registers = machine.registers
        found = np.broadcast_to(function(*[read(registers) for read in readers]), registers.shape)
        active = registers.active
        registers.write_mask(destination.number, found if active is None else found & active)

    return compare
