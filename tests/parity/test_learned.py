"""fastattn.learned.attention: every normalizer and top_k against its paper's formula, forward and backward."""

import pytest
import torch

import fastattn
import learned_formula as formula
from cases import Case, inputs
from fastattn import Mask, learned

NORMALIZERS = ("softmax", "softmax1", "sigmoid", "sparsemax", "entmax15")
KINDS = [(normalizer, top_k) for normalizer in NORMALIZERS for top_k in (None, 5)]
SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=33, seqlen_k=47, head_dim=5, head_dim_v=6, dtype="float64")
TERMS = SMALL._replace(bias="per_head", alibi=True, softcap=3.0, learned_scale="per_head", causal=True)
MASKS = ("lengths", "documents", "intervals", "tensor_per_head", "key_tensor", "blocks", "shared_blocks", "top_left")
CASES = [SMALL, TERMS, SMALL._replace(window_size=(4, 2)), SMALL._replace(num_heads_k=1, causal=True, seqlen_q=60)]
CASES += [SMALL._replace(mask=mask) for mask in MASKS] + [TERMS._replace(mask="intervals", window_size=(9, None))]


def call(case, seed=0):
    """q, k, v and keyword arguments, tensors in float64."""
    (q, k, v), kwargs = inputs(case, seed)
    names = ("bias", "alibi_slopes", "softmax_scale")
    return q, k, v, kwargs | {x: y.double() for x, y in kwargs.items() if x in names and isinstance(y, torch.Tensor)}


def leaves_of(q, k, v, kwargs):
    """(leaves by name, the arguments with them)"""
    names = [x for x in ("bias", "alibi_slopes", "softmax_scale") if isinstance(kwargs.get(x), torch.Tensor)]
    leaves = {"q": q, "k": k, "v": v} | {name: kwargs[name] for name in names}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    return leaves, kwargs | leaves


