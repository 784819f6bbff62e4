"""Triton decides when it is imported whether kernels are interpreted or compiled: tests of the two need two processes.

`make test-triton` starts both. In any other process their modules skip and say why.
"""

import importlib.util
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def require(interpreted: bool) -> None:
    """Skip the module that calls this, before it imports triton, where it cannot run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip('triton is not installed: pip install "fastattn[triton]"', allow_module_level=True)
    if interpreted != INTERPRETED:
        wanted = "with TRITON_INTERPRET=1" if interpreted else "without TRITON_INTERPRET"
        pytest.skip(f"runs in a process {wanted}: make test-triton", allow_module_level=True)
