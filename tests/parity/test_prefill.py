"""The forward kernels against the reference in float64: values, strides, bits, and rules on shapes of many tiles."""

import math
import os

import numpy as np
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
    INF,
    NAN,
    SHAPES,
    TOLERANCE,
    assert_parity,
    assert_same_bits,
    dtypes,
    exactly_these,
    max_error,
    run,
    shapes,
)
from isas import needs_cpu, only, run_tests_on, supported_isas

pytestmark = pytest.mark.usefixtures("one_thread")  # test_threads.py is about more


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", dispatch.KERNELS, ids=lambda row: row.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, row):
    (q, k, v), kwargs = inputs(case)
    run(q, k, v, "reference", **kwargs)  # for its Problem
    reasons = dispatch.refuse(row, fastattn.last_call().problem)
    if reasons:
        with only(row), pytest.raises(UnsupportedError) as refusal:
            run(q, k, v, row.backend, **kwargs)
        assert all(reason in str(refusal.value) for reason in reasons)
        return
    with only(row):
        actual = run(q, k, v, row.backend, **kwargs)
    assert fastattn.last_call().kernel == row.name
    if row.backend == "cpu":
        assert fastattn.last_call().isa == (os.environ.get("FASTATTN_CPU_ISA") or cpu.isa())
    assert_parity(actual, q, k, v, **kwargs)


@needs_cpu
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_every_isa(isa):
    """Each in a process of its own: the choice is made once."""
    if isa == cpu.isa():
        return  # test_parity has run on it
    run_tests_on(isa, "tests/parity/test_prefill.py", "-k", "test_parity")


@pytest.mark.slow
@needs_cpu
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_every_isa_in_every_respect(isa):
    if isa == cpu.isa():
        return
    files = [f"tests/parity/test_{name}.py" for name in ("prefill", "reference", "sdpa")]
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


# --- bits ------------------------------------------------------------------------------------------------------------


def at_batch(b: int, q, k, v, kwargs):
    """The call of one element of the batch."""
    one = slice(b, b + 1)

    def pick(x, dims):
        return x[one] if isinstance(x, torch.Tensor) and x.dim() == dims and x.shape[0] > 1 else x

    kwargs = {name: pick(value, 4) for name, value in kwargs.items()}
    if isinstance(kwargs.get("mask"), Mask):
        mask = kwargs["mask"]
        kwargs["mask"] = Mask(mask.windows, pick(mask.k_start, 3), pick(mask.k_end, 3))
    return (q[one], k[one], v[one]), kwargs


