"""How far a GPU kernel's result may be from the truth."""

import torch

from test_prefill import TOLERANCE, max_error, run


def assert_accuracy(actual: tuple[torch.Tensor, torch.Tensor], q, k, v, **kwargs) -> None:
    """(out, lse): at most twice the error of the reference in the same dtype, against the reference in float64.

    The rule of test_prefill without its limit of half an ulp, which no weights of 16 bits can keep: those are what the
    matrix units multiply.
    """
    same_dtype = run(q, k, v, "reference", **kwargs)
    oracle = run(q.double(), k.double(), v.double(), "reference", **kwargs)
    for name, x, y, z in zip(("out", "lse"), actual, same_dtype, oracle, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        slack, _ = TOLERANCE[str(x.dtype).removeprefix("torch.")]
        error, bound = max_error(x, z), 2.0 * max_error(y, z) + slack
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"
