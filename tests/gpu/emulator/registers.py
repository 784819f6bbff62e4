"""Registers as arrays over lanes, and the types in which instructions see their bits."""

import struct

import numpy as np

from .faults import NotWaited, Uninitialized, Unknown
from .parsing import SINK, Immediate, Register, Symbol

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "tf32": np.uint32, "f32x2": np.uint64, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
TYPES = {name: np.dtype(dtype) for name, dtype in TYPES.items()}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def immediate(text: str, type: str) -> np.ndarray:
    """A number of the text as an array without dimensions."""
    dtype = TYPES[type]
    if type == "pred":
        return np.array(int(text) != 0)
    if text[:2] in ("0f", "0d"):
        value = struct.unpack(">f" if text[1] == "f" else ">d", bytes.fromhex(text[2:]))[0]
        size = 4 if text[1] == "f" else 8
        return np.array(value, f"f{size}").view(_UNSIGNED[size]).view(dtype)
    bits = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, _UNSIGNED[dtype.itemsize]).view(dtype)


def seen_as(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The lowest bits of a register as a type."""
    if bits.dtype.itemsize > dtype.itemsize:
        bits = bits.astype(_UNSIGNED[dtype.itemsize])
    return bits.view(dtype)


def kept_as(values: np.ndarray, type: str) -> np.ndarray:
    """The bits of values in a register of that type: narrower ones are extended by their sign, if they have one."""
    dtype = TYPES[type]
    if values.dtype.itemsize < dtype.itemsize:
        wider = f"{values.dtype.kind}{dtype.itemsize}"
        values = values.astype(wider)
    return values.view(dtype)


class Registers:
    """Of `lanes` lanes. Each remembers in which lanes it was written: `written` is False, True, or which.

    busy      in which lanes an asynchronous product uses a register, by its number
    touched   when something else used each last: `now` is a number that grows with each wgmma.fence
    """

    def __init__(self, number: int, lanes: int):
        self.lanes = lanes
        self.values: list = [None] * number
        self.written: list = [False] * number
        self.busy: dict[int, np.ndarray] = {}
        self.now, self.touched = 1, [0] * number

    def is_undefined(self, operand) -> bool:
        """Whether no lane wrote it so far."""
        return isinstance(operand, Register) and self.written[operand.number] is False

    def read(self, register: Register, active: np.ndarray | None) -> np.ndarray:
        """Its bits, which have to be there in the active lanes; None: in all."""
        self._touch(register, active)
        return self.peek(register, active)

    def _touch(self, register: Register, active: np.ndarray | None) -> None:
        self.touched[register.number] = self.now
        if register.number in self.busy:
            busy = self.busy[register.number]
            if np.any(busy if active is None else busy & active):
                raise NotWaited(f"{register.name} is used while a product that uses it is under way")

    def peek(self, register: Register, active: np.ndarray | None) -> np.ndarray:
        """What `read` gives, for an asynchronous product."""
        number = register.number
        written = self.written[number]
        if written is not True:
            missing = ~written if active is None else active & ~np.broadcast_to(written, self.lanes)
            if np.any(missing) or written is False:
                raise Uninitialized(f"{register.name} is read in lanes that did not write it")
        return self.values[number]

    def write(self, register: Register, values: np.ndarray, active: np.ndarray | None) -> None:
        """In the active lanes; None: in all."""
        self._touch(register, active)
        number, values = register.number, kept_as(values, register.type)
        if active is None:
            self.values[number] = values if values.ndim else np.full(self.lanes, values)
            self.written[number] = True
            return
        before = self.values[number]
        self.values[number] = np.where(active, values, values.dtype.type(0) if before is None else before)
        written = self.written[number]
        if written is not True:
            written = active | written
            self.written[number] = True if written.all() else written

    def copy(self, to: Register, source: Register, active: np.ndarray | None) -> None:
        """A mov: another name for what the source holds. LLVM puts some between a wgmma.fence and its product; ptxas
        moves them before it (`machine_code.used_between_products`)."""
        when = self.touched[source.number]
        self.write(to, self.read(source, active), active)
        self.touched[to.number] = self.touched[source.number] = when

    def deliver(self, register: Register, lanes: np.ndarray, bits: np.ndarray) -> None:
        """The result of an asynchronous product, in lanes of these numbers."""
        number = register.number
        if self.written[number] is not True:
            written = np.array(np.broadcast_to(self.written[number], self.lanes))
            written[lanes] = True
            self.written[number] = True if written.all() else written
        before = self.values[number]
        self.values[number] = values = np.zeros(self.lanes, bits.dtype) if before is None else before.copy()
        values[lanes] = bits


def reader(operand, type: str):
    """A function from a machine to an operand's values: an array over lanes, or without dimensions."""
    dtype = TYPES[type]
    if isinstance(operand, Immediate):
        value = immediate(operand.text, type)
        return lambda machine: value
    if isinstance(operand, Register):
        if TYPES[operand.type].itemsize < dtype.itemsize:
            raise Unknown(f"a register of {operand.type} as {type}")
        return lambda machine: seen_as(machine.registers.read(operand, machine.active), dtype)
    if isinstance(operand, Symbol):
        return lambda machine: machine.symbol(operand.name).astype(dtype)
    raise Unknown(f"operand {operand}")


def writer(operand):
    """A function that writes values to an operand in the active lanes of a machine."""
    if operand == SINK:
        return lambda machine, values: None
    if not isinstance(operand, Register):
        raise Unknown(f"{operand} as a result")
    return lambda machine, values: machine.registers.write(operand, values, machine.active)
