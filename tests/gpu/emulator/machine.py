"""Lanes of several programs that run at once.

While all agree where to go, an instruction is one NumPy call for all of them. Where they part, each block of code runs
for the lanes that are there, the earliest block first, so that they meet again where the paths join.
"""

import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .faults import Diverged, Fault, NotWaited
from .mbarriers import Barriers, Descriptor
from .opcodes import step_of
from .parsing import Instruction, Program, parse
from .registers import Registers, reader
from .shared import Shared
from .steps import run_blocks
from .tensors import Tensors
from .warpgroups import Warpgroups

LEAVES = ("bra", "ret", "exit")


class Block(NamedTuple):
    """Instructions between branches, and the one that ends it, or None; next: the number of the block that follows."""

    steps: tuple
    instructions: tuple[Instruction, ...]
    last: Instruction | None
    next: int


class Code(NamedTuple):
    """first: the number of the block at each label; unit: bytes of the smallest access to shared memory; visited:
    numbers of the blocks that have run."""

    program: Program
    blocks: tuple[Block, ...]
    first: dict[str, int]
    unit: int
    visited: set[int]


@lru_cache(maxsize=64)
def decode(text: str) -> Code:
    program = parse(text)
    instructions = program.instructions
    targets = {i.operands[0].name for i in instructions if i.opcode.split(".")[0] == "bra"}
    starts = {0, *(program.labels[name] for name in targets)}
    starts |= {n + 1 for n, i in enumerate(instructions) if i.opcode.split(".")[0] in LEAVES}
    starts = sorted(starts - {len(instructions)})
    number = {start: n for n, start in enumerate(starts)}
    blocks = []
    for n, (start, end) in enumerate(zip(starts, [*starts[1:], len(instructions)], strict=True)):
        body, last = instructions[start:end], None
        if body[-1].opcode.split(".")[0] in LEAVES:
            *body, last = body
        blocks.append(Block(tuple(map(_step, body)), tuple(body), last, n + 1))
    sizes = re.findall(r"\.shared(?:\.v\d)?\.b(8|16)\b", re.sub(r"(ld|st)matrix.*", "", text))
    first = {name: number[start] for name, start in program.labels.items() if start in number}
    return Code(program, tuple(blocks), first, min([int(size) // 8 for size in sizes], default=4), set())


def _step(instruction: Instruction):
    try:
        step = step_of(instruction)
    except Fault as fault:
        raise type(fault)(f"{fault}\n  {instruction}") from None
    if instruction.guard is None:
        return step
    holds = _guard(instruction)

    def guarded(machine):
        active, chosen = machine.active, holds(machine)
        if active is not None:
            chosen = active & chosen
        if not np.any(chosen):
            return
        machine.active = None if np.all(chosen) else chosen
        try:
            step(machine)
        finally:
            machine.active = active

    return guarded


def _guard(instruction: Instruction):
    """A function from a machine to the lanes in which an instruction's predicate holds."""
    register, negated = instruction.guard
    read = reader(register, "pred")
    return lambda machine: ~read(machine) if negated else read(machine)


class Values(NamedTuple):
    """What a launch gives its kernel: the bits of each parameter by name; descriptors by address, and their addresses
    by the name of the parameter."""

    tensors: Tensors
    parameters: dict[str, np.ndarray]
    descriptors: dict[int, Descriptor]
    addresses: dict[str, np.ndarray]


class Machine:
    """Runs `programs` (numbers in the grid) of `threads` lanes each.

    active: which lanes run now, None for all.
    """

    def __init__(self, code: Code, values: Values, grid, programs: np.ndarray, threads: int, shared: int):
        self.code, self.tensors = code, values.tensors
        self.parameters, self.descriptors = values.parameters, values.descriptors
        self.threads, self.lanes = threads, threads * len(programs)
        self.program_of_lane = np.repeat(programs, threads)
        self.shared = Shared(shared, len(programs), threads, code.unit)
        self.barriers = Barriers(self.shared)
        x, y, _ = grid
        thread = np.tile(np.arange(threads), len(programs))
        number = self.program_of_lane
        self._symbols = {
            "ctaid.x": number % x, "ctaid.y": number // x % y, "ctaid.z": number // (x * y),
            "nctaid.x": np.array(grid[0]), "nctaid.y": np.array(grid[1]), "nctaid.z": np.array(grid[2]),
            "tid.x": thread, "tid.y": np.array(0), "tid.z": np.array(0), "ntid.x": np.array(threads),
            "laneid": thread % 32, "global_smem": np.array(0), **values.addresses,
        }  # fmt: skip
        self.registers = Registers(code.program.registers, self.lanes)
        self.warpgroups = Warpgroups(self.shared, self.registers)
        self.active: np.ndarray | None = None

    def symbol(self, name: str) -> np.ndarray:
        return self._symbols[name]

    @property
    def is_active(self) -> np.ndarray:
        """Of each lane."""
        return np.ones(self.lanes, bool) if self.active is None else self.active

    def active_lanes(self) -> np.ndarray:
        return np.arange(self.lanes) if self.active is None else np.flatnonzero(self.active)

    def of_active(self, values: np.ndarray) -> np.ndarray:
        """An array over the active lanes alone."""
        values = np.broadcast_to(values, self.lanes)
        return values if self.active is None else values[self.active]

    def of_all(self, values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, self.lanes)

    def require_whole_warps(self) -> None:
        self.whole(32, "warp")

    def whole(self, lanes: int, name: str) -> np.ndarray:
        """Numbers of the active groups of so many lanes, each of which has to be there as a whole."""
        groups = self.is_active.reshape(-1, lanes)
        if np.any(groups.any(1) != groups.all(1)):
            raise Diverged(f"an instruction of a whole {name}, of which some lanes are elsewhere")
        return np.flatnonzero(groups.any(1))

    def barrier(self) -> None:
        programs = np.zeros(len(self.shared.times), bool)
        programs[self.whole(self.threads, "program")] = True
        self.shared.barrier(programs)

    def run(self) -> None:
        run_blocks(self, np.ones(self.lanes, bool), self._choose)
        self.barriers.check_end()
        self.warpgroups.check_end()
        if self.shared.is_pending():
            raise NotWaited("the kernel ends before an asynchronous copy that nobody waited for")

    def _choose(self, lanes: np.ndarray) -> None:
        self.active = None if lanes.all() else lanes

    def leave(self, block: Block, lanes: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Where the lanes go after a block."""
        last = block.last
        if last is None:
            return [(block.next, lanes)]
        chosen = lanes & _guard(last)(self) if last.guard else lanes
        stay = [(block.next, lanes & ~chosen)] if last.guard else []
        if last.opcode.split(".")[0] != "bra":
            return stay
        return [(self.code.first[last.operands[0].name], chosen), *stay]
