"""What the environment decides: its variables, packages and devices that are missing, and what an import does."""

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import UnsupportedError, dispatch
from fastattn.backends import triton as gpu
from fastattn.dispatch import KERNELS, refuse
from fastattn.problem import Problem

ROOT = Path(fastattn.__file__).parents[1]
PROBLEM = Problem("cuda", "float32", 2, 3, 5, 4, 2, 8, 6)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_environment_names_the_backend_in_every_thread():
    code = """
import threading, torch, fastattn
q = torch.randn(1, 1, 2, 8)
def run():
    fastattn.attention(q, q, q)
    print(fastattn.last_call().kernel)
    with fastattn.use(None):
        fastattn.explain(q, q, q)
run()
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    result = python(code, FASTATTN_BACKEND="reference")
    assert result.stdout.split() == ["reference", "reference"], result.stderr


def test_environment_with_an_unknown_backend():
    result = python("import fastattn", FASTATTN_BACKEND="tpu")
    assert result.returncode == 1
    assert "ValueError: FASTATTN_BACKEND='tpu' is not a backend; choose one of cpu, triton, reference" in result.stderr


@pytest.mark.parametrize(
    "installed, cuda, reason",
    [
        ("", False, "Triton is not installed (pip install triton)"),
        ("", True, "Triton is not installed (pip install triton)"),
        ("3.6.1", True, "Triton 3.6.1 is too old"),
        ("3.7.0", False, "there is no CUDA or ROCm device (with TRITON_INTERPRET=1, Triton interprets calls"),
        ("3.10.0", True, None),
    ],
)  # fmt: skip
def test_the_triton_rows_say_what_is_missing(installed, cuda, reason, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(gpu, "_version", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    dispatch._answer.cache_clear()
    try:
        rows = [row for row in KERNELS if row.backend == "triton"]
        refusals = {row.name: refuse(row, PROBLEM)[:1] for row in rows}
    finally:
        dispatch._answer.cache_clear()
    if reason is None:
        assert gpu.unavailable() is None and refusals["triton.prefill"] == []
    else:
        assert rows and all(reason in refusal[0] for refusal in refusals.values())


@pytest.mark.skipif(gpu.unavailable() is None, reason="the Triton kernels can run here")
def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(UnsupportedError) as caught:
        fastattn.attention(*(torch.randn(1, 2, 4, 8) for _ in range(3)), backend="triton")
    assert gpu.unavailable() in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreter_takes_cpu_tensors():
    """For people who debug kernels; triton is imported by the first call, not with the package."""
    code = """
import sys, torch, fastattn
print("triton" in sys.modules)
q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
out = fastattn.attention(q, k, v, causal=True)
print(fastattn.last_call().kernel)
dq, = torch.autograd.grad(out.sum(), q)
print(fastattn.last_call().kernel)
expected = fastattn.attention(q, k, v, causal=True, backend="reference")
torch.testing.assert_close(out, expected)
torch.testing.assert_close(dq, torch.autograd.grad(expected.sum(), q)[0])
print("triton" in sys.modules)
"""
    result = python(code, FASTATTN_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.stdout.split() == ["False", "triton.prefill", "triton.backward", "True"], result.stderr


def test_import_stays_light():
    """No optional package is imported, and CUDA is left alone."""
    code = """
import sys, torch
before = set(sys.modules)
import fastattn
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(new & {"triton", "transformers", "diffusers", "timm", "onnx", "onnxruntime", "numpy", "matplotlib"}))
print(torch.cuda.is_initialized())
"""
    result = python(code, FASTATTN_BACKEND="")
    assert result.stdout.splitlines() == ["", "False"], result.stderr


def test_public_names():
    assert all(hasattr(fastattn, name) for name in fastattn.__all__) and fastattn.__all__ == sorted(fastattn.__all__)


# --- which Triton there is -------------------------------------------------------------------------------------------


@pytest.fixture
def other_distribution(monkeypatch):
    """Triton as torch for ROCm brings it; returns a function that gives it a version, or an import that fails."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def install(version=None, error=None):
        module = types.ModuleType("triton")
        if version:
            module.__version__ = version
        import_module = importlib.import_module

        def find(name):
            if name == "triton" and error:
                raise error
            return module if name == "triton" else import_module(name)

        monkeypatch.setattr(importlib, "import_module", find)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    dispatch.forget()
    yield install
    monkeypatch.undo()
    dispatch.forget()


def test_triton_of_another_distribution(other_distribution, monkeypatch):
    """Its own version counts, where the distribution's name is not the module's."""
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    for version in ("3.7.0", "3.9.0+git1f2e3d", "4.0rc1"):
        other_distribution(version)
        assert gpu.unavailable() is None
    other_distribution("3.6.0+rocm")
    assert "Triton 3.6.0+rocm is too old" in gpu.unavailable()
    other_distribution()
    assert "too old" in gpu.unavailable()  # a folder named triton
    other_distribution(error=OSError("libtriton.so: no such file"))
    assert "cannot be imported: OSError: libtriton.so" in gpu.unavailable()
    assert "refused: Triton cannot be imported" in fastattn.explain(*torch.zeros(3, 1, 2, 4, 8))
