"""`attention_weights` against the dense matrix in float64: values, choice of rows and heads, derivatives, rules."""

import pytest
import torch

import fastattn
from cases import CASES, Case
from fastattn import Mask, attention_weights
from forward import INF, NAN
from seeing import call, dense_weights

SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=45, seqlen_k=77, head_dim=12, dtype="float64")
TERMS = SMALL._replace(softcap=3.0, alibi=True, sinks=True, bias="per_head", learned_scale="per_head", causal=True)
MASKS = ("lengths", "intervals", "tensor_per_head", "blocks", "shared_blocks")
SOME_CASES = list(dict.fromkeys(case._replace(dropout_p=0.0) for case in CASES if (case.seqlen_k or 0) <= 170))
ROWS, HEADS = [44, 3, 4, 5, -10, 3], [3, 0, 0]


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_parity(case):
    q, k, v, kwargs = call(case)
    _, lse = fastattn.attention(q, k, v, return_lse=True, **kwargs)
    weights, expected = attention_weights(q, k, **kwargs), dense_weights(q, k, **kwargs)
    assert weights.dtype == lse.dtype and weights.shape == expected.shape
    limit = 1e-12 if case.dtype == "float64" else 2e-6
    torch.testing.assert_close(weights.double(), expected, rtol=0.0, atol=limit)
    from_lse = attention_weights(q, k, lse, **kwargs)
    torch.testing.assert_close(from_lse.double(), expected, rtol=0.0, atol=2 * limit)
    if not case.sinks:
        sees = expected.sum(-1) > 0.5
        torch.testing.assert_close(weights.sum(-1).double(), sees.double(), rtol=0.0, atol=limit)


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("num_heads_k", [1, 2, 4])
@pytest.mark.parametrize("terms", [False, True])
def test_rows_and_heads_are_those_of_the_matrix(mask, num_heads_k, terms):
    q, k, _, kwargs = call((TERMS if terms else SMALL)._replace(mask=mask, num_heads_k=num_heads_k))
    expected = dense_weights(q, k, **kwargs)
    for rows, heads in ((ROWS, None), (None, HEADS), (ROWS, HEADS), ([], [1]), ([7], []), (range(10, 20), (-1,))):
        row_index = slice(None) if rows is None else list(rows)
        head_index = slice(None) if heads is None else list(heads)
        part = attention_weights(q, k, rows=rows, heads=heads, **kwargs)
        torch.testing.assert_close(part, expected[:, head_index][:, :, row_index], rtol=0.0, atol=1e-13)
    as_tensor = attention_weights(q, k, rows=torch.tensor(ROWS), heads=torch.tensor([1], dtype=torch.int32), **kwargs)
    torch.testing.assert_close(as_tensor, expected[:, 1:2, ROWS], rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(
    "case", [SMALL, TERMS, TERMS._replace(mask="intervals"), SMALL._replace(mask="blocks")], ids=str
)
def test_gradients_of_chosen_rows(case, lse):
    q, k, v, kwargs = call(case)
    names = [name for name in ("bias", "alibi_slopes", "sinks", "softmax_scale") if name in kwargs]
    kwargs |= {name: kwargs[name].double() for name in names}
    leaves = {"q": q, "k": k} | {name: kwargs[name] for name in names}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    kwargs |= leaves
    given = fastattn.attention(v=v, return_lse=True, **kwargs)[1] if lse else None
    weights = attention_weights(lse=given, rows=ROWS, heads=HEADS, **kwargs)
    expected = dense_weights(**kwargs)[:, HEADS][:, :, ROWS]
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for actual, wanted in ((weights, expected), (weights.square(), expected.square())):
        grads = torch.autograd.grad(actual, list(leaves.values()), cotangent, retain_graph=True)
        oracle = torch.autograd.grad(wanted, list(leaves.values()), cotangent, retain_graph=True)
        for name, x, y in zip(leaves, grads, oracle, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lse", [False, True])
def test_derivatives_of_higher_order_and_of_torch_func(lse):
    q, k, v, kwargs = call(Case(num_heads=2, seqlen_q=3, seqlen_k=4, head_dim=2, dtype="float64", sinks=True))
    kwargs["sinks"] = kwargs["sinks"].double()
    given = fastattn.attention(q, k, v, return_lse=True, **kwargs)[1] if lse else None

    def fused(q, k):
        return attention_weights(q, k, given, rows=[0, 2], **kwargs)

    def dense(q, k):
        return dense_weights(q, k, **kwargs)[:, :, [0, 2]]

    if not lse:  # finite differences do not know that lse is that of q and k
        assert torch.autograd.gradcheck(fused, (q.requires_grad_(), k.requires_grad_()))
        assert torch.autograd.gradgradcheck(fused, (q, k))
    second = [torch.func.hessian(lambda q, f=f: f(q, k).square().sum())(q) for f in (fused, dense)]
    torch.testing.assert_close(*second)
    pushed = [torch.func.jvp(f, (q, k), (k[:, :, :3], q.repeat(1, 1, 2, 1)[:, :, :4]))[1] for f in (fused, dense)]
    torch.testing.assert_close(*pushed)


def test_vmap_folds_samples_into_the_batch():
    q, k, _, _ = call(SMALL)
    many = torch.stack([q, 2 * q, -q])
    found = torch.vmap(lambda q: attention_weights(q, k, rows=ROWS, causal=True))(many)
    torch.testing.assert_close(found, torch.stack([attention_weights(q, k, rows=ROWS, causal=True) for q in many]))


def test_an_lse_of_more_keys_gives_the_share_of_these():
    q, k, v, _ = call(SMALL)
    _, lse = fastattn.attention(q, k, v, return_lse=True)
    parts = [attention_weights(q, part, lse) for part in k.split(30, 2)]
    torch.testing.assert_close(torch.cat(parts, -1), attention_weights(q, k))


def test_rows_whose_lse_is_no_denominator_find_their_own():
    """transformers' padding: finfo.min everywhere in a row. Its weights are equal, and not all 1."""
    q, k, v, _ = call(SMALL._replace(dtype="float32"))
    bias = torch.zeros(2, 1, 45, 77)
    bias[0, :, :7] = torch.finfo(torch.float32).min
    _, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True)
    assert lse[0, 0, 0] < -1e38
    torch.testing.assert_close(attention_weights(q, k, lse, bias=bias), attention_weights(q, k, bias=bias))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_stands_behind_a_mask_does_not_show(bad):
    q, k, _, _ = call(SMALL)
    mask = Mask.lengths(torch.tensor([50, 77])) & Mask.causal()
    clean = attention_weights(q, k, mask=mask)
    k = k.clone()
    k[0, :, 50:] = bad
    torch.testing.assert_close(attention_weights(q, k, mask=mask), clean)
    lse = fastattn.attention(q, k, k, mask=mask, return_lse=True)[1]
    torch.testing.assert_close(attention_weights(q, k, lse, mask=mask, rows=ROWS), clean[:, :, ROWS])


def test_any_strides_and_autocast_change_nothing():
    q, k, _, _ = call(SMALL._replace(dtype="float32"))
    expected = attention_weights(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_weights(q, k), expected)
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    torch.testing.assert_close(attention_weights(*strided), expected)
    torch.testing.assert_close(attention_weights(q.flip(2).flip(2), k), expected)


def test_compile_breaks_the_graph_and_gives_the_same():
    q, k, _, _ = call(SMALL)
    compiled = torch.compile(lambda q, k: attention_weights(q + 0.0, k, rows=[1]) * 2.0, backend="eager")
    torch.testing.assert_close(compiled(q, k), attention_weights(q, k, rows=[1]) * 2.0)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"rows": [45]}, ValueError, "45 must be in 0 ... 44"),
        ({"rows": [-46]}, ValueError, "-46 must be in"),
        ({"rows": 3}, TypeError, r"pass rows=\[3\]"),
        ({"rows": [1.5]}, TypeError, "rows=.* must be a sequence of ints"),
        ({"rows": torch.ones(45, dtype=torch.bool)}, TypeError, "integer tensor"),
        ({"heads": [4]}, ValueError, "heads=.*4 must be in 0 ... 3"),
        ({"heads": "ab"}, TypeError, "heads='ab'"),
        ({"lse": torch.zeros(2, 4, 44)}, ValueError, r"lse has shape \(2, 4, 44\)"),
        ({"lse": torch.zeros(2, 4, 45, dtype=torch.int32)}, TypeError, "lse has dtype"),
        ({"lse": 1.0}, TypeError, "lse must be a torch.Tensor"),
        ({"mask": torch.ones(3, 3)}, TypeError, "mask has dtype"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"dropout_p": 0.1}, TypeError, "dropout_p"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, text):
    q, k, _, _ = call(SMALL)
    with pytest.raises(error, match=text):
        attention_weights(q, k, **arguments)


def test_tensors_that_do_not_fit_are_named():
    q, k, _, _ = call(SMALL)
    with pytest.raises(ValueError, match="k has shape"):
        attention_weights(q, k[:1])
    with pytest.raises(TypeError, match="k must be a torch.Tensor"):
        attention_weights(q, None)
