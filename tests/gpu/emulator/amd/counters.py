"""What a wave has asked memory for and not waited for."""

import numpy as np

from ..faults import NotWaited

KINDS = ("vector", "local", "scalar", "stores")
"""Loads of vector registers, which come in order; accesses to LDS, in order too; loads of scalar registers, in any
order; stores, which are counted among the first where the architecture has no counter for them."""


SCALARS = 1024
"""Number of s0 among all registers; a0 has 256, v0 and the others their own."""


def name_of(register: int) -> str:
    if register >= SCALARS:
        return f"s{register - SCALARS}"
    return f"a{register - 256}" if register >= 256 else f"v{register}"


class Counters:
    """For each kind how many accesses each wave asked for, and of how many it knows that they are done."""

    def __init__(self, waves: int, has_store_counter: bool):
        self.issued = {kind: np.zeros(waves, np.int32) for kind in KINDS}
        self.done = {kind: np.zeros(waves, np.int32) for kind in KINDS}
        self.has_store_counter = has_store_counter
        self.waves: np.ndarray | None = None
        self.touched = np.zeros(waves, np.int32)
        self._pending: dict[int, dict[str, np.ndarray]] = {}

    def issue(self, kind: str) -> None:
        """By the waves that run."""
        if kind == "stores" and not self.has_store_counter:
            kind = "vector"
        self.issued[kind] = self.issued[kind] + (1 if self.waves is None else self.waves)

    def expect(self, kind: str, register: int) -> None:
        """The latest access brings a register."""
        kinds, now = self._pending.setdefault(register, {}), self.issued[kind]
        kinds[kind] = now if self.waves is None else np.where(self.waves, now, kinds.get(kind, 0))

    def touch_memory(self) -> None:
        """The latest access to LDS is one to its memory, and not only an exchange among lanes."""
        now = self.issued["local"]
        self.touched = now if self.waves is None else np.where(self.waves, now, self.touched)

    def wait(self, kind: str, left: int) -> None:
        """Until at most so many are not done. Of scalar loads, any may be the ones that are left."""
        if kind == "scalar" and left:
            return
        done = np.maximum(self.done[kind], self.issued[kind] - left)
        self.done[kind] = done if self.waves is None else np.where(self.waves, done, self.done[kind])

    def check(self, register: int, by: str = "") -> None:
        """That a register is there in the waves that run, or brought before what another access of that kind brings."""
        kinds = self._pending.get(register)
        if kinds is None:
            return
        for kind in [kind for kind in kinds if kind != by or kind == "scalar"]:
            late = kinds[kind] > self.done[kind]
            if self._is_any(late):
                raise NotWaited(f"{name_of(register)} is used while a load to it is under way")
            if not np.any(late):
                del kinds[kind]
        if not kinds:
            del self._pending[register]

    def check_barrier(self) -> None:
        if self._is_any(self.touched > self.done["local"]):
            raise NotWaited("a barrier before an access to LDS that nobody waited for")

    def _is_any(self, waves: np.ndarray) -> bool:
        """Among those that run."""
        return bool(np.any(waves if self.waves is None else waves & self.waves))
