"""Rules of the forward pass where rows and keys fill many tiles: empty rows, numbers that are not finite, extremes."""

import math

import numpy as np
import pytest
import torch

from cases import Case, inputs
from fastattn import Mask
from forward import (
    INF,
    NAN,
    ROUNDS_WEIGHTS,
    TOLERANCE,
    assert_parity,
    assert_same_bits,
    dtypes,
    max_error,
    run,
)
from isas import needs_cpu

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """Subnormal inputs and outputs are numbers like others, but 0 where products are of pairs."""
    q, k, v = large_inputs("tiles", dtype)
    tiny = torch.finfo(v.dtype).smallest_normal
    assert_parity(run(q * 1e-4, k * 1e-4, v), q * 1e-4, k * 1e-4, v)
    v = (v * 0.0) + tiny / 16
    out, _ = run(q, k, v)
    expected = torch.zeros_like(out) if ROUNDS_WEIGHTS and dtype == "bfloat16" else v[:, :, :1].expand_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=0.0)


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
