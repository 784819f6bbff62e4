"""The specification against something simpler still, and every rule of the semantics by itself.

The rules run on each backend that this machine has; the oracle here shares no code with fastattn.
"""

import math
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from fastattn import Mask, reference
from fastattn.backends import cpu
from fastattn.masks import dense

BACKENDS = ["reference"] + (["cpu"] if cpu.unavailable() is None else [])
backends = pytest.mark.parametrize("backend", BACKENDS)
INF = math.inf


def softmax_loop(q, k, v, sees, scale, softcap=0.0, bias=None, slopes=None, sinks=None):
    """out and lse, one scalar at a time; sees(b, h, i, j) says whether a query sees a key, bias is full size."""
    (batch, heads, seqlen_q, _), (_, heads_k, seqlen_k, _) = q.shape, k.shape
    out, lse = q.new_zeros(batch, heads, seqlen_q, v.shape[-1]), q.new_full((batch, heads, seqlen_q), -INF)
    for b, h, i in product(range(batch), range(heads), range(seqlen_q)):
        head_k, logits = h * heads_k // heads, {}
        for j in (j for j in range(seqlen_k) if sees(b, h, i, j)):
            score = scale * sum(x * y for x, y in zip(q[b, h, i].tolist(), k[b, head_k, j].tolist(), strict=True))
            score = softcap * math.tanh(score / softcap) if softcap else score
            score += 0.0 if bias is None else bias[b, h, i, j].item()
            logits[j] = score - (0.0 if slopes is None else slopes[h].item() * abs(i + seqlen_k - seqlen_q - j))
        terms = [*logits.values()] + ([] if sinks is None else [sinks[h].item()])
        if terms:
            lse[b, h, i] = math.log(sum(map(math.exp, terms)))
        for j, score in logits.items():
            out[b, h, i] += math.exp(score - lse[b, h, i].item()) * v[b, head_k, j]
    return out, lse


LENGTHS, PREFIXES, DOCUMENTS = [3, 0], [1, 4], [[0, 0, 1, 1, 1], [5, 6, 6, 7, 9]]
ANY = lambda b, h, i, j: True  # noqa: E731
# name: arguments of attention(), what a query sees (seqlen_q=4, seqlen_k=5 or as given), shapes (H, Hk, Sq, Sk, D, Dv)
LOOP_CASES = {
    "plain": ({}, ANY, (2, 2, 4, 5, 3, 3)),
    "gqa": ({}, ANY, (4, 2, 4, 5, 3, 3)),
    "mqa": ({}, ANY, (3, 1, 4, 5, 3, 3)),
    "head_dim_v": ({}, ANY, (2, 2, 4, 5, 3, 7)),
    "scale": ({"softmax_scale": -1.5}, ANY, (2, 2, 4, 5, 3, 3)),
    "scale 0": ({"softmax_scale": 0.0}, ANY, (2, 2, 4, 5, 3, 3)),
    "softcap": ({"softcap": 0.7}, ANY, (2, 2, 4, 5, 3, 3)),
    "causal": ({"causal": True}, lambda b, h, i, j: j <= i + 1, (2, 1, 4, 5, 3, 3)),
    "causal long q": ({"causal": True}, lambda b, h, i, j: j <= i - 2, (2, 1, 5, 3, 3, 3)),
    "top-left": ({"mask": Mask.causal("top_left")}, lambda b, h, i, j: j <= i, (2, 1, 4, 5, 3, 3)),
    "window": ({"window_size": (1, 0)}, lambda b, h, i, j: i <= j <= i + 1, (2, 1, 4, 5, 3, 3)),
    "open window": ({"window_size": (None, 2)}, lambda b, h, i, j: j <= i + 3, (2, 1, 4, 5, 3, 3)),
    "lengths": ({"mask": Mask.lengths(torch.tensor(LENGTHS))}, lambda b, h, i, j: j < LENGTHS[b], (2, 1, 4, 5, 3, 3)),
    "documents": (
        {"mask": Mask.documents(torch.tensor(DOCUMENTS)), "causal": True},
        lambda b, h, i, j: DOCUMENTS[b][i] == DOCUMENTS[b][j] and j <= i,
        (2, 1, 5, 5, 3, 3),
    ),
    "prefix-LM": (
        {"mask": Mask.prefix_lm(torch.tensor(PREFIXES), 4, 5)},
        lambda b, h, i, j: j < PREFIXES[b] or j <= i + 1,
        (2, 1, 4, 5, 3, 3),
    ),
    "bool tensor": (
        {"mask": (torch.arange(20).view(4, 5) % 3 > 0)},
        lambda b, h, i, j: (i * 5 + j) % 3 > 0,
        (2, 1, 4, 5, 3, 3),
    ),
    "everything": (
        {"mask": torch.arange(5) != 2, "causal": True, "window_size": (2, 9), "softcap": 0.9, "softmax_scale": 0.4},
        lambda b, h, i, j: j != 2 and i - 1 <= j <= i + 1,
        (4, 2, 4, 5, 3, 2),
    ),
}


