"""Memory: nothing is read or written beside the tensors, offsets beyond 2^31, no leak, no n x n tensor."""

import ctypes
import faulthandler
import gc
import math
import mmap
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastattn
from cases import Case, inputs
from children import forked, graph, train
from fastattn import Mask
from fastattn.backends import cpu
from fastattn.masks import UNBOUNDED
from fastattn.terms import Terms
from forward import DTYPES, ROUNDS_WEIGHTS, assert_same_bits, dtypes, run
from guarded import Guarded, in_child, reset_peak, resident, status

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]


def fill(out, lse, q, k, v, causal=False, **kwargs):
    """The kernel into tensors of the caller's, without the allocations of fastattn.attention."""
    hi = k.shape[2] - q.shape[2] if causal else UNBOUNDED
    terms = Terms(softmax_scale=q.shape[3] ** -0.5, diagonal_hi=hi, query_start=k.shape[2] - q.shape[2], **kwargs)
    cpu._C.forward(q, k, v, out, lse, None, None, terms, 1)
    return out, lse


def tensors_of(dtype, shape, extras: str) -> dict[str, torch.Tensor]:
    """What the kernel reads, for batch, num_heads, seqlen_q, seqlen_k, head_dim, head_dim_v; half as many key heads.

    extras   "none", "all", or "row": a mask and a bias of the keys alone
    """
    b, h, sq, sk, d, dv = shape
    (q, k, v), _ = inputs(Case(b, h, sq, sk, d, dv, max(h // 2, 1), dtype))
    tensors = {"q": q, "k": k, "v": v}
    if extras == "row":
        tensors |= {"mask": torch.rand(sk) < 0.7, "bias": torch.randn(sk)}
    if extras == "all":
        tensors |= {"mask": torch.rand(b, h, sq, sk) < 0.7, "bias": torch.randn(b, h, sq, sk).to(q.dtype)}
        tensors |= {"k_start": torch.randint(3, (b, h, sq)).int(), "k_end": torch.randint(1, sk + 2, (b, h, sq)).int()}
        tensors |= {"alibi_slopes": torch.rand(b, h), "sinks": torch.randn(h).to(q.dtype)}
    return tensors


def expected_of(tensors):
    tensors = dict(tensors)
    out = torch.empty(*tensors["q"].shape[:3], tensors["v"].shape[3], dtype=tensors["q"].dtype)
    lse = torch.empty(out.shape[:3], dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)
    result = fill(out, lse, **tensors)
    if "k_start" in tensors:
        interval = Mask.intervals(tensors.pop("k_start"), tensors.pop("k_end")).to_dense(*_seqlens(tensors))
        tensors["mask"] = tensors["mask"] & interval
    rounds = ROUNDS_WEIGHTS and out.dtype == torch.bfloat16
    torch.testing.assert_close(
        result, run(backend="reference", **tensors), **({"rtol": 2**-7, "atol": 2**-8} if rounds else {})
    )
    return result


def _seqlens(tensors):
    return tensors["q"].shape[2], tensors["k"].shape[2]


# --- guard pages -----------------------------------------------------------------------------------------------------


GUARDED_SHAPES = [  # batch, num_heads, seqlen_q, seqlen_k, head_dim, head_dim_v
    *((1, 2, 3, 5, d, dv) for d in (1, 7, 33, 65) for dv in (1, 7, 33, 65)),
    *((2, 2, sq, sk, 7, 33) for sq, sk in ((1, 1), (1, 300), (17, 31), (129, 1), (131, 257))),
    *((1, 1, 3, 1031, d, 65 - d) for d in (1, 24, 64)),
]


def guarded_calls(say, dtype, side):
    torch.use_deterministic_algorithms(False)
    for shape in GUARDED_SHAPES:
        for layout in ("bhsd", "bshd"):
            for extras in ("none", "row", "all"):
                say((shape, layout, extras))
                tensors = tensors_of(dtype, shape, extras)
                out, lse = expected_of(tensors)
                swap = layout == "bshd"

                def place(x, swap=swap):
                    guarded = Guarded(x.transpose(1, 2) if swap and x.dim() == 4 else x, side)
                    return guarded, guarded.tensor.transpose(1, 2) if swap and x.dim() == 4 else guarded.tensor

                targets = [place(torch.full_like(x, math.nan)) for x in (out, lse)]
                sources = {name: place(x)[1] for name, x in tensors.items()}
                assert_same_bits(fill(*(view for _, view in targets), **sources), (out, lse))
                for guarded, _ in targets:
                    guarded.assert_untouched_outside()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@dtypes
@pytest.mark.parametrize("side", ["end", "start"])
def test_guard_pages(side, dtype):
    in_child(guarded_calls, dtype, side)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_guard_pages_guard():
    def read_past(say):
        faulthandler.disable()
        guarded = Guarded(torch.ones(5), "end")
        say("the read")
        ctypes.string_at(guarded.tensor.data_ptr() + 20, 1)

    def write_before(say):
        guarded = Guarded(torch.ones(5), "end")
        guarded.memory[guarded.first - 1] = 0
        guarded.assert_untouched_outside()

    with pytest.raises(AssertionError, match="exit code -(7|11) at the read"):
        in_child(read_past)
    with pytest.raises(AssertionError, match="exit code 1"):
        in_child(write_before)


# --- offsets beyond 2^31 ---------------------------------------------------------------------------------------------


def spread_out(x: torch.Tensor, axis: int, stride: int) -> torch.Tensor:
    """x with a huge stride along one axis, in memory that is reserved and hardly ever touched."""
    strides = list(torch.empty(x.shape).stride())
    strides[axis] = stride
    elements = sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, elements * x.element_size(), flags=flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@dtypes
@pytest.mark.parametrize("stride", [2**31 + 5, 2**32 + 3])
@pytest.mark.parametrize("axis", ["batch", "heads", "seqlen", "head_dim"])
def test_offsets_beyond_32_bits(axis, stride, dtype):
    shape = {"batch": (2, 2, 5, 7, 9, 3), "heads": (1, 4, 5, 7, 9, 3), "seqlen": (1, 2, 2, 2, 9, 3)}
    shape |= {"head_dim": (1, 2, 3, 2, 2, 2)}
    tensors = tensors_of(dtype, shape[axis], "all")
    out, lse = expected_of(tensors)
    axis = ["batch", "heads", "seqlen", "head_dim"].index(axis)

    def place(x):
        dims = x.dim()
        where = axis if dims >= 2 else 0
        return spread_out(x, min(where, dims - 1), stride)

    results = [place(torch.full_like(x, math.nan)) for x in (out, lse)]
    assert_same_bits(fill(*results, **{name: place(x) for name, x in tensors.items()}), (out, lse))


# --- the native entry checks for itself ------------------------------------------------------------------------------

WRONG = {  # name of a tensor: what it must not be
    "q": (torch.ones(2, 2, 3), torch.ones(2, 2, 3, 5), torch.ones(2, 2, 3, 4).int(), torch.ones(1, 1, 2, 2, 3, 4)),
    "k": (torch.ones(1, 2, 5, 4), torch.ones(2, 3, 5, 4), torch.ones(2, 2, 5, 3), torch.ones(2, 2, 5, 4).half(), None),
    "v": (torch.ones(2, 2, 4, 6), torch.ones(2, 1, 5, 6), torch.ones(2, 2, 5), torch.ones(2, 2, 5, 6).double(), 1.0),
    "out": (torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 6).half(), torch.ones(6), torch.ones(1, 2, 3, 6)),
    "lse": (torch.ones(2, 2, 4), torch.ones(2, 2, 3).double(), torch.ones(2, 2, 3, 1)),
    "mask": (torch.ones(3, 4).bool(), torch.ones(3, 5), torch.ones(1, 2, 2, 3, 5).bool()),
    "bias": (torch.ones(4, 5), torch.ones(3, 5).int(), torch.ones(3, 5).bool(), torch.ones(2, 3, 3, 5)),
    "k_start": (torch.ones(2, 2, 3), torch.ones(2, 2, 3).long(), torch.ones(2, 2, 5).int()),
    "k_end": (torch.ones(2, 2, 3), torch.ones(2, 2, 3, 1).int(), torch.ones(3, 2, 3).int()),
    "alibi_slopes": (torch.ones(3), torch.ones(2, 2).int(), torch.ones(2, 2, 1)),
    "sinks": (torch.ones(3), torch.ones(2).int(), torch.ones(1, 1, 2)),
    "softmax_scale": (torch.ones(3), torch.ones(2).int(), torch.ones(1, 1, 2)),
    "lse_parts": (torch.ones(2, 2, 3), torch.ones(2, 2, 3, 1), torch.ones(2, 2, 3, 2).double()),
    "out_exact": (torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 6).half()),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_native_entry_refuses_what_does_not_fit(name):
    for wrong in (*WRONG[name], torch.ones(1, 1, 1, 1, 1), torch.ones(2, device="meta"), "text"):
        tensors = {"q": torch.ones(2, 2, 3, 4), "k": torch.ones(2, 2, 5, 4), "v": torch.ones(2, 2, 5, 6)}
        tensors |= {"out": torch.ones(2, 2, 3, 6), "lse": torch.ones(2, 2, 3), name: wrong}
        arguments = [tensors.pop(n, None) for n in ("q", "k", "v", "out", "lse", "lse_parts", "out_exact")]
        terms = Terms(**{"softmax_scale": 0.5} | tensors)
        with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError)):
            cpu._C.forward(*arguments, terms, 1)


