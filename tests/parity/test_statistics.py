"""`attention_stats` against the dense matrix in float64: the fused pass, torch's blocks, derivatives, rules."""

import os

import pytest
import torch

import fastattn
from cases import CASES, Case
from fastattn import Mask, attention_stats
from fastattn.seeing.stats import FUSED, STATISTICS
from forward import INF, NAN, SHAPES, assert_same_bits
from isas import needs_cpu, run_tests_on, running_isa, supported_isas
from seeing import call, dense_statistics, dense_weights

pytestmark = needs_cpu

SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=45, seqlen_k=77, head_dim=12, dtype="float64")
TERMS = SMALL._replace(softcap=3.0, alibi=True, sinks=True, bias="per_head", learned_scale="per_head", causal=True)
SOME_CASES = [case._replace(dropout_p=0.0) for case in CASES if (case.seqlen_k or case.seqlen_q) <= 700]


def assert_close(actual, expected, dtype):
    """Relative to max(1, |value|): sums of as many float32 weights, or of float64 ones."""
    limit = 1e-12 if dtype == "float64" else 4e-6
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        torch.testing.assert_close(actual[name].double(), x, rtol=limit, atol=limit, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("case", list(dict.fromkeys(SOME_CASES)), ids=str)
def test_parity(case):
    q, k, v, kwargs = call(case)
    expected = dense_statistics(q, k, **kwargs)
    _, lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)
    for given in (None, lse):
        actual = attention_stats(q, k, given, **kwargs)
        assert fastattn.last_call().kernel == "cpu.statistics" and set(actual) == set(FUSED)
        assert all(x.dtype == lse.dtype for x in actual.values())
        assert_close(actual, expected, case.dtype)
    with fastattn.use("reference"):
        assert_close(attention_stats(q, k, lse, **kwargs), expected, case.dtype)
        assert fastattn.last_call().kernel == "reference.statistics"


@pytest.mark.slow
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_every_isa(isa):
    if isa != running_isa():
        run_tests_on(isa, "tests/parity/test_statistics.py", "-k", "parity or behind or bits")


@pytest.mark.parametrize("mask", [None, "lengths", "tensor_per_head", "blocks"])
@pytest.mark.parametrize("terms", [False, True])
def test_chosen_rows_and_heads(mask, terms):
    q, k, _, kwargs = call((TERMS if terms else SMALL)._replace(mask=mask))
    p = dense_weights(q, k, **kwargs)
    rows, heads = [44, 3, 4, -10], [3, 0, 0]
    whole, part = dense_statistics(q, k, **kwargs), p[:, heads][:, :, rows]
    fused = attention_stats(q, k, heads=heads, **kwargs)
    assert_close(fused, {name: x[:, heads] for name, x in whole.items()}, "float64")
    chosen = attention_stats(q, k, heads=heads, rows=rows, stats=STATISTICS, top_k=5, **kwargs)
    expected = {name: x[:, heads][:, :, rows] for name, x in whole.items() if name != "key_mass"}
    assert_close(chosen, expected | {"key_mass": part.sum(2)}, "float64")
    top = chosen["top_k"]
    torch.testing.assert_close(top.weights, part.topk(5, -1).values, rtol=0.0, atol=1e-13)
    seen = part.gather(-1, top.keys.clamp(min=0))
    torch.testing.assert_close(torch.where(top.keys < 0, 0.0, seen), top.weights, rtol=0.0, atol=1e-13)
    assert ((top.keys < 0) == (top.weights == 0.0)).all()


