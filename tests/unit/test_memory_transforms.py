"""Derivatives of all kinds in O(n) memory."""

import pytest
import torch

import fastattn
from guarded import printed_by_child, reset_peak, status
from isas import needs_cpu

pytestmark = needs_cpu

SEQLEN, HEADS, DIM = 4096, 2, 16
SCORES = HEADS * SEQLEN * SEQLEN * 4  # bytes, 128 MiB
LIMIT = 72 * 2**20


def tensors(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, SEQLEN, DIM, generator=generator) for _ in range(count)]


def loss(*x):
    return fastattn.attention(*x, causal=True).square().sum()


def derivative_by_forward_mode(x, t):
    return torch.func.jvp(lambda *x: fastattn.attention(*x, causal=True), x, t)


def double_backward(x, t):
    leaves = [y.requires_grad_() for y in x]
    grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(grads, leaves, t)


def forward_over_reverse(x, t):
    return torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), x, t)


def reverse_over_forward(x, t):
    return torch.func.grad(lambda *x: torch.func.jvp(loss, x, t)[1], (0, 1, 2))(*x)


def gradients_of_samples(x, t):
    many = [torch.stack([a, b]) for a, b in zip(x, t, strict=True)]
    return torch.vmap(torch.func.grad(loss, (0, 1, 2)))(*many)


DERIVATIVES = (
    derivative_by_forward_mode, double_backward, forward_over_reverse, reverse_over_forward, gradients_of_samples,
)  # fmt: skip


def extra_bytes(name: str) -> int:
    """What a derivative takes beyond its inputs in this process, at its peak."""
    torch.set_num_threads(1)
    function, x, t = globals()[name], tuple(tensors(3)), tuple(tensors(3))
    function(tuple(y[:, :, :64] for y in x), tuple(y[:, :, :64] for y in t))  # what is imported on first use
    x = tuple(y.detach() for y in x)
    before = reset_peak()
    function(x, t)
    return status("VmHWM") - before


@pytest.mark.parametrize("function", DERIVATIVES, ids=lambda function: function.__name__)
def test_extra_memory_is_not_quadratic(function):
    """Less than one tensor of scores, of which each formula by itself has ten; in a process of its own, whose heap
    holds nothing of other tests."""
    assert LIMIT < 0.6 * SCORES
    assert 0 < printed_by_child(f"test_memory_transforms.extra_bytes({function.__name__!r})") < LIMIT