def test_the_native_entry_refuses_wrong_terms():
    q, fine = torch.ones(2, 2, 3, 4), Terms(softmax_scale=0.5)
    for wrong in (
        None, (), tuple(fine)[:-1], fine._replace(softcap=None), fine._replace(diagonal_lo=0.5),
        fine._replace(dropout_p=1.0), fine._replace(dropout_p=-0.1), fine._replace(dropout_p=math.nan),
        fine._replace(dropout_p=0.1, seed=None), fine._replace(dropout_p=0.1, seed="x"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            cpu._C.forward(q, q, q, torch.empty_like(q), None, None, None, wrong, 1)
    cpu._C.forward(q, q, q, torch.empty_like(q), None, None, None, fine, 1)


def test_the_native_entry_refuses_the_wrong_number_of_arguments():
    for count in (0, 8, 10):
        with pytest.raises(ValueError, match="9 arguments"):
            cpu._C.forward(*[None] * count)


# --- how much --------------------------------------------------------------------------------------------------------


def small_calls():
    """Of every dtype, with every kind of argument."""
    case = Case(2, 4, 9, 20, 16, 8, 2, sinks=True)
    changes = ({"alibi": True}, {"mask": "tensor", "bias": "full"}, {"mask": "lengths", "bias": "key"})
    changes += ({"layout": "bshd", "bias": "query", "softcap": 2.0},)
    return [inputs(case._replace(dtype=dtype, **change)) for dtype, change in zip(DTYPES, changes, strict=True)]


many = pytest.mark.parametrize("count", [10_000, pytest.param(50_000, marks=pytest.mark.slow)])


@many
def test_calls_do_not_leak(count):
    made = small_calls()
    negated = torch.randn(1, 2, 5, 8, dtype=torch.complex64).conj().imag  # the one thing that is copied

    terms = Terms(softmax_scale=0.5, diagonal_lo=0, diagonal_hi=0)

    def call(n):
        for i in range(n):
            qkv, kwargs = made[i % len(made)]
            fastattn.attention(*qkv, **kwargs, return_lse=i % 3 == 0, softmax_scale=0.5 + i % 7, backend="cpu")
            if i % 10 == 0:
                fastattn.attention(negated, negated, negated, backend="cpu")
                with pytest.raises(ValueError, match="dimensions"):
                    cpu._C.forward(*[qkv[0][0]] * 5, None, None, terms, 1)

    call(400)
    before = resident()
    call(count)
    assert resident() - before < 2**20


@many
def test_calls_of_other_layouts_do_not_leak(count):
    q = torch.randn(9, 2, 8)
    bounds, lists = torch.tensor([0, 4, 9]), (torch.tensor([0, 1, 3, 3, 4, 5]), torch.tensor([0, 0, 1, 3, 4]))
    cache = fastattn.KVCache(batch=2, num_heads_k=2, head_dim=8, capacity=16, page_size=4)
    rows, dense = torch.randn(2, 2, 1, 8), torch.randn(3, 1, 2, 5, 8)

    def call(n):
        for i in range(n):
            if i % 3 == 0:
                fastattn.attention_varlen(q, q, q, bounds, bounds, causal=True)
            elif i % 3 == 1:
                fastattn.attention_csr(*dense, *lists)
            else:
                if i % 48 == 2:
                    cache.reset()
                cache.attend(rows, rows, rows)
            if i % 20 == 0:
                with pytest.raises(ValueError, match="cu_seqlens_q"):
                    fastattn.attention_varlen(q, q, q, torch.tensor([0, 4, 8]), bounds)

    call(600)
    before = resident()
    call(count)
    assert resident() - before < 2**20


def count_tensors() -> int:
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def test_forward_and_backward_do_not_leak():
    made = [(qkv, kwargs, torch.randn(*qkv[0].shape[:3], 8).to(qkv[0].dtype)) for qkv, kwargs in small_calls()]
    terms = Terms(softmax_scale=0.5, diagonal_lo=0, diagonal_hi=0)

    def call(n):
        for i in range(n):
            qkv, kwargs, dout = made[i % len(made)]
            out, lse, leaves = graph(qkv, kwargs)
            if i % 3:
                torch.autograd.grad(out, leaves, dout)
            elif i % 2:
                torch.autograd.grad([out, lse], leaves, [dout, torch.zeros_like(lse)])  # else nobody goes through it
            if i % 50 == 0:
                with pytest.raises(ValueError, match="dimensions"):
                    cpu._C.backward(*[qkv[0][0]] * 5, terms, dout, *[None] * 5, 1)

    call(800)
    before, objects, tensors = resident(), sys.getallocatedblocks(), count_tensors()
    call(10_000)
    assert resident() - before < 2**20
    assert sys.getallocatedblocks() - objects < 1000  # not one a call, nor one for each kind of call
    assert count_tensors() == tensors


def test_threads_do_not_leak():
    """Each thread of Python has OpenMP threads of its own, and all of them scratch memory for as long as they live."""
    call = inputs(Case(num_heads=4, seqlen_q=300, head_dim=32))

    def work():
        torch.set_num_threads(2)
        train(*call)

    def run_threads(n):
        for _ in range(n):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    run_threads(20)
    before = resident()
    run_threads(100)
    assert resident() - before < 16 * 2**20  # libc keeps some stacks of ended threads; all scratch memory is 70 MiB


def without_memory(out, q, expected) -> None:
    torch.set_num_threads(2)
    train(*inputs(Case(num_heads=8, seqlen_q=100)))  # starts the second thread
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 16 * 2**20, limit[1]))
    for _ in range(3):
        with pytest.raises(MemoryError):
            torch.autograd.grad(out, q, out.detach(), retain_graph=True)
    resource.setrlimit(resource.RLIMIT_AS, limit)
    assert_same_bits(torch.autograd.grad(out, q, out.detach()), expected)


