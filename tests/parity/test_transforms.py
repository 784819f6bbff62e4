"""torch.func, forward mode and derivatives of gradients, against plain torch in float64."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import fastattn
from eager import eager, ours
from fastattn import Mask
from fastattn.transforms import blocks
from isas import needs_cpu

pytestmark = [
    needs_cpu,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::fastattn.FallbackWarning"),
]

close, slow = torch.testing.assert_close, pytest.mark.slow


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boolean(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6


@pytest.fixture(autouse=True, params=[pytest.param(False, marks=slow), True], ids=["one block", "many blocks"])
def size_of_blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(blocks, "_ROWS", 3)
        monkeypatch.setattr(blocks, "_SCORES", 20)


Q, K, V = normal(2, 4, 7, 5), normal(2, 2, 6, 5, seed=1), normal(2, 2, 6, 3, seed=2)
IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
BLOCKS = fastattn.BlockMask.from_dense(boolean(2, 4, 7, 6), block_size=16)

KINDS = {  # name: (terms with derivatives, others)
    "dense": ({}, {}),
    "causal": ({}, {"causal": True}),
    "window": ({}, {"window_size": (2, 1)}),
    "lengths": ({}, {"mask": Mask.lengths(torch.tensor([0, 5]))}),
    "documents": ({}, {"mask": Mask.documents(IDS, IDS[:, 1:])}),
    "tensor": ({}, {"mask": boolean(2, 1, 7, 6)}),
    "blocks": ({}, {"mask": BLOCKS, "causal": True}),
    "softcap": ({}, {"softcap": 0.7, "softmax_scale": 0.8}),
    "bias": ({"bias": normal(4, 7, 6)}, {"softcap": 1.5}),
    "key bias": ({"bias": normal(2, 1, 1, 6)}, {}),
    "bias of -inf": (
        {},
        {"bias": normal(7, 6).masked_fill(boolean(7, 6) | (torch.arange(7)[:, None] == 2), -torch.inf)},
    ),
    "alibi": ({"alibi_slopes": normal(4)}, {"causal": True}),
    "alibi of samples": ({"alibi_slopes": normal(2, 4)}, {}),
    "sinks": ({"sinks": normal(4)}, {"mask": boolean(2, 4, 7, 6) & (torch.arange(7)[:, None] != 2)}),
    "scale": ({"softmax_scale": normal()}, {}),
    "scales": ({"softmax_scale": normal(4)}, {"softcap": 2.0}),
    "dropout": ({}, {"dropout_p": 0.3, "seed": 5}),
    "all": (
        {"bias": normal(2, 1, 7, 6), "alibi_slopes": normal(4), "sinks": normal(4), "softmax_scale": normal(4)},
        {"softcap": 1.5, "dropout_p": 0.2, "seed": 7, "causal": True, "mask": boolean(7, 6)},
    ),
}


def functions(kind):
    """(ours, plain torch: a number of the tensors, the tensors, their tangents)"""
    tensors, others = KINDS[kind]
    weights = normal(2, 4, 7, 3, seed=3), normal(2, 4, 7, seed=4)

    def of(function):
        def call(q, k, v, *values):
            out, lse = function(q, k, v, **dict(zip(tensors, values, strict=True)), **others)
            # Not linear in the results: derivatives of the cotangents count.
            return (weights[0] * out * out).sum() + (weights[1] * lse.sin()).sum()

        return call

    primals = Q, K, V, *tensors.values()
    return of(ours), of(eager), primals, tuple(normal(*x.shape, seed=5 + i) for i, x in enumerate(primals))


def all_of(primals):
    return tuple(range(len(primals)))


def along(tangents, function):
    """The derivative of a number along tangents, in forward mode."""
    return lambda *x: jvp(function, x, tangents)[1]


TRANSFORMS = {
    "grad": lambda f, n, t: grad(f, n),
    "jvp": lambda f, n, t: along(t, f),
    "jvp of grad": lambda f, n, t: lambda *x: jvp(grad(f, n), x, t)[1],
    "grad of jvp": lambda f, n, t: grad(along(t, f), n),
    "grad of grad": lambda f, n, t: grad(
        lambda *x: sum((a * b).sum() for a, b in zip(grad(f, n)(*x), t, strict=True)), n
    ),
    "jvp of jvp": lambda f, n, t: along(t, along(t, f)),
    "grad of jvp of jvp": lambda f, n, t: grad(along(t, along(t, f)), n),
    "jvp of grad of jvp": lambda f, n, t: lambda *x: jvp(grad(along(t, f), n), x, t)[1],
}


THIRD = [name for name in TRANSFORMS if name.count("jvp") + name.count("grad") > 2]


@pytest.mark.parametrize("transform", [pytest.param(x, marks=slow) if x in THIRD else x for x in TRANSFORMS])
@pytest.mark.parametrize("kind", KINDS)
def test_transform(kind, transform):
    f, plain, primals, tangents = functions(kind)
    of, n = TRANSFORMS[transform], all_of(primals)
    close(of(f, n, tangents)(*primals), of(plain, n, tangents)(*primals), rtol=1e-9, atol=1e-9)


def stacked(x, dim, seed):
    return torch.stack([x, x + 0.1 * normal(*x.shape, seed=seed), -x], dim)


SECOND = [name for name in TRANSFORMS if " of " in name]
OFTEN = ("key bias", "all")  # of which derivatives of derivatives are tried in many samples each time


@pytest.mark.parametrize(
    "kind, transform",
    [
        pytest.param(kind, name, marks=[slow] if name in THIRD or (name in SECOND and kind not in OFTEN) else [])
        for kind in KINDS
        for name in ("none", *TRANSFORMS)
    ],
)
def test_vmap(kind, transform):
    """All tensors along different dimensions, and only some of them."""
    f, plain, primals, tangents = functions(kind)
    of, n = TRANSFORMS.get(transform, lambda f, n, t: f), all_of(primals)
    for some in (n, (0,), (1, 2), (2, *n[3:])):
        dims = tuple(min(i, x.dim()) if i in some else None for i, x in enumerate(primals))
        many = tuple(x if d is None else stacked(x, d, i) for i, (x, d) in enumerate(zip(primals, dims, strict=True)))
        actual = vmap(of(f, n, tangents), dims)(*many)
        slices = [[x if d is None else x.select(d, i) for x, d in zip(many, dims, strict=True)] for i in range(3)]
        results = [of(plain, n, tangents)(*one) for one in slices]
        if not torch.is_tensor(results[0]):
            results = [torch.stack(parts) for parts in zip(*results, strict=True)]
        expected = torch.stack(results) if torch.is_tensor(actual) else tuple(results)
        close(actual, expected, rtol=1e-9, atol=1e-9)
