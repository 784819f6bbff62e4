"""What instructions do. `step_of` makes a function of a machine of an instruction; `operation_of` knows those that make
a value of values in each lane, which have no other effect."""

from ...faults import Unknown
from ..parsing import Instruction
from . import carries, comparisons, control, lanes, local, matrix, memory, mixed, scalar, vector

BRANCHES = control.BRANCHES
"""opcode -> function(registers) -> which waves go there, or None where they end"""

FAMILIES = (carries, comparisons, control, lanes, local, matrix, memory, mixed, scalar, vector)
"""Each has step(instruction, lanes), lanes being those of a wave, which gives None for what it does not know."""

operation_of, smallest_access = vector.operation_of, local.smallest_access


def step_of(instruction: Instruction, lanes: int):
    try:
        for family in FAMILIES:
            step = family.step(instruction, lanes)
            if step is not None:
                return step
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise Unknown(f"{instruction.opcode} ({error})") from error
    raise Unknown(instruction.opcode)
