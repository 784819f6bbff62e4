"""The extension's own entries: negated views, fields by name, wrong arguments, sizes that overflow, signatures."""

import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn.backends import cpu
from fastattn.layouts.edges import Edges
from fastattn.terms import Terms

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")
VIEWS = {
    "contiguous": lambda x: torch._neg_view(-x),
    "imaginary": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "odd strides": lambda x: torch._neg_view(torch.stack([-x] * 3, -1).flatten(-2))[..., ::3],
    "as_strided": lambda x: (z := torch.complex(x * 0, -x).conj().imag).as_strided(z.shape, z.stride()),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "alibi_slopes", "sinks", "softmax_scale"])
def test_negated_views_keep_their_sign(name, view):
    tensors = {x: torch.randn(1, 2, 5, 8) for x in "qkv"}
    tensors |= {"bias": torch.randn(2, 5, 5), "alibi_slopes": torch.rand(2), "sinks": torch.randn(2)}
    tensors |= {"softmax_scale": torch.rand(2)}
    dout = torch.randn(1, 2, 5, 8)

    def results(tensors, dout):
        leaves = {x: t.detach().requires_grad_() for x, t in tensors.items()}
        out = fastattn.attention(**leaves, backend="cpu")
        return [out, *torch.autograd.grad(out, list(leaves.values()), dout)]

    expected = results(tensors, dout)
    negated = VIEWS[view](tensors[name])
    assert negated.is_neg() and torch.equal(negated, tensors[name])
    for actual in (results(tensors | {name: negated}, dout), results(tensors, VIEWS[view](dout))):
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_a_tensor_that_stays_negated_is_an_error():
    class Stubborn(torch.Tensor):
        def is_neg(self):
            return True

        def resolve_neg(self):
            return self

    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match="stays negated"):
        terms = Terms(softmax_scale=0.5, diagonal_lo=0, diagonal_hi=0)
        cpu._C.forward(q.as_subclass(Stubborn), q, q, q.clone(), None, None, None, terms, 1)


@pytest.mark.parametrize("kind, fields", [("Terms", Terms._fields), ("Edges", Edges._fields)])
def test_fields_are_bound_by_name(kind, fields):
    try:
        for name in fields:
            with pytest.raises(ValueError, match=f"{kind}: the field {name} is missing"):
                cpu._C.bind_fields(kind, [x for x in fields if x != name])
        with pytest.raises(ValueError, match="the field colour is unknown"):
            cpu._C.bind_fields(kind, [*fields, "colour"])
        with pytest.raises(ValueError, match="Nothing"):
            cpu._C.bind_fields("Nothing", fields)
    finally:
        cpu._C.bind_fields(kind, fields)


HUGE = """
import torch
from fastattn.backends import cpu
from fastattn.layouts.edges import Edges
from fastattn.terms import Terms
terms, n = Terms(softmax_scale=0.5, diagonal_lo=0, diagonal_hi=0), {size}
def x(*shape): return torch.zeros(1).expand(*shape)
def refused(function, *arguments):
    try: function(*arguments, 1)
    except (ValueError, MemoryError): return
    raise AssertionError(function)
b, h, sq, d, dv = {shape}
q, k, v, out, parts = x(b, h, sq, d), x(b, h, 1, d), x(b, h, 1, dv), x(b, h, sq, dv), x(b, h, sq, 2)
edges = Edges(torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long), None, 0.5)
refused(cpu._C.forward, q, k, v, out, None, None, None, terms)
refused(cpu._C.decode, q, k, v, out, None, None, None, terms)
refused(cpu._C.csr_forward, q, k, v, out, None, None, None, edges)
grads = Terms(*[None] * len(Terms._fields))
refused(cpu._C.backward, q, k, v, out, parts, terms, out, None, q, k, v, grads)
refused(cpu._C.csr_backward, q, k, v, out, parts, edges, out, None, q, k, v, Edges(None, None, None, None))
"""


@pytest.mark.parametrize("shape", ["1, 1, 1, n, 1", "1, 1, 1, 1, n", "n, 1, 1, 1, 1", "1, n, 1, 1, 1", "1, 1, n, 1, 1"])
@pytest.mark.parametrize("size", ["2**60", "2**62 // 3", "2**61"])
def test_sizes_that_overflow_are_refused(size, shape):
    code = HUGE.format(size=size, shape=shape)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]


