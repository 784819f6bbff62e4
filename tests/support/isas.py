"""Instruction sets of this machine, and tests run on one of them in a process of their own."""

import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import fastattn
from fastattn import dispatch, plans
from fastattn.backends import cpu

ROOT = Path(fastattn.__file__).parents[1]


needs_cpu = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")


@contextmanager
def only(row: dispatch.Row):
    """The table has this row alone: a call runs on it or raises."""
    kernels = dispatch.KERNELS
    try:
        dispatch.KERNELS = (row,)
        plans.forget()
        yield
    finally:
        dispatch.KERNELS = kernels
        plans.forget()


def running_isa() -> str:
    """What this process runs on, as FASTATTN_CPU_ISA would name it."""
    return cpu._C.pair_isa() or cpu.isa()


def supported_isas() -> list[str]:
    """What this CPU can run and does by itself, best first, by the kernel's word and not by ours."""
    on_arm, flags = platform.machine() == "aarch64", set()
    if Path("/proc/cpuinfo").exists():
        heading = "Features" if on_arm else "flags"
        flags = set(Path("/proc/cpuinfo").read_text().partition(heading)[2].partition("\n")[0].split())
    if on_arm:
        return [*(["neon_bf16"] if "bf16" in flags else []), "neon", "scalar"]
    wanted = {"avx512_bf16": {"avx512f", "avx512_bf16", "sse4a"}}  # the last: of AMD's alone
    wanted |= {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2", "fma", "f16c"}}
    return [isa for isa, needed in wanted.items() if needed <= flags] + ["scalar"]


def run_tests_on(isa: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "FASTATTN_CPU_ISA": isa}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
