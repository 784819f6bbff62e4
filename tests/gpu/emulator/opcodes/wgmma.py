"""Products of warpgroups: `warpgroups` says what they do, here is what their operands mean."""

import re

import numpy as np

from ..faults import Diverged, Unknown
from ..parsing import Vector
from ..registers import TYPES, reader
from ..warpgroups import LANES, PIECE, Layout
from .matrix import TO_FLOAT, left_factor
from .operation import one_of

_DEPTHS = {"bf16": 16, "f16": 16, "tf32": 8}


def active_groups(machine) -> np.ndarray:
    return machine.whole(LANES, "warpgroup")


def _of_groups(machine, values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """One value of each of these warpgroups, whose lanes have to agree."""
    values = machine.of_all(values).reshape(-1, LANES)[groups]
    if np.any(values != values[:, :1]):
        raise Diverged("lanes of a warpgroup that do not agree")
    return values[:, 0]


def _from_registers(parts, type: str):
    """A function from a machine and warpgroups to the left factor, and the units of shared memory that hold it."""

    def load(machine, groups):
        registers = np.stack([machine.registers.peek(part, machine.active) for part in parts])
        return left_factor(registers, type).reshape(-1, 64, _DEPTHS[type])[groups], np.zeros((len(groups), 0), int)

    return load


def _from_shared(descriptor, rows: int, type: str, is_transposed: bool):
    """The same of a factor [rows, K] that lies in shared memory; transposed: as [K, rows]."""
    read = reader(descriptor, "b64")

    def load(machine, groups):
        places = Layout.of(_of_groups(machine, read(machine), groups)).places(rows, is_transposed)
        lanes, shared = groups * LANES, machine.shared
        each = np.repeat(lanes, places[0].size)
        units = shared.units_of(each, places.ravel(), PIECE).reshape(len(groups), -1)
        numbers = shared.load_for_product(lanes, units).view(TYPES["b32" if type == "tf32" else "b16"])
        x = TO_FLOAT[type](numbers.reshape(len(groups), places.shape[1], -1))
        return x.swapaxes(1, 2) if is_transposed else x, units

    return load


def _multiply(instruction, modifiers):
    """d = a b, or a b + d: d [64, N], a [64, K], b [N, K] unless transposed."""
    shape, type = modifiers[3], modifiers[-1]
    one_of(modifiers, (("mma_async", "sync", "aligned", shape, "f32", type, type),))
    columns, depth = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
    result, left, right, adds, *signs = instruction.operands
    is_in_registers = isinstance(left, Vector)
    transposed = [x.text for x in signs[2:]]
    if (
        depth != _DEPTHS[type]
        or len(result.parts) != columns // 2
        or [x.text for x in signs[:2]] != ["1", "1"]
        or len(transposed) != (0 if type == "tf32" else 1 if is_in_registers else 2)
    ):
        raise Unknown(str(instruction))
    if is_in_registers:
        load_left = _from_registers(left.parts, type)
    else:
        load_left = _from_shared(left, 64, type, transposed[:1] == ["1"])
    load_right = _from_shared(right, columns, type, transposed[-1:] == ["1"])
    adds = reader(adds, "pred")

    def step(machine):
        groups = active_groups(machine)
        sums = _of_groups(machine, adds(machine), groups)
        if sums.any() and result.parts[0].number not in machine.registers.busy:
            for part in result.parts:
                machine.registers.peek(part, machine.active)
        (a, units), (b, more) = load_left(machine, groups), load_right(machine, groups)
        factor = left.parts if is_in_registers else ()
        units = np.concatenate((units, more), 1)
        machine.warpgroups.start(groups, sums, result.parts, factor, np.matmul(a, b.swapaxes(1, 2)), units)

    return step


def _wgmma(instruction, modifiers):
    kind, *rest = modifiers
    if kind == "mma_async":
        return _multiply(instruction, modifiers)
    one_of(tuple(rest), (("sync", "aligned"),))
    if kind == "fence":
        return lambda machine: machine.warpgroups.fence(active_groups(machine))
    if kind == "commit_group":
        return lambda machine: machine.warpgroups.commit(active_groups(machine))
    one_of(kind, ("wait_group",))
    pending = int(instruction.operands[0].text)
    return lambda machine: machine.warpgroups.wait(active_groups(machine), pending)


STEPS = {"wgmma": _wgmma}
