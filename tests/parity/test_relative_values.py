"""Shaw's relative values, alone and beside relative keys, in blocks of rows."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from fastattn import Mask, relative
from fastattn.transforms import blocks
from guarded import printed_by_child, reset_peak, status
from refusals import assert_refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows, heads and of the batch, and a last one that is shorter."""
    monkeypatch.setattr(blocks, "_ROWS", 5)
    monkeypatch.setattr(blocks, "_SCORES", 1)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def eager(q, k, v, keys, values, seen, scale, sinks=None):
    """(out, lse) of Shaw's formula; seen: bool [..., seqlen_q, seqlen_k]"""
    heads, (rows, columns) = q.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    distance = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)

    def vectors(table):
        furthest = table.shape[-2] // 2
        table = table.expand(heads, -1, -1) if table.dim() == 3 else table.expand(heads, *table.shape)
        return table[:, distance.clamp(-furthest, furthest) + furthest]

    scores = q @ k.mT
    if keys is not None:
        scores = scores + torch.einsum("bhid,hijd->bhij", q, vectors(keys))
    scores = (scores * scale).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    p = torch.softmax(scores, -1).masked_fill(blind, 0.0)[..., :columns]
    lse = torch.logsumexp(scores, -1).masked_fill(blind[..., 0], -torch.inf)
    return p @ v + torch.einsum("bhij,hijd->bhid", p, vectors(values)), lse


def seen_by(options, rows, columns):
    """What masks of `options` leave, [..., rows, columns]."""
    ones = torch.ones(2, 1, rows, columns, dtype=torch.bool)
    shift = columns - rows
    if options.get("causal"):
        ones = ones.tril(shift)
    if (mask := options.get("mask")) is not None:
        ones = ones & (mask if isinstance(mask, torch.Tensor) else mask.to_dense(rows, columns))
    return ones


OPTIONS = {
    "plain": lambda rows, columns: {},
    "causal": lambda rows, columns: {"causal": True},
    "lengths": lambda rows, columns: {"mask": Mask.lengths(torch.tensor([columns, columns // 2])), "causal": True},
    "tensor": lambda rows, columns: {"mask": torch.rand(2, 1, rows, columns) < 0.5, "sinks": double(4)},
    "blind": lambda rows, columns: {"mask": torch.arange(columns) < torch.arange(rows)[:, None] - 2},
    "learned scale": lambda rows, columns: {"softmax_scale": torch.rand(4).double().requires_grad_()},
}  # fmt: skip
TABLES = {
    "values": (None, (7, 5)),
    "keys and values": ((7, 6), (5, 5)),
    "a head": ((4, 3, 6), (4, 9, 5)),
    "shared": ((1, 3, 6), (1, 1, 5)),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("lengths", [(11, 11), (6, 17), (17, 6)])
def test_parity(tables, options, lengths):
    """out, lse and all gradients are those of the formula, in float64."""
    q, k, v = double(2, 4, lengths[0], 6), double(2, 2, lengths[1], 6), double(2, 2, lengths[1], 5)
    keys, values = (None if shape is None else double(*shape) for shape in TABLES[tables])
    options = OPTIONS[options](*lengths)
    scale = options.get("softmax_scale", torch.tensor(6**-0.5).double())
    scale = scale.view(-1, 1, 1) if scale.dim() else 6**-0.5
    sinks = options.get("sinks")
    leaves = [x for x in (q, k, v, keys, values, sinks, options.get("softmax_scale")) if x is not None]
    results = (
        fastattn.attention(q, k, v, bias=relative.shaw(keys, values), return_lse=True, **options),
        eager(q, k, v, keys, values, seen_by(options, *lengths), scale, sinks),
    )
    found = []
    for out, lse in results:
        loss = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).square().sum()
        found.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = (torch.randn(2, 9, 4, 6).to(dtype).transpose(1, 2) for _ in range(3))
    keys, values = torch.randn(2, 7, 6).to(dtype)
    out = fastattn.attention(q, k, v, bias=relative.shaw(keys, values), causal=True)
    exact = [x.double() for x in (q, k, v, keys, values)]
    expected = fastattn.attention(*exact[:3], bias=relative.shaw(*exact[3:]), causal=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_derivatives():
    q, k, v, keys, values = double(1, 2, 6, 3), double(1, 1, 6, 3), double(1, 1, 6, 2), double(5, 3), double(5, 2)

    def call(q, k, v, keys, values):
        return fastattn.attention(q, k, v, bias=relative.shaw(keys, values), causal=True)

    assert gradcheck(call, (q, k, v, keys, values))
    assert gradgradcheck(call, (q, k, v, keys, values))
    bias = relative.shaw(keys.detach(), values.detach())
    samples = torch.vmap(lambda x: fastattn.attention(x, k, v, bias=bias))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(samples[1], fastattn.attention(2 * q, k, v, bias=bias))


def test_dropout_drops_the_same_of_both():
    """Weights that are dropped take part neither in values nor in relative values."""
    q, k = (torch.randn(1, 2, 9, 4).double() for _ in range(2))
    v, options = torch.eye(9).double().expand(1, 2, 9, 9), {"dropout_p": 0.5, "seed": 3}
    weights = fastattn.attention(q, k, v, bias=relative.shaw(None, torch.zeros(1, 9).double()), **options)
    both = fastattn.attention(q, k, v, bias=relative.shaw(None, torch.ones(1, 9).double()), **options)
    torch.testing.assert_close(both, weights + weights.sum(-1, keepdim=True))
    assert (weights == 0.0).any()


@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 5, 0), (0, 4, 4), (2, 1, 1)])
def test_sizes_of_0_and_1(sizes):
    q, k, v = (double(sizes[0], 2, n, 6) for n in (sizes[1], sizes[2], sizes[2]))
    table = double(5, 6)
    out, lse = fastattn.attention(q, k, v, bias=relative.shaw(table, table), return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, table), materialize_grads=True))


