"""What the lanes of a wave tell each other."""

import numpy as np

from ...faults import Unknown
from ..parsing import Number, Register
from ..registers import POISON, reader, writer

ROW = 16


def _sources(name: str, value: str, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """DPP: for each lane the one that it reads, and whether there is one."""
    lane = np.arange(lanes)
    row, place = lane // ROW * ROW, lane % ROW
    if name == "quad_perm":
        return lane // 4 * 4 + np.array([int(x) for x in value.strip("[]").split(",")])[lane % 4], lane >= 0
    if name == "row_shr":
        return lane - int(value), place >= int(value)
    if name == "row_shl":
        return lane + int(value), place + int(value) < ROW
    if name == "row_ror":
        return row + (place - int(value)) % ROW, lane >= 0
    if name == "row_xmask":
        return row + (place ^ int(value)), lane >= 0
    if name == "row_mirror":
        return row + ROW - 1 - place, lane >= 0
    if name == "row_half_mirror":
        return lane // 8 * 8 + 7 - lane % 8, lane >= 0
    if name == "row_bcast" and value == "15":  # the last lane of a row, to the next row
        return row - 1, row > 0
    if name == "row_bcast" and value == "31":
        return np.full(lanes, 31), lane >= 32
    raise KeyError(name)


PATTERNS = ("quad_perm", "row_shr", "row_shl", "row_ror", "row_xmask", "row_mirror", "row_half_mirror", "row_bcast")


def moved(readers, write, modifiers, lanes: int):
    """DPP: the first operand comes from other lanes. (readers, write), as the modifiers say, which are taken out.

    A lane whose source is not there or not active reads 0 with bound_ctrl, and is not written without it.
    """
    found = [name for name in PATTERNS if name in modifiers]
    if not found:
        return readers, write
    source, exists = _sources(found[0], modifiers.pop(found[0]), lanes)
    source = np.where(exists, source, 0)
    rows, banks = int(modifiers.pop("row_mask"), 0), int(modifiers.pop("bank_mask"), 0)
    reads_zero = modifiers.pop("bound_ctrl", "0") == "1"
    lane = np.arange(lanes)
    chosen = (rows >> lane // ROW & 1) & (banks >> lane % ROW // 4 & 1) == 1
    first, *others = readers

    def there(registers):
        active = registers.active
        return exists if active is None else exists & active[:, source]

    def read(registers):
        values = np.broadcast_to(first(registers), registers.shape)
        return np.where(there(registers), values[:, source], values.dtype.type(0))

    def write_chosen(registers, values):
        lanes_written = chosen if reads_zero else chosen & there(registers)
        if np.all(lanes_written):
            return write(registers, values)
        with registers.only(np.broadcast_to(lanes_written, registers.shape)):
            return write(registers, values)

    return [read, *others], write_chosen


def step(instruction, lanes):
    name, operands = instruction.opcode, instruction.operands
    if name == "v_readfirstlane_b32":
        return _read_lane(operands, None)
    if name == "v_readlane_b32":
        return _read_lane(operands[:2], operands[2])
    if name == "v_writelane_b32":
        return _write_lane(*operands)
    if name == "v_permlanex16_b32":
        return _exchange_rows(*operands, instruction.modifiers)
    if name == "ds_bpermute_b32":
        return _permute(*operands, instruction.modifiers)
    return None


def _read_lane(operands, lane):
    write, read = writer(operands[0]), reader(operands[1], "u32")
    which = reader(lane, "u32") if lane is not None else None

    def read_lane(machine):
        registers = machine.registers
        values = np.broadcast_to(read(registers), registers.shape)
        if which is not None:
            place = np.broadcast_to(which(registers) % np.uint32(registers.lanes), (registers.shape[0], 1))
        elif registers.active is None:
            place = np.zeros((registers.shape[0], 1), np.int64)
        else:
            place = registers.active.argmax(1)[:, None]  # the first one; 0 where none is active
        write(registers, np.take_along_axis(values, place.astype(np.int64), 1))

    return read_lane


def _write_lane(destination, source, lane):
    if not isinstance(lane, Number):
        raise Unknown("v_writelane_b32 to a lane that a register names")
    read, place = reader(source, "u32"), int(lane.text)

    def write_lane(machine):
        registers = machine.registers
        if isinstance(source, Register):
            registers.define(source)  # LLVM keeps all of a tuple there, of which parts may be undefined
        before = registers.vectors[destination.number]
        values = np.full(registers.shape, POISON) if before is None else before.copy()
        values[:, place] = np.broadcast_to(read(registers), (registers.shape[0], 1))[:, 0]
        registers.write_vector(destination.number, values, everywhere=True)

    return write_lane


def _exchange_rows(destination, value, low, high, modifiers):
    """Lane i reads lane n of the other row, n being four bits of a number that all lanes share."""
    flags = dict(modifiers)
    if flags.pop("op_sel", None) != "[1,0]" or flags:  # inactive lanes are read, too
        raise Unknown(f"modifiers {modifiers}")
    write, read, low, high = writer(destination), reader(value, "u32"), reader(low, "u32"), reader(high, "u32")

    def exchange(machine):
        registers = machine.registers
        places = high(registers).astype(np.uint64) << np.uint64(32) | low(registers).astype(np.uint64)
        lane = np.arange(registers.lanes)
        places = np.broadcast_to(places, (registers.shape[0], 1))
        source = (places >> (4 * (lane % ROW)).astype(np.uint64) & np.uint64(15)).astype(np.int64)
        source = source + (lane // ROW ^ 1) * ROW
        write(registers, np.take_along_axis(np.broadcast_to(read(registers), registers.shape), source, 1))

    return exchange


def _permute(destination, address, value, modifiers):
    """Lane i reads the lane that it names, times four; through LDS, so that it has to be waited for."""
    offset = np.uint32(modifiers.get("offset", "0"))
    write, read, address = writer(destination), reader(value, "u32"), reader(address, "u32")

    def permute(machine):
        registers = machine.registers
        source = (address(registers) + offset >> np.uint32(2)) % np.uint32(registers.lanes)
        source = np.broadcast_to(source, registers.shape).astype(np.int64)
        values = np.take_along_axis(np.broadcast_to(read(registers), registers.shape), source, 1)
        if registers.active is not None:
            values = np.where(np.take_along_axis(registers.active, source, 1), values, np.uint32(0))
        write(registers, values)
        machine.counters.issue("local")
        machine.counters.expect("local", destination.number)

    return permute
