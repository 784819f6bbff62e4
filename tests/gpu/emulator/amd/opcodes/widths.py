"""What a load or a store moves: bytes of memory, and where they are in registers."""

from typing import NamedTuple

import numpy as np

from ..registers import POISON

SIZES = {
    "u8": 1, "i8": 1, "b8": 1, "ubyte": 1, "sbyte": 1, "byte": 1, "u16": 2, "i16": 2, "b16": 2, "ushort": 2,
    "sshort": 2, "short": 2, "b32": 4, "dword": 4, "b64": 8, "dwordx2": 8, "b96": 12, "dwordx3": 12, "b128": 16,
    "dwordx4": 16, "b256": 32, "dwordx8": 32, "b512": 64, "dwordx16": 64,
}  # fmt: skip
SIGNED = ("i8", "i16", "sbyte", "sshort")


class Width(NamedTuple):
    """size: bytes. half: "l" or "h" if that half of a register is meant and the other one stays."""

    size: int
    is_signed: bool
    half: str

    @property
    def registers(self) -> int:
        return max(1, self.size // 4)


def width_of(name: str) -> Width:
    """Of "b128", "u16_d16_hi", "d16_hi_u8" and the like."""
    words = name.split("_")
    (size,) = set(words) - {"d16", "hi"}
    half = ("h" if "hi" in words else "l") if "d16" in words else ""
    return Width(SIZES[size], size in SIGNED, half)


def put(machine, kind: str, number: int, width: Width, lanes: np.ndarray, data: np.ndarray) -> None:
    """A load of that kind brings bytes [lanes, size] of some lanes, numbered over all waves, to vector registers."""
    registers, counters = machine.registers, machine.counters
    if width.size < 4:
        values = data.view(f"{'i' if width.is_signed else 'u'}{width.size}").astype(np.int32).view(np.uint32)
    else:
        values = data.view(np.uint32)
    for i in range(width.registers):
        whole = np.full(registers.shape[0] * registers.lanes, POISON)
        whole[lanes] = values[:, i]
        registers.write_vector(number + i, whole.reshape(registers.shape), width.half, by=kind)
        counters.expect(kind, number + i)


def get(registers, number: int, width: Width) -> np.ndarray:
    """[active lanes, size] bytes of vector registers."""
    parts = [registers.of_active(registers.vector(number + i)) for i in range(width.registers)]
    data = np.stack(parts, 1)
    if width.half == "h":
        data = data >> np.uint32(16)
    return data.view(np.uint8)[:, : width.size] if width.size < 4 else data.view(np.uint8)
