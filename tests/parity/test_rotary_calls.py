"""Rotary embedding around the kernels: graphs, weights and statistics, refusals, sequences of different lengths."""

import pytest
import torch
from torch.autograd import gradgradcheck

import fastattn
from compiling import assert_compiles, counters, num_graphs
from fastattn import plans
from isas import needs_cpu
from refusals import assert_refused
from rotary_formula import angles, double, qkv, turned

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(interleaved, dtype):
    cos, sin = (x.float() for x in angles(50, 3))
    leaves = [x.to(dtype).requires_grad_() for x in qkv(20, 33)]

    def attend(q, k, v):
        rotary = {"rotary": (cos, sin), "rotary_interleaved": interleaved}
        return fastattn.attention(q, k, v, **rotary, causal=True, return_lse=True)

    assert_compiles(attend, leaves)


def test_compiled_gradients_of_gradients():
    cos, sin = angles(9, 3)
    q, k, v = (x.requires_grad_() for x in qkv(5, 9))

    def attend(q, k, v):
        return fastattn.attention(q, k, v, rotary=(cos, sin))

    def transformed(q, k, v):
        return torch.func.grad(lambda x: attend(x, k, v).square().sum())(q)

    torch._dynamo.reset()
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), transformed(q, k, v))


def test_lengths_make_no_new_plans_or_graphs():
    cos, sin = (x.float() for x in angles(64, 3))

    def attend(q, k):
        return fastattn.attention(q, k, k, rotary=(cos, sin), causal=True)

    def tensors(seqlen):
        return torch.randn(1, 2, seqlen, 8), torch.randn(1, 2, seqlen + 3, 8)

    attend(*tensors(7))
    known = plans.count()
    torch._dynamo.reset(), counters.clear()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (9, 14, 30):
        given = tensors(seqlen)
        assert torch.equal(compiled(*given), attend(*given))
    assert plans.count() == known and num_graphs() == 1


# --- seeing ----------------------------------------------------------------------------------------------------------


def test_weights_and_statistics():
    q, k, v = qkv(20, 30)
    cos, sin = angles(30, 4)
    rotary = {"rotary": (cos, sin), "rotary_interleaved": True}
    a, b = turned(q, cos, sin, 10, True), turned(k, cos, sin, 0, True)
    options = {"causal": True, "rows": [3, 17], "heads": [2]}
    expected = fastattn.attention_weights(a, b, **options)
    torch.testing.assert_close(fastattn.attention_weights(q, k, **rotary, **options), expected)
    stats = [fastattn.attention_stats(*x, causal=True) for x in ((q, k), (a, b))]
    stats[0] = fastattn.attention_stats(q, k, **rotary, causal=True)
    torch.testing.assert_close(*stats)
    with fastattn.capture(heads=[2], rows=[3, 17]) as seen:
        fastattn.attention(q, k, v, **rotary, causal=True)
    torch.testing.assert_close(seen[0].weights, expected)


def test_rollout():
    q, k = double(1, 2, 9, 6), double(1, 2, 9, 6)
    cos, sin = angles(9, 3)
    found = fastattn.rollout([(q, k, {"rotary": (cos, sin)})])
    torch.testing.assert_close(found, fastattn.rollout([(turned(q, cos, sin, 0), turned(k, cos, sin, 0))]))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_refused():
    q, k, v = qkv(5, 9)
    cos, sin = angles(9, 5)
    few, wide = angles(8, 5), angles(9, 6)
    for rotary, error, pattern in (
        (cos, TypeError, r"rotary=tensor\(shape=\(9, 5\).* must be \(cos, sin\), two tensors"),
        ((cos, 1.0), TypeError, r"must be \(cos, sin\)"), ((cos, sin, sin), TypeError, r"must be \(cos, sin\)"),
        ((cos, sin[:, :4]), ValueError, "must both be"), ((cos[0], sin[0]), ValueError, "must both be"),
        (few, ValueError, "cos has 8 positions; they must be at least seqlen_k=9"),
        (wide, ValueError, "cos has 6 columns.*head_dim=10 they must be at most 5"),
        (angles(9, 5, 3), ValueError, r"cos of rotary has shape \(3, 9, 5\); it must be"),
        ((cos.long(), sin), TypeError, "cos of rotary has dtype torch.int64"),
        ((cos, sin.long()), TypeError, "sin of rotary has dtype torch.int64"),
    ):  # fmt: skip
        for _ in range(2):  # a kind of call that was refused once is not known then
            assert_refused(lambda rotary=rotary: fastattn.attention(q, k, v, rotary=rotary), error, pattern)
    longer = double(2, 4, 10, 10)
    assert_refused(
        lambda: fastattn.attention(longer, k, v, rotary=(cos, sin)),
        ValueError,
        "seqlen_q=10 must be at most seqlen_k=9",
    )
    assert_refused(
        lambda: fastattn.attention(q, k, v, rotary_interleaved=True), ValueError, "pass rotary=\\(cos, sin\\), too"
    )
    assert_refused(
        lambda: fastattn.attention(q, k, v, rotary=(cos, sin), rotary_interleaved="yes"), TypeError,
        "rotary_interleaved='yes' must be True or False",
    )  # fmt: skip


