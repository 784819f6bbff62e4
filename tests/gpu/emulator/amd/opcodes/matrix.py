"""Products of matrices that a wave holds together: v_wmma of RDNA3, v_mfma of CDNA.

A lane holds numbers of one row of the left factor, of one column of the right one, and of one column of the sum.
"""

import re
from typing import NamedTuple

import numpy as np

from ...faults import Diverged, Fault
from ..parsing import Number
from ..registers import constant


class Shape(NamedTuple):
    """rows x columns of the sum, depth of the product, numbers of each factor and of the sum in a lane."""

    rows: int
    depth: int
    factors: int
    sums: int


WMMA = Shape(16, 16, 16, 8)
_NAME = re.compile(r"v_mfma_f32_(\d+)x\d+x(\d+)_(bf16|f16|f32)$|v_wmma_f32_16x16x16_(bf16|f16)$")


def step(instruction, lanes):
    match = _NAME.match(instruction.opcode)
    if not match:
        return None
    if instruction.modifiers:
        raise KeyError(f"modifiers {instruction.modifiers}")
    destination, left, right, before = instruction.operands
    rows, depth, type, type_of_wmma = match.groups()
    type, multiply = (type_of_wmma, wmma) if type_of_wmma else (type, mfma)
    if type_of_wmma:
        shape = WMMA
    else:
        rows, depth = int(rows), int(depth)
        shape = Shape(rows, depth, rows * depth // lanes, rows * rows // lanes)
    per_register = 1 if type == "f32" else 2
    registers_of_factor = shape.factors // per_register
    if (left.count, right.count, destination.count) != (registers_of_factor, registers_of_factor, shape.sums):
        raise KeyError("registers of another shape")

    def product(machine):
        registers = machine.registers
        if _is_partial(registers):
            raise Diverged("a product of matrices, of which some lanes are inactive")
        a, b = (numbers(_stack(registers, x), type) for x in (left, right))
        if type_of_wmma:
            _require_repeated(a, registers.waves)
            _require_repeated(b, registers.waves)
        if isinstance(before, Number):
            c = np.broadcast_to(constant(before, "f32"), (*registers.shape, shape.sums))
        else:
            c = _stack(registers, before).view(np.float32)
        result = multiply(a, b, c, shape).view(np.uint32)
        for i in range(shape.sums):
            registers.write_vector(destination.number + i, result[..., i])

    return product


def _require_repeated(factor: np.ndarray, waves: np.ndarray | None) -> None:
    factor = factor if waves is None else factor[waves]
    if not np.array_equal(factor[:, :16], factor[:, 16:], equal_nan=True):
        raise Fault("a factor that is not the same in both halves of the wave")


def _is_partial(registers) -> bool:
    """Whether EXEC leaves out lanes of a wave that runs."""
    active = registers.active
    return active is not None and not np.array_equal(active.any(1), active.all(1))


def _stack(registers, register) -> np.ndarray:
    """[waves, lanes, registers]"""
    return np.stack([registers.vector(register.number + i) for i in range(register.count)], -1)


def numbers(bits: np.ndarray, type: str) -> np.ndarray:
    """[..., registers] as float32 numbers, the lower half of a register first."""
    if type == "f32":
        return bits.view(np.float32)
    halves = np.ascontiguousarray(bits).view(np.uint16)
    if type == "f16":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def wmma(a: np.ndarray, b: np.ndarray, c: np.ndarray, shape: Shape = WMMA) -> np.ndarray:
    """[waves, 32 lanes, numbers] each. Lanes 16 to 31 repeat the factors of 0 to 15."""
    sums = a[:, :16] @ b[:, :16].swapaxes(1, 2)
    # a lane holds every second row: those of 0 to 15 the even ones
    rows = sums.reshape(-1, 8, 2, 16).transpose(0, 2, 3, 1).reshape(-1, 32, 8)
    return np.ascontiguousarray(rows + c)


def mfma(a: np.ndarray, b: np.ndarray, c: np.ndarray, shape: Shape) -> np.ndarray:
    """[waves, 64 lanes, numbers] each: lanes in groups of as many as there are rows; each group has the next numbers
    of the depth, and four rows in turn of the sum."""
    rows, groups = shape.rows, 64 // shape.rows
    a, b = (x.reshape(-1, groups, rows, shape.factors).swapaxes(1, 2).reshape(-1, rows, shape.depth) for x in (a, b))
    sums = (a @ b.swapaxes(1, 2)).reshape(-1, shape.sums // 4, groups, 4, rows)
    return np.ascontiguousarray(sums.transpose(0, 2, 4, 1, 3).reshape(-1, 64, shape.sums) + c)
