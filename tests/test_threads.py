"""Threads and processes: the bits do not depend on them, a forked child works, threads of Python may call at once."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastattn
from cases import Case, inputs
from fastattn import cpu
from test_prefill import SHAPES, assert_same_bits, bits, run, shapes

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")
PATIENCE = 30  # seconds after which a child counts as hanging


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@shapes
def test_bits_do_not_depend_on_the_number_of_threads(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    torch.set_num_threads(1)
    expected = run(q, k, v, **kwargs)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_same_bits(run(q, k, v, **kwargs), expected)


def test_more_threads_than_work():
    torch.set_num_threads(16)
    for case in (Case(), Case(num_heads=1, seqlen_q=129, seqlen_k=700), Case(num_heads=3, seqlen_q=0, seqlen_k=5)):
        (q, k, v), kwargs = inputs(case)
        actual = run(q, k, v, **kwargs)
        torch.set_num_threads(1)
        assert_same_bits(actual, run(q, k, v, **kwargs))


def test_the_number_of_threads_is_left_alone():
    (q, k, v), kwargs = inputs(SHAPES["dense"])
    for threads in (2, 1):
        torch.set_num_threads(threads)
        run(q, k, v, **kwargs)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_python_call_at_once(threads):
    """The GIL is released inside; each thread has its own scratch memory and its own record of the last call."""
    torch.set_num_threads(threads)
    calls = [inputs(case) for case in SHAPES.values()]
    expected = [run(*qkv, **kwargs) for qkv, kwargs in calls]

    def work(i):
        torch.set_num_threads(threads)
        qkv, kwargs = calls[i % len(calls)]
        out = run(*qkv, **kwargs)
        assert fastattn.last_call().problem.batch == len(qkv[0])
        return out

    with ThreadPoolExecutor(4) as pool:
        for i, actual in enumerate(pool.map(work, range(40))):
            assert_same_bits(actual, expected[i % len(calls)])


def attention_in_child(connection, call, expected, generations: int):
    """Without torch's own loops over many elements (fills, comparisons): its threads do not survive a fork."""
    torch.use_deterministic_algorithms(False)
    (q, k, v), kwargs = call
    same = all(np.array_equal(x, y) for x, y in zip(bits(run(q, k, v, **kwargs)), expected, strict=True))
    if same and generations > 1:
        same = forked(call, expected, generations - 1)
    connection.send(same)


def forked(call, expected, generations: int = 1) -> bool:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=attention_in_child, args=(sender, call, expected, generations))
    child.start()
    try:
        assert receiver.poll(PATIENCE), "the child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("shape", ["dense", "decoding"])
def test_fork(shape):
    """What DataLoader workers do: the parent has run on two threads, then the child runs."""
    torch.set_num_threads(2)
    call = inputs(SHAPES[shape])
    expected = bits(run(*call[0], **call[1]))
    for generations in (1, 1, 1, 1, 2):
        assert forked(call, expected, generations)
        for x, y in zip(bits(run(*call[0], **call[1])), expected, strict=True):  # the parent still has its threads
            np.testing.assert_array_equal(x, y)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_while_another_thread_computes():
    torch.set_num_threads(2)
    call = inputs(SHAPES["everything"])
    expected = bits(run(*call[0], **call[1]))
    with ThreadPoolExecutor(1) as pool:
        busy = [pool.submit(run, *call[0], **call[1]) for _ in range(20)]
        assert forked(call, expected)
        for future in busy:
            assert_same_bits(future.result(), run(*call[0], **call[1]))
