"""The registers of several waves: a vector register is an array [waves, lanes], a scalar one [waves, 1], of 32 bits.

Arrays are replaced, never changed. What a load brings is there at once, but reading it before its wait raises.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..faults import Uninitialized, Unknown
from .counters import SCALARS, Counters, name_of
from .parsing import EXEC, NULL, Number, Register

TYPES = {
    "u16": np.uint16, "i16": np.int16, "f16": np.float16, "u32": np.uint32, "i32": np.int32, "f32": np.float32,
    "u64": np.uint64, "i64": np.int64, "f32x2": np.uint64, "f16x2": np.uint32, "u16x2": np.uint32,
}  # fmt: skip
TYPES = {name: np.dtype(dtype) for name, dtype in TYPES.items()}
POISON = np.uint32(0x7FFF7FFF)
"""In lanes that did not write a register that others wrote: NaN as float32, float16 and bfloat16."""


class Registers:
    """waves: which of them run now, None for all. scc: the scalar condition, [waves, 1]."""

    def __init__(self, waves: int, lanes: int, counters: Counters):
        self.shape, self.lanes, self.counters = (waves, lanes), lanes, counters
        self.vectors: list = [None] * 512
        self.scalars: list = [None] * 128
        self.scalars[NULL] = np.zeros((waves, 1), np.uint32)
        self.scc = np.zeros((waves, 1), bool)
        self.waves: np.ndarray | None = None
        self._active, self._is_active_known = None, True
        self._masks: dict[int, np.ndarray] = {}
        self.write_mask(EXEC, np.ones(self.shape, bool))

    # --- which lanes take part ---------------------------------------------------------------------------------------

    def run_waves(self, waves: np.ndarray | None) -> None:
        self.waves, self._is_active_known = waves, False

    @property
    def active(self) -> np.ndarray | None:
        """[waves, lanes] by EXEC and of the waves that run, None for all."""
        if not self._is_active_known:
            active = self.mask(EXEC)
            active = active if self.waves is None else active & self.waves[:, None]
            self._active, self._is_active_known = None if active.all() else active, True
        return self._active

    @contextmanager
    def only(self, lanes: np.ndarray) -> Iterator[None]:
        """Inside, no others take part."""
        before = self.active
        self._active = lanes if before is None else lanes & before
        yield
        self._active = before

    def active_lanes(self) -> np.ndarray:
        """Numbers of lanes, counted over all waves."""
        count = self.shape[0] * self.lanes
        return np.arange(count) if self.active is None else np.flatnonzero(self.active.reshape(-1))

    def of_active(self, values: np.ndarray) -> np.ndarray:
        values = np.broadcast_to(values, self.shape)
        return values.reshape(-1) if self.active is None else values[self.active]

    # --- vector registers --------------------------------------------------------------------------------------------

    def vector(self, number: int) -> np.ndarray:
        self.counters.check(number)
        values = self.vectors[number]
        if values is None:
            raise Uninitialized(f"{name_of(number)} is read, which nobody wrote")
        return values

    def write_vector(
        self, number: int, values: np.ndarray, half: str = "", everywhere: bool = False, by: str = ""
    ) -> None:
        """In the active lanes, or in all those of waves that run. by: the kind of load that brings it."""
        self.counters.check(number, by)
        before = self.vectors[number]
        if half:
            kept = POISON if before is None else before
            low, high = (kept, values) if half == "h" else (values, kept)
            high = high << np.uint32(16) if half == "h" else high & np.uint32(0xFFFF0000)
            values = high | (low & np.uint32(0xFFFF))
        active = self.active
        if everywhere:
            active = None if self.waves is None else self.waves[:, None]
        if active is not None:
            values = np.where(active, values, POISON if before is None else before)
        self.vectors[number] = values if values.shape == self.shape else np.broadcast_to(values, self.shape)

    # --- scalar registers --------------------------------------------------------------------------------------------

    def scalar(self, number: int) -> np.ndarray:
        self.counters.check(SCALARS + number)
        values = self.scalars[number]
        if values is None:
            raise Uninitialized(f"s{number} is read, which nobody wrote")
        return values

    def define(self, register: Register) -> None:
        """With anything, if nobody wrote it: what LLVM leaves undefined, since no use depends on it."""
        of_kind = self.vectors if register.kind == "v" else self.scalars
        for i in range(register.number, register.number + register.count):
            if of_kind[i] is None:
                of_kind[i] = np.full(self.shape if register.kind == "v" else (self.shape[0], 1), POISON)

    def write_scalar(self, number: int, values: np.ndarray) -> None:
        if number == NULL:
            return
        self.counters.check(SCALARS + number)
        before = self.scalars[number]
        if self.waves is not None:
            values = np.where(self.waves[:, None], values, np.uint32(0) if before is None else before)
        self.scalars[number] = np.broadcast_to(values, (self.shape[0], 1))
        self._masks.pop(number & ~1 if self.lanes == 64 else number, None)
        if number in (EXEC, EXEC + 1):
            self._is_active_known = False

    def mask(self, number: int) -> np.ndarray:
        """The lanes whose bit is set in a scalar register, or in two where waves have 64 lanes."""
        found = self._masks.get(number)
        if found is None:
            parts = [self.scalar(number + i) for i in range(self.lanes // 32)]
            bits = np.concatenate(parts, 1).view(np.uint8)
            found = self._masks[number] = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
        else:
            self.counters.check(SCALARS + number)
        return found

    def write_mask(self, number: int, lanes: np.ndarray) -> None:
        if number == NULL:
            return
        bits = np.packbits(np.broadcast_to(lanes, self.shape), axis=1, bitorder="little")
        bits = np.ascontiguousarray(bits).view(np.uint32)  # they lie as `lanes` do, maybe by columns
        for i in range(self.lanes // 32):
            self.write_scalar(number + i, bits[:, i : i + 1])
        if self.waves is None:
            self._masks[number] = np.broadcast_to(lanes, self.shape)


def constant(number: Number, type: str) -> np.ndarray:
    """A number of the text as an array without dimensions."""
    dtype, text = TYPES[type], number.text
    if "." in text or "e" in text.removeprefix("0x") and not text.startswith("0x"):
        kind = "e" if type in ("f16", "u16", "i16", "f16x2") else "f"
        bits = int.from_bytes(struct.pack("<" + kind, float(text)), "little")
    else:
        bits = int(text, 0)
    bits &= (1 << 8 * dtype.itemsize) - 1
    value = np.array(bits, f"u{dtype.itemsize}").view(dtype)
    return _signed(value, number)


def _signed(values: np.ndarray, operand) -> np.ndarray:
    if (operand.negated or operand.absolute) and values.dtype.kind != "f":
        raise Unknown("a sign of an integer")
    values = np.abs(values) if operand.absolute else values
    return -values if operand.negated else values


def reader(operand, type: str):
    """A function from `Registers` to an operand's values: [waves, lanes], [waves, 1] or without dimensions."""
    if isinstance(operand, Number):
        value = constant(operand, type)
        return lambda registers: value
    if not isinstance(operand, Register):
        raise Unknown(f"operand {operand}")
    bits = bits_reader(operand, TYPES[type].itemsize)
    dtype = TYPES[type]
    if operand.negated or operand.absolute:
        return lambda registers: _signed(bits(registers).view(dtype), operand)
    return lambda registers: bits(registers).view(dtype)


