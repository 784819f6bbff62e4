"""`fastattn.scaled_dot_product_attention` against torch's own, in float64."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import scaled_dot_product_attention as sdpa
from fastattn.backends import cpu
from fastattn.compat.sdpa import _fold
from torch_sdpa import scaled_dot_product_attention as torchs

INF = math.inf
BACKENDS = ["reference"] + (["cpu"] if cpu.unavailable() is None else [])


def randn(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


def check(query, key, value, *args, gradients=True, **kwargs):
    """Same shape, dtype, values and gradients as torch, by backend choice and, without gradients, by default."""
    expected = torchs(query, key, value, *args, **kwargs)
    actual = sdpa(query, key, value, *args, **kwargs)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    if not gradients:
        return
    mask = kwargs.get("attn_mask", args[0] if args else None)
    inputs = [x for x in (query, key, value, mask) if x is not None and x.is_floating_point()]
    cotangent = torch.randn_like(expected)
    results = []
    for function in (torchs, sdpa):
        leaves = {id(x): x.detach().requires_grad_() for x in inputs}
        q, k, v = (leaves[id(x)] for x in (query, key, value))
        m = leaves.get(id(mask), mask)
        rest = {**kwargs, "attn_mask": m} if "attn_mask" in kwargs else kwargs
        out = function(q, k, v, *((m, *args[1:]) if args else ()), **rest)
        results.append(torch.autograd.grad(out, leaves.values(), cotangent, allow_unused=True))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


# name: shapes of query, key, value without head_dim (4) and head_dim_v (4 or 6)
SHAPES = {
    "2-D": ((3,), (5,), (5,)),
    "3-D": ((4, 3), (4, 5), (4, 5)),
    "4-D": ((2, 3, 4), (2, 3, 7), (2, 3, 7)),
    "5-D": ((2, 3, 2, 4), (2, 3, 2, 5), (2, 3, 2, 5)),
    "6-D": ((2, 1, 2, 2, 3), (2, 3, 2, 2, 5), (2, 1, 2, 1, 5)),
    "keys of one batch": ((3, 2, 4), (1, 2, 5), (1, 2, 5)),
    "query of one batch": ((1, 2, 4), (3, 2, 5), (3, 2, 5)),
    "one key head": ((2, 3, 4), (2, 1, 5), (2, 1, 5)),
    "one query head": ((2, 1, 4), (2, 3, 5), (2, 3, 5)),
    "key and value broadcast apart": ((2, 3, 4), (2, 1, 5), (1, 3, 5)),
    "value has the batch": ((1, 1, 4), (1, 1, 5), (2, 3, 5)),
    "3-D of one batch": ((4, 3), (1, 5), (1, 5)),
    "5-D, first broadcast": ((2, 3, 2, 4), (1, 3, 2, 5), (1, 3, 2, 5)),
    "5-D, second broadcast": ((2, 3, 2, 4), (2, 1, 2, 5), (2, 1, 2, 5)),
    "5-D, heads broadcast": ((2, 3, 2, 4), (2, 3, 1, 5), (2, 3, 1, 5)),
    "ranks 4, 3, 3": ((2, 3, 4), (3, 5), (3, 5)),
    "ranks 3, 4, 4": ((3, 4), (2, 3, 5), (2, 3, 5)),
    "ranks 4, 2, 2": ((2, 3, 4), (5,), (5,)),
    "ranks 5, 3, 4": ((2, 3, 2, 4), (2, 5), (3, 2, 5)),
    "one query": ((2, 3, 1), (2, 3, 5), (2, 3, 5)),
    "more queries than keys": ((2, 3, 6), (2, 3, 2), (2, 3, 2)),
    "as many queries as keys": ((2, 3, 4), (2, 3, 4), (2, 3, 4)),
    "batch 0": ((0, 3, 4), (0, 3, 5), (0, 3, 5)),
    "heads 0": ((2, 0, 4), (2, 0, 5), (2, 0, 5)),
    "no queries": ((2, 3, 0), (2, 3, 5), (2, 3, 5)),
    "no keys": ((2, 3, 4), (2, 3, 0), (2, 3, 0)),
    "3-D batch 0": ((0, 4), (0, 5), (0, 5)),
    "2-D, no keys": ((4,), (0,), (0,)),
    "5-D batch 0": ((2, 0, 2, 4), (2, 0, 2, 5), (1, 1, 2, 5)),
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": -1}], ids=str)
@pytest.mark.parametrize("head_dim_v", [4, 6])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, head_dim_v, options):
    q, k, v = SHAPES[name]
    check(randn(*q, 4), randn(*k, 4), randn(*v, head_dim_v), **options)


@pytest.mark.parametrize("head_dim, head_dim_v", [(0, 4), (4, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_head_dim_of_zero(rank, head_dim, head_dim_v):
    lead = (2, 2, 3)[: rank - 2]
    shapes = ((3, head_dim), (5, head_dim), (5, head_dim_v))
    check(*(randn(*lead, *shape) for shape in shapes), gradients=head_dim > 0 and head_dim_v > 0)


MASKS = {  # for scores [2, 3, 4, 5]
    "2-D": (4, 5), "3-D": (3, 4, 5), "4-D": (2, 3, 4, 5), "one batch": (1, 3, 4, 5), "one head": (2, 1, 4, 5),
    "shared": (1, 1, 4, 5), "keys": (2, 1, 1, 5), "queries": (3, 4, 1), "row": (1, 5), "column": (4, 1), "one": (1, 1),
}  # fmt: skip


def mask_of(shape, kind):
    keep = torch.rand(shape) < 0.7
    if kind == "bool":
        return keep
    bias = randn(*shape)
    return bias if kind == "float" else bias.masked_fill(~keep, -INF)


@pytest.mark.parametrize("kind", ["bool", "float", "-inf"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, kind):
    check(randn(2, 3, 4, 8), randn(2, 3, 5, 8), randn(2, 3, 5, 6), mask_of(MASKS[name], kind))


FOLDED_MASKS = [  # (shape of the scores, shape of a mask)
    ((4, 5), (4, 5)),
    ((4, 5), (1, 5)),
    ((3, 4, 5), (4, 5)),
    ((3, 4, 5), (3, 1, 5)),
    ((3, 4, 5), (1, 4, 5)),
    ((2, 3, 2, 4, 5), (4, 5)),
    ((2, 3, 2, 4, 5), (2, 4, 5)),
    ((2, 3, 2, 4, 5), (3, 1, 4, 5)),
    ((2, 3, 2, 4, 5), (2, 1, 1, 4, 5)),
    ((2, 3, 2, 4, 5), (2, 1, 2, 1, 5)),
    ((2, 3, 2, 4, 5), (2, 3, 2, 4, 1)),
]


@pytest.mark.parametrize("kind", ["bool", "float", "-inf"])
@pytest.mark.parametrize("scores, mask", FOLDED_MASKS, ids=str)
def test_masks_of_other_ranks(scores, mask, kind):
    *lead, seqlen_q, seqlen_k = scores
    check(randn(*lead, seqlen_q, 8), randn(*lead, seqlen_k, 8), randn(*lead, seqlen_k, 6), mask_of(mask, kind))


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("mask", [(4, 5), (2, 1, 4, 5), (6, 1, 5)], ids=str)
@pytest.mark.parametrize("broadcast", [False, True])
def test_masks_with_groups_and_broadcast_batch(mask, kind, broadcast):
    k, v = randn(1 if broadcast else 2, 2, 5, 8), randn(1 if broadcast else 2, 2, 5, 6)
    check(randn(2, 6, 4, 8), k, v, mask_of(mask, kind), enable_gqa=True)


@pytest.mark.parametrize("mask", [torch.tensor([True, False, True, True, False]), torch.tensor(True)])
def test_masks_of_rank_0_and_1(mask):
    """torch's documentation allows them, torch itself fails."""
    q, k, v = randn(2, 3, 4, 8), randn(2, 3, 5, 8), randn(2, 3, 5, 6)
    expected = torchs(q, k, v, mask.expand(4, 5))
    torch.testing.assert_close(sdpa(q, k, v, mask), expected)
    torch.testing.assert_close(sdpa(q[0], k[0], v[0], mask), expected[0])


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("rank", [3, 4])
def test_query_that_sees_no_key(rank, kind):
    q, k, v = (randn(2, 3, 5, 8)[(0,) * (4 - rank)] for _ in range(3))
    mask = torch.tensor([True, False, True, False, True])[:, None].expand(5, 5)
    if kind == "-inf":
        mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, -INF)
    out = sdpa(q, k, v, mask)
    assert (out[..., 1, :] == 0).all() and (out[..., 3, :] == 0).all() and (out[..., 0, :] != 0).all()
    torch.testing.assert_close(out, torchs(q, k, v, mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_minimum_is_a_bias_not_a_mask(backend, dtype):
    """Models mask with finfo.min: no weight beside other keys, equal weights where it is everywhere."""
    q, k, v = (torch.randn(1, 2, 3, 8).to(dtype) for _ in range(3))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]).to(dtype) * torch.finfo(dtype).min
    with fastattn.use(backend):
        actual = sdpa(q, k, v, mask)
    torch.testing.assert_close(actual, torchs(q, k, v, mask))


