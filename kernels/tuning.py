"""Tiles that were measured: read from tuned/<device>.json, written there with FASTATTN_AUTOTUNE=1.

A measurement stands for all calls with the same kernel, dtype, head dims and kind of scores; lengths are no part of it,
so tune with lengths that matter to you (`python -m fastattn warmup`). Without a file, `config` decides.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path

import triton
from triton.runtime.errors import OutOfResources

from . import config
from .config import Config, Device

TABLES = {
    "prefill": config.prefill,
    "decode": config.decode,
    "key_value": config.key_value,
    "query": config.query,
    "bias": config.bias,
}


def directory() -> Path:
    """Where the files are: FASTATTN_TUNED, or tuned/ in the package."""
    return Path(os.environ.get("FASTATTN_TUNED") or Path(__file__).absolute().parents[1] / "tuned")


def file_of(device: Device) -> Path:
    return directory() / (re.sub(r"[^A-Za-z0-9]+", "-", device.name or device.arch).strip("-") + ".json")


def tiles(kernel: str, problem, device: Device) -> Config:
    """The measured tiles of a kernel for such a problem, else those of the table. Of its lengths, only the number of
    queries matters, and only to decoding."""
    seqlen_q = problem.seqlen_q if kernel == "decode" else 0
    return _tiles_of_kind(kernel, problem._replace(batch=1, seqlen_q=seqlen_q, seqlen_k=0), device)


@lru_cache(maxsize=4096)
def _tiles_of_kind(kernel: str, problem, device: Device) -> Config:
    return _read(file_of(device)).get(name_of(kernel, problem)) or TABLES[kernel](problem, device)


tiles.cache_clear = _tiles_of_kind.cache_clear


def name_of(kernel: str, problem) -> str:
    """What a measurement stands for."""
    terms = [name for name in ("alibi", "softcap", "dropout") if getattr(problem, name)]
    terms += [] if problem.bias == "none" else ["bias"]
    dims = f"D{problem.head_dim}" + (f"/{problem.head_dim_v}" if problem.head_dim_v != problem.head_dim else "")
    return " ".join([kernel, problem.dtype, dims, problem.mask, *terms])


def is_wanted(kernel: str, problem, device: Device) -> bool:
    """Whether FASTATTN_AUTOTUNE=1 asks for a measurement that is not there yet."""
    return os.environ.get("FASTATTN_AUTOTUNE") == "1" and name_of(kernel, problem) not in _read(file_of(device))


def tune(kernel: str, problem, device: Device, launch_with: Callable[[Config], Callable], measure=None) -> Config:
    """Time every candidate, remember the best. launch_with(tiles) compiles and returns a function that launches."""
    measure = measure or triton.testing.do_bench
    times = {}
    for candidate in candidates(kernel, problem, device):
        try:
            times[candidate] = measure(launch_with(candidate))
        except OutOfResources:  # the estimate of shared memory was too low
            times[candidate] = math.inf
    best = min(times, key=times.get)
    _write(file_of(device), name_of(kernel, problem), best)
    return best


def candidates(kernel: str, problem, device: Device) -> Iterator[Config]:
    """The table's choice first, then its neighbours; tiles that other kernels rely on stay."""
    first = TABLES[kernel](problem, device)
    yield first
    block_ms = (64, 128) if kernel in ("prefill", "query") else (first.BLOCK_M,)
    block_ns = (32, 64, 128) if kernel != "decode" else (first.BLOCK_N,)
    for block_m in block_ms:
        for block_n in block_ns:
            for num_warps in (4, 8):
                for num_stages in (1, 2, 3, 4):
                    candidate = Config(block_m, block_n, num_warps, num_stages, first.waves_per_eu)
                    if candidate != first and config.shared_memory(candidate, problem) <= device.smem:
                        yield candidate


@cache
def _read(path: Path) -> dict[str, Config]:
    if not path.exists():
        return {}
    return {name: Config(**fields) for name, fields in json.loads(path.read_text()).items()}


def _write(path: Path, name: str, best: Config) -> None:
    _read.cache_clear()  # another process may have written
    found = {**_read(path), name: best}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({key: value._asdict() for key, value in sorted(found.items())}, indent=1) + "\n")
    scratch.replace(path)
    _read.cache_clear(), tiles.cache_clear()
