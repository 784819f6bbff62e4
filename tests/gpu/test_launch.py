"""From a call to the driver: what is compiled once is launched again without Triton's own way, and with few arguments.

How long that takes is a measurement: `python bench/launch.py`.
"""

import gc
import warnings
import weakref
from contextlib import contextmanager

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

import fastattn  # noqa: E402
import launch as bench_launch  # noqa: E402
from fake_device import Specialized, nothing_compiled  # noqa: E402
from fastattn import torch_internals  # noqa: E402
from fastattn.kernels import config, launch, tuning  # noqa: E402
from kernel_report import arch_name, compiling_for  # noqa: E402
from launching import BLOCKS, call, empty, variants  # noqa: E402

KINDS = {
    # Keyword arguments of `call`; the kernels that it launches, with the most arguments that the C launcher may have to
    # look at one by one: constants included, strides a tuple each.
    "prefill": ({}, {"forward_kernel": 65}),
    "decode": ({"seqlen_q": 1, "seqlen_k": 4096}, {"decode_kernel": 74, "combine_kernel": 16}),
    "block_sparse": ({"mask": BLOCKS}, {"forward_kernel": 65}),
    "backward": (
        {"backward": True},
        {"forward_kernel": 65, "delta_kernel": 28, "key_value_kernel": 64, "query_kernel": 64},
    ),
}


@pytest.fixture
def launches():
    with compiling_for(90) as launches:
        yield launches


