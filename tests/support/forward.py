"""Calls of the forward pass, and how their results are compared with the reference in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import settings

import fastattn
from cases import Case
from fastattn.backends import cpu

INF, NAN = math.inf, math.nan


DTYPES = ("float32", "bfloat16", "float16", "float64")


def run(q, k, v, backend="cpu", **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=backend)


ROUNDS_WEIGHTS = cpu.unavailable() is None and bool(cpu._C.pair_isa())
"""Whether this process rounds weights to bfloat16 in calls on bfloat16."""

TOLERANCE = {  # dtype: (slack, limit), of errors relative to max(1, |value|)
    # Slack is for shapes so small that the reference happens to be exact; the limit is ours, whatever torch does.
    "float32": (1e-6, 4e-6),
    "float64": (4e-15, 4e-15),  # the oracle is the reference in the same dtype: there is no error to double
    # One rounding of a float32 result: half an ulp. Another where weights are rounded too.
    "bfloat16": (2**-8, (2**-7 if ROUNDS_WEIGHTS else 2**-8) + 4e-6),
    "float16": (2**-11, 2**-11 + 4e-6),
}


def max_error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest error relative to max(1, |oracle|); NaN, inf and -inf must stand in the same places."""
    actual = actual.double()
    for same in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(same(actual), same(oracle)), same.__name__
    finite = torch.isfinite(oracle)
    errors = (actual - oracle).abs() / oracle.abs().clamp(min=1.0)
    return errors[finite].max().item() if finite.any() else 0.0


def assert_parity(actual, q, k, v, large_scores=False, **kwargs):
    """(out, lse) err at most twice as much as the reference in the same dtype, against the reference in float64."""
    same_dtype = run(q, k, v, "reference", **kwargs)
    oracle = run(q.double(), k.double(), v.double(), "reference", **kwargs)
    scores = max(oracle[1][torch.isfinite(oracle[1])].abs().tolist(), default=0.0)
    for name, x, y, z in zip(("out", "lse"), actual, same_dtype, oracle, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        slack, limit = TOLERANCE[str(x.dtype).removeprefix("torch.")]
        if large_scores:  # rounding a score s moves its weight by eps * s, whoever rounds
            slack, limit = slack + 2.0 * torch.finfo(actual[1].dtype).eps * scores, INF
        error, bound = max_error(x, z), min(2.0 * max_error(y, z) + slack, limit)
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


exactly_these = settings(derandomize=True, deadline=None, database=None)


def bits(tensors) -> list[np.ndarray]:
    """Tensors as integers: NaN equals itself, 0 differs from -0."""
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.view(integers[t.element_size()]).numpy() for t in tensors]


def assert_same_bits(actual, expected):
    for x, y in zip(bits(actual), bits(expected), strict=True):
        np.testing.assert_array_equal(x, y)


SHAPES = {  # enough work for threads, and rows, keys and splits of every kind
    "dense": Case(batch=2, num_heads=4, seqlen_q=300, seqlen_k=310, head_dim=40),
    "causal": Case(batch=3, num_heads=4, num_heads_k=2, seqlen_q=270, head_dim=33, causal=True, dtype="bfloat16"),
    "few heads": Case(batch=2, num_heads=1, seqlen_q=600, seqlen_k=1200, head_dim=16, causal=True),
    "decoding": Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=3, seqlen_k=4096, mask="lengths", dtype="float16"),
    "everything": Case(
        batch=3, num_heads=4, num_heads_k=2, seqlen_q=90, seqlen_k=700, head_dim=24, head_dim_v=40, causal=True,
        window_size=(600, 3), mask="tensor_per_head", bias="full", alibi=True, softcap=5.0, sinks=True, layout="bshd",
    ),
    "double": Case(batch=2, num_heads=2, seqlen_q=150, seqlen_k=1100, head_dim=30, bias="key", dtype="float64"),
}  # fmt: skip


shapes = pytest.mark.parametrize("shape", SHAPES)


dtypes = pytest.mark.parametrize("dtype", DTYPES)