@pytest.mark.parametrize("extras", ["none", "bias", "alibi", "sinks", "all"])
@pytest.mark.parametrize("name", LOOP_CASES)
def test_equals_a_scalar_loop(name, extras):
    kwargs, sees, (h, hk, sq, sk, d, dv) = LOOP_CASES[name]
    q, k, v = _randn(2, h, sq, d), _randn(2, hk, sk, d), _randn(2, hk, sk, dv)
    bias = _randn(2, 1, sq, sk).masked_fill(torch.rand(2, 1, sq, sk) < 0.2, -INF)
    slopes, sinks = torch.rand(h, dtype=torch.float64), _randn(h)
    bias, slopes, sinks = (
        x if extras in (extra, "all") else None for extra, x in (("bias", bias), ("alibi", slopes), ("sinks", sinks))
    )
    out, lse = fastattn.attention(
        q, k, v, **kwargs, bias=bias, alibi_slopes=slopes, sinks=sinks, return_lse=True, backend="reference"
    )
    full_bias = None if bias is None else bias.expand(2, h, sq, sk)
    seen = sees if bias is None else lambda b, h, i, j: sees(b, h, i, j) and bias[b, 0, i, j] != -INF
    expected_out, expected_lse = softmax_loop(
        q, k, v, seen, kwargs.get("softmax_scale", d**-0.5), kwargs.get("softcap", 0.0), full_bias, slopes, sinks
    )
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


# --- derivatives -----------------------------------------------------------------------------------------------------

VISIBLE = {
    "all": None,
    "causal": dense(-INF, 1, None, None, 3, 4, "cpu"),
    "holes": torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool),
    "empty row": torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool),
}
SCORES = {"plain": {}, "softcap": {"softcap": 0.8, "softmax_scale": 0.7}, "dropout": {"dropout_p": 0.3, "seed": 5}}


def _differentiable_inputs(alibi_rank=1):
    shapes = [(2, 4, 3, 3), (2, 2, 4, 3), (2, 2, 4, 2), (1, 4, 1, 4), (4,) if alibi_rank == 1 else (2, 4), (4,)]
    return [_randn(*shape).requires_grad_() for shape in shapes]


def _reference(visible, kwargs):
    def function(q, k, v, bias, alibi_slopes, sinks=None):
        return reference.attention(
            q, k, v, visible=visible, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, **kwargs
        )  # fmt: skip

    return function


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("visible", VISIBLE)
def test_gradcheck_of_out_and_lse(visible, scores):
    function = _reference(VISIBLE[visible], SCORES[scores])
    assert gradcheck(function, _differentiable_inputs())  # the sinks keep lse finite in an empty row


@pytest.mark.parametrize("visible", ["all", "causal", "holes"])
def test_gradcheck_without_sinks(visible):
    assert gradcheck(_reference(VISIBLE[visible], {}), _differentiable_inputs(alibi_rank=2)[:5])


@pytest.mark.parametrize("visible", ["all", "empty row"])
def test_second_derivatives(visible):
    assert gradgradcheck(_reference(VISIBLE[visible], {"softcap": 0.8}), _differentiable_inputs())


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("visible", VISIBLE)
def test_explicit_backward_equals_autograd(visible, scores, with_dlse, sinks):
    names = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
    inputs = dict(zip(names, _differentiable_inputs(), strict=True))
    if not sinks:
        inputs.pop("sinks")
    kwargs = {**inputs, "visible": VISIBLE[visible], **SCORES[scores]}
    out, lse = reference.attention(**kwargs)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if with_dlse else None
    outputs, cotangents = ((out, lse), (dout, dlse)) if with_dlse else ((out,), (dout,))
    expected = torch.autograd.grad(outputs, inputs.values(), cotangents)
    with torch.no_grad():
        actual = reference.backward(dout, dlse=dlse, **kwargs)
    assert actual.keys() == inputs.keys()
    for name, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(actual[name], gradient, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_explicit_backward_keeps_shape_and_dtype():
    shapes = {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 6), "bias": (3, 5), "alibi_slopes": (2, 4)}
    inputs = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    grads = reference.backward(torch.randn(2, 4, 3, 6, dtype=torch.bfloat16), **inputs)
    assert {name: (grad.shape, grad.dtype) for name, grad in grads.items()} == {
        name: (x.shape, x.dtype) for name, x in inputs.items()
    }