def test_signature():
    def key(b, h, sq, sk, d, *extras, dtype=torch.float32):
        qkv = (torch.zeros(b, h, n, d, dtype=dtype) for n in (sq, sk, sk))
        return cpu._C.signature(*qkv, *extras)

    first, lengths = key(2, 4, 5, 7, 8)
    assert lengths == (2, 5, 7)
    assert key(3, 4, 6, 9, 8) == (first, (3, 6, 9))
    for other in (key(2, 3, 5, 7, 8), key(2, 4, 5, 7, 9), key(2, 4, 5, 7, 8, dtype=torch.float64)):
        assert other[0] != first
    bias = key(2, 4, 5, 7, 8, torch.zeros(4, 5, 7), None)[0]
    assert key(2, 4, 6, 9, 8, torch.zeros(4, 6, 9), None)[0] == bias
    wrong = [torch.zeros(4, 6, 8), torch.zeros(1, 6, 9), torch.zeros(6, 9), torch.zeros(4, 6, 9).half(), None]
    assert all(key(2, 4, 6, 9, 8, x, None)[0] != bias for x in wrong)
    assert key(2, 4, 5, 7, 8, torch.zeros(2, 2, device="meta")) is None
    assert key(2, 4, 5, 7, 8, torch.zeros(1, 1, 1, 1, 1)) is None
    q, k = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8)
    assert cpu._C.signature(q, k, k[:, :, :6]) is None and cpu._C.signature(q, k[:1], k[:1]) is None
    assert cpu._C.signature(q[0], k, k) is None and cpu._C.signature(q, k, 5) is None


def test_wrong_arguments_of_the_extension_are_errors():
    q = torch.randn(1, 1, 4, 8)
    parts = torch.zeros(1, 1, 4, 2)
    terms = Terms(softmax_scale=1.0, diagonal_lo=-100, diagonal_hi=100)
    none = Terms(*[None] * len(Terms._fields))
    good = [q, q, q, q, parts, terms, q, None, q, q, q, none, 1]
    cpu._C.backward(*[x.clone() if isinstance(x, torch.Tensor) else x for x in good])
    for position, wrong, message in (
        (4, None, "lse_parts must be given"),
        (3, q.double(), "out has another dtype"),
        (6, q[:, :, :2], "dout has a size"),
        (7, parts, "dlse has a wrong number"),
        (8, q.double(), "dq has another dtype"),
        (9, q[..., :4], "dk has a size"),
        (5, none, "must be real number"),
        (11, None, "must be the Terms"),
        (11, none._replace(bias=q.new_zeros(4).double()), "dbias has no tensor"),
        (11, none._replace(sinks=q.new_zeros(1).double()), "dsinks has no tensor"),
        (11, none._replace(softmax_scale=q.new_zeros(1).double()), "dsoftmax_scale has no tensor"),
        (11, none._replace(mask=q.new_zeros(1).double()), "dmask is no gradient"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            cpu._C.backward(*good[:position], wrong, *good[position + 1 :])
    good[5] = terms._replace(bias=q.new_zeros(4), sinks=q.new_zeros(1))
    for wrong, message in (
        (none._replace(bias=q.new_zeros(4, 4).double()), "dbias has a wrong dtype"),
        (none._replace(bias=q.new_zeros(4)), "dbias has a wrong dtype"),
        (none._replace(bias=q.new_zeros(1).expand(4)), "dbias must be contiguous"),
        (none._replace(sinks=q.new_zeros(1)), "dsinks has a wrong dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu._C.backward(*good[:11], wrong, 1)
    with pytest.raises(ValueError, match="takes 13 arguments"):
        cpu._C.backward(*good[:-1])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["q", "k", "v", "edge_bias"])
def test_negated_views_along_edges(name, view):
    tensors = {x: torch.randn(1, 2, 4, 8) for x in "qkv"} | {"edge_bias": torch.randn(2, 6)}
    lists = {"indptr": torch.tensor([0, 2, 2, 5, 6]), "indices": torch.tensor([1, 3, 0, 2, 3, 2])}
    expected = fastattn.attention_csr(**tensors, **lists)
    negated = VIEWS[view](tensors[name])
    assert negated.is_neg() and torch.equal(negated, tensors[name])
    assert torch.equal(fastattn.attention_csr(**tensors | {name: negated}, **lists), expected)


def test_fields_are_found_by_name_wherever_they_stand():
    """In a process of its own: places are learned once."""
    code = """
import torch, fastattn
from collections import namedtuple
from fastattn.backends import cpu
from fastattn.terms import Terms

q = torch.randn(1, 2, 5, 8)
expected = fastattn.attention(q, q, q, causal=True, bias=torch.ones(5, 5) / 3, sinks=torch.ones(2))
Backwards = namedtuple("Backwards", Terms._fields[::-1])
cpu._C.bind_fields("Terms", Backwards._fields)
values = dict(softmax_scale=8**-0.5, diagonal_hi=0, bias=torch.ones(5, 5) / 3, sinks=torch.ones(2))
terms = Backwards(**Terms(**values)._asdict())
out = torch.empty_like(q)
cpu._C.decode(q, q, q, out, None, None, None, terms, 1)
assert torch.equal(out, expected)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
