"""Triton decides when it is imported whether kernels are interpreted or compiled: tests of the two need two processes.

`make test-triton` starts both, `make test-gpu` one on a device. In any other process their modules skip and say why.
"""

import importlib.util
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def require(interpreted: bool) -> None:
    """Skip the module that calls this, before it imports triton, where it cannot run."""
    _require_triton()
    if interpreted != INTERPRETED:
        wanted = "with TRITON_INTERPRET=1" if interpreted else "without TRITON_INTERPRET"
        pytest.skip(f"runs in a process {wanted}: make test-triton", allow_module_level=True)


def require_runnable() -> None:
    """Skip the module where kernels neither run interpreted nor on a GPU."""
    import torch

    _require_triton()
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 (make test-triton) or a GPU (make test-gpu)", allow_module_level=True)


def require_gpu() -> None:
    """Skip the module where there is no GPU for what it tests."""
    import torch

    _require_triton()
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a GPU: make test-gpu", allow_module_level=True)


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip('triton is not installed: pip install "fastattn[triton]"', allow_module_level=True)