@needs_cpu
@shapes
def test_a_row_does_not_depend_on_the_batch(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    out, lse = run(q, k, v, **kwargs)
    for b in range(len(q)):
        alone, its_kwargs = at_batch(b, q, k, v, kwargs)
        assert_same_bits(run(*alone, **its_kwargs), (out[b : b + 1], lse[b : b + 1]))
        others = torch.arange(len(q)) != b
        for poison in (NAN, 1e4):
            q2, k2, v2 = (x.clone() for x in (q, k, v))
            q2[others] = k2[others] = v2[others] = poison
            out2, lse2 = run(q2, k2, v2, **kwargs)
            assert_same_bits((out2[b], lse2[b]), (out[b], lse[b]))


@needs_cpu
@shapes
def test_a_row_does_not_depend_on_other_rows_and_heads(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    out, lse = run(q, k, v, **kwargs)
    for row, head in ((0, 0), (q.shape[2] - 1, q.shape[1] - 1), (q.shape[2] // 2, 0)):
        q2 = torch.full_like(q, NAN)
        q2[:, head, row] = q[:, head, row]
        out2, lse2 = run(q2, k, v, **kwargs)
        assert_same_bits((out2[:, head, row], lse2[:, head, row]), (out[:, head, row], lse[:, head, row]))
        group_size = q.shape[1] // k.shape[1]
        others = torch.arange(k.shape[1]) != head // group_size
        k2, v2 = k.clone(), v.clone()
        k2[:, others] = v2[:, others] = NAN
        out2, lse2 = run(q, k2, v2, **kwargs)
        assert_same_bits((out2[:, head], lse2[:, head]), (out[:, head], lse[:, head]))


@needs_cpu
@shapes
def test_a_run_does_not_depend_on_the_ones_before(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape])
    expected = run(q, k, v, **kwargs)
    other = torch.full((1, 2, 200, 128), NAN)
    for _ in range(20):
        run(other, other, other)  # leaves NaN in the scratch memory
        assert_same_bits(run(q, k, v, **kwargs), expected)
    assert_same_bits(fastattn.attention(q, k, v, **kwargs, backend="cpu"), expected[0])


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads, seqlen", [(2, 200), (1, 1100)])
def test_causal_prefix(num_heads, seqlen, dtype):
    """Keys after a row do not change it, whatever they hold."""
    case = Case(num_heads=num_heads, seqlen_q=seqlen, head_dim=20, dtype=dtype, causal=True)
    (q, k, v), kwargs = inputs(case)
    out, lse = run(q, k, v, **kwargs)
    for last in (0, 30, 64, 127, 128, seqlen - 2):
        for poison in (0.5, NAN, INF):
            k2, v2 = k.clone(), v.clone()
            k2[:, :, last + 1 :] = v2[:, :, last + 1 :] = poison
            for kwargs2 in (kwargs, {"mask": Mask.causal("top_left")}, {"window_size": (seqlen - 1, 0)}):
                out2, lse2 = run(q, k2, v2, **kwargs2)
                rows = slice(0, last + 1)
                assert_same_bits((out2[:, :, rows], lse2[:, :, rows]), (out[:, :, rows], lse[:, :, rows]))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_the_same_keys_give_the_same_bits(dtype):
    seqlen = 300
    (q, k, v), _ = inputs(Case(batch=2, num_heads=2, seqlen_q=seqlen, head_dim=20, dtype=dtype))
    position = torch.arange(seqlen)
    causal = position[:, None] >= position
    expected = run(q, k, v, causal=True)
    for same in (
        {"window_size": (seqlen - 1, 0)},
        {"window_size": (None, 0)},
        {"window_size": (10**9, 0), "causal": True},
        {"mask": Mask.causal("top_left")},
        {"mask": Mask.intervals(k_end=position[None, None] + 1)},
        {"mask": causal},
        {"bias": torch.where(causal, 0.0, -INF)},
        {"mask": causal, "bias": torch.zeros(1)},
    ):
        assert_same_bits(run(q, k, v, **same), expected)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 3, 40, 130])
@pytest.mark.parametrize("group_size", [2, 4, 5])
def test_shared_keys_equal_repeated_keys(group_size, seqlen_q, dtype):
    plain = Case(num_heads=2 * group_size, num_heads_k=2, seqlen_q=seqlen_q, seqlen_k=700, head_dim=20, dtype=dtype)
    for case in (plain, plain._replace(causal=True, bias="per_head", mask="tensor_per_head", alibi=True, sinks=True)):
        (q, k, v), kwargs = inputs(case)
        k2, v2 = (x.repeat_interleave(group_size, 1) for x in (k, v))
        assert_same_bits(run(q, k, v, **kwargs), run(q, k2, v2, **kwargs))


# --- rules, where rows and keys fill many tiles ----------------------------------------------------------------------

LARGE = {  # name: batch, num_heads, num_heads_k, seqlen_q, seqlen_k
    "tiles": (2, 2, 2, 150, 400),
    "stacked heads": (2, 6, 2, 30, 300),
    "splits": (2, 2, 1, 4, 2100),
}
large = pytest.mark.parametrize("shape", LARGE)


def large_inputs(shape, dtype, head_dim=20, head_dim_v=12):
    b, h, hk, sq, sk = LARGE[shape]
    case = Case(b, h, sq, sk, head_dim, head_dim_v, hk, dtype)
    return inputs(case)[0]


def random_mask(kind, q, k):
    """(arguments, visible [B, H, Sq, Sk]) of a mask of which a third of the rows sees nothing."""
    (b, h, sq, _), sk = q.shape, k.shape[2]
    empty = torch.arange(sq)[:, None] % 3 == 1
    key = torch.arange(sk)
    if kind == "intervals":
        start, end = torch.randint(0, sk, (b, h, sq)), torch.randint(0, sk + 1, (b, h, sq))
        start[..., empty[:, 0]] = sk
        visible = (key >= start[..., None]) & (key < end[..., None])
        return {"mask": Mask.intervals(start, end)}, visible
    shape = (b, 1, sq, sk) if kind == "bool, all heads" else (b, h, sq, sk)
    visible = (torch.rand(shape) < 0.5) & ~empty
    if kind == "bias":
        return {"bias": torch.where(visible, torch.randn(sq, sk), -INF)}, visible.expand(b, h, sq, sk)
    if kind == "bool and bias":
        other = torch.rand(sq, sk) < 0.7
        return {"bias": torch.where(visible, torch.randn(sq, sk), -INF), "mask": other}, visible & other
    return {"mask": visible}, visible.expand(b, h, sq, sk)


kinds = pytest.mark.parametrize("kind", ["intervals", "bool", "bool, all heads", "bias", "bool and bias"])


@needs_cpu
@large
@dtypes
@kinds
def test_rows_that_see_nothing(kind, dtype, shape):
    q, k, v = large_inputs(shape, dtype)
    kwargs, visible = random_mask(kind, q, k)
    empty = ~visible.any(-1)
    out, lse = run(q, k, v, **kwargs)
    assert (out[empty] == 0).all() and (lse[empty] == -INF).all() and torch.isfinite(lse[~empty]).all()
    sinks = torch.tensor([-1.5, 40.0]).repeat(q.shape[1] // 2)
    out, lse = run(q, k, v, **kwargs, sinks=sinks)
    assert (out[empty] == 0).all()
    torch.testing.assert_close(lse[empty].float(), sinks[:, None].expand(lse.shape)[empty], rtol=1e-7, atol=0.0)
    assert_parity((out, lse), q, k, v, **kwargs, sinks=sinks)


@needs_cpu
@large
@dtypes
@kinds
@pytest.mark.parametrize("poisoned", ["k", "v", "k and v"])
def test_poison_stays_where_it_is_seen(poisoned, kind, dtype, shape):
    """A row that sees no poisoned key keeps its bits; the others do as the reference does."""
    q, k, v = large_inputs(shape, dtype)
    kwargs, visible = random_mask(kind, q, k)
    clean = run(q, k, v, **kwargs)
    keys = torch.randint(0, k.shape[2], (3,))
    k, v = k.clone(), v.clone()
    for key, poison in zip(keys, (NAN, INF, -INF), strict=True):
        for x in (k,) if poisoned == "k" else (v,) if poisoned == "v" else (k, v):
            x[:, :, key, : x.shape[3] // 2] = poison
    hidden = ~visible[..., keys].any(-1)
    out, lse = run(q, k, v, **kwargs)
    assert_same_bits((out[hidden], lse[hidden]), (clean[0][hidden], clean[1][hidden]))
    assert 0.0 < hidden.double().mean() < 1.0
    assert_parity((out, lse), q, k, v, **kwargs)


@needs_cpu
@dtypes
@pytest.mark.parametrize("kind", ["lengths", "left padding", "window", "bias row", "bool row"])
def test_poison_in_padding(kind, dtype):
    """Keys that no row sees: not computed, or selected away."""
    q, k, v = large_inputs("tiles", dtype)
    seqlen_k = k.shape[2]
    keep = (torch.arange(seqlen_k) < 190) if kind != "left padding" else (torch.arange(seqlen_k) >= 190)
    kwargs = {
        "lengths": {"mask": Mask.lengths(torch.tensor([190, 190]))},
        "left padding": {"mask": Mask.padding(keep.expand(2, -1))},
        "window": {"mask": Mask.window(None, 40, "top_left")},
        "bias row": {"bias": torch.where(keep, 0.0, -INF)},
        "bool row": {"mask": keep},
    }[kind]
    clean = run(q, k, v, **kwargs)
    for poison in (NAN, INF):
        k[:, :, ~keep] = poison
        v[:, :, ~keep] = poison
        assert_same_bits(run(q, k, v, **kwargs), clean)


@needs_cpu
@dtypes
def test_intervals_far_apart(dtype):
    """Neighbouring rows whose keys lie many tiles apart: tiles between them that nobody sees."""
    (q, k, v), _ = inputs(Case(1, 2, 128, 1000, 8, dtype=dtype))
    for rows in (1, 8, 16, 32, 64):
        far = torch.arange(128) // rows % 2 == 1
        mask = Mask.intervals(torch.where(far, 980, 0)[None, None], torch.where(far, 1000, 10)[None, None])
        assert_parity(run(q, k, v, mask=mask), q, k, v, mask=mask)


@needs_cpu
@dtypes
@large
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_scores_that_are_not_finite(value, shape, dtype):
    q, k, v = large_inputs(shape, dtype)
    q[:, :, 1, 3] = value
    q[:, 0, 0] = value
    k[:, :, 100, 2] = value
    for kwargs in ({}, {"causal": True}, {"sinks": torch.zeros(q.shape[1])}):
        assert_parity(run(q, k, v, **kwargs), q, k, v, **kwargs)


@needs_cpu
def test_infinite_bias():
    """A score of +inf gives NaN, wherever it comes from."""
    q, k, v = large_inputs("tiles", "float32")
    bias = torch.zeros(q.shape[2], k.shape[2])
    bias[3, 5] = INF
    assert_parity(run(q, k, v, bias=bias), q, k, v, bias=bias)


@needs_cpu
@dtypes
@large
def test_large_scores(shape, dtype):
    """Scores of +-1e4, where the softmax is all but a maximum, and where rounding the score alone moves the result."""
    q, k, v = large_inputs(shape, dtype)
    for scale in (1.0, 30.0, 2000.0):
        for kwargs in ({}, {"bias": torch.randn(k.shape[2]) * 1e4}, {"mask": torch.rand(k.shape[2]) < 0.5}):
            actual = run(q, k, v, softmax_scale=scale, **kwargs)
            assert_parity(actual, q, k, v, softmax_scale=scale, **kwargs, large_scores=True)


@needs_cpu
@dtypes
@pytest.mark.parametrize("rising", [True, False])
def test_scores_that_rise_or_fall_along_the_keys(rising, dtype):
    """The running maximum moves in every tile, or never after the first."""
    q, k, v = large_inputs("tiles", dtype)
    slope = torch.linspace(-300.0, 300.0, k.shape[2])
    bias = slope if rising else -slope
    assert_parity(run(q, k, v, bias=bias), q, k, v, bias=bias, large_scores=True)


@needs_cpu
@dtypes
def test_tiny_numbers(dtype):
    """Subnormal inputs and outputs are numbers like others."""
    q, k, v = large_inputs("tiles", dtype)
    tiny = torch.finfo(v.dtype).smallest_normal
    assert_parity(run(q * 1e-4, k * 1e-4, v), q * 1e-4, k * 1e-4, v)
    v = (v * 0.0) + tiny / 16
    out, _ = run(q, k, v)
    torch.testing.assert_close(out, v[:, :, :1].expand_as(out), rtol=1e-4, atol=0.0)


@needs_cpu
def test_the_largest_numbers_of_half_precision():
    q, k, v = large_inputs("tiles", "float16")
    v = torch.full_like(v, torch.finfo(torch.float16).max)
    for kwargs in ({}, {"causal": True}):
        out, lse = run(q, k, -v, **kwargs)
        assert (out == -v[:, :, :1]).all()


@needs_cpu
def test_the_processors_float_mode_stays(monkeypatch):
    """MXCSR: subnormal numbers are neither flushed after a call nor, where the user wants it, kept."""

    def flushed():
        numpy_flushes = np.float32(1e-40) * np.float32(1.0) == 0.0
        assert numpy_flushes == ((torch.full((1,), 1e-40) * 1.0).item() == 0.0)
        return numpy_flushes

    q, k, v = large_inputs("tiles", "float32")
    expected = run(q, k, v)
    assert not flushed()
    if not torch.set_flush_denormal(True):
        return
    try:
        assert flushed()
        out, lse = run(q, k, v)
        assert flushed()
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close((out, lse), expected)
    assert not flushed()


@needs_cpu
@dtypes
def test_scale_zero_averages_the_values(dtype):
    q, k, v = large_inputs("tiles", dtype)
    out, lse = run(q, k, v, softmax_scale=0.0)
    mean = v.double().mean(2, keepdim=True).expand(out.shape)
    assert max_error(out, mean) <= TOLERANCE[dtype][1]
    assert max_error(lse, torch.full(lse.shape, math.log(k.shape[2]), dtype=torch.float64)) <= 1e-6


@needs_cpu
@large
def test_algebra(shape):
    """What holds for any softmax, without an oracle."""
    q, k, v = large_inputs(shape, "float64")
    out, lse = run(q, k, v)
    shifted = run(q, k, v, bias=torch.full((1, 1, q.shape[2], 1), 7.0))
    torch.testing.assert_close(shifted, (out, lse + 7.0))
    order = torch.randperm(k.shape[2])
    torch.testing.assert_close(run(q, k[:, :, order], v[:, :, order]), (out, lse))
    torch.testing.assert_close(run(q, k, 3.0 * v - 1.0)[0], 3.0 * out - 1.0)
    torch.testing.assert_close(run(2.0 * q, 0.5 * k, v), (out, lse))
    with_key = torch.cat([k, torch.zeros_like(k[:, :, :1])], 2), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    torch.testing.assert_close(run(q, *with_key), run(q, k, v, sinks=torch.zeros(q.shape[1])))
    halves = [run(q, k[:, :, half], v[:, :, half]) for half in (slice(0, 90), slice(90, None))]
    weights = torch.softmax(torch.stack([lse for _, lse in halves]), 0)
    merged = sum(weight[..., None] * out for weight, (out, _) in zip(weights, halves, strict=True))
    torch.testing.assert_close(merged, out)