def test_top_k_of_fewer_keys_and_of_none():
    q, k, _, _ = call(SMALL)
    top = attention_stats(q, k[:, :, :3], stats=["top_k"], top_k=5)["top_k"]
    assert top.weights.shape == (2, 4, 45, 5) and (top.keys[..., 3:] == -1).all() and (top.keys[..., :3] >= 0).all()
    nothing = attention_stats(q, k[:, :, :0], stats=STATISTICS)
    assert (nothing.pop("top_k").keys == -1).all() and all((x == 0).all() for x in nothing.values())


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("case", [SMALL, TERMS, SMALL._replace(mask="intervals", window_size=(9, 2))], ids=str)
def test_gradients(case, lse):
    q, k, v, kwargs = call(case)
    names = [name for name in ("bias", "alibi_slopes", "sinks", "softmax_scale") if name in kwargs]
    leaves = {"q": q, "k": k} | {name: kwargs[name].double() for name in names}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    kwargs |= leaves
    given = fastattn.attention(v=v, return_lse=True, **kwargs)[1] if lse else None
    actual = attention_stats(lse=given, stats=STATISTICS, top_k=2, **kwargs)
    expected = dense_statistics(**kwargs) | {"top": dense_weights(**kwargs).topk(2, -1).values}
    actual["top"] = actual.pop("top_k").weights
    for name, x in expected.items():
        grads = torch.autograd.grad(actual[name].square().sum(), list(leaves.values()), retain_graph=True)
        oracle = torch.autograd.grad(x.square().sum(), list(leaves.values()), retain_graph=True)
        for leaf, y, z in zip(leaves, grads, oracle, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9, msg=lambda t, n=name, m=leaf: f"{n}, {m}: {t}")


def test_bits_do_not_depend_on_threads_or_the_batch():
    for case in SHAPES.values():
        q, k, _, kwargs = call(case)
        threads = torch.get_num_threads()
        try:
            found = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(list(attention_stats(q, k, **kwargs).values()))
        finally:
            torch.set_num_threads(threads)
        assert_same_bits(found[1], found[0])
        assert_same_bits(found[2], found[0])
    q, k, _, _ = call(SHAPES["dense"])
    both, one = attention_stats(q, k, causal=True), attention_stats(q[1:], k[1:], causal=True)
    assert_same_bits([x[1:].contiguous() for x in both.values()], list(one.values()))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_stands_behind_a_mask_does_not_show(bad):
    q, k, _, _ = call(SMALL._replace(dtype="float32"))
    mask = Mask.lengths(torch.tensor([50, 77])) & Mask.causal()
    clean = attention_stats(q, k, mask=mask)
    k = k.clone()
    k[0, :, 50:] = bad
    assert_same_bits(list(attention_stats(q, k, mask=mask).values()), list(clean.values()))
    q[1, 2, 3] = NAN
    poisoned = attention_stats(q, k, mask=mask)
    assert all(poisoned[name][1, 2, 3].isnan() and not poisoned[name][1, 2, 4].isnan() for name in FUSED[1:])


def test_rows_whose_lse_is_no_denominator():
    q, k, v, _ = call(SMALL._replace(dtype="float32"))
    bias = torch.zeros(2, 1, 45, 77)
    bias[0, :, :7] = torch.finfo(torch.float32).min
    lse = fastattn.attention(q, k, v, bias=bias, return_lse=True)[1]
    for given in (None, lse):
        assert_close(attention_stats(q, k, given, bias=bias), dense_statistics(q, k, bias=bias), "float32")


def test_what_the_kernel_refuses_runs_in_blocks_without_a_warning(fresh_fallbacks):
    q, k, _, _ = call(Case(num_heads=2, seqlen_q=20, head_dim=600))
    stats = attention_stats(q, k, causal=True)
    assert fastattn.last_call().kernel == "reference.statistics" and "head_dim=600" in fastattn.last_call().reason
    assert not fresh_fallbacks
    assert_close(stats, dense_statistics(q, k, causal=True), "float32")


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"stats": "entropy"}, TypeError, "stats='entropy' must be a set of names"),
        ({"stats": ["entropies"]}, ValueError, "'entropies' must be one of"),
        ({"stats": 3}, TypeError, "stats=3"),
        ({"top_k": 0}, ValueError, "top_k=0 must be >= 1"),
        ({"rows": [99]}, ValueError, "rows=.*99"),
        ({"lse": torch.zeros(2, 4, 44)}, ValueError, "lse has shape"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, text):
    q, k, _, _ = call(SMALL)
    with pytest.raises(error, match=text):
        attention_stats(q, k, **arguments)
