"""Times of several contenders, measured in turn, and the FMA peak beside them: for `bench`, and for bench/ too."""

import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from ..backends import cpu

fma_rate = getattr(cpu._C, "fma_rate", None)  # None without compiled kernels: no peak, shares are left empty

MIN_ROUNDS, MAX_ROUNDS = 5, 100
BURST = 0.02
"""Seconds that one contender runs at a stretch: short calls are repeated, so that cold caches do not decide."""


class Contender(NamedTuple):
    """A call of no arguments and the number of threads that it runs on."""

    run: Callable
    threads: int


def in_turn(contenders: dict[str, Contender], budget: float) -> dict[str, list[float]]:
    """Seconds of single calls by contender, of all `rounds`."""
    return {name: [x for each in bursts for x in each] for name, bursts in rounds(contenders, budget).items()}


def rounds(contenders: dict[str, Contender], budget: float) -> dict[str, list[list[float]]]:
    """Seconds of single calls by contender and round, for about `budget` seconds, five rounds at least; all are kept.

    The clock and the neighbours of a machine change within seconds: in turn, they change for everybody, and in another
    random order in each round (the same ones in every run), nobody always comes after the same neighbour.
    """
    estimate = {name: min(_burst(contender, 2)) for name, contender in contenders.items()}
    calls = {name: max(1, min(200, int(BURST / max(seconds, 1e-7)))) for name, seconds in estimate.items()}
    count = int(budget / sum(estimate[name] * calls[name] for name in contenders))
    times = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    for _ in range(max(MIN_ROUNDS, min(MAX_ROUNDS, count))):
        shuffle(order)
        for name in order:
            times[name].append(_burst(contenders[name], calls[name]))
    return times


def _burst(contender: Contender, calls: int) -> list[float]:
    if torch.get_num_threads() != contender.threads:
        torch.set_num_threads(contender.threads)
    times, collect = [], gc.isenabled()
    gc.disable()
    for _ in range(calls):
        start = time.perf_counter()
        contender.run()
        times.append(time.perf_counter() - start)
    if collect:
        gc.enable()
    return times


class Peak:
    """FLOP/s of a loop of multiply-adds, read just before and just after what it is compared with.

    A loop that does not reach the peak, or is disturbed, would flatter every share; so a reading is the best of several
    short ones, which fit between disturbances, and stands beside the rate of torch.matmul, which no true peak is below.
    `readings` keeps all by (dtype, threads): their spread says how steady the machine was.
    """

    def __init__(self, seconds: float = 0.005):
        self.seconds = seconds
        self.readings: dict[tuple[str, int], list[float]] = {}

    def read(self, dtype: str, threads: int) -> None:
        """Take a reading; nothing without the compiled extension."""
        if fma_rate is not None:
            rates = [fma_rate(_compute(dtype), self.seconds, threads) for _ in range(8)]
            self.readings.setdefault((_compute(dtype), threads), []).append(max(rates))

    def near(self, dtype: str, threads: int) -> tuple[float | None, str | None]:
        """(best of the last three readings, why not to believe it); (None, None) without readings."""
        readings = self.readings.get((_compute(dtype), threads), [])[-3:]
        if not readings:
            return None, None
        matmul = matmul_rate(_compute(dtype), threads)
        if matmul > max(readings):
            return (
                None,
                f"no share: torch.matmul ({matmul / 1e9:.0f} GFLOP/s) beats the FMA loop ({max(readings) / 1e9:.0f})",
            )
        return max(readings), None

    def taken(self) -> dict[tuple[str, int], int]:
        """How many readings there are so far: what `since` counts from."""
        return {key: len(rates) for key, rates in self.readings.items()}

    def since(self, taken: dict[tuple[str, int], int]) -> dict[tuple[str, int], float]:
        """The lowest of the readings taken since then."""
        new = {key: rates[taken.get(key, 0) :] for key, rates in self.readings.items()}
        return {key: min(rates) for key, rates in new.items() if rates}

    def steadiness(self, lowest: dict[tuple[str, int], float]) -> float:
        """The worst of some lowest readings, as a share of the highest reading of the run; 1 without any."""
        return min((rate / max(self.readings[key]) for key, rate in lowest.items()), default=1.0)

    def spread(self) -> dict[str, tuple[float, float, int]]:
        """(lowest, highest, how many) readings in GFLOP/s, by "dtype x threads"."""
        return {
            f"{dtype} x {threads}": (min(rates) / 1e9, max(rates) / 1e9, len(rates))
            for (dtype, threads), rates in self.readings.items()
        }


@cache
def peak_by_isa() -> dict[str, float]:
    """GFLOP/s of float32 multiply-adds on one thread, by instruction set: of those that are built and run here.

    Each in a process of its own, because the choice is made once. Peers choose theirs without asking us.
    """
    code = "from fastattn._C import fma_rate; print(max(fma_rate('float32', 0.005, 1) for _ in range(8)) / 1e9)"
    path, rates = os.pathsep.join(filter(None, sys.path)), {}
    for isa in ("avx512", "avx2", "neon", "scalar"):
        environment = os.environ | {"PYTHONPATH": path, "FASTATTN_CPU_ISA": isa}
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        if child.returncode == 0:
            rates[isa] = float(child.stdout)
    return rates


def multiplies_pairs(isa: str | None) -> bool:
    """Whether products are of pairs of bfloat16 there, which may be above float32's peak."""
    return isa is not None and isa.endswith("_bf16")


def matmul_rate(dtype: str, threads: int, size: int = 512) -> float:
    """FLOP/s of torch.matmul on square matrices, best of five."""
    a = torch.ones(size, size, dtype=getattr(torch, dtype))
    return 2 * size**3 / min(_burst(Contender(lambda: a @ a, threads), 5))


def _compute(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"  # 16-bit inputs are computed in float32
