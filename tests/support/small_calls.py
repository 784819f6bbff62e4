"""q, k and v of calls that cost nothing, and a kernel that takes few of them."""

import torch

from fastattn import dispatch, plans
from fastattn.dispatch import KERNELS, Row


def qkv(**kwargs) -> list[torch.Tensor]:
    """[1, 2, 4, 8]; kwargs of torch.randn."""
    return [torch.randn(1, 2, 4, 8, **kwargs) for _ in range(3)]


def wide_qkv(**kwargs) -> list[torch.Tensor]:
    """What only the reference takes."""
    return [torch.randn(1, 2, 4, 600, **kwargs) for _ in range(3)]


def with_narrow_row(monkeypatch):
    """A kernel that supports little, in front of the table."""
    supports = {"head_dim": range(8, 65, 8), "dtype": {"float32", "bfloat16"}, "needs_grad": {False}, "lse": {False}}
    row = Row("narrow.prefill", "fastattn.backends.reference:forward", None, supports)
    monkeypatch.setattr(dispatch, "KERNELS", (row, *KERNELS))
    monkeypatch.setattr(dispatch, "BACKENDS", ("narrow", *dispatch.BACKENDS))
    plans.forget()
