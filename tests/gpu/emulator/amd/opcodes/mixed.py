"""Packed and mixed numbers: two float32 in two registers, a float16 in half of one."""

import numpy as np

from ...opcodes.arithmetic import fused
from ..parsing import Number
from ..registers import reader, writer


def _flags(modifiers, name: str, count: int, default: int) -> list[int]:
    text = modifiers.pop(name, None)
    return [default] * count if text is None else [int(x) for x in text.strip("[]").split(",")]


def step(instruction, lanes):
    name, (destination, *sources) = instruction.opcode, instruction.operands or (None,)
    modifiers = dict(instruction.modifiers)
    if name in PACKED:
        made = _packed(PACKED[name], destination, sources, modifiers)
    elif name in PACKED_HALVES:
        made = _packed_halves(PACKED_HALVES[name], destination, sources, modifiers)
    elif name == "v_pk_mov_b32":
        made = _two_registers(destination, sources, modifiers)
    elif name in ("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16"):
        made = _mixed(name, destination, sources, modifiers)
    else:
        return None
    if modifiers:
        raise KeyError(f"modifiers {modifiers}")
    return made


def _one_of_pair(source, is_high: int, type: str):
    """A source of 64 bits has a register for each result, or one for both; a number is that of both."""
    if isinstance(source, Number):
        return reader(source, type)
    return reader(source._replace(number=source.number + (is_high if source.count == 2 else 0), count=1), type)


def _signed(read, is_negated):
    return (lambda registers: -read(registers)) if is_negated else read


def _packed(function, destination, sources, modifiers):
    count = len(sources)
    chosen = _flags(modifiers, "op_sel", count, 0), _flags(modifiers, "op_sel_hi", count, 1)
    negated = _flags(modifiers, "neg_lo", count, 0), _flags(modifiers, "neg_hi", count, 0)
    readers = [
        [
            _signed(_one_of_pair(source, high, "f32"), flag)
            for source, high, flag in zip(sources, row, signs, strict=True)
        ]
        for row, signs in zip(chosen, negated, strict=True)
    ]
    writers = [writer(destination._replace(number=destination.number + i, count=1)) for i in range(2)]

    def operate(machine):
        registers = machine.registers
        results = [function(*[read(registers) for read in row]) for row in readers]
        for write, values in zip(writers, results, strict=True):
            write(registers, values)

    return operate


PACKED = {"v_pk_add_f32": np.add, "v_pk_mul_f32": np.multiply, "v_pk_fma_f32": fused}


def _packed_halves(function, destination, sources, modifiers):
    """Of a number only the lower half is known here."""
    chosen = _flags(modifiers, "op_sel", 2, 0), _flags(modifiers, "op_sel_hi", 2, 1)
    if any(isinstance(source, Number) and high for row in chosen for source, high in zip(sources, row, strict=True)):
        raise KeyError("the upper half of a number")
    readers = [
        [
            reader(x if isinstance(x, Number) else x._replace(half="lh"[high]), "u16")
            for x, high in zip(sources, row, strict=True)
        ]
        for row in chosen
    ]
    writers = [writer(destination._replace(half=half)) for half in "lh"]

    def operate(machine):
        registers = machine.registers
        results = [function(*[read(registers) for read in row]) for row in readers]
        for write, values in zip(writers, results, strict=True):
            write(registers, np.broadcast_to(values, registers.shape))

    return operate


PACKED_HALVES = {"v_pk_lshlrev_b16": lambda count, x: x << (count & np.uint16(15))}


def _two_registers(destination, sources, modifiers):
    """v_pk_mov_b32: a half of the first source and one of the second."""
    chosen, _ = _flags(modifiers, "op_sel", 2, 0), _flags(modifiers, "op_sel_hi", 2, 1)
    readers = [_one_of_pair(source, high, "u32") for source, high in zip(sources, chosen, strict=True)]
    writers = [writer(destination._replace(number=destination.number + i, count=1)) for i in range(2)]

    def move(machine):
        registers = machine.registers
        for write, values in zip(writers, [read(registers) for read in readers], strict=True):
            write(registers, values)

    return move


def _mixed(name, destination, sources, modifiers):
    """A fused product of sources that are float32, or a float16 in a half; the result is a float32 or such a half."""
    high, is_half = _flags(modifiers, "op_sel", 3, 0), _flags(modifiers, "op_sel_hi", 3, 0)
    readers = []
    for source, place, half in zip(sources, high, is_half, strict=True):
        if half and not isinstance(source, Number):
            source = source._replace(half="h" if place else "l")
        readers.append(reader(source, "f16" if half else "f32"))
    half = {"v_fma_mix_f32": "", "v_fma_mixlo_f16": "l", "v_fma_mixhi_f16": "h"}[name]
    write, dtype = writer(destination._replace(half=half)), np.float16 if half else np.float32

    def operate(machine):
        registers = machine.registers
        a, b, c = (read(registers).astype(np.float32) for read in readers)
        write(registers, fused(a, b, c).astype(dtype))

    return operate