@pytest.mark.parametrize("normalizer, top_k", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_those_of_the_formula(case, normalizer, top_k):
    leaves, kwargs = leaves_of(*call(case)[:3], call(case)[3])
    out = learned.attention(**kwargs, normalizer=normalizer, top_k=top_k)
    expected = formula.attention(**kwargs, normalizer=normalizer, top_k=top_k)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    oracle = torch.autograd.grad(expected, list(leaves.values()), cotangent)
    for name, x, y in zip(leaves, grads, oracle, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("normalizer, top_k", KINDS)
def test_biases_of_positions(normalizer, top_k):
    q, k, v, _ = call(SMALL)
    vector = torch.randn(4, 33 + 47 - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    vector[:, 7] = -torch.inf
    vector.requires_grad_()
    options = {"causal": True, "normalizer": normalizer, "top_k": top_k}
    out = learned.attention(q, k, v, bias=fastattn.relative.toeplitz(vector), **options)
    dense = vector[:, torch.arange(47) - torch.arange(33)[:, None] + 32]
    expected = formula.attention(q, k, v, bias=dense, **options)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    grads = (torch.autograd.grad(x.square().sum(), vector)[0] for x in (out, expected))
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


def test_biases_that_follow_from_queries_are_refused_by_name():
    q, k, v, _ = call(SMALL)
    with pytest.raises(TypeError, match="relative.shaw.* follows from q and k"):
        learned.attention(q, k, v, bias=fastattn.relative.shaw(torch.randn(9, 5)), normalizer="sigmoid")


# Each normalizer with and without top_k in turn.
@pytest.mark.parametrize(
    "normalizer, top_k",
    [pytest.param(*kind, marks=[] if i % 4 in (0, 3) else [pytest.mark.slow]) for i, kind in enumerate(KINDS)],
)
def test_derivatives_of_every_order(normalizer, top_k):
    case = Case(num_heads=2, num_heads_k=1, seqlen_q=3, seqlen_k=4, head_dim=2, dtype="float64", causal=True)
    q, k, v, kwargs = call(case._replace(bias="per_head", learned_scale="per_head"))
    leaves, kwargs = leaves_of(q, k, v, kwargs)
    top_k = None if top_k is None else 2

    def fused(*given):
        return learned.attention(**kwargs | dict(zip(leaves, given, strict=True)), normalizer=normalizer, top_k=top_k)

    assert torch.autograd.gradcheck(fused, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(fused, tuple(leaves.values()))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_transforms(normalizer):
    q, k, v, _ = call(SMALL._replace(num_heads=2, num_heads_k=2, seqlen_q=7, seqlen_k=9))

    def both(f):
        def total(q):
            return f(q, k, v, normalizer=normalizer, top_k=6).square().sum()

        tangent = torch.func.jvp(total, (q,), (q.cos(),))[1]
        many = torch.vmap(torch.func.grad(total))(torch.stack([q, 2 * q]))
        return tangent, many, torch.func.jvp(torch.func.grad(total), (q,), (q.cos(),))[1]

    torch.testing.assert_close(both(learned.attention), both(formula.attention))


@pytest.mark.parametrize("normalizer, top_k", KINDS)
def test_what_stands_behind_a_mask_does_not_show(normalizer, top_k):
    q, k, v, _ = call(SMALL)
    mask = Mask.lengths(torch.tensor([30, 47])) & Mask.causal()
    clean = learned.attention(q, k, v, mask=mask, normalizer=normalizer, top_k=top_k)
    k, v = k.clone(), v.clone()
    k[0, :, 30:], v[0, :, 30:] = torch.nan, torch.inf
    torch.testing.assert_close(learned.attention(q, k, v, mask=mask, normalizer=normalizer, top_k=top_k), clean)


@pytest.mark.parametrize("normalizer, top_k", KINDS)
def test_what_is_not_finite_and_seen_shows(normalizer, top_k):
    q, k, v, _ = call(SMALL._replace(num_heads_k=4))
    q[0, 1, 3], k[1, 2, 40] = torch.nan, torch.nan
    out = learned.attention(q, k, v, normalizer=normalizer, top_k=top_k)
    wrong = torch.zeros(2, 4, 33, dtype=torch.bool)
    wrong[0, 1, 3], wrong[1, 2] = True, True
    assert torch.equal(out.isnan().all(-1), wrong) and torch.equal(out.isnan().any(-1), wrong)


@pytest.mark.parametrize("normalizer, top_k", KINDS)
def test_rows_that_see_nothing_and_zero_lengths(normalizer, top_k):
    q, k, v, _ = call(SMALL)
    mask = Mask.lengths(torch.tensor([0, 1]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = learned.attention(*leaves, mask=mask, normalizer=normalizer, top_k=top_k)
    assert not out[0].any() and out[1].any()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(x.isfinite().all() and not x[0].any() for x in grads)
    for rows, keys in ((0, 47), (33, 0), (0, 0)):
        out = learned.attention(q[:, :, :rows], k[:, :, :keys], v[:, :, :keys], normalizer=normalizer, top_k=top_k)
        assert out.shape == (2, 4, rows, 6) and not out.any()
    assert learned.attention(q[:0], k[:0], v[:0], normalizer=normalizer, top_k=top_k).shape == (0, 4, 33, 6)


@pytest.mark.parametrize("normalizer, top_k", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 3e-2), ("float16", 4e-3)])
def test_dtypes(normalizer, top_k, dtype, tolerance):
    q, k, v, kwargs = inputs(SMALL._replace(dtype=dtype, causal=True, layout="bshd"))[0] + ({"causal": True},)
    out = learned.attention(q, k, v, **kwargs, normalizer=normalizer, top_k=top_k)
    assert out.dtype == q.dtype
    expected = formula.attention(q, k, v, **kwargs, normalizer=normalizer, top_k=top_k)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_thresholds_of_many_keys(normalizer, scale, dtype, tolerance):
    """From all keys in the support to one, and rows of equal scores."""
    s = torch.randn(6, 3001, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * scale
    s[2], s[3, 1000:] = 0.25, -torch.inf
    found = formula_of(normalizer, s)
    expected = getattr(formula, normalizer)(s.double())
    torch.testing.assert_close(found.double(), expected, rtol=10 * tolerance, atol=tolerance)
    torch.testing.assert_close(
        found.double().sum(-1), torch.ones(6, dtype=torch.float64), rtol=0.0, atol=20 * tolerance
    )


def formula_of(normalizer, s):
    from fastattn.learned.normalizers import NORMALIZERS as OURS

    return OURS[normalizer](s)


@pytest.mark.parametrize("normalizer, top_k", KINDS)
def test_dropout_is_that_of_the_seed(normalizer, top_k):
    q, k, v, _ = call(SMALL)
    options = {"normalizer": normalizer, "top_k": top_k}
    out = learned.attention(q, k, v, **options, dropout_p=0.3, seed=7)
    keep = fastattn.dropout_mask(2, 4, 33, 47, 0.3, 7) / 0.7
    torch.testing.assert_close(out, formula.attention(q, k, v, **options, keep=keep))
    torch.manual_seed(0)
    drawn = [learned.attention(q, k, v, **options, dropout_p=0.3) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(drawn[0], learned.attention(q, k, v, **options, dropout_p=0.3))
    assert not torch.equal(*drawn)


def test_equal_scores_at_the_end_of_top_k_take_part():
    q, v = torch.ones(1, 1, 1, 1), torch.eye(4)[None, None]
    k = torch.tensor([1.0, 2.0, 2.0, 3.0]).view(1, 1, 4, 1)
    out = learned.attention(q, k, v, top_k=2, softmax_scale=0.0)
    torch.testing.assert_close(out[0, 0, 0], torch.full((4,), 0.25))
    out = learned.attention(q, k, v, top_k=2)
    assert out[0, 0, 0, 0] == 0.0 and (out[0, 0, 0, 1:] > 0.0).all()


def test_softmax_and_softmax1_are_fused():
    q, k, v, _ = call(SMALL)
    learned.attention(q, k, v, normalizer="softmax1", causal=True)
    assert fastattn.last_call().problem.sinks and fastattn.last_call().problem.mask == "causal"


def test_compile_breaks_the_graph_and_gives_the_same():
    q, k, v, _ = call(SMALL)
    compiled = torch.compile(lambda q: learned.attention(q + 0.0, k, v, normalizer="sparsemax"), backend="eager")
    torch.testing.assert_close(compiled(q), learned.attention(q, k, v, normalizer="sparsemax"))


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"normalizer": "hardmax"}, ValueError, "normalizer='hardmax' must be one of softmax, softmax1, sigmoid"),
        ({"normalizer": None}, ValueError, "normalizer=None must be one of"),
        ({"top_k": 0}, ValueError, "top_k=0 must be >= 1"),
        ({"top_k": 2.0}, TypeError, "top_k=2.0 must be an int"),
        ({"normalizer": "sigmoid", "mask": torch.ones(3, 3)}, TypeError, "mask has dtype"),
        ({"normalizer": "sparsemax", "softcap": -1.0}, ValueError, "softcap"),
        ({"normalizer": "entmax15", "dropout_p": 1.0}, ValueError, "dropout_p=1.0"),
        ({"normalizer": "entmax15", "bias": torch.zeros(3, 3)}, ValueError, r"bias has shape \(3, 3\)"),
        ({"sinks": torch.zeros(4)}, TypeError, "sinks"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, error, text):
    q, k, v, _ = call(SMALL)
    with pytest.raises(error, match=text):
        learned.attention(q, k, v, **options)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_tensors_that_do_not_fit_are_named(normalizer):
    q, k, v, _ = call(SMALL)
    with pytest.raises(ValueError, match="k has shape"):
        learned.attention(q, k[:1], v, normalizer=normalizer)
    with pytest.raises(TypeError, match="q must be a torch.Tensor"):
        learned.attention(None, k, v, normalizer=normalizer)
    with pytest.raises(ValueError, match="q has shape"):
        learned.attention(q[0], k, v, normalizer=normalizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [1, 7, 511, 512, 2047])
@pytest.mark.parametrize("top_k", [1, 5, 300, 4000])
def test_least_of_the_largest(keys, top_k, dtype):
    """With equal scores, scores that are hidden, and fewer than top_k that are seen."""
    from fastattn.learned.normalizers import thresholds

    s = torch.randn(40, keys, generator=torch.Generator().manual_seed(0)).to(dtype)
    s[1], s[2, keys // 3 :], s[3], s[4, : keys // 2] = 0.5, -torch.inf, s[3].round(), -torch.inf
    s[5] = s[5].sort(descending=True).values  # the sample is of the largest
    s[6, ::8] = -100.0
    found = thresholds(s, "largest", top_k)
    for row, x in zip(s, found, strict=True):
        seen = row[row > -torch.inf]
        assert x == (seen.sort(descending=True).values[min(top_k, len(seen)) - 1] if len(seen) else 0.0)


@pytest.mark.parametrize("normalizer, top_k", KINDS)
def test_thresholds_of_other_devices(normalizer, top_k, monkeypatch):
    """What torch's operators find is what C++ finds."""
    from fastattn.backends import cpu

    q, k, v, _ = call(SMALL)
    options = {"normalizer": normalizer, "top_k": top_k, "causal": True}
    expected = learned.attention(q, k, v, **options)
    monkeypatch.setattr(cpu, "unavailable", lambda: "not here")
    torch.testing.assert_close(learned.attention(q, k, v, **options), expected, rtol=1e-10, atol=1e-10)
