"""What instructions do. `step_of` makes a function of a machine of an instruction; `operation_of` knows those that make
a value of values, which have no other effect."""

from ..faults import Unknown
from ..parsing import Instruction
from ..registers import reader, writer
from . import arithmetic, bits, comparisons, control, conversions, matrix, memory, warps
from .operation import Operation

FAMILIES = arithmetic.FAMILIES | bits.FAMILIES | comparisons.FAMILIES | conversions.FAMILIES
"""name -> function(modifiers, as in "add.rn.f32" -> ("rn", "f32")) -> Operation"""

STEPS = conversions.STEPS | memory.STEPS | warps.STEPS | matrix.STEPS | control.STEPS
"""name -> function(instruction, modifiers) -> function(machine), or None if it is none of them after all"""


def operation_of(opcode: str) -> Operation:
    name, *modifiers = opcode.split(".")
    try:
        return FAMILIES[name](tuple(modifiers))
    except (KeyError, ValueError) as error:
        raise Unknown(opcode) from error


def step_of(instruction: Instruction):
    name, *modifiers = instruction.opcode.split(".")
    try:
        step = STEPS[name](instruction, tuple(modifiers)) if name in STEPS else None
    except (KeyError, ValueError) as error:
        raise Unknown(instruction.opcode) from error
    return step or _value_step(instruction)


def _value_step(instruction: Instruction):
    function, result, operands = operation_of(instruction.opcode)
    destination, *sources = instruction.operands
    if len(sources) != len(operands):
        raise Unknown(str(instruction))
    readers = [reader(source, type) for source, type in zip(sources, operands, strict=True)]
    write = writer(destination)

    def step(machine):
        write(machine, function(*[read(machine) for read in readers]))

    return step