def test_gradients_of_a_query_that_sees_nothing_are_zero():
    q, k, v = (_randn(1, 2, 3, 4).requires_grad_() for _ in range(3))
    bias = torch.zeros(3, 3, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([True, False, True])[:, None]
    out, lse = fastattn.attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    grads = torch.autograd.grad((out.sum() + lse[:, :, [0, 2]].sum()), (q, k, v, bias))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][:, :, 1] == 0).all() and (grads[3][1] == 0).all()
    alone = torch.autograd.grad(fastattn.attention(q[:, :, 1:2], k, v, mask=torch.tensor(False)).sum(), (q, k, v))
    assert all((grad == 0).all() for grad in alone)


# --- rules -----------------------------------------------------------------------------------------------------------


def seen(backend, seqlen_q, seqlen_k, **kwargs) -> list[str]:
    """What each query sees, as rows of 0 and 1, read off the result: equal scores, values = one-hot rows."""
    q, k = torch.zeros(1, 1, seqlen_q, 4), torch.zeros(1, 1, seqlen_k, 4)
    out = fastattn.attention(q, k, torch.eye(seqlen_k)[None, None], backend=backend, **kwargs)[0, 0]
    return ["".join(str(int(x > 0)) for x in row) for row in out.tolist()]


@backends
def test_order_scale_softcap_bias_alibi(backend):
    """With one key, lse is the score itself."""
    q, k, v = torch.tensor([[[[3.0]]]]), torch.tensor([[[[2.0]]]]), torch.ones(1, 1, 1, 1)
    kwargs = {"softmax_scale": 0.5, "softcap": 2.0, "bias": torch.tensor(10.0), "alibi_slopes": torch.tensor([0.25])}
    _, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=backend)
    assert lse.item() == pytest.approx(2.0 * math.tanh(0.5 * 6.0 / 2.0) + 10.0, rel=1e-6)  # ALiBi distance 0
    _, lse = fastattn.attention(q.expand(1, 1, 4, 1), k, v, **kwargs, return_lse=True, backend=backend)
    expected = 2.0 * math.tanh(1.5) + 10.0 - 0.25 * torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])  # |i + 1 - 4 - 0|
    torch.testing.assert_close(lse, expected)


@backends
def test_mask_comes_after_softcap_and_bias(backend):
    assert seen(backend, 1, 4, softcap=1.0, bias=torch.tensor([50.0, 0.0, -INF, 0.0]), mask=torch.arange(4) > 0) == [
        "0101"
    ]


def test_dropout_comes_after_softmax():
    q, k, v = (torch.randn(2, 3, 20, 8) for _ in range(3))
    kwargs = {"dropout_p": 0.4, "seed": 11, "return_lse": True, "backend": "reference"}
    out, lse = fastattn.attention(q, k, v, sinks=torch.zeros(3), **kwargs)
    _, lse_without = fastattn.attention(q, k, v, sinks=torch.zeros(3), return_lse=True, backend="reference")
    assert torch.equal(lse, lse_without)
    weights = torch.exp(q @ k.mT * 8**-0.5 - lse[..., None]) * fastattn.dropout_mask(2, 3, 20, 20, 0.4, 11) / 0.6
    torch.testing.assert_close(out, weights @ v)


@backends
def test_causal_is_bottom_right(backend):
    assert seen(backend, 3, 5, causal=True) == ["11100", "11110", "11111"]
    assert seen(backend, 5, 3, causal=True) == ["000", "000", "100", "110", "111"]
    assert seen(backend, 3, 3, causal=True) == ["100", "110", "111"]
    assert seen(backend, 1, 4, causal=True) == ["1111"]  # decoding with a cache


