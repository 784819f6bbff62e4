"""What this machine and this process are, read from /proc and /sys and never tuned; None where it cannot be read."""

import importlib.metadata
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

from ..backends import cpu

ENVIRONMENT = re.compile("(FASTATTN|OMP|GOMP|KMP|MKL|TORCHINDUCTOR|ORT)_")
"""Variables that change what is measured."""

CPU0 = Path("/sys/devices/system/cpu/cpu0")


def facts() -> dict:
    """Everything that a reader of a benchmark needs in order to judge or repeat it, as plain JSON values."""
    return {
        "cpu": cpu_model(),
        "microcode": _in_cpuinfo("microcode"),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "cgroup_cores": cgroup_cores(),
        "threads_per_core": _threads_per_core(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
        "caches": caches(),
        "governor": _text(CPU0 / "cpufreq/scaling_governor"),
        "boost": _boost(),
        "transparent_hugepages": _chosen(_text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))),
        "hypervisor": "hypervisor" in (_in_cpuinfo("flags") or "").split() if _in_cpuinfo("flags") else None,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "steal_ticks": steal_ticks(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "openmp": openmp_name(),
        "fastattn": version_of("fastattn"),
        "isa": None if cpu.unusable() else cpu.isa(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if ENVIRONMENT.match(name)},
    }


def cpu_model() -> str:
    """Its name, or that of its architecture."""
    return _in_cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str] | None:
    """Those of the kernel's list that matter to attention."""
    flags = (_in_cpuinfo("flags") or _in_cpuinfo("Features") or "").split()
    known = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")
    return [name for name in known if name in flags] if flags else None


def usable_cores() -> int | None:
    """How many the affinity of this process leaves."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def cgroup_cores() -> float | None:
    """The quota of the container, in cores; None without one."""
    quota = (_text(Path("/sys/fs/cgroup/cpu.max")) or "max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return int(quota[0]) / int(quota[1])
    quota, period = (_text(Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def caches() -> dict[str, int] | None:
    """Bytes of the data caches that the first core sees, by "L1", "L2", ..."""
    found = {}
    for index in sorted(CPU0.glob("cache/index*")):
        size = re.fullmatch(r"(\d+)([KM])", _text(index / "size") or "")
        if size and _text(index / "type") != "Instruction":
            found[f"L{_text(index / 'level')}"] = int(size[1]) << {"K": 10, "M": 20}[size[2]]
    return found or None


def steal_ticks() -> int | None:
    """Time that the hypervisor gave to others, in ticks, of all cores since the start."""
    fields = (_text(Path("/proc/stat")) or "").split("\n")[0].split()
    return int(fields[8]) if len(fields) > 8 else None


class Others:
    """How many cores other processes have kept busy since this was made; those that this one started and that have
    ended do not count."""

    def __init__(self):
        self._start = self._seconds(), time.monotonic()

    def cores(self) -> float | None:
        """None where /proc/stat cannot be read."""
        (seconds, since), now = self._start, self._seconds()
        if seconds is None or now is None:
            return None
        return max(0.0, now - seconds) / max(time.monotonic() - since, 1e-3)

    @staticmethod
    def _seconds() -> float | None:
        fields = (_text(Path("/proc/stat")) or "").split("\n")[0].split()
        if len(fields) < 9:
            return None
        user, nice, system, _, _, irq, softirq = map(int, fields[1:8])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def openmp_name() -> str | None:
    """The file name of torch's OpenMP runtime."""
    return Path(cpu.openmp()).name if cpu.openmp() else None


def openmp_runtimes() -> list[str]:
    """Every OpenMP runtime that this process has loaded: more than one is trouble."""
    names = {line.split()[-1] for line in (_text(Path("/proc/self/maps")) or "").split("\n") if line}
    return sorted(name for name in names if re.search(r"/lib(g|i|)omp(5)?[-.\w]*\.so", name))


def version_of(package: str) -> str | None:
    """What is installed of it."""
    if package == "fastattn":  # a checkout on the path has no metadata
        return sys.modules["fastattn"].__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _threads_per_core() -> int | None:
    siblings = _text(CPU0 / "topology/thread_siblings_list")
    if not siblings:
        return None
    ends = [[int(end) for end in part.split("-")] for part in siblings.split(",")]
    return sum(part[-1] - part[0] + 1 for part in ends)


def _boost() -> bool | None:
    if boost := _text(Path("/sys/devices/system/cpu/cpufreq/boost")):
        return boost == "1"
    no_turbo = _text(Path("/sys/devices/system/cpu/intel_pstate/no_turbo"))
    return no_turbo == "0" if no_turbo else None


def _chosen(text: str | None) -> str | None:
    match = re.search(r"\[(\w+)\]", text or "")
    return match and match[1]


def _in_cpuinfo(name: str) -> str | None:
    match = re.search(rf"^{name}\s*: (.*)", _text(Path("/proc/cpuinfo")) or "", re.M)
    return match and match[1]


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