@contextmanager
def only_direct_launches():
    """Inside, whatever a first call does and a second one has no time for raises."""

    def refuse(*args, **kwargs):
        raise AssertionError("a second call prepares again")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (JITFunction, "run"),
            (JITFunction, "warmup"),
            (launch, "plan_with_best_tiles"),
            (tuning, "_read"),
        ):
            patch.setattr(owner, name, refuse)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_second_call_launches_what_the_first_compiled(launches, kind):
    """With other tensors of the same shape."""
    kwargs, kernels = KINDS[kind]
    call(**kwargs)
    first = list(launches)
    assert [launch.binary.name for launch in first] == list(kernels)
    with only_direct_launches():
        call(**kwargs)
    second = launches[len(first) :]
    assert [describe(launch) for launch in second] == [describe(launch) for launch in first]
    assert [launch.binary for launch in second] == [launch.binary for launch in first]
    assert all(new.args[0] is not old.args[0] for new, old in zip(second, first, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_few(launches, kind):
    """No more of them without a reason."""
    kwargs, most = KINDS[kind]
    call(**kwargs)
    counts = {launch.binary.name: len(launch.args) for launch in launches}
    assert counts.keys() == most.keys() and all(counts[name] <= most[name] for name in most), counts


def describe(launched) -> tuple:
    """A launch by value: the code, the grid and the arguments, of tensors all but their address."""
    return launched.binary.metadata["hash"], launched.grid, tuple(map(_describe, launched.args))


def _describe(argument):
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.storage_offset()
    if isinstance(argument, TensorDescriptor):
        return _describe(argument.base), argument.shape, argument.strides, argument.block_shape
    return argument


# --- the key of the cache --------------------------------------------------------------------------------------------


@pytest.fixture
def launched(launches):
    """Launches of kernels that nobody compiles."""
    with nothing_compiled() as launched:
        yield launched


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 4096), (256, 256)])
def test_a_cached_launch_is_that_of_this_call(launched, seqlen_q, seqlen_k, backward):
    """After calls that differ in one thing, each call's launches are those that it makes with an empty cache."""

    def launches_of(variant) -> list[tuple]:
        launched.clear()
        call(**{"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, **variant}, backward=backward)
        return [(*launch, tuple(map(_describe, args))) for *launch, args in launched]

    calls, fresh = variants(seqlen_q, seqlen_k), {}
    for name, variant in calls.items():
        launch.forget()
        fresh[name] = launches_of(variant)
    assert len(set(map(str, fresh.values()))) == len(calls)  # each of them matters
    launch.forget()
    for _ in range(2):
        for name, variant in calls.items():
            assert launches_of(variant) == fresh[name], name


def test_the_cache_has_an_end(launches, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_LAUNCHES", 2)
    for softcap in (1.0, 2.0, 3.0, 4.0, 5.0):
        call(kwargs={"softcap": softcap})
        assert len(launch._launches) <= 2 and any(argument is softcap for argument in launches[-1].args)
    assert len(launches) == 5


def test_a_thousand_lengths_compile_a_few_kernels(launched):
    """A cache that grows by one token a step: what is compiled depends on kinds of strides (1, divisible by 16)."""
    for seqlen_k in range(1000, 2000):
        call(seqlen_q=1, seqlen_k=seqlen_k)
    assert len(launched) >= 1000 and len(launch._loaded) <= 4
    assert len({(name, key) for name, key, *_ in launched}) <= 4


def test_a_slice_of_a_cache_compiles_one_kernel(launched):
    cache = empty(2, 2, 4096, 64)
    q = empty(2, 4, 1, 64)
    for seqlen_k in range(3000, 3100):
        fastattn.attention(q, cache[:, :, :seqlen_k], cache[:, :, :seqlen_k], backend="triton")
    assert len({(name, key) for name, key, *_ in launched}) == len(launch._loaded) <= 2  # decoding, `combine`


def test_no_tensor_outlives_its_call(launched):
    """Not even in the descriptors (TMA) of a launch that is remembered."""
    k, v = empty(2, 2, 256, 64), empty(2, 2, 256, 64)
    known = [weakref.ref(x) for x in (k, v)]
    fastattn.attention(empty(2, 4, 256, 64), k, v, backend="triton")
    assert any(isinstance(x, TensorDescriptor) for *_, args in launched for x in args)
    launched.clear()
    del k, v
    gc.collect()
    assert [x() for x in known] == [None, None] and launch._launches


def test_another_device_is_current(launches, monkeypatch):
    """A tensor's own device is made current for its launch, and nothing is done where it is."""
    entered = []

    @contextmanager
    def device(index):
        entered.append(index)
        monkeypatch.setattr(launch, "current_device", lambda: index)
        yield
        monkeypatch.setattr(launch, "current_device", lambda: 7)

    call()
    monkeypatch.setattr(torch.cuda, "device", device)
    call()
    assert entered == [] and len(launches) == 2
    monkeypatch.setattr(launch, "current_device", lambda: 7)
    call()
    assert entered == [-1] and len(launches) == 3


def test_the_benchmark_runs(capsys):
    figures = bench_launch.main(["--calls", "2", "--rounds", "1"])
    assert figures.keys() == bench_launch.MODULES.keys()
    assert all(len(row) == 3 and min(row) > 0.0 for row in figures.values())
    assert "from the entry" in capsys.readouterr().out


# --- first calls -----------------------------------------------------------------------------------------------------


def test_a_first_call_compiles_and_loads_on_the_device_of_its_tensors(launches, monkeypatch):
    """Whichever is current: a function of another context would be remembered for ever."""
    current, loaded, compile_and_load = [7], [], launch.compile_and_load

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    def load(*args):
        loaded.append(current[-1])
        return compile_and_load(*args)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "current_device", lambda: current[-1])
    monkeypatch.setattr(launch, "compile_and_load", load)
    call(backward=True)
    assert set(loaded) == {-1} and len(loaded) == 4  # -1: meta tensors


def test_what_the_compiler_raises_is_a_refusal(launches, monkeypatch):
    def fail(*args):
        raise ValueError("PassManager::run failed\nand a page of text")

    monkeypatch.setattr(launch, "compile_and_load", fail)
    with pytest.raises(
        fastattn.UnsupportedError, match=r"triton\.prefill: prefill: ValueError: PassManager::run failed"
    ):
        call()


@pytest.mark.parametrize("arch, message", [("sm_75", "sm_80 and later"), ("gfx803", "these kernels know gfx90a")])
def test_a_device_that_triton_does_not_compile_for(launches, arch, message, monkeypatch):
    monkeypatch.setattr(launch, "device_facts", lambda index: config.Device(arch, 64 << 10, 40, "Old"))
    with pytest.raises(fastattn.UnsupportedError, match=f"Old is {arch}, and .*{message}"):
        call()


def test_amd_wants_the_triton_that_mends_its_loops():
    device = config.Device("gfx1100", 64 << 10, 40, "Radeon")
    assert "3.9 and later" in config.refusal(device, "3.8.0") and config.refusal(device, "3.9.0") is None
    assert config.refusal(device, "4.0rc1") is None and "3.9 and later" in config.refusal(device, "3.8rc2")
    assert config.refusal(config.Device("sm_90", 1, 1), "3.7.1") is None


def test_a_first_call_while_a_graph_is_captured(launches, monkeypatch):
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before the capture"):
        call()
    monkeypatch.undo()
    assert launches == []


def test_a_graph_captures_what_is_loaded(launched, monkeypatch):
    """Of another length, whose launch is prepared in the capture; nothing is measured there."""
    call(backward=True)
    loaded = len(launched)
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    call(seqlen_q=320, seqlen_k=320, backward=True)
    assert len(launched) == 2 * loaded
    with pytest.raises(RuntimeError, match="each process"):
        call(head_dim=32)
    monkeypatch.setenv("FASTATTN_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "tune", lambda *args: pytest.fail("measured in a capture"))
    with pytest.raises(RuntimeError, match="measures tiles in the first call .* call it once before the capture"):
        call(seqlen_q=340, seqlen_k=340)
    monkeypatch.setattr(tuning, "is_wanted", lambda *args: False)  # as where they have been measured
    call(seqlen_q=340, seqlen_k=340, backward=True)


def test_a_kernel_that_fails_beside_another_of_its_backend(launched, monkeypatch):
    """Nothing falls back to the reference, so a warning of its own tells of it, once, and last_call() from then on."""
    run = Specialized.run

    def fail(self, *args):
        if self.name == "decode_kernel":
            raise ValueError("boom")
        return run(self, *args)

    monkeypatch.setattr(Specialized, "run", fail)
    with pytest.warns(RuntimeWarning, match=r"^triton\.decode: decode: ValueError: boom; .*go to triton\.prefill"):
        call(seqlen_q=1, seqlen_k=4096)
    assert fastattn.last_call().kernel == "triton.prefill" and "decode: ValueError: boom" in fastattn.last_call().reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(seqlen_q=1, seqlen_k=4096)
    assert [name for name, *_ in launched] == ["forward_kernel"] * 2


class Strange(Exception):
    pass


@pytest.mark.parametrize("kernel", ["forward_kernel", "key_value_kernel"])
@pytest.mark.parametrize("kind", [ValueError, OverflowError, KeyError, AssertionError, MemoryError, Strange])
def test_whatever_a_first_launch_raises_is_a_refusal(launched, kind, kernel, monkeypatch):
    """Forward and backward, of any type."""
    run = Specialized.run

    def fail(self, *args):
        if self.name == kernel:
            raise kind("boom")
        return run(self, *args)

    monkeypatch.setattr(Specialized, "run", fail)
    with pytest.raises(fastattn.UnsupportedError, match=f"{kind.__name__}: .?boom"):
        call(backward=True)


@pytest.mark.parametrize("setting, is_exact", [("tf32", False), ("ieee", True), ("none", True)])
def test_the_newer_setting_of_products(setting, is_exact, monkeypatch):
    """After which the older one cannot be asked."""
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        with compiling_for(90) as launches, nothing_compiled() as launched:
            call(dtype=torch.float32, head_dim=32)
        assert launches == [] and ("ieee" in launched[0][3]) == is_exact and ("tf32" in launched[0][3]) != is_exact
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(torch_internals, "_precision_of", None)  # before torch 2.9
    assert torch_internals.are_products_exact()


def test_products_of_float32_are_exact_where_amd_has_no_tf32(monkeypatch):
    torch.set_float32_matmul_precision("high")
    try:
        for arch, expected in ((90, "tf32"), ("gfx942", "tf32"), ("gfx90a", "ieee"), ("gfx1100", "ieee")):
            if config.refusal(config.Device(arch_name(arch), 0, 1), triton.__version__):  # AMD's before Triton 3.9
                continue
            with compiling_for(arch) as launches:
                call(dtype=torch.float32, head_dim=32)
            assert len(launches) == 1 and expected in launches[0].args
    finally:
        torch.set_float32_matmul_precision("highest")
