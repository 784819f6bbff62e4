"""The Triton kernels against the reference in float64, on what there is: the strict interpreter, or a GPU.

`make test-triton` interprets, `make test-gpu` runs the same on a device.
"""

import dataclasses

import process

process.require_runnable()

import pytest  # noqa: E402
import torch  # noqa: E402

import fastattn  # noqa: E402
import test_prefill  # noqa: E402
from cases import CASES, Case, inputs  # noqa: E402
from fastattn import Mask, UnsupportedError, dispatch  # noqa: E402

if process.INTERPRETED:
    from strict_interpreter import harden

    harden()

DEVICE = "cpu" if process.INTERPRETED else "cuda"
DTYPES = ("float32", "bfloat16", "float16")
ROWS = [row for row in dispatch.KERNELS if row.backend == "triton"]
FORWARD = [row for row in ROWS if row.supports["direction"] == {"forward"}]


def in_every_dtype(cases) -> list[Case]:
    """A case in float32 stands for all three."""
    return list(
        dict.fromkeys(
            case._replace(dtype=dtype)
            for case in cases
            for dtype in (DTYPES if case.dtype == "float32" else (case.dtype,))
        )
    )


def to(device: str, x):
    if isinstance(x, Mask):
        k_start, k_end = (bound if bound is None else bound.to(device) for bound in (x.k_start, x.k_end))
        return dataclasses.replace(x, k_start=k_start, k_end=k_end)
    return x.to(device) if isinstance(x, torch.Tensor) else x


def on_device(case: Case) -> tuple[list, dict]:
    qkv, kwargs = inputs(case)
    return [to(DEVICE, x) for x in qkv], {name: to(DEVICE, x) for name, x in kwargs.items()}


def problem_of(case: Case) -> fastattn.problem.Problem:
    (q, k, v), kwargs = on_device(case)
    with fastattn.record() as calls:
        fastattn.attention(q, k, v, **kwargs, return_lse=True, backend="reference")
    return calls[0].problem


def assert_refused(row: dispatch.Row, case: Case, reasons: list[str]) -> None:
    (q, k, v), kwargs = on_device(case)
    with test_prefill.only(row), pytest.raises(UnsupportedError) as refusal:
        fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=row.backend)
    assert all(reason in str(refusal.value) for reason in reasons)


def assert_forward(row: dispatch.Row, case: Case) -> None:
    """One row on one case, by the rule of test_prefill."""
    (q, k, v), kwargs = on_device(case)
    with test_prefill.only(row):
        out, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=row.backend)
    assert fastattn.last_call().kernel == row.name
    (q, k, v), kwargs = inputs(case)
    test_prefill.assert_parity((out.cpu(), lse.cpu()), q, k, v, **kwargs)


@pytest.mark.parametrize("row", FORWARD, ids=lambda row: row.name)
@pytest.mark.parametrize("case", in_every_dtype(CASES), ids=str)
def test_forward(case, row):
    reasons = dispatch.refuse(row, problem_of(case))
    if reasons:
        assert_refused(row, case, reasons)
    else:
        assert_forward(row, case)
