"""Scores far from zero: their rounding must not grow with their size, only with their distance from the row's largest.
Those of these tests are exact in float32 up to the softmax: one column of k climbs in steps of powers of two."""

import pytest
import torch

import fastattn
from tests.support.isas import needs_cpu

BATCH, HEADS, DIM = 1, 2, 64
STEPS = {"8 a tile": 2.0**-4, "steeply": 2.0, "down": -2.0}
SCALES = {"default": None, "negative": -0.125, "tensor": torch.tensor([0.125, 0.25])}


def climbing(seqlen_q: int, seqlen_k: int, step: float, dtype=torch.float64):
    """q, k, v whose scores step from key to key, to thousands if it is steep, by whole multiples of 2^-7."""
    generator = torch.Generator().manual_seed(seqlen_q)
    q = torch.randint(-4, 5, (BATCH, HEADS, seqlen_q, DIM), generator=generator) / 16.0
    k = torch.randint(-4, 5, (BATCH, HEADS, seqlen_k, DIM), generator=generator) / 16.0
    q[..., 0], k[..., 0] = 8.0, step * torch.arange(seqlen_k)
    v = torch.randn(BATCH, HEADS, seqlen_k, DIM, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def error(found, expected) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def eager(q, k, v, scale):
    return torch.softmax(q @ k.mT * scale, -1) @ v


def with_gradients(function, q, k, v, dout):
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*tensors)
    dq, dk, dv = torch.autograd.grad(out, tensors, dout.to(out.dtype))
    return [out.detach(), dq[..., 1:], dk, dv]  # dq's first column is a difference of numbers in the thousands


@needs_cpu
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("seqlen_q", [1, 8, 80])
def test_forward_and_backward_are_as_exact_as_eager(seqlen_q, step, scale):
    exact = climbing(seqlen_q, 700, STEPS[step])
    rough, scale = [x.float() for x in exact], SCALES[scale]
    factor = 0.125 if scale is None else scale if isinstance(scale, float) else scale.double().view(1, -1, 1, 1)
    dout = torch.randn(BATCH, HEADS, seqlen_q, DIM, generator=torch.Generator().manual_seed(1))
    expected = with_gradients(lambda *x: eager(*x, factor), *exact, dout)
    of_eager = with_gradients(lambda *x: eager(*x, torch.as_tensor(factor).float()), *rough, dout)
    ours = with_gradients(lambda *x: fastattn.attention(*x, softmax_scale=scale), *rough, dout)
    ours[0] = fastattn.attention(*rough, softmax_scale=scale)  # few rows: by cpu.decode
    # dq and dk: where one key has all the weight, dS is a difference of what out, and so delta, has rounded.
    limits = {"out": 3, "dq": 12, "dk": 12, "dv": 3}
    for (name, limit), one, other, truth in zip(limits.items(), ours, of_eager, expected, strict=True):
        assert error(one, truth) < limit * error(other, truth) + 4e-7, name


@needs_cpu
@pytest.mark.parametrize("step", STEPS)
def test_edges_tangents_and_statistics_are_exact(step):
    exact = climbing(40, 300, STEPS[step])
    q, k, v = (x.float() for x in exact)
    indptr, indices = torch.arange(41) * 300, torch.arange(300).repeat(40)
    expected = eager(*exact, 0.125)
    assert error(fastattn.attention_csr(q, k, v, indptr, indices), expected) < 5e-7

    directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) for x in exact]
    _, truth = torch.func.jvp(lambda *x: eager(*x, 0.125), exact, tuple(directions))
    _, of_eager = torch.func.jvp(lambda *x: eager(*x, 0.125), (q, k, v), tuple(x.float() for x in directions))
    _, tangent = torch.func.jvp(fastattn.attention, (q, k, v), tuple(x.float() for x in directions))
    assert error(tangent, truth) < 3 * error(of_eager, truth) + 4e-7

    weights = torch.softmax(exact[0] @ exact[1].mT * 0.125, -1)
    found = fastattn.attention_stats(q, k, stats=("key_mass", "max"))
    assert error(found["key_mass"], weights.sum(2)) < 1e-6
    assert error(found["max"], weights.amax(-1)) < 1e-6


@needs_cpu
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_a_bias_of_finfo_min_is_less_than_half_of_it(seqlen_q):
    lowest = torch.finfo(torch.float32).min
    q, k, v = (x.float() for x in climbing(seqlen_q, 200, 2.0**-4))
    bias = torch.full((1, 1, seqlen_q, 200), lowest)
    bias[..., 70] = lowest / 2
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*tensors, bias=bias)
    torch.testing.assert_close(out, v[:, :, 70:71].expand_as(out), rtol=0, atol=0)
    (dv,) = torch.autograd.grad(out.sum(), v)
    assert (dv[:, :, 70] == seqlen_q).all() and dv.sum() == BATCH * HEADS * DIM * seqlen_q


@needs_cpu
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_a_row_of_finfo_min_alone_weighs_its_keys_alike(seqlen_q):
    q, k, v = (x.float() for x in climbing(seqlen_q, 200, 2.0**-4))
    bias = torch.full((1, 1, 1, 200), torch.finfo(torch.float32).min)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*tensors, bias=bias)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv, torch.full_like(v, seqlen_q / 200))


@needs_cpu
def test_a_query_near_the_largest_number_is_finite():
    q = torch.full((1, 1, 32, 16), 0.9 * torch.finfo(torch.float32).max)
    k, v = torch.randn(1, 1, 40, 16) * 1e-38, torch.randn(1, 1, 40, 16)
    out = fastattn.attention(q, k, v, softmax_scale=1.0)
    torch.testing.assert_close(out.double(), eager(q.double(), k.double(), v.double(), 1.0), rtol=1e-5, atol=1e-5)
