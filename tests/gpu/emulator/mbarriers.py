"""Barriers in shared memory (mbarrier) and the copies of tensors that they wait for."""

from typing import NamedTuple

import numpy as np

from .faults import Deadlock, Misused, NotWaited, OutOfBounds, Race, Uninitialized
from .shared import Shared
from .tensors import Tensors

FIRST_DESCRIPTOR = 1 << 16
"""Address of the first descriptor of a launch; the next ones follow at such distances."""


PIECE = 16
"""Bytes that stay together, whatever the swizzle."""


class Descriptor(NamedTuple):
    """A tensor map: where a tensor lies and how a box of it goes to shared memory. Dimensions from outer to inner.

    swizzle: 0 none; 1, 2, 3: bits 4, 4 and 5, 4 to 6 of a place are flipped by the bits three above
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    size: int
    swizzle: int

    def load(self, tensors: Tensors, first: list[int], program: int) -> np.ndarray:
        """[pieces, 16] bytes of the box whose first element has these indices; zeros outside the tensor."""
        indices = np.indices(self.box).reshape(len(self.box), -1) + np.array(first)[:, None]
        shape = np.array(self.shape)[:, None]
        inside = np.flatnonzero(((indices >= 0) & (indices < shape)).all(0))
        data = np.zeros((indices.shape[1], self.size), np.uint8)
        offsets = (indices[:, inside] * np.array(self.strides)[:, None]).sum(0) * self.size
        addresses = (np.uint64(self.address) + offsets.astype(np.uint64)).astype(np.uint64)
        data[inside] = tensors.load(addresses, self.size, np.full(len(inside), program))
        return data.reshape(-1, PIECE)

    def places(self, address: int) -> np.ndarray:
        """Of the box's pieces in shared memory, from `address` on."""
        linear = np.arange(address, address + np.prod(self.box) * self.size, PIECE)
        bits = (0, 0x10, 0x30, 0x70)[self.swizzle]
        if address % (128, 256, 512, 1024)[self.swizzle]:
            raise OutOfBounds(f"a swizzled box begins at {address}, which is no multiple of its pattern")
        return linear ^ (linear >> 3 & bits)


class Barrier:
    """One of a program: how many arrivals and bytes its phase still waits for, copies that have not come yet, and the
    units of those that came in the phase before.

    units: of shared memory, where it lies; mark: of the warp that made it, when it did
    """

    def __init__(self, count: int, units: np.ndarray, mark: int):
        self.count = self.arrivals = count
        self.units, self.mark = units, mark
        self.bytes, self.phase = 0, 0
        self.copies: list[tuple[np.ndarray, np.ndarray]] = []
        self.arrived: list[np.ndarray] = []

    def advance(self) -> None:
        if self.arrivals == 0 and self.bytes == 0:
            self.arrivals, self.phase = self.count, self.phase + 1


class Barriers:
    """Of several programs, by program and address. A copy comes when somebody waits for it, not before.

    Each step is one of lanes, whose program has the barrier.
    """

    def __init__(self, shared: Shared):
        self.shared = shared
        self.barriers: dict[tuple[int, int], Barrier] = {}

    def init(self, lane: int, address: int, count: int) -> None:
        key = self._key(lane, address)
        if key in self.barriers:
            raise Misused(f"there is a barrier at {address} of shared memory already")
        self.barriers[key] = Barrier(count, self.shared.place_barrier(lane, address), self.shared.marks[lane])

    def invalidate(self, lane: int, address: int) -> None:
        barrier = self._known(np.array([lane]), address)
        self._check_done(barrier)
        self.shared.free_barrier(lane, barrier.units)
        del self.barriers[self._key(lane, address)]

    def expect(self, lane: int, address: int, size: int) -> None:
        barrier = self._used(np.array([lane]), address)
        barrier.bytes += size
        if not barrier.arrivals:
            raise Misused("more arrivals at a barrier than it counts")
        barrier.arrivals -= 1
        barrier.advance()

    def copy(self, lane: int, address: int, units: np.ndarray, data: np.ndarray) -> None:
        lanes = np.full(len(units), lane)
        self.shared.require_fence(lanes, units)
        self.shared.reserve(lanes, units)
        self._used(lanes[:1], address).copies.append((units, data))

    def wait(self, lanes: np.ndarray, address: int, parity: int) -> None:
        """Until the phase of that parity is over. The lanes are of one program."""
        barrier = self._used(lanes, address)
        if barrier.phase % 2 == parity:
            self._finish(barrier, lanes[0])
        for units in barrier.arrived:
            self.shared.note_wait(lanes, units)

    def _finish(self, barrier: Barrier, lane: int) -> None:
        phase, barrier.arrived = barrier.phase, [units for units, _ in barrier.copies]
        for units, data in barrier.copies:
            self.shared.settle(lane, units, data)
            barrier.bytes -= data.nbytes
        barrier.copies = []
        barrier.advance()
        if barrier.phase == phase:
            raise Deadlock(f"a wait for {barrier.arrivals} arrivals and {barrier.bytes} bytes that will not come")

    def _key(self, lane: int, address: int) -> tuple[int, int]:
        return int(self.shared.programs[lane]), address

    def _known(self, lanes: np.ndarray, address: int) -> Barrier:
        """That was made by these lanes' warp, or before the last barrier of their program."""
        key = self._key(lanes[0], address)
        if key not in self.barriers:
            raise Uninitialized(f"there is no barrier at {address} of shared memory")
        barrier = self.barriers[key]
        if np.any((barrier.mark >= self.shared.since[lanes]) & (barrier.mark != self.shared.marks[lanes])):
            raise Race("an mbarrier that another warp made, with no bar.sync since")
        return barrier

    def _used(self, lanes: np.ndarray, address: int) -> Barrier:
        """As known, and no other warp may end it before the next bar.sync."""
        barrier = self._known(lanes, address)
        self.shared.note_read(lanes, np.broadcast_to(barrier.units, (len(lanes), barrier.units.shape[1])))
        return barrier

    def check_end(self) -> None:
        for barrier in self.barriers.values():
            self._check_done(barrier)

    def _check_done(self, barrier: Barrier) -> None:
        if barrier.copies:
            raise NotWaited("a barrier ends before a copy to shared memory that nobody waited for")
