"""From type to type, and several registers as one."""

import numpy as np

from ..parsing import Register, Vector
from ..registers import TYPES, reader, writer
from .operation import FLOATS, INTEGERS, Operation, one_of, only, same

_NAN16, _SIGN = np.uint16(0x7FFF), np.uint32(0x80000000)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 rounded to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), _NAN16, rounded.astype(np.uint16))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Bits of float32 rounded to the nearest of 10 bits of mantissa, ties away from zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def _to_integer(type: str, rounding):
    """Saturated; NaN becomes 0."""
    limits = np.iinfo(TYPES[type])

    def convert(x):
        rounded = np.nan_to_num(rounding(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
        converted = np.clip(rounded, limits.min, limits.max).astype(TYPES[type])
        return np.where(rounded >= limits.max, TYPES[type].type(limits.max), converted)

    return convert


_ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
_NARROWINGS = {"f16": to_float16, "bf16": to_bfloat16}


def _convert(modifiers) -> Operation:
    *rest, to, source = modifiers
    if (to, source) in (("bf16x2", "f32"), ("f16x2", "f32")):  # the first operand is the upper half
        only(rest, "rn")
        narrow = _NARROWINGS[to.removesuffix("x2")]

        def both(high, low):
            high, low = (narrow(x).view(np.uint16).astype(np.uint32) for x in (high, low))
            return high << np.uint32(16) | low

        return Operation(both, to, ("f32", "f32"))
    if to in _NARROWINGS and source == "f32":
        only(rest, "rn")
        return Operation(_NARROWINGS[to], to, ("f32",))
    if to == "tf32" and source == "f32":
        only(rest, "rna")
        return Operation(to_tf32, to, ("f32",))
    if source == "bf16":
        only(rest)
        return Operation(from_bfloat16, one_of(to, ("f32",)), ("bf16",))
    integers = INTEGERS + ("s8", "u8")
    if source in FLOATS and to in integers:
        (rounding,) = only(rest, *_ROUNDINGS)
        return Operation(_to_integer(to, _ROUNDINGS[rounding]), to, (source,))
    only(rest, *(("rn",) if to in FLOATS and (source in integers or FLOATS.index(to) < FLOATS.index(source)) else ()))
    one_of(source, integers + FLOATS)
    return Operation(lambda x: x.astype(TYPES[to]), one_of(to, integers + FLOATS), (source,))


def _move(modifiers) -> Operation:
    (type,) = modifiers
    return same(lambda x: x, type, 1)


def _move_registers(instruction, modifiers):
    """mov between a register and a vector of narrower ones, the lowest bits first, or between two registers."""
    destination, source = instruction.operands
    (type,) = modifiers
    if isinstance(destination, Register) and isinstance(source, Register) and destination.type == source.type == type:
        return lambda machine: machine.registers.copy(destination, source, machine.active)
    if isinstance(destination, Vector):
        narrow = f"b{8 * TYPES[type].itemsize // len(destination.parts)}"
        read, writers = reader(source, type), [writer(part) for part in destination.parts]

        def unpack(machine):
            parts = machine.of_all(read(machine))[:, None].copy().view(TYPES[narrow])
            for number, write in enumerate(writers):
                write(machine, parts[:, number])

        return unpack
    if isinstance(source, Vector):
        narrow = f"b{8 * TYPES[type].itemsize // len(source.parts)}"
        readers, write = [reader(part, narrow) for part in source.parts], writer(destination)

        def pack(machine):
            # a half that no instruction writes is one that the compiler does not need
            parts = [
                machine.of_all(np.zeros((), TYPES[narrow]) if machine.registers.is_undefined(part) else read(machine))
                for part, read in zip(source.parts, readers, strict=True)
            ]
            write(machine, np.stack(parts, 1).view(TYPES[type])[:, 0])

        return pack
    return None


def _to_generic(modifiers) -> Operation:
    """An address of a parameter: the same in both spaces here."""
    return same(lambda x: x, one_of(modifiers, (("param", "u64"),))[1], 1)


FAMILIES = {"cvt": _convert, "cvta": _to_generic, "mov": _move}
STEPS = {"mov": _move_registers}
