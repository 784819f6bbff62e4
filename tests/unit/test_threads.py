"""Threads and processes: the bits do not depend on them, a forked child works, threads of Python may call at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy.testing  # noqa: F401  (a child forked while another thread is the first to import it would wait for that)
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastattn
from backward import SHAPES as BACKWARD_SHAPES
from cases import Case, inputs
from children import FORK, PATIENCE, forked, gradients, graph, train
from fastattn.backends import cpu
from forward import SHAPES, assert_same_bits, run, shapes

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
ALL_SHAPES = SHAPES | BACKWARD_SHAPES


def forward(qkv, kwargs):
    return run(*qkv, **kwargs)


def train_without_dense_bias(qkv, kwargs):
    """What a child can do on any number of threads: torch zeroes the gradient of a dense bias, in a loop of its own."""
    return train(qkv, kwargs, of_bias=kwargs.get("bias") is None or 1 in kwargs["bias"].shape[-2:])


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- OpenMP's threads ------------------------------------------------------------------------------------------------


@shapes
def test_bits_do_not_depend_on_the_number_of_threads(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    torch.set_num_threads(1)
    expected = run(q, k, v, **kwargs)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_same_bits(run(q, k, v, **kwargs), expected)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_gradients_do_not_depend_on_the_number_of_threads_or_the_run(shape):
    call = inputs(ALL_SHAPES[shape])
    torch.set_num_threads(1)
    expected = train(*call)
    for repeat in range(30):
        torch.set_num_threads(1 + repeat % 3)
        assert_same_bits(train(*call), expected)


def test_more_threads_than_work():
    cases = Case(), Case(num_heads=1, seqlen_q=129, seqlen_k=700), Case(num_heads=3, seqlen_q=0, seqlen_k=5)
    for call in map(inputs, cases):
        torch.set_num_threads(16)
        actual = train(*call)
        torch.set_num_threads(1)
        assert_same_bits(actual, train(*call))


def test_the_number_of_threads_is_left_alone():
    call = inputs(SHAPES["dense"])
    for threads in (2, 1):
        torch.set_num_threads(threads)
        train(*call)
        assert torch.get_num_threads() == threads


# --- threads of Python -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("compute", [forward, train])
def test_threads_of_python_call_at_once(compute, threads):
    """The GIL is released inside; each thread has its own scratch memory and its own record of the last call."""
    torch.set_num_threads(threads)
    calls = [inputs(case) for case in SHAPES.values()]
    expected = [compute(*call) for call in calls]

    def work(i):
        torch.set_num_threads(threads)
        call = calls[i % len(calls)]
        result = compute(*call)
        assert fastattn.last_call().problem.batch == len(call[0][0])
        return result

    with ThreadPoolExecutor(4) as pool:
        for i, actual in enumerate(pool.map(work, range(40))):
            assert_same_bits(actual, expected[i % len(calls)])


def compute_freely(calls, expected, repeats: int) -> None:
    """Threads of Python, each in its own order and on its own number of OpenMP threads, which it may change."""
    start, failures = threading.Barrier(4), []

    def work(i):
        try:
            start.wait()
            for n in range(repeats):
                torch.set_num_threads(1 + (i + n) % 4)
                which = (5 * i + n) % len(calls)
                assert_same_bits(train(*calls[which]), expected[which])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("repeats", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_threads_of_python_with_different_numbers_of_threads(repeats):
    calls = [inputs(case) for case in ALL_SHAPES.values()]
    compute_freely(calls, [train(*call) for call in calls], repeats)


def test_one_graph_backward_in_many_threads():
    """What one thread saved, others read at once."""
    call = inputs(SHAPES["everything"])
    torch.set_num_threads(2)
    out, _, leaves = graph(*call)
    expected = gradients(out, leaves, retain_graph=True)

    def work(i):
        torch.set_num_threads(1 + i % 2)
        return gradients(out, leaves, retain_graph=True)

    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(work, range(20)):
            assert_same_bits(actual, expected)


# --- processes -------------------------------------------------------------------------------------------------------


def assert_same_bits_in_child(compute, call, expected, generations: int = 1) -> None:
    """Compares with numpy and lets torch.empty be.

    torch runs fills, comparisons and copies of more than 32768 elements on the OpenMP threads of its caller, which a
    fork leaves behind: it would hang by itself.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert_same_bits(compute(*call), expected)
    if generations > 1:
        forked(assert_same_bits_in_child, compute, call, expected, generations - 1)


