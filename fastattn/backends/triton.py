"""The rows of the Triton kernels, which are imported, Triton with them, when the first one runs and not before.

Signatures: `fastattn.kernel_table.Row`.
"""

import importlib.metadata
import importlib.util
import os
import re
from functools import cache
from types import ModuleType

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton will run CPU tensors in its interpreter: for debugging kernels, slowly."""

CHECK = os.environ.get("FASTATTN_CHECK") == "1"
"""Whether a call checks what its block mask holds, on the host, which waits for the device. Without it, kernels clamp
every index that they read, so that none leaves its tensor; a mask that was changed since it was made gives nonsense."""

FEW_QUERIES, MOST_QUERIES = 16, 256
"""Of how many queries a call always has split keys, and of how many where prefill would leave multiprocessors idle."""

OLDEST = (3, 7)


def unavailable() -> str | None:
    """None if Triton kernels can run here, else why not. What a device cannot do shows at its first call."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = _version()
    except Exception as error:  # of an import: of any type
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    if tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < OLDEST:
        return f"Triton {version} is too old: these kernels take 3.7 and later (pip install -U triton)"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA or ROCm device (with TRITON_INTERPRET=1, Triton interprets calls on CPU tensors)"
    return None


def _version() -> str:
    """Triton's, without an import of it where its distribution has its name: those for ROCm and Windows have others."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return getattr(importlib.import_module("triton"), "__version__", "0")  # "0": of a folder that is no package


@cache
def _kernel(name: str) -> ModuleType:
    return importlib.import_module(f"fastattn.kernels.{name}")


postponed: dict[tuple, list] = {}
"""(kernel, problem) -> compiled code that was first launched where nothing could be looked at (`selfcheck`)."""


def declines(problem) -> str | None:
    """None if `decode` serves a call of at most MOST_QUERIES better than `prefill` on its device, else why."""
    if problem.seqlen_q <= FEW_QUERIES:
        return None
    return _kernel("decode").declines(problem, _kernel("launch").device_facts(problem.device_index))


def decode(problem, q, k, v, terms, *cache):
    """Forward pass of few queries; cache: block_table, k_scale, v_scale of `kernels.decode.Cache`."""
    _check(terms.block_mask)
    decode, before = _kernel("decode"), _loaded()
    held = (decode.Cache(*cache),) if cache else ()
    found = _launched("decode", before, decode.forward, problem, q, k, v, terms, *held)
    if _loaded() != before or postponed:
        _selfcheck().forward("decode", before, problem, (q, k, v), terms, found, cache)
    return found


def prefill(problem, q, k, v, terms):
    """Forward pass."""
    _check(terms.block_mask)
    before = _loaded()
    found = _launched("prefill", before, _kernel("prefill").forward, problem, q, k, v, terms)
    if _loaded() != before or postponed:
        _selfcheck().forward("prefill", before, problem, (q, k, v), terms, found)
    return found


def prefill_for_backward(problem, q, k, v, terms):
    """(out, lse or None, (out in float32, lse_parts))."""
    _check(terms.block_mask)
    before, forward = _loaded(), _kernel("prefill").forward_for_backward
    out, lse, saved = _launched("prefill", before, forward, problem, q, k, v, terms)
    if _loaded() != before or postponed:
        _selfcheck().forward("prefill", before, problem, (q, k, v), terms, (out, lse, *saved))
    return out, lse, saved


def backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients."""
    _check(None if terms.block_mask is None else terms.block_mask.transpose())
    before, call = _loaded(), (problem, q, k, v, terms, saved, dout, dlse, wanted)
    found = _launched("backward", before, _kernel("backward").backward, *call)
    if _loaded() != before or postponed:
        _selfcheck().backward(before, problem, (q, k, v), terms, saved, dout, dlse, found[:3], any(wanted[3]))
    return found


def _loaded() -> int:
    """How many pieces of code have been loaded: where a call adds one, its results are checked."""
    return _kernel("launch").loaded()


def _launched(name: str, before: int, function, *call):
    """What the function of a kernel returns. KernelError if code that it has loaded cannot be launched."""
    try:
        return function(*call)
    except Exception as error:  # of Triton's launcher or a driver: of any type
        from ..dispatch import KernelError  # which imports this module

        launch = _kernel("launch")
        if code := launch.loaded_since(before):
            launch.drop(code)  # another kind of call that would run it loads it anew, and is checked
        is_known = isinstance(error, (KernelError, torch.cuda.OutOfMemoryError))
        if is_known or not code or launch.is_capturing():
            raise
        raise KernelError(f"{name}: {type(error).__name__}: {error}".splitlines()[0]) from error


@cache
def _selfcheck() -> ModuleType:
    return importlib.import_module("fastattn.backends.selfcheck")


def _check(block_mask) -> None:
    """With FASTATTN_CHECK=1, ValueError that names the list and the entry if `block_mask` no longer is what it was."""
    if CHECK and block_mask is not None:
        from ..masks.block_checks import check_mask

        check_mask(block_mask)