@backends
def test_top_left_is_offered(backend):
    top_left = Mask.causal("top_left")
    assert seen(backend, 3, 5, mask=top_left) == ["10000", "11000", "11100"]
    assert seen(backend, 5, 3, mask=top_left) == ["100", "110", "111", "111", "111"]


@backends
def test_window_counts_inclusively(backend):
    assert seen(backend, 4, 4, window_size=(0, 0)) == ["1000", "0100", "0010", "0001"]
    assert seen(backend, 4, 4, window_size=(1, 0)) == ["1000", "1100", "0110", "0011"]
    assert seen(backend, 4, 4, window_size=(None, 1)) == ["1100", "1110", "1111", "1111"]
    assert seen(backend, 4, 4, window_size=(1, None)) == ["1111", "1111", "0111", "0011"]
    assert seen(backend, 2, 5, window_size=(2, 0)) == ["01110", "00111"]  # the last query is at the last key
    assert seen(backend, 4, 2, window_size=(0, 1)) == ["00", "10", "11", "01"]
    assert seen(backend, 4, 4, window_size=(3, 0)) == seen(backend, 4, 4, causal=True)


@backends
def test_masks_combine(backend):
    mask = torch.tensor([1, 1, 0, 1], dtype=torch.bool)
    assert seen(backend, 4, 4, mask=mask, causal=True, window_size=(2, 5)) == ["1000", "1100", "1100", "0101"]
    assert seen(backend, 4, 4, mask=Mask.lengths(torch.tensor([3])), causal=True) == ["1000", "1100", "1110", "1110"]


EMPTY_ROWS = {
    "bool": {"mask": torch.tensor([True, False, True])[:, None]},
    "-inf bias": {"bias": torch.tensor([0.0, -INF, 0.0])[:, None]},
    "interval": {"mask": Mask.intervals(torch.tensor([[[0, 2, 0]]]), torch.tensor([[[4, 2, 4]]]))},
    "reversed interval": {"mask": Mask.intervals(torch.tensor([[[0, 9, 0]]]), torch.tensor([[[9, -3, 9]]]))},
    "mask and bias": {"mask": torch.arange(4) < 2, "bias": torch.tensor([[0.0] * 4, [-INF, -INF, 0, 0], [0.0] * 4])},
}


@backends
@pytest.mark.parametrize("kind", EMPTY_ROWS)
def test_query_that_sees_no_key(kind, backend):
    q, k, v = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    out, lse = fastattn.attention(q, k, v, **EMPTY_ROWS[kind], return_lse=True, backend=backend)
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -INF).all()
    assert (out[:, :, [0, 2]] != 0).all() and torch.isfinite(lse[:, :, [0, 2]]).all()


@backends
def test_rows_above_a_causal_triangle_are_empty(backend):
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 3, 8)
    out, lse = fastattn.attention(q, k, k, causal=True, return_lse=True, backend=backend)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -INF).all() and torch.isfinite(lse[:, :, 2:]).all()


@backends
@pytest.mark.parametrize("kind", EMPTY_ROWS)
def test_sink_alone_in_the_denominator(kind, backend):
    q, k, v = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    sinks = torch.tensor([-1.5, 40.0])
    out, lse = fastattn.attention(q, k, v, **EMPTY_ROWS[kind], sinks=sinks, return_lse=True, backend=backend)
    assert (out[:, :, 1] == 0).all() and torch.equal(lse[:, :, 1], sinks.expand(2, 2))


@backends
def test_sink_takes_part_of_the_weight(backend):
    """A sink is a key with that logit and a zero value; -inf is no sink."""
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    with_sink, sink_lse = fastattn.attention(q, k, v, sinks=torch.ones(2), return_lse=True, backend=backend)
    torch.testing.assert_close(sink_lse, torch.logaddexp(lse, torch.ones(())))
    torch.testing.assert_close(with_sink, out * torch.exp(lse - sink_lse)[..., None])
    torch.testing.assert_close(fastattn.attention(q, k, v, sinks=torch.full((2,), -INF), backend=backend), out)


HIDING = {  # ways to hide keys 5 and 6 of 7 from every query
    "bool": {"mask": torch.arange(7) < 5},
    "bool and causal": {"mask": torch.arange(7) < 5, "causal": True},
    "lengths": {"mask": Mask.lengths(torch.tensor([5, 5]))},
    "window": {"mask": Mask.window(None, 0, "top_left")},  # seqlen_q=5
    "-inf bias": {"bias": torch.tensor([0.0] * 5 + [-INF] * 2)},
}


