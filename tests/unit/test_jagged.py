"""torch's jagged tensors: what `attention` makes of each sequence alone, without padding."""

import warnings

import pytest
import torch

import fastattn
from fastattn import Mask, attention, attention_csr, attention_varlen

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]  # they are a prototype
LENGTHS = (3, 5, 0, 9)


def jagged(lengths=LENGTHS, heads=4, dim=8, seed=0, layout=torch.jagged):
    """(rows of each sequence [seqlen, heads, dim], the tensor [batch, heads, seqlen, dim] of them)."""
    torch.manual_seed(seed)
    rows = [torch.randn(n, heads, dim) for n in lengths]
    return rows, torch.nested.nested_tensor(rows, layout=layout, requires_grad=layout == torch.jagged).transpose(1, 2)


def values(x):
    """[total, heads, dim] of a jagged tensor."""
    return x.transpose(1, 2).values()


def alone(*rows, **options):
    """`attention` of one sequence, [seqlen, heads, dim] as its rows."""
    out, lse = attention(*[x.transpose(0, 1)[None] for x in rows], return_lse=True, **options)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 5.0},
        {"window_size": (2, 0), "softmax_scale": 0.3},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "sinks": torch.tensor([1.5, -0.4, -0.2, 1.0])},
    ],
)
def test_each_sequence_is_as_if_alone(options):
    rows, q = jagged()
    out, lse = attention(q, q, q, return_lse=True, **options)
    assert (q + out).shape == q.shape and lse.shape[:2] == (4, 4)
    outs, lses = (x.transpose(1, 2).unbind() for x in (out, lse))
    for x, found, found_lse in zip(rows, outs, lses, strict=True):
        expected, expected_lse = alone(x, x, x, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(found_lse, expected_lse, rtol=0, atol=1e-6)


def test_gradients():
    rows, q = jagged()
    leaf = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    x = leaf.transpose(1, 2)
    weights = torch.randn(sum(LENGTHS), 4, 8)
    (values(attention(x, x, x, causal=True)) * weights).sum().backward()
    leaves = [part.clone().requires_grad_() for part in rows]
    for part, weight in zip(leaves, weights.split(LENGTHS), strict=True):
        (alone(part, part, part, causal=True)[0] * weight).sum().backward()
    torch.testing.assert_close(leaf.grad.values(), torch.cat([part.grad for part in leaves]), rtol=0, atol=1e-5)


def test_grouped_heads_and_keys_of_other_lengths():
    (queries, q), (keys, k) = jagged(), jagged((7, 0, 2, 11), heads=2, seed=1)
    out = attention(q, k, k)
    for i, found in enumerate(out.transpose(1, 2).unbind()):
        torch.testing.assert_close(found, alone(queries[i], keys[i], keys[i])[0], rtol=0, atol=1e-6)


def test_sequences_with_rows_that_nobody_uses():
    packed, offsets, lengths = torch.randn(12, 4, 8), torch.tensor([0, 4, 9, 12]), torch.tensor([2, 5, 0])
    q = torch.nested.nested_tensor_from_jagged(packed, offsets, lengths).transpose(1, 2)
    out = attention(q, q, q, causal=True).transpose(1, 2)
    assert torch.equal(out.lengths(), lengths)
    for start, n in zip(offsets.tolist(), lengths.tolist(), strict=False):
        rows = packed[start : start + n]
        torch.testing.assert_close(out.values()[start : start + n], alone(rows, rows, rows, causal=True)[0])


def test_torchs_function_and_its_causal_mask():
    _, q = jagged()
    for causal in (False, True):
        found = fastattn.scaled_dot_product_attention(q, q, q, is_causal=causal)
        torch.testing.assert_close(values(found), values(attention(q, q, q, causal=causal)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_a_graph(backend):
    _, q = jagged()

    def model(q):
        return attention(q, q, q, causal=True) + q

    found = torch.compile(model, backend=backend, fullgraph=True)(q)
    assert torch.equal(values(found), values(model(q)))


def test_dropout_is_that_of_packed_sequences():
    rows, q = jagged()
    packed, offsets = torch.cat(rows), torch.tensor([0, 3, 8, 8, 17])
    expected = attention_varlen(packed, packed, packed, offsets, offsets, dropout_p=0.5, seed=3)
    torch.testing.assert_close(values(attention(q, q, q, dropout_p=0.5, seed=3)), expected)


def test_what_is_refused():
    _, q = jagged()
    for name, value in (("mask", torch.ones(1, dtype=torch.bool)), ("mask", Mask.causal()), ("bias", torch.ones(1))):
        with pytest.raises(TypeError, match=f"{name}= is not supported with jagged tensors"):
            attention(q, q, q, **{name: value})
    _, other = jagged((2, 5, 0, 9))
    with pytest.raises(ValueError, match="k and v are jagged tensors of different lengths"):
        attention(q, q, other)
    with pytest.raises(TypeError, match="mask= is not supported"):  # top-left, of other lengths
        fastattn.scaled_dot_product_attention(q, other, other, is_causal=True)
    with pytest.raises(TypeError, match="k must be a jagged tensor"):
        attention(q, torch.randn(4, 4, 9, 8), q)
    with pytest.raises(TypeError, match="q must be a jagged tensor"):
        attention(q.transpose(1, 2), q, q)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_other_functions_and_other_nested_tensors_say_what_to_do(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, x = jagged(layout=layout)
    edges = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    calls = [lambda: attention_csr(x, x, x, *edges), lambda: fastattn.explain(x, x, x)]
    calls += [lambda: attention(x, x, x), lambda: attention(torch.randn(4, 4, 9, 8), x, x)] * (layout == torch.strided)
    for call in calls:
        with pytest.raises(TypeError, match="nested tensors are not supported here: fastattn.attention takes jagged"):
            call()
