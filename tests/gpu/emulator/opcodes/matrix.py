"""Products of the tensor cores, and how their factors are loaded: PTX ISA, "Warp-level matrix instructions".

A lane is in a group of four: lane = 4 * group + place. A register of 16-bit numbers holds two neighbours.
"""

import numpy as np

from ..faults import Unknown
from ..parsing import parts_of
from ..registers import reader, writer
from .conversions import from_bfloat16
from .memory import address_of, lanes_and_addresses
from .operation import one_of

TO_FLOAT = {
    "bf16": from_bfloat16,
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32),  # the hardware reads no further
}


def _pairs(registers: np.ndarray, type: str) -> np.ndarray:
    """[registers, lanes] -> [registers, warps, group, place, neighbours] of float32"""
    registers = np.ascontiguousarray(registers).reshape(len(registers), -1, 8, 4, 1)
    return TO_FLOAT[type](registers if type == "tf32" else registers.view(np.uint16))


def left_factor(registers: np.ndarray, type: str) -> np.ndarray:
    """[4, lanes] -> [warps, 16, K]: registers are rows group, group + 8, of the first half of K, then of the second."""
    x = _pairs(registers, type)
    x = x.reshape(2, 2, *x.shape[1:])  # half of K, half of the rows, warp, group, place, neighbour
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(x.shape[2], 16, -1)


def right_factor(registers: np.ndarray, type: str) -> np.ndarray:
    """[2, lanes] -> [warps, K, 8]: columns are groups, registers the halves of K."""
    x = _pairs(registers, type)  # half of K, warp, group, place, neighbour
    return x.transpose(1, 0, 3, 4, 2).reshape(x.shape[1], -1, 8)


def sums(registers: np.ndarray) -> np.ndarray:
    """[4, lanes] of float32 -> [warps, 16, 8]: two neighbours of row group, then of row group + 8."""
    x = registers.reshape(2, 2, -1, 8, 4)  # half of the rows, neighbour, warp, group, place
    return x.transpose(2, 0, 3, 4, 1).reshape(x.shape[2], 16, 8)


def registers_of_sums(x: np.ndarray) -> np.ndarray:
    """The inverse of `sums`."""
    return x.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)


def multiply(a, b, c, type: str) -> np.ndarray:
    """Registers of the sums of the products of left and right factor, and c: float32, in no promised order."""
    return registers_of_sums(np.matmul(left_factor(a, type), right_factor(b, type)) + sums(c))


_SHAPES = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}


def _multiply(instruction, modifiers):
    *_, type = modifiers[:-1]
    if type not in _SHAPES or modifiers != ("sync", "aligned", _SHAPES[type], "row", "col", "f32", type, type, "f32"):
        raise Unknown(instruction.opcode)
    d, a, b, c = instruction.operands
    writers = [writer(part) for part in d.parts]
    factors = [[reader(part, "b32") for part in factor.parts] for factor in (a, b)]
    terms = [reader(part, "f32") for part in c.parts]

    def step(machine):
        machine.require_whole_warps()
        a, b, c = (np.stack([machine.of_all(read(machine)) for read in readers]) for readers in (*factors, terms))
        for write, values in zip(writers, multiply(a, b, c, type), strict=True):
            write(machine, values)

    return step


def transposed(rows: np.ndarray) -> np.ndarray:
    """[..., 8 rows, 4 registers] of 8 x 8 16-bit numbers -> the same of the transposed matrices"""
    numbers = np.ascontiguousarray(rows).view(np.uint16)
    return np.ascontiguousarray(numbers.swapaxes(-1, -2)).view(np.uint32)


def _matrices_of(modifiers) -> tuple[int, bool]:
    """(how many, whether transposed)"""
    count, transpose = {"x1": 1, "x2": 2, "x4": 4}[modifiers[3]], "trans" in modifiers
    one_of(modifiers, (("sync", "aligned", "m8n8", f"x{count}", *(("trans",) if transpose else ()), "shared", "b16"),))
    return count, transpose


def _store_matrices(instruction, modifiers):
    """stmatrix: the inverse of ldmatrix."""
    count, transpose = _matrices_of(modifiers)
    address, sources = instruction.operands
    readers, address = [reader(part, "b32") for part in parts_of(sources)], address_of(address, "u32")

    def step(machine):
        machine.require_whole_warps()
        lanes, addresses = lanes_and_addresses(machine, address)
        rows = np.stack([machine.of_active(read(machine)).reshape(-1, 8, 4) for read in readers], 1)
        if transpose:
            rows = transposed(rows)
        points = lanes % 32 < 8 * count
        lanes, addresses = lanes[points], addresses[points]
        shared = machine.shared
        data = np.ascontiguousarray(rows.reshape(-1, 4)).view(shared.dtype)
        shared.store(lanes, shared.units_of(lanes, addresses, 16), data)

    return step


def _load_matrices(instruction, modifiers):
    """ldmatrix: a matrix for each register, whose eight rows of 16 bytes the next eight lanes point to; lane 4 r + c
    gets numbers 2 c and 2 c + 1 of row r."""
    count, transpose = _matrices_of(modifiers)
    destinations, address = instruction.operands
    writers, address = [writer(part) for part in parts_of(destinations)], address_of(address, "u32")

    def step(machine):
        machine.require_whole_warps()
        lanes, addresses = lanes_and_addresses(machine, address)
        points = lanes % 32 < 8 * count
        lanes, addresses = lanes[points], addresses[points]
        data = machine.shared.load(lanes, machine.shared.units_of(lanes, addresses, 16))
        rows = data.view(np.uint32).reshape(-1, count, 8, 4)
        if transpose:
            rows = transposed(rows)
        warps = np.unique(lanes // 32)
        values = np.zeros((count, machine.lanes // 32, 32), np.uint32)
        values[:, warps] = rows.reshape(-1, count, 32).swapaxes(0, 1)
        for write, x in zip(writers, values.reshape(count, -1), strict=True):
            write(machine, x)

    return step


STEPS = {"mma": _multiply, "ldmatrix": _load_matrices, "stmatrix": _store_matrices}
