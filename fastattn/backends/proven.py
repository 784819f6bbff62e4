"""Which compiled code the self-check has found right: a file for each device, driver and version of Triton, beside the
files of measured tiles (`fastattn.kernels.tuning`).

Code is known by what it was compiled from: kernel, kinds of arguments, tiles and options, the sources of the kernels.
"""

import hashlib
import json
import os
import re
from functools import cache
from pathlib import Path

import torch

from ..kernels import tuning
from ..kernels.config import Device
from ..torch_internals import driver_version


def file_of(device: Device) -> Path:
    """Where the code of this device, driver and Triton is listed."""
    file = tuning.file_of(device)
    driver = re.sub(r"[^A-Za-z0-9.]+", "-", driver_version()).strip("-")
    return file.with_name(f"{file.stem}-driver-{driver}-proven.json")


def signatures(code: list[tuple]) -> dict[str, str]:
    """Hash -> what it is of, for keys of `kernels.launch._loaded`."""
    found = {}
    for kernel, _, kinds, constexprs, options in code:
        text = repr((kernel.__name__, kinds, constexprs, options, torch.__version__, _sources()))
        tiles = {name: value for name, value in (*constexprs, *options) if name.startswith(("BLOCK_", "num_"))}
        named = " ".join(f"{name}={value}" for name, value in tiles.items())
        found[hashlib.sha256(text.encode()).hexdigest()[:24]] = f"{kernel.__name__} {named}"
    return found


def read(device: Device) -> dict[str, str]:
    """Signatures that are proven; none where there is no file, or something else stands in it."""
    return _read(file_of(device))


def add(device: Device, signatures: dict[str, str]) -> None:
    """Remember them, for this process where the file cannot be written."""
    file = file_of(device)
    _read.cache_clear()  # another process may have written
    found = {**_read(file), **signatures}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        scratch.replace(file)
        _read.cache_clear()
    except OSError:
        _read(file).update(signatures)


@cache
def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    is_listed = isinstance(found, dict) and all(isinstance(x, str) for x in found.values())
    return found if is_listed else {}


@cache
def _sources() -> str:
    """A hash of the kernels and of what launches them."""
    found = hashlib.sha256()
    for path in sorted(Path(tuning.__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()
