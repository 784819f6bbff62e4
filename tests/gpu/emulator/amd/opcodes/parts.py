"""SDWA: an operand is a byte or a half of a register, or the result goes to a part of one."""

import numpy as np

from ..registers import TYPES, bits_reader, writer

PARTS = {f"BYTE_{n}": (8 * n, 255) for n in range(4)} | {f"WORD_{n}": (16 * n, 0xFFFF) for n in range(2)}
"""name -> (first bit, mask)"""


def of_registers(readers, sources, types, destination, result, modifiers):
    """(readers, function(registers, values) that writes), as the modifiers say, which are taken out."""
    changed = []
    for number, (read, source, type) in enumerate(zip(readers, sources, types, strict=True)):
        part = modifiers.pop(f"src{number}_sel", "DWORD")
        changed.append(read if part == "DWORD" else _part_of(source, part, TYPES[type]))
    part, unused = modifiers.pop("dst_sel", "DWORD"), modifiers.pop("dst_unused", "UNUSED_PAD")
    if unused != "UNUSED_PAD":
        raise KeyError(unused)
    return changed, writer(destination) if part == "DWORD" else _to_part(destination, part)


def _part_of(source, part: str, dtype):
    shift, mask = (np.uint32(x) for x in PARTS[part])
    if source.negated or source.absolute:
        raise KeyError("a sign of a part")
    bits = bits_reader(source, 4)
    return lambda registers: (bits(registers) >> shift & mask).astype(f"u{dtype.itemsize}").view(dtype)


def _to_part(destination, part: str):
    """The rest of the register becomes zero."""
    shift, mask = (np.uint32(x) for x in PARTS[part])
    write = writer(destination)
    return lambda registers, values: write(
        registers, (values.view(f"u{values.dtype.itemsize}").astype(np.uint32) & mask) << shift
    )
