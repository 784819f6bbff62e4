"""Derivatives of all kinds in O(n) memory."""

import pytest
import torch

import fastattn
from fastattn.backends import cpu
from guarded import reset_peak, status

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]

SEQLEN, HEADS, DIM = 4096, 2, 16
SCORES = HEADS * SEQLEN * SEQLEN * 4  # bytes, 128 MiB
LIMIT = 96 * 2**20  # blocks take 50 to 76 MiB, by what earlier tests have left in the heap


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


@pytest.mark.parametrize(
    "function",
    [derivative_by_forward_mode, double_backward, forward_over_reverse, reverse_over_forward, gradients_of_samples],
)
def test_extra_memory_is_not_quadratic(function):
    """Less than one tensor of scores, of which each formula by itself has ten."""
    assert LIMIT < 0.8 * SCORES
    x, t = tuple(tensors(3)), tuple(tensors(3))
    function(tuple(y[:, :, :64] for y in x), tuple(y[:, :, :64] for y in t))  # what is imported on first use
    x = tuple(y.detach() for y in x)
    before = reset_peak()
    function(x, t)
    assert status("VmHWM") - before < LIMIT