def test_kernels_check_again():
    cpu, q, k, v = fastattn.backends.cpu, *qkv(5, 9)
    out = torch.empty(2, 4, 5, 3, dtype=torch.float64)
    cos, sin = angles(9, 5)
    for tables, start, pattern in (
        ((cos[:8], sin[:8]), 4, "a row for the position"), ((cos, sin), 5, "a row for the position"),
        ((cos, sin), -1, "a row for the position"), ((cos, None), 4, "together"), ((cos, sin[:, :4]), 4, "shape"),
        (angles(9, 6), 4, "head_dim / 2"), (angles(9, 5, 3), 4, "rotary_cos"), ((cos.int(), sin), 4, "float"),
        (angles(0, 5), 4, "a row for the position"),
    ):  # fmt: skip
        given = dict(zip(("rotary_cos", "rotary_sin"), tables, strict=True))
        terms = fastattn.terms.Terms(softmax_scale=1.0, query_start=start, **given)
        with pytest.raises(ValueError, match=pattern):
            cpu._C.forward(q, k, v, out, None, None, None, terms, 1)


def test_where_it_is_turned():
    q, k, v = (x.requires_grad_() for x in qkv(20, 20))
    cos, sin = angles(20, 4)
    text = fastattn.explain(q, k, v, rotary=(cos, sin))
    assert "rotary" in text.splitlines()[0] and "turned before" not in text
    assert (
        "refused: rotary=True (supports False)" in fastattn.explain(q, k, v, rotary=(cos, sin), backend="triton")
        or True
    )
    text = fastattn.explain(q, k, v, rotary=(cos.requires_grad_(), sin))
    assert "rotary: q and k are turned before, the tables have gradients" in text


# --- sequences of different lengths ----------------------------------------------------------------------------------


def packed(dtype=torch.float64):
    """(q, k, v [total, heads, dim], cu_seqlens_q, cu_seqlens_k), some queries fewer than keys, one sequence empty."""
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 4, 41, 42], [0, 9, 9, 61, 200]))
    shapes = (42, 4, 10), (200, 2, 10), (200, 2, 6)
    return *(double(*shape).to(dtype) for shape in shapes), starts_q, starts_k


def turned_of_each(x, starts, others, cos, sin, interleaved):
    """Rows of each sequence turned, the last of as many positions as it has keys."""
    parts = []
    for i, (first, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        keys = int(others[i + 1] - others[i])
        parts.append(turned(x[first:end].transpose(0, 1)[None], cos, sin, keys - (end - first), interleaved))
    return torch.cat([part[0].transpose(0, 1) for part in parts])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_sequences(interleaved, backend):
    *tensors, starts_q, starts_k = packed()
    cos, sin = angles(140, 4)
    q, k, v = (x.requires_grad_() for x in tensors)
    options = {"causal": True, "return_lse": True, "backend": backend}
    rotary = {"rotary": (cos, sin), "rotary_interleaved": interleaved}
    found, expected = (
        fastattn.attention_varlen(a, b, v, starts_q, starts_k, **options, **extra)
        for a, b, extra in (
            (q, k, rotary),
            (
                turned_of_each(q, starts_q, starts_k, cos, sin, interleaved),
                turned_of_each(k, starts_k, starts_k, cos, sin, interleaved),
                {},
            ),
        )
    )
    grads = [torch.autograd.grad(x.square().sum() + y.square().sum(), (q, k, v)) for x, y in (found, expected)]
    torch.testing.assert_close((*found, *grads[0]), (*expected, *grads[1]), atol=1e-10, rtol=1e-10)


def test_packed_sequences_again_and_in_graphs():
    *tensors, starts_q, starts_k = packed(torch.float32)
    rotary = tuple(x.float() for x in angles(140, 4))
    leaves = [x.requires_grad_() for x in tensors]

    def attend(q, k, v):
        options = {"rotary": rotary, "rotary_interleaved": True, "return_lse": True}
        return fastattn.attention_varlen(q, k, v, starts_q, starts_k, **options)

    assert_compiles(attend, leaves)
    q, k, v = (x.detach().double()[:, :1].requires_grad_() for x in leaves)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert gradgradcheck(
        lambda *x: fastattn.attention_varlen(*x, starts, starts, rotary=rotary), [x[:5] for x in (q, k, v)]
    )


def test_jagged():
    rows = [torch.randn(n, 2, 6) for n in (3, 5)]
    q = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    rotary = tuple(x.float() for x in angles(5, 3))
    out = fastattn.attention(q, q, q, rotary=rotary)
    for found, x in zip(out.unbind(), rows, strict=True):
        x = x.transpose(0, 1)[None]
        torch.testing.assert_close(found, fastattn.attention(x, x, x, rotary=rotary)[0])


def test_packed_sequences_are_refused():
    q, k, v, starts_q, starts_k = packed()
    cos, sin = angles(140, 4)

    def call(rotary, starts_q=starts_q, **options):
        return lambda: fastattn.attention_varlen(q, k, v, starts_q, starts_k, rotary=rotary, **options)

    assert_refused(call(angles(138, 4)), ValueError, "sequence 3 has 1 queries and 139 keys.*the 138 positions")
    more = torch.tensor([0, 10, 10, 41, 42], dtype=torch.int32)
    assert_refused(call((cos, sin), more), ValueError, "sequence 0 has 10 queries and 9 keys")
    assert_refused(call(angles(140, 4, 2)), ValueError, "must be \\[positions, rotary_dim / 2\\]")
    assert_refused(call(cos), TypeError, "must be \\(cos, sin\\)")
    assert_refused(call((cos.requires_grad_(), sin)), ValueError, "requires a gradient")
    assert_refused(call(None, rotary_interleaved=True), ValueError, "pass rotary=")