computes = pytest.mark.parametrize("compute", [forward, train_without_dense_bias])


@computes
@pytest.mark.parametrize("shape", ["dense", "decoding", "key bias"])
def test_fork(shape, compute):
    """The parent has run on two threads, then the child runs, and its child; the parent still has its threads."""
    torch.set_num_threads(2)
    call = inputs(ALL_SHAPES[shape])
    expected = compute(*call)
    for generations in (1, 1, 2):
        forked(assert_same_bits_in_child, compute, call, expected, generations)
        assert_same_bits(compute(*call), expected)


def fork_while_another_thread_computes(compute, shape: str, repeats: int) -> None:
    torch.set_num_threads(2)
    call = inputs(ALL_SHAPES[shape])
    expected = compute(*call)
    stop = threading.Event()

    def work():
        torch.set_num_threads(2)
        while not stop.is_set():
            assert_same_bits(compute(*call), expected)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(work)
        try:
            for _ in range(repeats):
                forked(assert_same_bits_in_child, compute, call, expected)
        finally:
            stop.set()
        other.result()


@computes
@pytest.mark.parametrize("shape", ["everything", "one head"])
def test_fork_while_another_thread_computes(shape, compute):
    fork_while_another_thread_computes(compute, shape, 5)


@pytest.mark.slow
@computes
@pytest.mark.parametrize("shape", ["everything", "one head"])
def test_fork_often_while_another_thread_computes(shape, compute):
    fork_while_another_thread_computes(compute, shape, 300)


def number_of_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def threads_in_child(call, expected) -> list[int]:
    """How many threads are started by the one that the fork has left, and by a new one."""
    started = []

    def work():
        torch.set_num_threads(2)  # before: this starts threads too, which torch uses elsewhere
        before = number_of_threads()
        assert_same_bits_in_child(train, call, expected)
        started.append(number_of_threads() - before)

    work()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    return started


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc does not list the threads of a process")
@pytest.mark.parametrize("forks", ["main thread", "other thread"])
def test_new_threads_of_a_child_have_threads_again(forks):
    """Servers fork, then answer requests in threads."""
    torch.set_num_threads(2)
    call = inputs(SHAPES["dense"])
    expected = train(*call)

    def parent():
        torch.set_num_threads(2)
        train(*call)
        return forked(threads_in_child, call, expected)

    if forks == "main thread":
        started = parent()
    else:
        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(parent).result()
    assert started == [0, 1]


class Checks(Dataset):
    """Item i is i, once this process has computed what is expected. Workers have its arguments by fork."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __len__(self):
        return 8

    def __getitem__(self, i):
        assert_same_bits_in_child(*self.arguments)
        return i


def check(i: int) -> int:
    return check.of[i]


@computes
def test_pool_of_forked_workers(compute):
    torch.set_num_threads(2)
    call = inputs(SHAPES["dense"])
    checks = Checks(compute, call, compute(*call))
    with FORK.Pool(2, lambda: setattr(check, "of", checks)) as pool:
        assert pool.map_async(check, range(8)).get(PATIENCE) == list(range(8))


@pytest.mark.parametrize("compute", [forward, train])
@pytest.mark.parametrize("shape", ["dense", "everything"])
def test_dataloader_workers(shape, compute):
    """Which have set their number of threads to 1."""
    torch.set_num_threads(2)
    call = inputs(SHAPES[shape])
    checks = Checks(compute, call, compute(*call))
    loader = DataLoader(checks, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE)
    assert list(loader) == list(range(8))
