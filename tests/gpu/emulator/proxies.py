"""Two ways to shared memory: ordinary instructions, and asynchronous ones (wgmma, TMA), which see what the former wrote
only if a fence (fence.proxy.async) lies between.

Time is a number that grows with each fence and barrier.
"""

import numpy as np

from .faults import Unfenced


class Proxies:
    """Of several programs with as many warps each; `warps` are numbers over all of them."""

    def __init__(self, units: int, programs: int, warps: int):
        self.now, self.warps = 1, warps
        self.written = np.zeros(units, np.int32)
        """When an ordinary instruction wrote each unit last; 0: what it holds came otherwise."""
        self.own = np.zeros(programs * warps, np.int32)
        """Up to when a warp's writes are fenced by itself,"""
        self.passed = np.zeros(programs * warps, np.int32)
        """so that all know it since a barrier,"""
        self.others = np.zeros(programs * warps, np.int32)
        """and up to when the writes of all are, as far as it knows."""
        self.met = np.zeros(programs * warps, np.int32)
        """When it came to a barrier last."""

    def write(self, units: np.ndarray) -> None:
        self.written[units] = self.now

    def fence(self, warps: np.ndarray) -> None:
        self.own[warps] = self.now
        self.others[warps] = self.met[warps]
        self.now += 1

    def barrier(self, programs: np.ndarray) -> None:
        """Programs, as a bool each."""
        chosen = np.repeat(programs, self.warps)
        self.met[chosen] = self.now
        known = self.others.reshape(-1, self.warps).max(1)
        self.others = np.where(chosen, np.repeat(known, self.warps), self.others)
        self.passed = np.where(chosen, self.own, self.passed)
        self.now += 1

    def require(self, units: np.ndarray, writers: np.ndarray, readers: np.ndarray) -> None:
        """A fence between the last writes to these units and asynchronous accesses of warps."""
        fenced = np.where(writers == readers, self.own[writers], self.passed[writers])
        if np.any(self.written[units] > np.maximum(fenced, self.others[readers])):
            raise Unfenced("an asynchronous access where others wrote, with no fence.proxy.async since")
