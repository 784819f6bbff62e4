"""Tiny calls with gradients: nothing of them stays, and the short way to autograd takes what the long one does."""

import gc

import pytest
import torch

import fastattn
from fastattn.backends import cpu
from tests.support.isas import needs_cpu

SHAPES = (1, 1, 1, 16), (2, 4, 16, 32)


def draw(shape, count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(count)]


def step(tensors, **options):
    out = fastattn.attention(*tensors, **options)
    return torch.autograd.grad(out.sum(), tensors)


def resident_bytes() -> int:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096


@needs_cpu
@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_leaves_no_object_behind(shape):
    tensors = draw(shape)
    step(tensors)
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(50):
            step(tensors)
        assert len(gc.get_objects()) - before < 50
        assert gc.collect() == 0  # no cycles either
    finally:
        gc.enable()


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_of_100000_calls_does_not_grow(shape):
    tensors = draw(shape)
    for _ in range(5_000):
        step(tensors)
    before = resident_bytes()
    for _ in range(100_000):
        step(tensors)
    assert resident_bytes() - before < 4 << 20


@needs_cpu
def test_terms_that_are_no_tensors_go_the_short_way_and_tensors_the_long_one():
    tensors = draw(SHAPES[1])
    bias = torch.zeros(16, 16)
    for options in ({}, {"causal": True}, {"softcap": 3.0}, {"softmax_scale": 0.5}):
        for _ in range(2):  # the second call finds a plan
            short = step(tensors, **options)
        for one, other in zip(short, step(tensors, bias=bias, **options), strict=True):
            assert torch.equal(one, other)


@needs_cpu
def test_gradients_of_out_and_lse_and_of_one_of_them():
    tensors = draw(SHAPES[1])
    expected = None
    for _ in range(2):
        out, lse = fastattn.attention(*tensors, return_lse=True)
        both = torch.autograd.grad([out, lse], tensors, [torch.ones_like(out), torch.ones_like(lse)], retain_graph=True)
        of_out = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
        of_lse = torch.autograd.grad(lse.sum(), tensors)
        for one, other, sum_of_both in zip(of_out, of_lse, both, strict=True):
            torch.testing.assert_close(one + other, sum_of_both)
        expected = step(tensors) if expected is None else expected
        assert all(map(torch.equal, of_out, expected))


@needs_cpu
def test_a_tensor_that_left_torch_func_is_taken():
    left = []

    def keep(x):
        left.append(x)
        return x.sum()

    q, k, v = draw(SHAPES[1])
    torch.func.grad(keep)(q.detach())
    step([q, k, v])
    expected = fastattn.attention(q, k, v)
    assert torch.equal(fastattn.attention(left[0], k, v), expected)


@needs_cpu
def test_both_ways_run_the_kernels():
    tensors = draw(SHAPES[0])
    step(tensors)
    before = cpu.runs()
    step(tensors)
    after = cpu.runs()
    assert [after[name] - before[name] for name in ("forward", "backward")] == [1, 1]