def extra_bytes(seqlen: int) -> int:
    torch.set_num_threads(1)

    def step(seqlen):
        q, k, v = (torch.randn(1, 2, seqlen, 16).requires_grad_() for _ in range(3))
        tables = [torch.randn(65, 16).requires_grad_() for _ in range(2)]
        out = fastattn.attention(q, k, v, bias=relative.shaw(*tables), window_size=(1024, 0))
        torch.autograd.grad(out.sum(), (q, k, v, *tables))

    step(128)
    before = reset_peak()
    step(seqlen)
    return status("VmHWM") - before


@pytest.mark.slow
def test_memory_is_linear():
    """n x n would be 2 GiB."""
    assert printed_by_child("test_relative_values.extra_bytes(16384)") < 192 * 2**20


def test_refusals():
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    shaw = relative.shaw

    def call(bias, options):
        return lambda: fastattn.attention(q, k, v, bias=bias(), **options)

    for bias, options, error, pattern in (
        (lambda: shaw(), {}, TypeError, "give keys, values or both"),
        (lambda: shaw(values=torch.ones(4, 8)), {}, ValueError, "values has 4 distances; it must have an odd number"),
        (lambda: shaw(values=torch.ones(8)), {}, ValueError, r"values has shape \(8,\)"),
        (lambda: shaw(values=torch.ones(5, 7)), {}, ValueError, "values has 7 columns; it must have head_dim_v=8"),
        (lambda: shaw(torch.ones(5, 7), torch.ones(5, 8)), {}, ValueError, "keys has 7 columns; it must have head_dim"),
        (lambda: shaw(values=torch.ones(3, 5, 8)), {}, ValueError, "values is of 3 heads"),
        (lambda: shaw(values=torch.ones(5, 8)), {"backend": "cpu"}, fastattn.UnsupportedError, "no relative values"),
    ):  # fmt: skip
        assert_refused(call(bias, options), error, pattern)
