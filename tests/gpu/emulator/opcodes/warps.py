"""What the lanes of a warp tell each other. All of them have to take part."""

import numpy as np

from ..faults import Unknown
from ..registers import reader, writer
from .operation import only

LANES = np.arange(32)
_SOURCES = {
    "bfly": lambda lane, b: lane ^ b,
    "idx": lambda lane, b: b & 31,
    "up": lambda lane, b: np.where(lane - b >= 0, lane - b, lane),
    "down": lambda lane, b: np.where(lane + b < 32, lane + b, lane),
}


def _is(operand, number: int) -> bool:
    return getattr(operand, "text", None) is not None and int(operand.text, 0) == number


def _shuffle(instruction, modifiers):
    _, kind, _ = modifiers
    only(modifiers, "sync", kind, "b32")
    destination, value, b, clamp, members = instruction.operands
    if not (_is(clamp, 0 if kind == "up" else 31) and _is(members, -1)):
        raise Unknown(str(instruction))
    write, read, source = writer(destination), reader(value, "b32"), reader(b, "s32")

    def shuffle(machine):
        machine.require_whole_warps()
        values = machine.of_all(read(machine)).reshape(-1, 32)
        lanes = _SOURCES[kind](LANES, machine.of_all(source(machine)).reshape(-1, 32))
        write(machine, np.take_along_axis(values, lanes, 1).reshape(-1))

    return shuffle


_REDUCTIONS = {
    "add": lambda x: x.sum(1, dtype=x.dtype), "min": lambda x: x.min(1), "max": lambda x: x.max(1),
    "and": lambda x: np.bitwise_and.reduce(x, 1), "or": lambda x: np.bitwise_or.reduce(x, 1),
    "xor": lambda x: np.bitwise_xor.reduce(x, 1),
}  # fmt: skip


def _reduce(instruction, modifiers):
    _, kind, type = modifiers
    destination, value, members = instruction.operands
    write, read, members = writer(destination), reader(value, type), reader(members, "s32")

    def reduce(machine):
        machine.require_whole_warps()
        if np.any(machine.of_active(members(machine)) != -1):
            raise Unknown("a reduction over some lanes of a warp")
        values = machine.of_all(read(machine)).reshape(-1, 32)
        write(machine, np.repeat(_REDUCTIONS[kind](values), 32))

    return reduce


STEPS = {"shfl": _shuffle, "redux": _reduce}
