"""Tiles that were measured: read from a file of the user's cache, written there with FASTATTN_AUTOTUNE=1.

A measurement stands for all calls with the same kernel, dtype, head dims and kind of scores; lengths are no part of it,
so tune with lengths that matter to you (`python -m fastattn warmup`). Without a file, `config` decides.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import torch
import triton

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
    """Where the files are: FASTATTN_TUNED, or fastattn/tuned in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FASTATTN_TUNED") or cache / "fastattn" / "tuned")


def file_of(device: Device) -> Path:
    """One for each kind of device and version of Triton, whose code the measured times are of."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name or device.arch).strip("-")
    return directory() / f"{name}-triton-{triton.__version__}.json"


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
    terms = [name for name in ("alibi", "softcap", "dropout", "learned_scale") if getattr(problem, name)]
    terms += [] if problem.bias == "none" else ["bias"]
    terms += [f"{problem.group_size}x{problem.seqlen_q} rows"] if kernel == "decode" else []
    dims = f"D{problem.head_dim}" + (f"/{problem.head_dim_v}" if problem.head_dim_v != problem.head_dim else "")
    return " ".join([kernel, problem.dtype, dims, problem.mask, *terms])


def is_wanted(kernel: str, problem, device: Device) -> bool:
    """Whether FASTATTN_AUTOTUNE=1 asks for a measurement that is not there yet."""
    return os.environ.get("FASTATTN_AUTOTUNE") == "1" and name_of(kernel, problem) not in _read(file_of(device))


def tune(
    kernel: str, problem, device: Device, launch_with: Callable[[Config], Callable], results: list, measure=None
) -> Config:
    """Time every candidate whose results are those of the table's tiles, remember the best.

    launch_with(tiles) compiles and returns a function that launches, which writes the tensors `results`.
    """
    measure = measure or triton.testing.do_bench
    first, *others = candidates(kernel, problem, device)

    def launched(candidate: Config) -> Callable:
        launch = launch_with(candidate)
        for result in results:  # what a launch leaves out is not what another one wrote
            result.fill_(float("nan"))
        launch()
        return launch

    launch = launched(first)  # tiles of the table have to work
    expected = [x.clone() for x in results]
    times = {first: measure(launch)}
    for candidate in others:
        try:
            launch = launched(candidate)
            if all(map(_agree, results, expected)):
                times[candidate] = measure(launch)
        except Exception:  # too much shared memory, or whatever the compiler and the driver raise
            continue
    best = min(times, key=times.get)
    _write(file_of(device), name_of(kernel, problem), best)
    return best


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results differ by rounding alone, as far as a fast wrong kernel has to be told from a right one. NaN
    has to be where NaN is."""
    if found.is_meta:  # compiled for a device that is not there
        return True
    if not torch.equal(found.isnan(), expected.isnan()):
        return False
    tolerance = 1e-3 if found.dtype == torch.float32 else 2e-2
    found, expected = (torch.nan_to_num(x.double(), posinf=1e30, neginf=-1e30) for x in (found, expected))
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max()) if found.numel() else True


def candidates(kernel: str, problem, device: Device) -> Iterator[Config]:
    """The table's choice first, then its neighbours; tiles that other kernels rely on stay."""
    first = TABLES[kernel](problem, device)
    yield first
    block_ms = (64, 128) if kernel in ("prefill", "query") else (first.BLOCK_M,)
    block_ns = (32, 64, 128) if kernel != "decode" else (first.BLOCK_N,)
    warps = (4, 8) if kernel != "decode" else (2, 4, 8)
    for block_m, block_n, num_warps, num_stages in product(block_ms, block_ns, warps, (1, 2, 3, 4)):
        tiles = Config(block_m, block_n, num_warps, num_stages, first.waves_per_eu)
        for candidate in _variants(kernel, tiles, problem, device):
            if candidate != first and config.shared_memory(candidate, problem) <= device.smem:
                yield candidate


def _variants(kernel: str, tiles: Config, problem, device: Device) -> Iterator[Config]:
    """`tiles`, and what else some devices can make of them."""
    yield tiles
    if device.arch in config.WITH_KPACK:
        yield tiles._replace(kpack=2)
    if kernel == "prefill" and config.can_specialize(tiles, problem, device):
        yield tiles._replace(specialize=True)


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
