"""torch.func and derivatives of gradients along edges, against plain torch in float64."""

import pytest
import torch
from torch.func import grad, jvp, linearize, vmap

import fastattn
from fastattn.transforms import blocks
from forward import INF
from graphs import BIASES, Graph, inputs
from isas import needs_cpu

pytestmark = [
    needs_cpu,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::fastattn.FallbackWarning"),
]

close = torch.testing.assert_close


@pytest.fixture(autouse=True, params=[pytest.param("one block", marks=pytest.mark.slow), "many blocks"])
def size_of_blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(blocks, "_SCORES", 60)


def plain(q, k, v, indptr, indices, edge_bias=None, **_):
    """(out, lse), the scores of all edges in a dense row of each query."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1)[:, :, indices] for x in (k, v))
    seen = torch.arange(len(indptr) - 1).repeat_interleave(indptr.diff()) == torch.arange(len(indptr) - 1)[:, None]
    scores = q @ k.mT * q.shape[3] ** -0.5
    if edge_bias is not None:
        scores, seen = scores + edge_bias.unsqueeze(-2), seen & (edge_bias != -INF).unsqueeze(-2)
    blind = (~seen).all(-1, keepdim=True).expand(scores.shape)
    scores = scores.masked_fill(~seen, -INF).masked_fill(blind, 0.0)
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log())[..., 0].masked_fill(blind[..., 0], -INF)
    return (weights / total).masked_fill(blind, 0.0) @ v, lse


def functions(bias):
    """(ours, plain torch: a number of the tensors, the tensors, their tangents)"""
    (q, k, v, *lists), kwargs = inputs(Graph(9, 7, 3, head_dim=5, head_dim_v=3, dtype="float64", bias=bias))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 4, 9, 3, generator=generator, dtype=torch.float64)

    def of(function):
        def call(q, k, v, *biases):
            biases = [x.masked_fill(kwargs["edge_bias"] == -INF, -INF) for x in biases]
            out, lse = function(q, k, v, *lists, **dict(zip(kwargs, biases, strict=True)), return_lse=True)
            return (weights * out * out).sum() + lse.masked_fill(lse == -INF, 0.0).sin().sum()

        return call

    primals = q, k, v, *[x.masked_fill(x == -INF, 0.0) for x in kwargs.values()]
    tangents = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in primals)
    return of(fastattn.attention_csr), of(plain), primals, tangents


def along(tangents, function):
    return lambda *x: jvp(function, x, tangents)[1]


TRANSFORMS = {
    "grad": lambda f, n, t: grad(f, n),
    "jvp": lambda f, n, t: along(t, f),
    "jvp of grad": lambda f, n, t: lambda *x: jvp(grad(f, n), x, t)[1],
    "grad of jvp": lambda f, n, t: grad(along(t, f), n),
    "jvp of jvp": lambda f, n, t: along(t, along(t, f)),
    "grad of jvp of jvp": lambda f, n, t: grad(along(t, along(t, f)), n),
}


SLOW = ("jvp of jvp", "grad of jvp of jvp")


@pytest.mark.parametrize("transform", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in TRANSFORMS])
@pytest.mark.parametrize("bias", BIASES)
def test_transform(bias, transform):
    f, g, primals, tangents = functions(bias)
    of, n = TRANSFORMS[transform], tuple(range(len(primals)))
    close(of(f, n, tangents)(*primals), of(g, n, tangents)(*primals))
    if transform.count("of") > 1:
        return
    for some in (n, (0,), n[1:]):
        dims = tuple(0 if i in some else None for i in n)
        many = tuple(torch.stack([x, -x, x.sin()]) if i in some else x for i, x in enumerate(primals))
        close(vmap(of(f, n, tangents), dims)(*many), vmap(of(g, n, tangents), dims)(*many))


def test_samples_with_lists_of_their_own():
    (q, k, v, indptr, indices), _ = inputs(Graph())
    both = torch.stack([indices, indices.flip(0)])
    found = vmap(lambda indices: fastattn.attention_csr(q, k, v, indptr, indices))(both)
    close(found, torch.stack([fastattn.attention_csr(q, k, v, indptr, x) for x in both]))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearize():
    (q, k, v, *lists), _ = inputs(Graph(dtype="float64"))
    tangent = torch.randn_like(q)
    call = lambda q: fastattn.attention_csr(q, k, v, *lists)  # noqa: E731
    close(linearize(call, q)[1](tangent), jvp(call, (q,), (tangent,))[1])