def bits_reader(register: Register, size: int):
    """A function from `Registers` to the bits of `size` bytes of a register, of both of a pair in one number."""
    number = register.number
    if register.kind == "v":
        one = lambda registers, i: registers.vector(number + i)  # noqa: E731
    else:
        one = lambda registers, i: registers.scalar(number + i)  # noqa: E731
    if size == 8:
        if register.count != 2:
            raise Unknown(f"{register} as 64 bits")
        wide = np.uint64
        return lambda registers: one(registers, 0).astype(wide) | one(registers, 1).astype(wide) << wide(32)
    if register.count != 1:
        raise Unknown(f"{register} as {8 * size} bits")
    if size == 4:
        return lambda registers: one(registers, 0)
    if register.half == "h":
        return lambda registers: (one(registers, 0) >> np.uint32(16)).astype(np.uint16)
    return lambda registers: one(registers, 0).astype(np.uint16)


def writer(operand):
    """A function that writes values to a register of `Registers`; 16 bits without a half clear the other one."""
    if not isinstance(operand, Register):
        raise Unknown(f"{operand} as a result")
    number, half = operand.number, operand.half
    write = Registers.write_vector if operand.kind == "v" else Registers.write_scalar

    def write_values(registers, values):
        size = values.dtype.itemsize
        if size == 8:
            bits = values.view(np.uint64)
            write(registers, number, bits.astype(np.uint32))
            write(registers, number + 1, (bits >> np.uint64(32)).astype(np.uint32))
        elif size == 2:
            registers.write_vector(number, values.view(np.uint16).astype(np.uint32), half)
        else:
            write(registers, number, values.view(np.uint32))

    return write_values


def mask_reader(operand):
    """A function from `Registers` to the lanes of a mask in scalar registers."""
    if not isinstance(operand, Register) or operand.kind != "s":
        raise Unknown(f"{operand} as a mask")
    return lambda registers: registers.mask(operand.number)
