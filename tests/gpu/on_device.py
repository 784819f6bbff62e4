"""Calls of the Triton kernels, interpreted or on a GPU, compared with the reference in float64."""

import dataclasses

import pytest
import torch

import backward
import fastattn
import isas
import process
from accuracy import assert_accuracy, plain
from cases import Case, inputs
from fastattn import BlockMask, Mask, dispatch
from fastattn.relative import RelativeBias, toeplitz

DEVICE = "cpu" if process.INTERPRETED else "cuda"


def to(device: str, x):
    if isinstance(x, Mask):
        k_start, k_end = (bound if bound is None else bound.to(device) for bound in (x.k_start, x.k_end))
        return dataclasses.replace(x, k_start=k_start, k_end=k_end)
    if isinstance(x, RelativeBias):
        return toeplitz(x.vector.to(device))
    return x.to(device) if isinstance(x, (torch.Tensor, BlockMask)) else x


def on_device(case: Case) -> tuple[list, dict]:
    qkv, kwargs = inputs(case)
    return [to(DEVICE, x) for x in qkv], {name: to(DEVICE, x) for name, x in kwargs.items()}


def assert_forward(row: dispatch.Row, case: Case) -> None:
    """One row on one case."""
    (q, k, v), kwargs = on_device(case)
    with isas.only(row):
        out, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=row.backend)
    assert fastattn.last_call().kernel == row.name
    (q, k, v), kwargs = inputs(case)
    assert_accuracy((out.cpu(), lse.cpu()), q, k, v, **kwargs)


def assert_backward(case: Case) -> None:
    """By the rule of tests/parity/test_backward.py, whose gradients of "cpu" come from the Triton kernels here."""
    gradients = backward.gradients

    def on_device_or_reference(q, k, v, kwargs, dout, dlse=None, backend="cpu", of_scores=False):
        if backend != "cpu":
            with plain(q.dtype):
                return gradients(q, k, v, kwargs, dout, dlse, backend, of_scores)
        kwargs = {name: to(DEVICE, x) for name, x in kwargs.items()}
        q, k, v, dout, dlse = (to(DEVICE, x) for x in (q, k, v, dout, dlse))
        found = gradients(q, k, v, kwargs, dout, dlse, "triton", of_scores)
        assert (
            fastattn.last_call().kernel.startswith("triton.") and fastattn.last_call().problem.direction == "backward"
        )
        return {name: x.cpu() for name, x in found.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "gradients", on_device_or_reference)
        backward.assert_parity(case, of_scores=True)