def without_memory_in_a_thread(*arguments) -> None:
    with ThreadPoolExecutor(1) as pool:  # the thread that the fork has left has scratch memory, and computes alone
        pool.submit(without_memory, *arguments).result()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_out_of_memory_is_an_error():
    """On each OpenMP thread, which can be used again; they need 100 MiB each, for gradients of the keys."""
    q, kv = torch.randn(1, 8, 16, 64, requires_grad=True), torch.randn(1, 1, 1, 64).expand(1, 8, 200_000, 64)
    out = fastattn.attention(q, kv, kv, window_size=(64, 0), backend="cpu")
    forked(without_memory_in_a_thread, out, q, torch.autograd.grad(out, q, out.detach(), retain_graph=True))


def test_extra_memory_is_not_quadratic():
    """Less than 64 MiB beyond out, where the scores alone would take 4 GiB."""
    q, k, v = (torch.randn(1, 4, 16384, 64) for _ in range(3))
    bias = torch.randn(16384)
    before = reset_peak()
    out = fastattn.attention(q, k, v, causal=True, bias=bias, backend="cpu")
    assert out.nbytes <= status("VmHWM") - before < out.nbytes + 64 * 2**20


@pytest.mark.parametrize("threads", [1, 2])
def test_extra_memory_of_training_is_not_quadratic(threads):
    """Less than 200 MiB beyond out and the gradients, saved tensors included; a window, as it is sooner done."""
    torch.set_num_threads(threads)
    q, k, v = (torch.randn(1, 4, 16384, 64, requires_grad=True) for _ in range(3))
    bias, dout = torch.randn(16384, requires_grad=True), torch.randn(1, 4, 16384, 64)
    before = reset_peak()
    out = fastattn.attention(q, k, v, window_size=(1024, 0), bias=bias, backend="cpu")
    grads = torch.autograd.grad(out, (q, k, v, bias), dout)
    results = sum(x.nbytes for x in (out, *grads))
    assert results <= status("VmHWM") - before < results + 200 * 2**20
