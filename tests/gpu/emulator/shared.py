"""Shared memory, which forgets nothing: who wrote and who read each unit since the last barrier, what was never
written, and what an asynchronous copy will still write.

A unit is as many bytes as the kernel's smallest access has. Each warp marks what it touches with a number that also
tells the time, in barriers: a mark since the last one that is not the warp's own is a race.
"""

from typing import NamedTuple

import numpy as np

from .faults import Misaligned, NotWaited, OutOfBounds, Race, Uninitialized
from .proxies import Proxies

MARKS = 64
"""Of one time: a number for each warp, and the last one for several of them (of writers: for a box, see `settle`)."""
NEVER, PENDING, BARRIER = -1, -2, -3
"""Writers that are none: nobody yet, a copy under way, an mbarrier that lies there."""
UNDER_WAY = np.iinfo(np.int32).max
"""A reader: an asynchronous product, until it is waited for."""


class Copies(NamedTuple):
    """Asynchronous ones of one instruction: for each lane that takes part the units, their data, and how many groups
    it had committed before."""

    lanes: np.ndarray
    units: np.ndarray
    data: np.ndarray
    group: np.ndarray

    def where(self, chosen: np.ndarray) -> "Copies":
        return Copies(*(x[chosen] for x in self))


class Shared:
    """Of several programs of `threads` lanes each, `size` bytes each. `lanes` are numbers of lanes, `warp` of which run
    as one."""

    def __init__(self, size: int, programs: int, threads: int, unit: int, warp: int = 32):
        self.size, self.unit, self.dtype = size, unit, np.dtype(f"u{unit}")
        stride = -(-size // 16) * 16
        units = programs * stride // unit
        self.data = np.zeros(units, self.dtype)
        self.writers = np.full(units, NEVER, np.int32)
        self.readers = np.zeros(units, np.int32)
        self.waited = np.zeros(units, np.int64)
        """Which warps, a bit each, waited for the box that wrote each unit last."""
        self.first = np.repeat(np.arange(programs) * stride, threads)
        self.programs = np.repeat(np.arange(programs), threads)
        self.warps = np.tile(np.arange(threads) // warp, programs).astype(np.int32)
        self.times = np.ones(programs, np.int32)
        self.copies: list[Copies] = []
        self.groups = np.zeros(programs * threads, np.int32)
        self.proxies = Proxies(units, programs, threads // 32)
        self._mark()

    def _mark(self) -> None:
        self.since = self.times[self.programs] * np.int32(MARKS)
        self.marks = self.since + self.warps

    def barrier(self, programs: np.ndarray) -> None:
        """Programs, as a bool each, whose warps have met."""
        self.times = self.times + programs.astype(np.int32)
        self.proxies.barrier(programs)
        self._mark()

    def units_of(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """[lanes, size / unit]"""
        if np.any(addresses % np.uint32(size)):
            raise Misaligned(f"an access of {size} bytes of shared memory at an address that is no multiple of it")
        outside = addresses.astype(np.int64) + size > self.size
        if np.any(outside):
            raise OutOfBounds(f"{size} bytes at {addresses[outside][0]} of {self.size} bytes of shared memory")
        return ((self.first[lanes] + addresses) // self.unit)[:, None] + np.arange(size // self.unit)

    def load(self, lanes: np.ndarray, units: np.ndarray) -> np.ndarray:
        writers = self.writers[units]
        wrong = (writers < 0) | self._is_unknown(lanes, units, self.marks[lanes, None])
        if np.any(wrong):
            _explain_read(writers[wrong])
        self.note_read(lanes, units)
        return self.data[units]

    def _is_unknown(self, lanes: np.ndarray, units: np.ndarray, mark: np.ndarray | None, warps: int = 1) -> np.ndarray:
        """Whether another than `mark` wrote them since the last barrier; a box counts as one's own if as many warps,
        from the lanes' own on, waited for it."""
        since, writers = self.since[lanes, None], self.writers[units]
        unknown = writers >= since
        if mark is not None:
            unknown &= writers != mark
        if np.any(unknown):
            all_warps = np.int64((1 << warps) - 1)
            waited = self.waited[units] >> self.warps[lanes, None] & all_warps == all_warps
            unknown &= ~(waited & (writers == since + np.int32(MARKS - 1)))
        return unknown

    def note_read(self, lanes: np.ndarray, units: np.ndarray) -> None:
        since, mark = self.since[lanes, None], self.marks[lanes, None]
        readers = self.readers[units]
        several = since + np.int32(MARKS - 1)
        others = np.where(readers == UNDER_WAY, readers, several)
        self.readers[units] = marks = np.where((readers >= since) & (readers != mark), others, mark)
        clash = self.readers[units] != marks  # warps that read it in this instruction
        if np.any(clash):
            self.readers[units[clash]] = np.broadcast_to(several, units.shape)[clash]

    def store(self, lanes: np.ndarray, units: np.ndarray, data: np.ndarray) -> None:
        """[lanes, units] of this memory's dtype. Of lanes that differ one would win on a GPU: it is open which."""
        self._check_write(lanes, units, data)
        mark = self.marks[lanes, None]
        self.data[units] = data
        self.writers[units] = mark
        self.proxies.write(units)
        if np.any(self.data[units] != data):
            raise Race("two lanes write different values to one place of shared memory")

    def _check_write(self, lanes: np.ndarray, units: np.ndarray, data: np.ndarray | None) -> None:
        writers = self.writers[units]
        if np.any(writers == PENDING):
            raise NotWaited("a write to shared memory while an asynchronous copy to it is under way")
        if np.any(writers == BARRIER):
            raise Race("a write to shared memory where an mbarrier lies")
        self._check_readers(lanes, units)
        other = self._is_unknown(lanes, units, self.marks[lanes, None])
        if np.any(other if data is None else other & (self.data[units] != data)):  # lanes may repeat a value
            raise Race("a write to shared memory that another warp wrote, with no barrier since")

    def _check_readers(self, lanes: np.ndarray, units: np.ndarray) -> None:
        readers = self.readers[units]
        if np.any(readers == UNDER_WAY):
            raise NotWaited("a write to shared memory that a product under way reads")
        if np.any((readers >= self.since[lanes, None]) & (readers != self.marks[lanes, None])):
            raise Race("a write to shared memory that another warp read, with no barrier since")

    # --- asynchronous copies -----------------------------------------------------------------------------------------

    def copy(self, lanes: np.ndarray, units: np.ndarray, data: np.ndarray) -> None:
        self.reserve(lanes, units)
        self.copies.append(Copies(lanes, units, data, self.groups[lanes]))

    def reserve(self, lanes: np.ndarray, units: np.ndarray) -> None:
        """For data that comes later: until then nobody may touch these units."""
        self._check_write(lanes, units, None)
        self.writers[units] = PENDING

    def require_fence(self, lanes: np.ndarray, units: np.ndarray) -> None:
        """Before asynchronous accesses to [lanes, ...] units."""
        readers, warps = lanes[:, None] // 32, self.proxies.warps
        writers = np.maximum(self.writers[units], 0) % MARKS % warps  # of a box: no matter which
        writers = writers + readers // warps * warps
        self.proxies.require(units, writers, np.broadcast_to(readers, units.shape))

    def settle(self, lane: int, units: np.ndarray, data: np.ndarray) -> None:
        """The box that they were reserved for. Until the next barrier of this lane's program only warps that waited
        for it may use it."""
        self.data[units], self.writers[units] = data, self.since[lane] + np.int32(MARKS - 1)
        self.waited[units], self.proxies.written[units] = 0, 0

    def note_wait(self, lanes: np.ndarray, units: np.ndarray) -> None:
        """Of warps of one program, all lanes of each, for a box."""
        warps, counts = np.unique(self.warps[lanes], return_counts=True)
        self.waited[units] |= (np.int64(1) << warps[counts == 32].astype(np.int64)).sum()

    def commit(self, lanes: np.ndarray) -> None:
        self.groups[lanes] += 1

    def wait(self, lanes: np.ndarray, pending: int) -> None:
        """All groups of these lanes but for the latest `pending` are delivered."""
        delivered = np.zeros(len(self.groups), np.int32)
        delivered[lanes] = self.groups[lanes] - pending
        left = []
        for copies in self.copies:
            done = copies.group < delivered[copies.lanes]
            self._deliver(copies.where(done))
            if not np.all(done):
                left.append(copies.where(~done))
        self.copies = left

    def is_pending(self) -> bool:
        return any(len(copies.lanes) for copies in self.copies)

    def _deliver(self, copies: Copies) -> None:
        self.data[copies.units] = copies.data
        self.writers[copies.units] = self.marks[copies.lanes, None]
        self.proxies.write(copies.units)

    # --- asynchronous products ---------------------------------------------------------------------------------------

    def load_for_product(self, lanes: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Of the first lanes of warpgroups: what their four warps have to see without a barrier between."""
        writers = self.writers[units]
        wrong = (writers < 0) | self._is_unknown(lanes, units, None, warps=4)
        if np.any(wrong):
            _explain_read(writers[wrong])
        for warp in range(4):
            self.require_fence(lanes + 32 * warp, units)
        return self.data[units]

    def hold(self, units: np.ndarray) -> None:
        """Nobody may write there until they are released."""
        self.readers[units] = UNDER_WAY

    def release(self, lanes: np.ndarray, units: np.ndarray) -> None:
        self.readers[units] = self.since[lanes, None] + np.int32(MARKS - 1)

    # --- mbarriers ---------------------------------------------------------------------------------------------------

    def place_barrier(self, lane: int, address: int) -> np.ndarray:
        """[1, units] of eight bytes that nobody may read or write until they are freed."""
        lanes = np.array([lane])
        units = self.units_of(lanes, np.array([address], np.uint32), 8)
        self._check_write(lanes, units, None)
        self.writers[units] = BARRIER
        return units

    def free_barrier(self, lane: int, units: np.ndarray) -> None:
        lanes = np.array([lane])
        self._check_readers(lanes, units)
        self.writers[units] = NEVER
        self.note_read(lanes, units)  # others may write there after a barrier


def _explain_read(writers: np.ndarray) -> None:
    """writers: those that make it wrong."""
    if np.any(writers == BARRIER):
        raise Race("a read of shared memory where an mbarrier lies")
    if np.any(writers == PENDING):
        raise NotWaited("shared memory is read while an asynchronous copy to it is under way")
    if np.any(writers == NEVER):
        raise Uninitialized("shared memory is read that nobody wrote")
    if np.any(writers % MARKS == MARKS - 1):
        raise NotWaited("a warp that did not wait for a box reads it, with no barrier since others waited")
    raise Race("a read of shared memory that another warp wrote, with no barrier since")
