"""Random graphs and calls along their edges."""

from typing import NamedTuple

import torch

import fastattn
from forward import INF


class Graph(NamedTuple):
    """One call by value. Query i has between 0 and 2 * degree edges to random keys, some of them twice.

    bias    None | "edge" ([edges]) | "head" ([num_heads, edges]) | "full" ([batch, num_heads, edges]) |
            "batch" ([batch, 1, edges]); some entries are -inf
    """

    seqlen_q: int = 37
    seqlen_k: int = 53
    degree: int = 6
    batch: int = 2
    num_heads: int = 4
    num_heads_k: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    dtype: str = "float32"
    bias: str | None = None
    index: str = "int64"

    def __str__(self) -> str:
        return "-".join(str(x) for x in self)


def inputs(graph: Graph, seed: int = 0) -> tuple[list[torch.Tensor], dict]:
    """((q, k, v, indptr, indices), keyword arguments)"""
    g, generator = graph, torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = torch.randint(0, 2 * g.degree + 1, (g.seqlen_q,), generator=generator)
    counts = counts * (torch.rand(g.seqlen_q, generator=generator) < 0.8) * (g.seqlen_k > 0)
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    edges = int(indptr[-1])
    indices = torch.randint(0, max(g.seqlen_k, 1), (edges,), generator=generator)
    shapes = {"edge": (edges,), "head": (g.num_heads, edges), "batch": (g.batch, 1, edges)}
    shapes |= {"full": (g.batch, g.num_heads, edges)}
    kwargs = {}
    if g.bias:
        bias = normal(*shapes[g.bias])
        kwargs["edge_bias"] = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.1, -INF)
    sizes = (g.num_heads, g.seqlen_q, g.head_dim), (g.num_heads_k, g.seqlen_k, g.head_dim)
    qkv = [normal(g.batch, *size) for size in (*sizes, (g.num_heads_k, g.seqlen_k, g.head_dim_v))]
    dtype, index = getattr(torch, g.dtype), getattr(torch, g.index)
    lists = [indptr.to(index), indices.to(index)]
    return [x.to(dtype) for x in qkv] + lists, {name: x.to(dtype) for name, x in kwargs.items()}


def run(*tensors, backend="cpu", **kwargs):
    result = fastattn.attention_csr(*tensors, **kwargs, return_lse=True, backend=backend)
    assert fastattn.last_call().kernel == f"{backend}.csr"
    return result


BIASES = (None, "edge", "head", "full", "batch")


def cotangents(q, v):
    generator = torch.Generator().manual_seed(1)
    shape = (*q.shape[:3], v.shape[3])
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[:3]))


def results(tensors, kwargs, backend="cpu", dout=None, dlse=None) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of q, k, v, edge_bias; an lse of -inf takes no cotangent."""
    leaves = dict(zip("qkv", tensors, strict=False)) | kwargs
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    options = {name: leaves[name] for name in kwargs}
    out, lse = run(*(leaves[name] for name in "qkv"), *tensors[3:], **options, backend=backend)
    both = cotangents(*(tensors[i] for i in (0, 2)))
    weights = [(both[0] if dout is None else dout).to(out.dtype), (both[1] if dlse is None else dlse).to(lse.dtype)]
    grads = torch.autograd.grad([out, lse.masked_fill(lse == -INF, 0.0)], list(leaves.values()), weights)
    if backend == "cpu":
        assert fastattn.last_call().kernel == "cpu.csr_backward"
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}


def assert_same(actual: dict, expected: dict):
    for name, x in expected.items():
        y = actual[name]
        assert (y.shape, y.dtype) == (x.shape, x.dtype) and torch.equal(x, y), name
