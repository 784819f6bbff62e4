"""Tiles that were measured: read from a file of the user's cache, written there with FASTATTN_AUTOTUNE=1.

A measurement stands for all calls with the same kernel, dtype, head dims and kind of scores; lengths are no part of it,
so tune with lengths that matter to you (`python -m fastattn warmup`). Without a file, `config` decides.
"""

import json
import os
import re
import warnings
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


NOWHERE = Path(os.devnull)
"""In place of a folder where there is none: no file can be in it."""


def directory() -> Path:
    """Where the files are: FASTATTN_TUNED, or fastattn/tuned in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    if folder := os.environ.get("FASTATTN_TUNED"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "fastattn" / "tuned"
    try:
        return Path.home() / ".cache" / "fastattn" / "tuned"
    except RuntimeError:  # the user has no home
        return NOWHERE


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
            if all(_agree(x, y, problem.dtype) for x, y in zip(results, expected, strict=True)):
                times[candidate] = measure(launch)
        except Exception:  # too much shared memory, or whatever the compiler and the driver raise
            continue
    best = min(times, key=times.get)
    _write(file_of(device), name_of(kernel, problem), best)
    return best


_FLOOR = 2.0**-9


def _agree(found: torch.Tensor, expected: torch.Tensor, dtype: str = "") -> bool:
    """Whether two results of a call in `dtype`, or in their own, differ by rounding alone, as far as a fast wrong
    kernel has to be told from a right one. NaN and infinities have to be where they are.

    Each row (the last dimension) goes by its own largest entry: late rows of a causal mask are means of many values, so
    small ones. _FLOOR of all rows' size is for those where everything cancels, such as dq of a query with one key.
    """
    if found.is_meta or not found.numel():  # meta: compiled for a device that is not there
        return True
    is_bfloat16 = "bfloat16" in (dtype or str(found.dtype))
    is_finite = expected.isfinite()
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    found, expected = (torch.where(is_finite, x.double(), 0.0) for x in (found, expected))
    largest, size = expected.abs().amax(-1, keepdim=True), expected.square().mean().sqrt()
    tolerance = (2e-2 if is_bfloat16 else 4e-3) * largest + _FLOOR * size
    return bool(torch.where(is_finite, (found - expected).abs() <= tolerance, is_same).all())


def candidates(kernel: str, problem, device: Device) -> Iterator[Config]:
    """The table's choice first, then its neighbours; tiles that other kernels rely on stay."""
    first = TABLES[kernel](problem, device)
    yield first
    block_ms = (64, 128) if kernel in ("prefill", "query") else (first.BLOCK_M,)
    if kernel == "key_value" and first.BLOCK_M < 64:  # 64 x 128 is FlexAttention's for head_dim 128
        block_ms = (64, first.BLOCK_M)  # never fewer: there is room for the bounds of as many blocks as the table's
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
    """What this process knows of a file."""
    return _parsed(path)


def _parsed(path: Path) -> dict[str, Config]:
    """What stands in a file; without entries that are none, of which a warning tells."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _warn(f"{path} cannot be read: {type(error).__name__}: {error}; delete it")
        return {}
    tiles = {name: _tiles_of(fields) for name, fields in found.items()} if isinstance(found, dict) else {"": None}
    if None in tiles.values():
        _warn(f"{path} has entries that are no tiles, which are passed over; delete it, or measure again")
    return {name: x for name, x in tiles.items() if x is not None}


_BLOCKS, _WARPS = {16, 32, 64, 128, 256}, {1, 2, 4, 8, 16}


def _tiles_of(fields) -> Config | None:
    """The Config of these fields, None if they are not those of one."""
    try:
        tiles = Config(**fields)
    except TypeError:  # no dictionary, or one of something else
        return None
    is_typed = all(type(x) is Config.__annotations__[name] for name, x in tiles._asdict().items())
    if not is_typed or {tiles.BLOCK_M, tiles.BLOCK_N} - _BLOCKS or tiles.num_warps not in _WARPS:
        return None
    return tiles if tiles.num_stages > 0 and tiles.kpack in (1, 2) else None


def _write(path: Path, name: str, best: Config) -> None:
    """Remember it, for this process alone where the file cannot be written."""
    known = _read(path)
    known.update(_parsed(path))  # another process may have written
    known[name] = best
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({key: value._asdict() for key, value in sorted(known.items())}, indent=1) + "\n")
        scratch.replace(path)
    except OSError as error:
        _warn(f"{path} cannot be written: {error}; measured tiles serve this process alone: FASTATTN_TUNED=folder")
    tiles.cache_clear()


@cache
def _warn(text: str) -> None:
    """Once in a process."""
    warnings.warn(text, RuntimeWarning, 2)
