"""Global memory, by buffer descriptors or addresses; scratch memory of each lane; loads of scalar registers."""

import re

import numpy as np

from ...faults import OutOfBounds, Uninitialized, Unknown
from ..counters import SCALARS
from ..parsing import Name, Register
from ..registers import reader
from .widths import SIZES, get, put, width_of

_NAME = re.compile(r"(buffer|global|scratch)_(load|store)_(\w+)$")
LAST_WORDS = {"gfx9": 0x00027000, "gfx1": 0x31027000}
"""Of a descriptor of a plain buffer, whose records are bytes, by the start of the architecture's name."""


def step(instruction, lanes):
    if instruction.opcode.startswith("s_load_"):
        return _scalar_load(instruction)
    match = _NAME.match(instruction.opcode)
    if not match:
        return None
    space, direction, width = match.groups()
    width, modifiers = width_of(width), dict(instruction.modifiers)
    address = {"buffer": _of_buffer, "global": _of_global, "scratch": _of_scratch}[space]
    data, place = _operands(instruction.operands, space, direction)
    if data.count != width.registers:
        raise Unknown(f"{data} of {width.size} bytes")
    address = address(place, modifiers, width.size)
    if modifiers:
        raise KeyError(f"modifiers {modifiers}")
    access = _load if direction == "load" else _store
    return access(data.number, width, address, _Scratch if space == "scratch" else _Tensors)


def _operands(operands, space, direction):
    """(registers of the data, the operands that make the address)"""
    if direction == "store" and space != "buffer":
        return operands[1], (operands[0], *operands[2:])
    return operands[0], operands[1:]


class _Tensors:
    @staticmethod
    def load(machine, lanes, addresses, size):
        return machine.tensors.load(addresses, size, machine.program_of_lane[lanes])

    @staticmethod
    def store(machine, lanes, addresses, data):
        machine.tensors.store(addresses, data, machine.program_of_lane[lanes])


class _Scratch:
    @staticmethod
    def places(machine, lanes, addresses, size):
        if np.any(addresses + np.uint64(size) > machine.scratch.shape[0]):
            raise OutOfBounds(f"{size} bytes at {addresses[0]} of {machine.scratch.shape[0]} bytes of scratch memory")
        return addresses.astype(np.int64)[:, None] + np.arange(size), lanes[:, None]

    @staticmethod
    def load(machine, lanes, addresses, size):
        places = _Scratch.places(machine, lanes, addresses, size)
        if not np.all(machine.is_scratch_written[places]):
            raise Uninitialized("scratch memory is read that nobody wrote")
        return machine.scratch[places]

    @staticmethod
    def store(machine, lanes, addresses, data):
        places = _Scratch.places(machine, lanes, addresses, data.shape[1])
        machine.scratch[places], machine.is_scratch_written[places] = data, True


def _load(number, width, address, memory):
    def load(machine):
        registers = machine.registers
        addresses, there = address(machine)
        lanes = registers.active_lanes()
        data = np.zeros((len(lanes), width.size), np.uint8)  # what is beyond a buffer is 0
        if np.any(there):
            data[there] = memory.load(machine, lanes[there], addresses[there], width.size)
        machine.counters.issue("vector")
        put(machine, "vector", number, width, lanes, data)

    return load


def _store(number, width, address, memory):
    def store(machine):
        registers = machine.registers
        addresses, there = address(machine)
        data = get(registers, number, width)
        if np.any(there):
            lanes = registers.active_lanes()
            memory.store(machine, lanes[there], addresses[there], np.ascontiguousarray(data[there]))
        machine.counters.issue("stores")

    return store


# Each makes a function from a machine to (addresses of the active lanes, which of them are in the buffer).


def _of_buffer(operands, modifiers, size):
    place, descriptor, offset = operands
    fixed = np.uint64(modifiers.pop("offset", "0"))
    modifiers.pop("offen", None)
    in_lane = reader(place, "u32") if not isinstance(place, Name) else lambda registers: np.uint32(0)
    words = [reader(Register("s", descriptor.number + i), "u32") for i in range(4)]
    offset = reader(offset, "u32")

    def address(machine):
        registers = machine.registers
        low, high, records, last = (np.broadcast_to(read(registers), (registers.shape[0], 1)) for read in words)
        waves = slice(None) if registers.waves is None else registers.waves
        expected = LAST_WORDS[machine.code.program.arch[:4]]
        if np.any(high[waves] >> np.uint32(16)) or np.any(last[waves] != expected):
            raise Unknown("a buffer of records of several bytes")
        inside = in_lane(registers).astype(np.uint64) + fixed
        base = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        addresses = registers.of_active(base + offset(registers) + inside)
        return addresses, registers.of_active(inside + np.uint64(size) <= records)

    return address


def _of_global(operands, modifiers, size):
    place, base = operands
    fixed = np.uint64(int(modifiers.pop("offset", "0")) & (1 << 64) - 1)
    if isinstance(base, Name):
        places = [reader(place, "u64")]
    else:
        places = [reader(place, "u32"), reader(base, "u64")]

    def address(machine):
        registers = machine.registers
        total = fixed
        for read in places:
            total = total + read(registers).astype(np.uint64)
        addresses = registers.of_active(total)
        return addresses, np.ones(len(addresses), bool)

    return address


def _of_scratch(operands, modifiers, size):
    fixed = np.uint64(modifiers.pop("offset", "0"))
    if not all(isinstance(operand, Name) for operand in operands):
        raise Unknown("scratch memory at an address of a register")

    def address(machine):
        count = len(machine.registers.active_lanes())
        return np.full(count, fixed), np.ones(count, bool)

    return address


def _scalar_load(instruction):
    destination, base, offset = instruction.operands
    size = SIZES[instruction.opcode.removeprefix("s_load_")]
    base, offset, count = reader(base, "u64"), reader(offset, "u32"), size // 4
    if destination.count != count:
        raise Unknown("registers of another size")

    def load(machine):
        registers = machine.registers
        waves = np.arange(registers.shape[0]) if registers.waves is None else np.flatnonzero(registers.waves)
        addresses = np.broadcast_to(base(registers) + offset(registers), (registers.shape[0], 1))[waves, 0]
        addresses = (addresses[:, None] + 4 * np.arange(count, dtype=np.uint64)).reshape(-1)
        programs = np.repeat(machine.program_of_lane[waves * registers.lanes], count)
        values = np.zeros((registers.shape[0], count), np.uint32)
        values[waves] = machine.tensors.load(addresses, 4, programs).view(np.uint32).reshape(-1, count)
        machine.counters.issue("scalar")
        for i in range(count):
            registers.write_scalar(destination.number + i, values[:, i : i + 1])
            machine.counters.expect("scalar", SCALARS + destination.number + i)

    return load
