"""The machine's own limits, measured in the same run as what is compared with them: multiply-adds, reading memory."""

import torch

from ..backends import cpu
from . import machine
from .timing import Peak, matmul_rate, peak_by_isa

LARGE = 256 << 20
"""Bytes that no cache holds."""


def threads_to_measure() -> list[int]:
    """One, and as many as torch runs on."""
    return list(dict.fromkeys((1, torch.get_num_threads())))


def measure(peak: Peak) -> dict:
    """Plain JSON values; None where the kernels are missing. GFLOP/s and GB/s.

    caches        bytes, by level
    fma           by dtype and threads: multiply-adds on registers, at what the instruction set in use can do
    fma_by_isa    float32, one thread
    dot16         peak of 16-bit dot products; None: not measured
    matmul        torch.matmul by dtype, one thread: what torch's own libraries reach
    read          by threads: plain loads in order of addresses, of the L2's size, the L3's, and of memory
    """
    threads = threads_to_measure()
    for dtype in ("float32", "float64"):
        for count in threads:
            peak.read(dtype, count)
    return {
        "caches": machine.caches() or {},
        "fma": {key: high for key, (_, high, _) in peak.spread().items()},
        "fma_by_isa": peak_by_isa(),
        "dot16": None,
        "matmul": {dtype: matmul_rate(dtype, 1) / 1e9 for dtype in ("float32", "bfloat16")},
        "read": {str(count): _read_rates(count) for count in threads},
    }


def _read_rates(threads: int) -> dict[str, float] | None:
    if cpu.unavailable():
        return None
    sizes = {name: size // 2 for name, size in (machine.caches() or {}).items() if name != "L1"}
    rates = {name: cpu._C.read_rate(size, max(3, (64 << 20) // size), threads) / 1e9 for name, size in sizes.items()}
    return rates | {"memory": cpu._C.read_rate(max(LARGE, 4 * max(sizes.values(), default=0)), 1, threads) / 1e9}
