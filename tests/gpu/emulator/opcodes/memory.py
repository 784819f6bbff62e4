"""Loads, stores, asynchronous copies."""

import numpy as np

from ..faults import Unknown
from ..parsing import Address, parts_of
from ..registers import TYPES, immediate, reader, writer

_HINTS = ("L1::evict_last", "L1::evict_first", "L1::no_allocate", "L2::128B", "nc", "relaxed", "weak", "gpu")


def _parse(modifiers: tuple[str, ...], operand) -> tuple[str, int, str]:
    """(space, bytes of an access, type) of .global.v4.b32 and the like."""
    space, *rest, type = modifiers
    parts = len(parts_of(operand))
    known = {*_HINTS} | ({f"v{parts}"} if parts > 1 else set())
    if set(rest) - known or (parts > 1 and f"v{parts}" not in rest):
        raise Unknown(".".join(modifiers))
    return space, parts * TYPES[type].itemsize, type


def address_of(operand: Address, type: str):
    base, offset = reader(operand.base, type), operand.offset
    if not offset:
        return base
    offset = immediate(str(offset), type)
    return lambda machine: base(machine) + offset


def lanes_and_addresses(machine, address) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the active lanes, and what `address` gives for them."""
    return machine.active_lanes(), machine.of_active(address(machine))


def _load(instruction, modifiers):
    destination, address = instruction.operands
    if modifiers[0] == "param":
        return _load_parameter(destination, address, modifiers)
    space, size, type = _parse(modifiers, destination)
    dtype = TYPES[type]
    writers = [writer(part) for part in parts_of(destination)]
    get = {"global": _from_tensors, "shared": _from_shared}[space](address, size)

    def load(machine):
        lanes, data = get(machine)
        if not len(lanes):
            return
        values = np.zeros((machine.lanes, len(writers)), dtype)
        values[lanes] = data.view(dtype)
        for number, write in enumerate(writers):
            write(machine, values[:, number])

    return load


def _from_tensors(address, size):
    address = address_of(address, "u64")

    def get(machine):
        lanes, addresses = lanes_and_addresses(machine, address)
        return lanes, machine.tensors.load(addresses, size, machine.program_of_lane[lanes])

    return get


def _from_shared(address, size):
    address = address_of(address, "u32")

    def get(machine):
        lanes, addresses = lanes_and_addresses(machine, address)
        return lanes, machine.shared.load(lanes, machine.shared.units_of(lanes, addresses, size))

    return get


def _load_parameter(destination, address, modifiers):
    _, type = modifiers
    write, name, offset, dtype = writer(destination), address.base.name, address.offset, TYPES[type]

    def load(machine):
        write(machine, machine.parameters[name][offset : offset + dtype.itemsize].view(dtype).reshape(()))

    return load


def _store(instruction, modifiers):
    address, source = instruction.operands
    space, size, type = _parse(modifiers, source)
    readers = [reader(part, type) for part in parts_of(source)]
    address = address_of(address, {"global": "u64", "shared": "u32"}[space])

    def store(machine):
        lanes, addresses = lanes_and_addresses(machine, address)
        if not len(lanes):
            return
        data = np.stack([machine.of_active(read(machine)) for read in readers], 1)
        if space == "global":
            machine.tensors.store(addresses, data.view(np.uint8), machine.program_of_lane[lanes])
        else:
            shared = machine.shared
            shared.store(lanes, shared.units_of(lanes, addresses, size), data.view(shared.dtype))

    return store


def _copy(instruction, modifiers):
    """cp.async from global to shared memory: what the source has not is zeros; wait_group, commit_group."""
    _, kind, *rest = modifiers
    if kind == "commit_group":
        return lambda machine: machine.shared.commit(machine.active_lanes())
    if kind == "wait_group":
        pending = int(instruction.operands[0].text)
        return lambda machine: machine.shared.wait(machine.active_lanes(), pending)
    if kind not in ("ca", "cg") or set(rest) - {"shared", "global", *_HINTS}:
        raise Unknown(str(instruction))
    destination, source, size, *filled = instruction.operands
    destination, source, size = address_of(destination, "u32"), address_of(source, "u64"), int(size.text, 0)
    if size not in (4, 8, 16) or len(filled) > 1:
        raise Unknown(str(instruction))
    from_source = reader(filled[0], "u32") if filled else lambda machine: np.array(size, np.uint32)

    def copy(machine):
        lanes, addresses = lanes_and_addresses(machine, source)
        if not len(lanes):
            return
        shared, places = machine.shared, machine.of_active(destination(machine))
        given = machine.of_active(from_source(machine))
        if np.any((given != 0) & (given != size)):
            raise Unknown(f"an asynchronous copy of a part of its {size} bytes")
        data = np.zeros((len(lanes), size), np.uint8)
        some = np.flatnonzero(given)
        if len(some):
            data[some] = machine.tensors.load(addresses[some], size, machine.program_of_lane[lanes[some]])
        shared.copy(lanes, shared.units_of(lanes, places, size), data.view(shared.dtype))

    return copy


STEPS = {"ld": _load, "st": _store, "cp": _copy}
