"""Calls that take long: a signal ends them, nothing half-written is left; memory that threads keep between calls."""

import signal

import pytest
import torch

import fastattn
from fastattn.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")


class Alarm(Exception):
    pass


@pytest.fixture
def alarm():
    """A function that has `Alarm` raised in the main thread, soon after."""

    def ring(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_right():
    x = torch.randn(1, 2, 140, 8)
    torch.testing.assert_close(fastattn.attention(x, x, x), fastattn.attention(x, x, x, backend="reference"))


def test_a_signal_ends_a_forward_pass(alarm, threads):
    """An hour of work; memory is that of one batch entry."""
    q = torch.randn(1, 1, 256, 16).expand(4096, 1, 256, 16)
    k = torch.randn(1, 1, 1 << 16, 16).expand(4096, 1, 1 << 16, 16)
    alarm()
    with pytest.raises(Alarm):
        fastattn.attention(q, k, k, backend="cpu")
    assert_right()


def test_a_signal_ends_a_backward_pass_and_leaves_no_gradient(alarm, threads, monkeypatch):
    """Minutes of work in one unit."""
    leaves = [torch.randn(1, 1, 1 << 17, 64, requires_grad=True) for _ in "qkv"]
    with monkeypatch.context() as context:
        context.setattr(cpu._C, "forward", lambda *arguments: None)  # would take long too; out is whatever lies there
        out = fastattn.attention(*leaves, backend="cpu")
    alarm()
    with pytest.raises(Alarm):
        out.sum().backward()
    assert [leaf.grad for leaf in leaves] == [None] * 3
    assert_right()


def gradient(x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(fastattn.attention(leaf, leaf, leaf, backend="cpu").sum(), leaf)[0]


def test_a_handler_computes_while_a_backward_pass_waits(one_thread):
    """It gets scratch memory of its own: that of the pass is in use."""
    x = torch.randn(1, 1, 6000, 64, dtype=torch.float64)
    short = x[:, :, :300]
    expected, of_short = gradient(x), fastattn.attention(short, short, short, backend="cpu")
    found = []

    def ring(number, frame):
        found.append(fastattn.attention(short, short, short, backend="cpu"))
        fastattn.release_scratch()

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        actual = gradient(x)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert found and all(torch.equal(y, of_short) for y in found)
    assert torch.equal(actual, expected)


def test_scratch_is_released_and_comes_back(threads):
    fastattn.release_scratch()
    q, k, v = torch.randn(3, 2, 4, 300, 64).unbind()
    expected = fastattn.attention(q, k, v, backend="cpu")
    kept = fastattn.release_scratch()
    assert 0 < kept < threads * 4 << 20 and fastattn.release_scratch() == 0
    assert torch.equal(fastattn.attention(q, k, v, backend="cpu"), expected)


def test_no_thread_keeps_more_than_32_mib():
    q, k, v = (torch.randn(1, 1, 3000, 512, dtype=torch.float64, requires_grad=True) for _ in range(3))
    fastattn.release_scratch()
    fastattn.attention(q, k, v, window_size=(8, 8), backend="cpu").sum().backward()  # takes about 100 MiB a thread
    assert fastattn.release_scratch() <= torch.get_num_threads() * 32 << 20
