"""From a call to the driver: what is compiled once is launched again without Triton's own way, and with few arguments.

How long that takes is a measurement: `python bench/launch.py`.
"""

import gc
import weakref
from contextlib import contextmanager

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

import fastattn  # noqa: E402
import launch as bench_launch  # noqa: E402
from fake_device import nothing_compiled  # noqa: E402
from fastattn import BlockMask, Mask  # noqa: E402
from fastattn.kernels import launch, tuning  # noqa: E402
from kernel_report import compiling_for, without_device  # noqa: E402

BLOCKS, SMALL_BLOCKS = (
    without_device(BlockMask.from_mask(Mask.causal(), seqlen_q=256, block_size=size)) for size in (128, 64)
)
KINDS = {
    # Keyword arguments of `call`; the kernels that it launches, with the most arguments that the C launcher may have to
    # look at one by one: constants included, strides a tuple each.
    "prefill": ({}, {"forward_kernel": 64}),
    "decode": ({"seqlen_q": 1, "seqlen_k": 4096}, {"decode_kernel": 55, "combine_kernel": 16}),
    "block_sparse": ({"mask": BLOCKS}, {"forward_kernel": 64}),
    "backward": (
        {"backward": True},
        {"forward_kernel": 64, "delta_kernel": 28, "key_value_kernel": 64, "query_kernel": 64},
    ),
}


@pytest.fixture
def launches():
    with compiling_for(90) as launches:
        yield launches


def empty(*shape, dtype=torch.bfloat16, offset=0, layout="bhsd", backward=False) -> torch.Tensor:
    """A tensor [batch, heads, seqlen, head_dim] on no device, `offset` elements after an aligned address."""
    b, h, s, d = shape
    size = b * h * s * d
    x = torch.empty(size + offset, dtype=dtype, device="meta")[offset:]
    x = x.view(b, s, h, d).transpose(1, 2) if layout == "bshd" else x.view(shape)
    return x.requires_grad_(backward)


def call(seqlen_q=256, seqlen_k=256, head_dim=64, group=2, backward=False, kv=None, kwargs=None, **options) -> None:
    """One call of attention: kv are options of `empty` for k and v, kwargs those of attention."""
    mask = options.pop("mask", None)
    q = empty(2, 4, seqlen_q, head_dim, backward=backward, **options)
    k, v = (empty(2, 4 // group, seqlen_k, head_dim, backward=backward, **options | (kv or {})) for _ in range(2))
    kwargs = {name: x.detach().requires_grad_(backward) if is_float(x) else x for name, x in (kwargs or {}).items()}
    out = fastattn.attention(q, k, v, mask=mask, backend="triton", **kwargs)
    if backward:
        torch.autograd.grad(out, (q, k, v, *filter(is_float, kwargs.values())), torch.empty_like(out))


def is_float(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


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


def variants(seqlen_q: int, seqlen_k: int) -> dict[str, dict]:
    """Arguments of `call`, each different from all others in what the kernels have to know."""
    bias = torch.empty(1, 4, seqlen_q, seqlen_k, dtype=torch.bfloat16, device="meta")
    bias_elsewhere = torch.empty(bias.numel() + 1, dtype=torch.bfloat16, device="meta")[1:].view_as(bias)
    numbers = torch.empty(4, device="meta")
    starts = torch.empty(1, 1, seqlen_q, dtype=torch.int32, device="meta")
    visible = torch.empty(2, 1, seqlen_q, seqlen_k, dtype=torch.bool, device="meta")
    found = {
        "nothing": {},
        "queries": {"seqlen_q": seqlen_q + 1},
        "keys": {"seqlen_k": seqlen_k + 1},
        "head_dim": {"head_dim": 80},
        "dtype": {"dtype": torch.float16},
        "layout": {"layout": "bshd"},
        "alignment": {"offset": 1},
        "place of k and v": {"kv": {"offset": 8}},
        "layout of k and v": {"kv": {"layout": "bshd"}},
        "heads": {"group": 1},
        "causal": {"kwargs": {"causal": True}},
        "window": {"kwargs": {"window_size": (9, 3)}},
        "another window": {"kwargs": {"window_size": (9, 4)}},
        "scale": {"kwargs": {"softmax_scale": 0.3}},
        "scale below 0": {"kwargs": {"softmax_scale": -0.3}},
        "learned scale": {"kwargs": {"softmax_scale": numbers[0]}},
        "learned scale elsewhere": {"kwargs": {"softmax_scale": numbers[1]}},
        "learned scales": {"kwargs": {"softmax_scale": numbers}},
        "softcap": {"kwargs": {"softcap": 3.0}},
        "another softcap": {"kwargs": {"softcap": 5.0}},
        "bias": {"kwargs": {"bias": bias}},
        "bias of all heads": {"kwargs": {"bias": bias[:, :1]}},
        "bias in float32": {"kwargs": {"bias": bias.float()}},
        "bias in another order": {"kwargs": {"bias": bias.transpose(2, 3).contiguous().transpose(2, 3)}},
        "bias elsewhere": {"kwargs": {"bias": bias_elsewhere}},
        "slopes": {"kwargs": {"alibi_slopes": numbers}},
        "sinks": {"kwargs": {"sinks": numbers}},
        "sinks far apart": {"kwargs": {"sinks": numbers.repeat(2)[::2]}},
        "intervals": {"mask": Mask.intervals(starts, starts)},
        "intervals of each head": {"mask": Mask.intervals(starts.repeat(1, 4, 1), starts)},
        "starts alone": {"mask": Mask.intervals(starts, None)},
        "bool mask": {"mask": visible},
        "bool mask of keys": {"mask": visible[:, :, :1]},
        "dropout": {"kwargs": {"dropout_p": 0.1, "seed": 1}},
        "another seed": {"kwargs": {"dropout_p": 0.1, "seed": 2}},
        "more dropout": {"kwargs": {"dropout_p": 0.2, "seed": 2}},
    }
    if seqlen_q == 1:  # where these are the same
        del found["bias in another order"], found["bool mask of keys"]
        return found
    return found | {"blocks": {"mask": BLOCKS}, "smaller blocks": {"mask": SMALL_BLOCKS}}


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
