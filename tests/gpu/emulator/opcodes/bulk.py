"""Copies of boxes of tensors into shared memory (TMA), barriers that wait for them, and the lane that starts them."""

import numpy as np

from ..faults import Unknown
from ..mbarriers import PIECE
from ..registers import reader, writer
from .memory import address_of, lanes_and_addresses
from .operation import one_of


def _elect(instruction, modifiers):
    """The first lane of each warp."""
    one_of(modifiers, (("sync",),))
    (elected, chosen), _ = instruction.operands[0].parts, instruction.operands[1]
    write, choose = writer(elected), writer(chosen)

    def elect(machine):
        machine.require_whole_warps()
        write(machine, np.zeros(machine.lanes, np.uint32))
        choose(machine, np.arange(machine.lanes) % 32 == 0)

    return elect


def _fence(instruction, modifiers):
    """Between ordinary accesses and asynchronous ones, for warps all of which come here."""
    one_of(modifiers, (("proxy", "async", "shared::cta"),))

    def fence(machine):
        machine.shared.proxies.fence(np.flatnonzero(machine.is_active.reshape(-1, 32).all(1)))

    return fence


def _barrier(instruction, modifiers):
    """init, inval, arrive.expect_tx: of each active lane; try_wait: of whole warps."""
    kind, space, type = modifiers[0], modifiers[-2], modifiers[-1]
    one_of((space, type), (("shared::cta", "b64"),))
    of = {
        ("init",): _init, ("inval",): _invalidate, ("arrive", "expect_tx"): _expect, ("try_wait", "parity"): _wait,
    }  # fmt: skip
    if modifiers[:-2] not in of:
        raise Unknown(f"mbarrier.{kind}")
    return of[modifiers[:-2]](*instruction.operands)


def _operands(address, argument):
    """A function from a machine to (lane, address, argument) of each active lane."""
    address = address_of(address, "u32")
    argument = reader(argument, "u32") if argument is not None else lambda machine: np.uint32(0)

    def read(machine):
        lanes, addresses = lanes_and_addresses(machine, address)
        return zip(lanes.tolist(), addresses.tolist(), machine.of_active(argument(machine)).tolist(), strict=True)

    return read


def _for_each(address, argument, do):
    read = _operands(address, argument)

    def step(machine):
        for each in read(machine):
            do(machine.barriers, *each)

    return step


def _init(address, count):
    return _for_each(address, count, lambda barriers, *each: barriers.init(*each))


def _invalidate(address):
    return _for_each(address, None, lambda barriers, lane, address, _: barriers.invalidate(lane, address))


def _expect(_, address, size):
    return _for_each(address, size, lambda barriers, *each: barriers.expect(*each))


def _wait(done, address, parity):
    read, write = _operands(address, parity), writer(done)

    def step(machine):
        waiting = {}  # whole warps wait for one barrier
        for lane, address, parity in read(machine):
            waiting.setdefault((lane // machine.threads, address, parity), []).append(lane)
        for (_, address, parity), lanes in waiting.items():
            machine.barriers.wait(np.array(lanes), address, parity)
        write(machine, np.ones(machine.lanes, bool))

    return step


def copy(instruction, modifiers):
    """cp.async.bulk.tensor of one box: its first element's indices come from the inner dimension to the outer."""
    rank = modifiers[3]
    if modifiers != ("async", "bulk", "tensor", rank, "shared::cta", "global", "mbarrier::complete_tx::bytes"):
        raise Unknown(instruction.opcode)
    destination, source, barrier = instruction.operands
    tensor, indices = source.parts
    destination, barrier, tensor = address_of(destination, "u32"), address_of(barrier, "u32"), reader(tensor, "u64")
    indices = [reader(index, "s32") for index in reversed(indices.parts)]

    def step(machine):
        lanes, places = lanes_and_addresses(machine, destination)
        operands = [machine.of_active(read(machine)).tolist() for read in (tensor, barrier, *indices)]
        for lane, place, map, of, *first in zip(lanes.tolist(), places.tolist(), *operands, strict=True):
            descriptor, program = machine.descriptors[map], machine.program_of_lane[lane]
            data = descriptor.load(machine.tensors, first, program).view(machine.shared.dtype)
            pieces = descriptor.places(place).astype(np.uint32)
            units = machine.shared.units_of(np.full(len(pieces), lane), pieces, PIECE)
            machine.barriers.copy(lane, of, units, data)

    return step


STEPS = {"elect": _elect, "fence": _fence, "mbarrier": _barrier}
