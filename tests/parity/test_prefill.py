"""The forward kernels against the reference in float64: values, on every instruction set, and strides."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from cases import CASES, Case, inputs
from fastattn import Mask, UnsupportedError, dispatch
from fastattn.backends import cpu
from forward import (
    DTYPES,
    NAN,
    assert_parity,
    assert_same_bits,
    exactly_these,
    run,
)
from isas import needs_cpu, only, run_tests_on, running_isa, supported_isas

pytestmark = pytest.mark.usefixtures("one_thread")  # test_threads.py is about more


# --- values ----------------------------------------------------------------------------------------------------------


def takes_forward_calls(row) -> bool:
    return row.supports["direction"] == {"forward"} and "dense" in row.supports["layout"]


@pytest.mark.parametrize("row", [row for row in dispatch.KERNELS if takes_forward_calls(row)], ids=lambda row: row.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, row):
    (q, k, v), kwargs = inputs(case)
    run(q, k, v, "reference", **kwargs)  # for its Problem
    if dispatch.refuse(row, fastattn.last_call().problem):
        assert_refused(row, case)
        return
    with only(row):
        actual = run(q, k, v, row.backend, **kwargs)
    assert fastattn.last_call().kernel == row.name
    if row.backend == "cpu":
        assert fastattn.last_call().isa == cpu.isa_of(row.name, fastattn.last_call().problem)
        assert running_isa() == os.environ.get("FASTATTN_CPU_ISA", running_isa())
    assert_parity(actual, q, k, v, **kwargs)


def assert_refused(row, case) -> None:
    (q, k, v), kwargs = inputs(case)
    run(q, k, v, "reference", **kwargs)
    reasons = dispatch.refuse(row, fastattn.last_call().problem)
    with only(row), pytest.raises(UnsupportedError) as refusal:
        run(q, k, v, row.backend, **kwargs)
    assert reasons and all(reason in str(refusal.value) for reason in reasons)


def test_rows_of_other_calls_refuse():
    rows = [row for row in dispatch.KERNELS if not takes_forward_calls(row)]
    for number, case in enumerate(CASES):
        assert_refused(rows[number % len(rows)], case)


@pytest.mark.slow  # a handful is in test_isas.py
@needs_cpu
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_every_isa_in_every_respect(isa):
    """Each in a process of its own: the choice is made once."""
    if isa == running_isa():
        return
    names = "prefill", "prefill_bits", "prefill_rules", "reference", "dropout_mask", "sdpa"
    files = [f"tests/parity/test_{name}.py" for name in names]
    run_tests_on(isa, *files, *(f"tests/unit/test_{name}.py" for name in ("memory", "threads", "api")))


def lengths(*edges):
    return st.one_of(st.integers(0, 40), st.sampled_from(edges))


@st.composite
def small_cases(draw):
    num_heads_k = draw(st.integers(1, 2))
    some = st.integers(0, 60) | st.none()
    masks = ("lengths", "left_padding", "documents", "prefix_lm", "intervals", "top_left")
    masks += ("tensor", "tensor_per_head", "key_tensor")
    return Case(
        batch=draw(st.integers(1, 3)),
        num_heads=num_heads_k * draw(st.integers(1, 3)),
        num_heads_k=num_heads_k,
        seqlen_q=draw(lengths(64, 127, 129, 260)),
        seqlen_k=draw(lengths(127, 128, 129, 300, 1100)),
        head_dim=draw(st.integers(1, 40) | st.sampled_from((64, 65, 128))),
        head_dim_v=draw(st.integers(1, 40) | st.sampled_from((64, 65, 128))),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.booleans()),
        window_size=draw(st.none() | st.tuples(some, some)),
        mask=draw(st.none() | st.sampled_from(masks)),
        bias=draw(st.none() | st.sampled_from(("shared", "per_head", "full", "key", "query"))),
        alibi=draw(st.booleans()),
        softcap=draw(st.just(0.0) | st.sampled_from((0.5, 3.0, 30.0))),
        sinks=draw(st.booleans()),
        softmax_scale=draw(st.none() | st.sampled_from((0.0, 0.2, -0.1))),
        layout=draw(st.sampled_from(("bhsd", "bshd"))),
    )


@needs_cpu
@settings(exactly_these, max_examples=250)
@given(case=small_cases(), seed=st.integers(0, 2**16))
def test_parity_of_any_combination(case, seed):
    (q, k, v), kwargs = inputs(case, seed)
    assert_parity(run(q, k, v, **kwargs), q, k, v, large_scores=True, **kwargs)


# --- strides ---------------------------------------------------------------------------------------------------------


def elsewhere(x: torch.Tensor, order, steps, offset: int) -> torch.Tensor:
    """x in other memory: dimensions in this order, every steps[d]-th element, and NaN (True) all around."""
    sizes = [x.shape[d] * steps[d] for d in order]
    memory = torch.full((offset + math.prod(sizes),), NAN if x.is_floating_point() else True, dtype=x.dtype)
    view = memory[offset:].view(sizes)[tuple(slice(None, None, steps[d]) for d in order)]
    return view.permute([order.index(d) for d in range(x.dim())]).copy_(x)


@st.composite
def memories(draw, dims: int):
    """(dimensions that are broadcast, arguments of elsewhere)"""
    broadcast = draw(st.sets(st.integers(0, dims - 1), max_size=2))
    steps = [draw(st.sampled_from((1, 1, 2, 3))) for _ in range(dims)]
    return broadcast, draw(st.permutations(range(dims))), steps, draw(st.integers(0, 3))


STRIDED = {"q": 4, "k": 4, "v": 4, "bias": 4, "mask": 4, "k_start": 3, "k_end": 3, "alibi_slopes": 2, "sinks": 1}


@needs_cpu
@settings(exactly_these, max_examples=100)
@given(
    dtype=st.sampled_from(DTYPES),
    seqlens=st.sampled_from(((21, 37), (1, 300), (140, 150), (3, 1100))),
    where=st.fixed_dictionaries({}, optional={name: memories(dims) for name, dims in STRIDED.items()}),
)
def test_any_strides(dtype, seqlens, where):
    """The bits are those of contiguous tensors of the same values."""
    case = Case(2, 4, *seqlens, head_dim=9, head_dim_v=17, num_heads_k=2, dtype=dtype, mask="tensor_per_head",
                bias="full")  # fmt: skip
    (q, k, v), kwargs = inputs(case)
    tensors = {"q": q, "k": k, "v": v, "bias": kwargs["bias"], "mask": kwargs["mask"]}
    tensors |= {"k_start": torch.randint(0, 9, (2, 4, seqlens[0])), "k_end": torch.randint(20, 400, (2, 4, seqlens[0]))}
    tensors |= {"alibi_slopes": torch.rand(2, 4), "sinks": torch.randn(4)}
    plain, strided = {}, {}
    for name, x in tensors.items():
        broadcast, *memory = where.get(name, ((), range(x.dim()), [1] * x.dim(), 0))
        narrow = x[tuple(slice(0, 1) if d in broadcast else slice(None) for d in range(x.dim()))]
        strided[name] = elsewhere(narrow, *memory).expand(x.shape)
        plain[name] = strided[name].clone(memory_format=torch.contiguous_format)

    def call(q, k, v, k_start, k_end, mask, **rest):
        if "k_start" in where or "k_end" in where:
            mask = Mask.intervals(k_start, k_end)
        return run(q, k, v, mask=mask, **rest)

    assert_same_bits(call(**strided), call(**plain))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_a_fused_projection(dtype):
    """What models do: one [batch, seqlen, 3 * num_heads * head_dim] tensor, split and viewed; nothing is copied."""
    qkv = torch.randn(2, 70, 3 * 4 * 20, dtype=torch.float64).to(getattr(torch, dtype))
    q, k, v = (part.unflatten(2, (4, 20)).transpose(1, 2) for part in qkv.chunk(3, -1))
    out, lse = run(q, k, v, causal=True)
    assert_same_bits((out, lse), run(q.contiguous(), k.contiguous(), v.contiguous(), causal=True))
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    interleaved = torch.stack([q, k, v], -1)
    assert_same_bits(run(*interleaved.unbind(-1), causal=True), (out, lse))


@needs_cpu
@pytest.mark.parametrize("head_dim_v", [24, 5])
@pytest.mark.parametrize("order", ["bhsd", "bshd", "sbhd", "bhds", "broadcast heads"])
def test_out_has_the_memory_order_of_q(order, head_dim_v):
    """Heads before or after the sequence, as in q; every other order counts as one of the two."""
    q, k, v = torch.randn(2, 3, 40, 24), torch.randn(2, 3, 50, 24), torch.randn(2, 3, 50, head_dim_v)
    if order == "broadcast heads":
        q = q[:, :1].expand(q.shape)
    else:
        dims = ["bhsd".index(letter) for letter in order]
        q = elsewhere(q, dims, [1, 1, 1, 1], 0)
    out, _ = run(q, k, v)
    assert (out.transpose(1, 2) if q.stride(1) < q.stride(2) else out).is_contiguous()
    assert_same_bits(out, run(q.contiguous(), k, v)[0])
