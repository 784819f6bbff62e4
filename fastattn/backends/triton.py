"""The rows of the Triton kernels, which are imported, Triton with them, when the first one runs and not before.

Signatures: `fastattn.kernel_table.Row`.
"""

import importlib.metadata
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton will run CPU tensors in its interpreter: for debugging kernels, slowly."""

CHECK = os.environ.get("FASTATTN_CHECK") == "1"
"""Whether a call checks what its block mask holds, on the host, which waits for the device. Without it, kernels clamp
every index that they read, so that none leaves its tensor; a mask that was changed since it was made gives nonsense."""


OLDEST = (3, 7)


def unavailable() -> str | None:
    """None if Triton kernels can run here, else why not. What a device cannot do shows at its first call."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    version = _version()
    if tuple(int(x) for x in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is too old: these kernels take 3.7 and later (pip install -U triton)"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA or ROCm device (with TRITON_INTERPRET=1, Triton interprets calls on CPU tensors)"
    return None


def _version() -> str:
    """Triton's, without an import of it."""
    return importlib.metadata.version("triton")


@cache
def _kernel(name: str) -> ModuleType:
    return importlib.import_module(f"fastattn.kernels.{name}")


def decode(problem, q, k, v, terms, *cache):
    """Forward pass of few queries; cache: block_table, k_scale, v_scale of `kernels.decode.Cache`."""
    decode = _kernel("decode")
    return decode.forward(problem, q, k, v, terms, *((decode.Cache(*cache),) if cache else ()))


def prefill(problem, q, k, v, terms):
    """Forward pass."""
    _check(terms.block_mask)
    return _kernel("prefill").forward(problem, q, k, v, terms)


def prefill_for_backward(problem, q, k, v, terms):
    """(out, lse or None, (out in float32, lse_parts))."""
    _check(terms.block_mask)
    return _kernel("prefill").forward_for_backward(problem, q, k, v, terms)


def backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients."""
    _check(None if terms.block_mask is None else terms.block_mask.transpose())
    return _kernel("backward").backward(problem, q, k, v, terms, saved, dout, dlse, wanted)


def _check(block_mask) -> None:
    """With FASTATTN_CHECK=1, ValueError that names the list and the entry if `block_mask` no longer is what it was."""
    if CHECK and block_mask is not None:
        from ..masks.block_checks import check_mask

        check_mask(block_mask)
