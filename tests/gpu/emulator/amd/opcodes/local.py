"""LDS, the memory that the waves of a program share."""

import re

import numpy as np

from ..registers import reader
from .widths import get, put, width_of

_ONE = re.compile(r"ds_(load|read|store|write)_(\w+)$")
_TWO = re.compile(r"ds_(?:load|read|store|write)_?2(?:addr)?(_stride64|st64)?_b(32|64)$")


def smallest_access(opcode: str) -> int:
    """Bytes, at most 4, that an instruction touches at once."""
    match = _ONE.match(opcode) if not _TWO.match(opcode) else None
    return min(4, width_of(match[2]).size) if match else 4


def step(instruction, lanes):
    name, operands = instruction.opcode, instruction.operands
    modifiers = dict(instruction.modifiers)
    is_load = name.startswith(("ds_load", "ds_read"))
    if match := _TWO.match(name):
        width = width_of("b" + match[2])
        stride = width.size * (64 if match[1] else 1)
        offsets = [stride * int(modifiers.pop(f"offset{n}", "0")) for n in range(2)]
        if is_load:
            (destination, address), parts = operands, operands[:1]
            numbers = [destination.number + n * width.registers for n in range(2)]
            counts = [destination.count // 2] * 2
        else:
            address, *parts = operands
            numbers, counts = [part.number for part in parts], [part.count for part in parts]
    elif match := _ONE.match(name):
        width, offsets = width_of(match[2]), [int(modifiers.pop("offset", "0"))]
        data, address = operands if is_load else operands[::-1]
        numbers, counts = [data.number], [data.count]
    else:
        return None
    if modifiers or set(counts) != {width.registers}:
        raise KeyError(f"modifiers {modifiers}, registers {counts}")
    accesses = list(zip(numbers, map(np.uint32, offsets), strict=True))
    return (_load if is_load else _store)(accesses, width, reader(address, "u32"))


def _units(machine, address, offset, size):
    """(numbers of the active lanes, units of shared memory that each of them touches)"""
    registers = machine.registers
    lanes = registers.active_lanes()
    return lanes, machine.shared.units_of(lanes, registers.of_active(address(registers)) + offset, size)


def _load(accesses, width, address):
    def load(machine):
        found = []
        for _, offset in accesses:
            lanes, units = _units(machine, address, offset, width.size)
            found.append(machine.shared.load(lanes, units).view(np.uint8))
        machine.counters.issue("local")
        machine.counters.touch_memory()
        for (number, _), data in zip(accesses, found, strict=True):
            put(machine, "local", number, width, lanes, data)

    return load


def _store(accesses, width, address):
    def store(machine):
        for number, offset in accesses:
            lanes, units = _units(machine, address, offset, width.size)
            machine.shared.store(lanes, units, get(machine.registers, number, width).view(machine.shared.dtype))
        machine.counters.issue("local")
        machine.counters.touch_memory()

    return store
