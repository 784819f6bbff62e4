"""A launch: a grid of programs of one kernel."""

import struct

import numpy as np
import torch

from ..faults import Unknown
from ..tensors import Tensors
from .machine import Machine, decode

MOST_LANES = 8192
"""That run at once: what their registers take should stay in the cache."""

ALIGNMENT = 4
"""Bytes that an access of more has to be aligned to: LLVM makes one of loads of 32 bits that lie side by side."""


def run(text: str, values: list, grid: tuple[int, int, int], waves: int, shared: int) -> None:
    """Run the kernel of an assembly text; raises `faults.Fault`.

    values  of its parameters in order: tensors on the CPU, numbers; None and those left out are null pointers
    waves   of each program
    shared  bytes of LDS of each program
    """
    code, tensors = decode(text), Tensors(ALIGNMENT)
    if grid[1] != 1 or grid[2] != 1:
        raise Unknown("a grid of more than one dimension")
    arguments = code.program.arguments
    packed = bytearray(-(-code.program.settings["kernarg_size"] // 64) * 64)
    for number, (argument, value) in enumerate(
        zip(arguments, values + [None] * (len(arguments) - len(values)), strict=True)
    ):
        if isinstance(value, torch.Tensor):
            value = tensors.add(f"argument {number}", value)
        packed[argument.offset : argument.offset + argument.size] = _bytes(value, argument.size)
    address = tensors.add("the arguments", torch.frombuffer(packed, dtype=torch.uint8))
    programs, at_once = np.arange(grid[0]), max(1, MOST_LANES // (waves * code.lanes))
    for first in range(0, len(programs), at_once):
        Machine(code, tensors, address, programs[first : first + at_once], waves, shared).run()


def _bytes(value, size: int) -> bytes:
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    return (int(value or 0) & (1 << 8 * size) - 1).to_bytes(size, "little")