@pytest.mark.parametrize(
    "q, k",
    [
        ((2, 4), (2, 2)),
        ((2, 4), (2, 1)),
        ((2, 4), (2, 4)),
        ((4,), (2,)),
        ((2, 3, 4), (2, 3, 2)),
        ((2, 3, 4), (1, 3, 2)),
        ((2, 3, 4), (2, 1, 2)),
        ((2, 4), (1, 2)),
        ((2, 4), (2,)),
        ((0, 4), (0, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_queries(q, k, is_causal):
    check(randn(*q, 3, 8), randn(*k, 5, 8), randn(*k, 5, 6), is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "bool", "float", "float32"])
def test_other_dtypes(dtype, mask):
    q, k, v = (torch.randn(2, 3, 20, 16).to(dtype) for _ in range(3))
    if mask is not None:
        mask = mask_of((20, 20), "bool") if mask == "bool" else torch.randn(20, 20).to(getattr(torch, mask, dtype))
    actual = sdpa(q, k, v, mask)
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = torchs(q.double(), k.double(), v.double(), exact_mask)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (4, 5, 8), (5, 8), (2, 2, 4, 5, 8)])
def test_other_strides(shape):
    q, k, v = (randn(*shape[:-2], shape[-1], shape[-2]).mT for _ in range(3))
    check(q, k, v)
    if len(shape) > 2:
        q, k, v = (randn(*shape[:-3], shape[-2], shape[-3], shape[-1]).transpose(-3, -2) for _ in range(3))
        check(q, k, v, is_causal=True)


def test_broadcast_copies_nothing_where_strides_can_express_it(monkeypatch):
    def views(q, k, v, mask=None, **kwargs):
        seen = {}

        def spy(q_, k_, v_, **options):
            mask_ = options["mask"] if options["mask"] is not None else options.get("bias")
            seen.update(q=q_, k=k_, v=v_, mask=mask_)
            return fastattn.attention(q_, k_, v_, **options)

        monkeypatch.setattr("fastattn.compat.sdpa.attention", spy)
        sdpa(q, k, v, mask, **kwargs)
        given = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
        return [name for name, x in given.items() if seen[name].data_ptr() == x.data_ptr()]

    keep = torch.ones(4, 5, dtype=torch.bool)
    assert views(randn(3, 2, 4, 8), randn(1, 2, 5, 8), randn(1, 2, 5, 8)) == ["q", "k", "v"]
    assert views(randn(3, 2, 4, 8), randn(3, 1, 5, 8), randn(3, 1, 5, 8), keep) == ["q", "k", "v", "mask"]
    assert views(randn(6, 4, 8), randn(6, 5, 8), randn(6, 5, 8), randn(6, 4, 5)) == ["q", "k", "v", "mask"]
    assert views(randn(2, 3, 2, 4, 8), randn(2, 3, 2, 5, 8), randn(2, 3, 2, 5, 8)) == ["q", "k", "v"]
    assert views(randn(2, 3, 2, 4, 8), randn(1, 3, 2, 5, 8), randn(1, 3, 2, 5, 8), keep) == ["q", "k", "v", "mask"]
    assert views(randn(2, 3, 2, 4, 8), randn(2, 3, 1, 5, 8), randn(2, 3, 1, 5, 8)) == ["q", "k", "v"]
    q, k = randn(2, 3, 2, 4, 8), randn(2, 3, 2, 5, 8)
    assert views(q, k, k, randn(2, 1, 1, 4, 5)) == ["q", "k", "v", "mask"]
    bshd = randn(2, 4, 3, 8).transpose(1, 2)
    assert views(bshd, bshd, bshd) == ["q", "k", "v"]
    assert _fold(randn(2, 1, 2, 5, 8), (2, 3, 2), 2, may_copy=True).shape == (6, 2, 5, 8)  # no strides for this one


def test_one_key_head_is_never_repeated(monkeypatch):
    heads = []
    attention = fastattn.attention
    monkeypatch.setattr(
        "fastattn.compat.sdpa.attention", lambda q, k, v, **kw: heads.append(k.shape[1]) or attention(q, k, v, **kw)
    )
    sdpa(randn(2, 8, 4, 8), randn(2, 1, 5, 8), randn(2, 1, 5, 8))
    sdpa(randn(6, 4, 8), randn(1, 5, 8), randn(1, 5, 8))
    assert heads == [1, 1]


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (3, 16, 8), (2, 2, 3, 16, 8)])
def test_dropout(shape):
    q, k = randn(*shape), randn(*shape)
    v = torch.eye(16, dtype=torch.float64).expand(*shape[:-2], 16, 16)
    weights = sdpa(q, k, v)
    torch.manual_seed(1)
    dropped = sdpa(q, k, v, dropout_p=0.4)
    torch.manual_seed(1)
    assert torch.equal(dropped, sdpa(q, k, v, None, 0.4))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.6)
    assert abs(kept.double().mean().item() - 0.6) < 0.1


