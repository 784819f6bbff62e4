"""How far a GPU kernel's result may be from the truth."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

import backward
from fastattn import reference
from forward import TOLERANCE, max_error, run


class _RoundWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


@contextmanager
def _rounded_factors(dtype: torch.dtype) -> Iterator[None]:
    product, weighted_sum = reference._product, reference._weighted_sum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_product", lambda q, k: _RoundGradient.apply(product(q, k), dtype))
        patch.setattr(
            reference, "_weighted_sum", lambda p, v, visible: weighted_sum(_RoundWeights.apply(p, dtype), v, visible)
        )
        yield


def plain(dtype: torch.dtype):
    """Inside, the reference rounds as plain torch in `dtype` does: every factor of a matrix product has that dtype.

    In 16 bits these are the weights and the gradients of the scores, which the reference otherwise keeps in float32 and
    no matrix unit of a GPU does. This is the yardstick of GPU kernels; the truth stays the reference in float64.
    """
    return _rounded_factors(dtype) if dtype.itemsize == 2 else nullcontext()


def assert_accuracy(actual: tuple[torch.Tensor, torch.Tensor], q, k, v, **kwargs) -> None:
    """(out, lse): at most twice the error of plain torch in the same dtype, against the reference in float64."""
    with plain(q.dtype):
        same_dtype = run(q, k, v, "reference", **kwargs)
    oracle = run(q.double(), k.double(), v.double(), "reference", **kwargs)
    for name, x, y, z in zip(("out", "lse"), actual, same_dtype, oracle, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        slack, _ = TOLERANCE[str(x.dtype).removeprefix("torch.")]
        error, bound = max_error(x, z), 2.0 * max_error(y, z) + slack
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


def assert_gradients(case, monkeypatch) -> None:
    """Gradients of a call on Triton's kernels, each against the reference's in float64 and in `plain` torch."""
    gradients = backward.gradients

    def ours(q, k, v, kwargs, dout, dlse=None, backend="triton", of_scores=False):
        with plain(q.dtype) if backend == "reference" else nullcontext():
            return gradients(q, k, v, kwargs, dout, dlse, backend, of_scores)

    monkeypatch.setattr(backward, "gradients", ours)
    backward.assert_parity(case, sums=("alibi_slopes", "softmax_scale"), of_scores=True)
