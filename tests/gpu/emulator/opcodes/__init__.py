"""What instructions do. `step_of` makes a function of a machine of an instruction; `operation_of` knows those that make
a value of values, which have no other effect."""

from ..faults import Unknown
from ..parsing import Instruction
from ..registers import reader, writer
from . import arithmetic, bits, bulk, comparisons, control, conversions, matrix, memory, warps, wgmma
from .operation import Operation

FAMILIES = arithmetic.FAMILIES | bits.FAMILIES | comparisons.FAMILIES | conversions.FAMILIES
"""name -> function(modifiers, as in "add.rn.f32" -> ("rn", "f32")) -> Operation"""

STEPS = comparisons.STEPS | conversions.STEPS | memory.STEPS | warps.STEPS | matrix.STEPS | wgmma.STEPS
STEPS |= bulk.STEPS | control.STEPS
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
        if instruction.opcode.startswith("cp.async.bulk"):
            return bulk.copy(instruction, tuple(modifiers))
        step = STEPS[name](instruction, tuple(modifiers)) if name in STEPS else None
    except (KeyError, ValueError) as error:
        raise Unknown(instruction.opcode) from error
    return step or _value_step(instruction)


def _value_step(instruction: Instruction):
    destination, *sources = instruction.operands
    opcode = instruction.opcode
    if opcode in ("max.f32", "min.f32") and len(sources) == 3:
        opcode = opcode[:3] + "3.f32"  # a name of our own
    if opcode == "prmt.b32":
        sources = bits.without_unused(sources)
    function, result, operands = operation_of(opcode)
    if len(sources) != len(operands):
        raise Unknown(str(instruction))
    readers = [reader(source, type) for source, type in zip(sources, operands, strict=True)]
    write = writer(destination)

    def step(machine):
        write(machine, function(*[read(machine) for read in readers]))

    return step
