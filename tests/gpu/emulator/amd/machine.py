"""Waves of several programs that run at once.

While all agree where to go, an instruction is one NumPy call for all of them. Where they part, each block of code runs
for the waves that are there, the earliest block first, so that they meet again where the paths join.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..faults import Diverged, Fault
from ..shared import Shared
from ..steps import run_blocks
from ..tensors import Tensors
from .counters import Counters
from .opcodes import BRANCHES, smallest_access, step_of
from .parsing import Instruction, Program, parse
from .registers import Registers


class Block(NamedTuple):
    """Instructions between branches and barriers, which come first, and the branch that ends it, or None; next: the
    number of the block that follows."""

    steps: tuple
    instructions: tuple[Instruction, ...]
    last: Instruction | None
    next: int


class Code(NamedTuple):
    """lanes: of a wave. unit: bytes of the smallest access to LDS. first: the number of the block at each label.
    visited: numbers of the blocks that have run."""

    program: Program
    lanes: int
    unit: int
    blocks: tuple[Block, ...]
    first: dict[str, int]
    visited: set[int]


@lru_cache(maxsize=64)
def decode(text: str) -> Code:
    program = parse(text)
    lanes = 32 if program.settings.get("wavefront_size32") else 64
    instructions = program.instructions
    starts = {0, *(program.labels[i.operands[0].name] for i in instructions if "branch" in i.opcode)}
    starts |= {n + 1 for n, i in enumerate(instructions) if i.opcode in BRANCHES}
    starts |= {n for n, i in enumerate(instructions) if i.opcode == "s_barrier"}
    starts = sorted(starts - {len(instructions)})
    number = {start: n for n, start in enumerate(starts)}
    blocks = []
    for n, (start, end) in enumerate(zip(starts, [*starts[1:], len(instructions)], strict=True)):
        body, last = instructions[start:end], None
        if body[-1].opcode in BRANCHES:
            *body, last = body
        blocks.append(Block(tuple(_step(i, lanes) for i in body), tuple(body), last, n + 1))
    first = {name: number[start] for name, start in program.labels.items() if start in number}
    unit = min((smallest_access(i.opcode) for i in instructions), default=4)
    return Code(program, lanes, unit, tuple(blocks), first, set())


def _step(instruction: Instruction, lanes: int):
    try:
        return step_of(instruction, lanes)
    except Fault as fault:
        raise type(fault)(f"{fault}\n  {instruction}") from None


class Machine:
    """Runs `programs` (numbers in the grid) of `waves` waves each. arguments: the address of what the kernel is given;
    shared, scratch: bytes of each program and of each lane."""

    def __init__(self, code: Code, tensors: Tensors, arguments: int, programs: np.ndarray, waves: int, shared: int):
        self.code, self.tensors = code, tensors
        count, settings = waves * len(programs), code.program.settings
        self.counters = Counters(count, has_store_counter=not code.program.arch.startswith("gfx9"))
        self.registers = Registers(count, code.lanes, self.counters)
        self.waves_of_program = waves
        self.program_of_lane = np.repeat(programs, waves * code.lanes)
        self.shared = Shared(shared, len(programs), waves * code.lanes, code.unit, code.lanes)
        self.scratch = np.zeros((settings["private_segment_fixed_size"], count * code.lanes), np.uint8)
        self.is_scratch_written = np.zeros(self.scratch.shape, bool)
        for place in range(2):
            self._give_scalar(place, arguments >> 32 * place)
        if not settings["user_sgpr_kernarg_segment_ptr"] or settings["system_sgpr_workgroup_id_y"]:
            raise Fault("a kernel that starts with other registers")
        self._give_scalar(settings["user_sgpr_count"], np.repeat(programs, waves)[:, None])
        thread = np.tile(np.arange(waves * code.lanes, dtype=np.uint32), len(programs))
        self.registers.write_vector(0, thread.reshape(-1, code.lanes))

    def _give_scalar(self, number: int, value) -> None:
        self.registers.write_scalar(number, np.asarray(value & 0xFFFFFFFF).astype(np.uint32))

    def barrier(self) -> None:
        """All waves of a program have to be here, and done with LDS."""
        waves = self.registers.waves
        running = np.ones(self.registers.shape[0], bool) if waves is None else waves
        if self._are_apart(running):
            raise Diverged("a barrier of a whole program, of which some waves are elsewhere")
        self.counters.check_barrier()
        self.shared.barrier(running.reshape(-1, self.waves_of_program).any(1))

    def _are_apart(self, waves: np.ndarray) -> bool:
        """Whether these are some of a program's waves, but not all."""
        programs = waves.reshape(-1, self.waves_of_program)
        return np.any(programs.any(1) != programs.all(1))

    def _waits(self, block: Block, waves: np.ndarray) -> bool:
        starts = block.instructions or (block.last,)
        return starts[0].opcode == "s_barrier" and self._are_apart(waves)

    def run(self) -> None:
        run_blocks(self, np.ones(self.registers.shape[0], bool), self._choose, self._waits)

    def _choose(self, waves: np.ndarray) -> None:
        self.registers.run_waves(None if waves.all() else waves)
        self.counters.waves = self.registers.waves

    def leave(self, block: Block, waves: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Where the waves go after a block."""
        last = block.last
        if last is None:
            return [(block.next, waves)]
        holds = BRANCHES[last.opcode]
        if holds is None:
            return []
        chosen = waves & holds(self.registers)
        return [(self.code.first[last.operands[0].name], chosen), (block.next, waves & ~chosen)]