@backends
@pytest.mark.parametrize("poison", [math.nan, INF, -INF, 3e38])
@pytest.mark.parametrize("kind", HIDING)
def test_masked_keys_and_values_never_leak(kind, poison, backend):
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    clean = fastattn.attention(q, k, v, **HIDING[kind], return_lse=True, backend=backend)
    for tensors in ((k,), (v,), (k, v)):
        poisoned = [_poison(x, poison) if any(x is t for t in tensors) else x for x in (k, v)]
        for actual, expected in zip(
            fastattn.attention(q, *poisoned, **HIDING[kind], return_lse=True, backend=backend), clean, strict=True
        ):
            assert torch.equal(actual, expected)


@backends
def test_visible_nan_stays_visible(backend):
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    v[0, 0, 2, 3] = math.nan
    out = fastattn.attention(q, k, v, causal=True, backend=backend)[0, 0]
    assert torch.isnan(out).nonzero().tolist() == [[2, 3], [3, 3]]
    k[0, 0, 2, 0] = math.nan
    out = fastattn.attention(q, k, torch.ones_like(v), causal=True, backend=backend)[0, 0]
    assert torch.isnan(out).all(1).tolist() == [False, False, True, True] and not torch.isnan(out[:2]).any()


@backends
@pytest.mark.parametrize("num_heads, num_heads_k", [(6, 6), (6, 3), (6, 2), (6, 1)])
def test_query_head_reads_its_group(num_heads, num_heads_k, backend):
    q, k = torch.randn(2, num_heads, 3, 8), torch.randn(2, num_heads_k, 5, 8)
    v = torch.arange(num_heads_k, dtype=torch.float32)[None, :, None, None].expand(2, num_heads_k, 5, 8)
    out = fastattn.attention(q, k, v, backend=backend)
    expected = torch.arange(num_heads) // (num_heads // num_heads_k)
    torch.testing.assert_close(out, expected[None, :, None, None].float().expand_as(out))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_out_and_lse(dtype, backend):
    q = torch.randn(1, 2, 3, 8, dtype=dtype)
    out, lse = fastattn.attention(q, q, q, return_lse=True, backend=backend)
    assert out.dtype == dtype and out.shape == q.shape
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.shape == q.shape[:3]


@backends
def test_half_precision_scores_are_float32(backend):
    """Scores beyond float16's largest number, a sum beyond bfloat16's 8 bits."""
    q = torch.full((1, 1, 1, 64), 200.0, dtype=torch.float16)
    k = torch.stack([q, q * 0.5], 2).squeeze(3)
    out, lse = fastattn.attention(q, k, k, softmax_scale=1.0, return_lse=True, backend=backend)
    assert torch.equal(out, q) and lse.item() == pytest.approx(200.0 * 200.0 * 64, rel=1e-6)
    ones = torch.ones(1, 1, 1000, 8, dtype=torch.bfloat16)
    out, lse = fastattn.attention(ones, ones, ones, return_lse=True, backend=backend)
    assert (out == 1.0).all()
    torch.testing.assert_close(lse, torch.full((1, 1, 1000), 8**0.5 + math.log(1000)), rtol=1e-6, atol=0.0)


@backends
def test_weights_sum_to_one_at_any_magnitude(backend):
    """exp(score - lse) does not: lse is rounded."""
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    for offset in (1e4, -1e7, 1e30, -1e38):
        bias = torch.full((4, 4), offset)
        ones = fastattn.attention(q, k, torch.ones_like(v), bias=bias, backend=backend)
        torch.testing.assert_close(ones, torch.ones_like(v))
    ones = fastattn.attention(1e3 * q, 1e3 * k, torch.ones_like(v), backend=backend)
    torch.testing.assert_close(ones, torch.ones_like(v))


@backends
@pytest.mark.parametrize("memory", ["bhsd", "bshd"])
def test_out_follows_the_memory_order_of_q(memory, backend):
    q = torch.randn(2, 5, 3, 8).transpose(1, 2) if memory == "bshd" else torch.randn(2, 3, 5, 8)
    k = torch.randn(2, 3, 7, 8)
    out = fastattn.attention(q, k, k, backend=backend)
    assert out.stride() == q.stride()


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _poison(x, value):
    return x.index_fill(2, torch.tensor([5, 6]), value)