@pytest.mark.parametrize("p", [1, 1.0])
def test_dropout_of_everything(p):
    q, k, v = (randn(2, 3, 4, 8).requires_grad_() for _ in range(3))
    out = sdpa(q, k, v, dropout_p=p)
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


# --- refusals --------------------------------------------------------------------------------------------------------

Q, K, V = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 6)
KEEP = torch.ones(3, 5, dtype=torch.bool)
REFUSALS = {  # arguments that torch refuses, and what the error must say
    "rank 1": ((Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0]), {}, r"query has shape \(8,\); .*rank 2 or more"),
    "no tensor": ((None, K, V), {}, "query must be a torch.Tensor, got NoneType"),
    "list": ((Q, K, [1.0]), {}, "value must be a torch.Tensor, got list"),
    "mask and causal": ((Q, K, V, KEEP), {"is_causal": True}, "attn_mask and is_causal=True exclude each other"),
    "3-D mask and causal": ((Q[0], K[0], V[0], KEEP), {"is_causal": True}, "attn_mask and is_causal=True exclude"),
    "heads": ((Q, K[:, :2], V[:, :2]), {}, r"\(2, 4, 3, 8\), \(2, 2, 5, 8\), .*must broadcast \(enable_gqa=True"),
    "batch": ((Q, K[:1].repeat(3, 1, 1, 1), V), {}, r"\(3, 4, 5, 8\).*must broadcast"),
    "3-D batch": ((Q[0], K[0, :2], V[0, :2]), {}, r"\(4, 3, 8\), \(2, 5, 8\), .*must broadcast"),
    "groups": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, "num_heads=4 and k has num_heads_k=3.*multiple"),
    "fewer query heads": ((Q[:, :2], K, V), {"enable_gqa": True}, "num_heads=2 and k has num_heads_k=4.*multiple"),
    "3-D groups": ((Q[0], K[0, :3], V[0, :3]), {"enable_gqa": True}, r"must broadcast|multiple"),
    "groups of rank 2": ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, "num_heads before seqlen for enable_gqa"),
    "head_dim": ((Q, K[..., :7], V), {}, r"k has shape \(2, 4, 5, 7\)"),
    "seqlen": ((Q, K, V[:, :, :4]), {}, r"v has shape \(2, 4, 4, 6\)"),
    "seqlen 1": ((Q, K[:, :, :1], V), {}, r"v has shape \(2, 4, 5, 6\)"),
    "dtypes": ((Q, K.double(), V), {}, "torch.float32, torch.float64, torch.float32"),
    "int": ((Q.int(), K.int(), V.int()), {}, "q has dtype torch.int32"),
    "device": ((Q, K.to("meta"), V), {}, "cpu, meta, cpu"),
    "mask list": ((Q, K, V, [True]), {}, "attn_mask must be a torch.Tensor, got list"),
    "mask int": ((Q, K, V, KEEP.int()), {}, "attn_mask has dtype torch.int32; it must be bool"),
    "mask shape": ((Q, K, V, KEEP.T), {}, r"attn_mask has shape \(5, 3\); .*broadcastable to \(2, 4, 3, 5\)"),
    "mask wider than Sk": ((Q, K[:, :, :1], V[:, :, :1], KEEP), {}, r"attn_mask has shape \(3, 5\); .*\(2, 4, 3, 1\)"),
    "mask with a batch": ((Q, K, V, KEEP.expand(3, 1, 3, 5)), {}, r"attn_mask has shape \(3, 1, 3, 5\)"),
    "mask rank 5": ((Q, K, V, KEEP[None, None, None]), {}, r"attn_mask has shape \(1, 1, 1, 3, 5\)"),
    "3-D mask for 2-D": (
        (Q[0, 0], K[0, 0], V[0, 0], KEEP[None]),
        {},
        r"attn_mask has shape .*broadcastable to \(3, 5\)",
    ),
    "4-D mask for 3-D": ((Q[0], K[0], V[0], KEEP.expand(2, 1, 3, 5)), {}, r"broadcastable to \(4, 3, 5\)"),
    "dropout": ((Q, K, V, None, 1.5), {}, r"dropout_p=1.5 must be in \[0, 1\)"),
    "scale": ((Q, K, V), {"scale": "a"}, "softmax_scale='a' must be a float"),
    "unknown keyword": ((Q, K, V), {"softcap": 1.0}, "unexpected keyword argument 'softcap'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_errors_where_torch_errs(name):
    args, kwargs, pattern = REFUSALS[name]
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        F.scaled_dot_product_attention(*args, **kwargs)
    with pytest.raises((ValueError, TypeError), match=pattern) as caught:
        sdpa(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_signature():
    parameters = inspect.signature(sdpa).parameters
    assert list(parameters) == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip
    q, k, v = randn(1, 2, 3, 4), randn(1, 2, 5, 4), randn(1, 2, 5, 4)
    named = sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=None, enable_gqa=False)
    assert torch.equal(named, sdpa(q, k, v, None, 0.0, True))


def test_masked_nan_does_not_leak():
    """Where torch's own multiplies 0 by NaN."""
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    keep = torch.arange(4) < 3
    clean = sdpa(q, k, v, keep.expand(4, 4))
    v[:, :, 3] = math.nan
    assert torch.equal(sdpa(q, k, v, keep.expand(4, 4)), clean)


def test_runs_on_the_kernel_that_attention_would_take():
    q, k, v = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    fastattn.attention(q, k, v, mask=fastattn.Mask.causal("top_left"))
    expected = fastattn.last_call()
    sdpa(q, k, v, is_causal=True)
    assert fastattn.last_call() == expected and expected.problem.mask == "causal"
