"""`attention_csr` as a call: what it refuses, what runs, and torch's machinery around it."""

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import UnsupportedError, dispatch
from fastattn.backends import cpu
from fastattn.layouts.edges import Edges
from graphs import Graph, inputs, run

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]


# --- refusals --------------------------------------------------------------------------------------------------------

MALFORMED = {
    "from 1": ([1, 2, 2, 3], [0, 1, 2], "indptr[0]=1 must be 0"),
    "from -1": ([-1, 2, 2, 3], [0, 1, 2], "indptr[0]=-1 must be 0"),
    "decreasing": (
        [0, 3, 2, 3],
        [0, 1, 2],
        "indptr[2]=2 is below indptr[1]=3; the starts of the rows must not decrease",
    ),
    "negative": ([0, -5, 2, 3], [0, 1, 2], "indptr[1]=-5 is below indptr[0]=0"),
    "too few": ([0, 1, 2, 2], [0, 1, 2], "indptr[3]=2 must be the number of indices, 3"),
    "too many": ([0, 1, 2, 4], [0, 1, 2], "indptr[3]=4 must be the number of indices, 3"),
    "huge": ([0, 1, 2, 2**31 - 1], [0, 1, 2], "indptr[3]=2147483647 must be the number of indices, 3"),
    "past the end": ([0, 1, 2, 3], [0, 5, 2], "indices[1]=5 must be a key, 0 <= index < seqlen_k=5"),
    "below 0": ([0, 1, 2, 3], [0, 1, -1], "indices[2]=-1 must be a key, 0 <= index < seqlen_k=5"),
    "no keys": ([0, 0, 0, 1], [0], "indices[0]=0 must be a key, 0 <= index < seqlen_k=0"),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_lists(name, backend, dtype):
    indptr, indices, message = MALFORMED[name]
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0 if name == "no keys" else 5, 8)
    lists = torch.tensor(indptr, dtype=dtype), torch.tensor(indices, dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(q, k, k, *lists, backend=backend)
    with pytest.raises(ValueError, match=re.escape(message)):  # also where there is nothing to compute
        run(q[:0], k[:0], k[:0], *lists, backend=backend)


def test_an_index_beyond_32_bits():
    q = torch.randn(1, 1, 1, 8)
    with pytest.raises(ValueError, match=r"indices\[0\]=4294967296 must be a key"):
        run(q, q, q, torch.tensor([0, 1]), torch.tensor([2**32]))


def test_the_backward_pass_checks_the_lists_too():
    """It may be handed other ones, by saved-tensor hooks for instance."""
    q, k, v = (torch.randn(1, 1, 2, 8).requires_grad_() for _ in range(3))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x if x.is_floating_point() else x + 1)
    with hooks:
        out = fastattn.attention_csr(q, k, v, torch.tensor([0, 1, 2]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"indptr\[0\]=1 must be 0"):
        out.sum().backward()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"indptr": [0, 1]}, TypeError, "indptr must be a torch.Tensor, got list"),
        ({"indices": None}, TypeError, "indices must be a torch.Tensor, got NoneType"),
        ({"indptr": torch.zeros(4)}, TypeError, "indptr has dtype torch.float32; it must be int32 or int64"),
        ({"indices": torch.zeros(3, dtype=torch.int16)}, TypeError, "indices has dtype torch.int16"),
        ({"indptr": torch.zeros(3, dtype=torch.int64)}, ValueError, "indptr has 3 entries; it must have seqlen_q + 1"),
        ({"indices": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "indices has shape (1, 3); it must have one"),
        ({"indptr": torch.zeros((), dtype=torch.int64)}, ValueError, "indptr has shape (); it must have one dimension"),
        ({"edge_bias": torch.zeros(4)}, ValueError, "edge_bias has shape (4,); it must be broadcastable"),
        ({"edge_bias": torch.zeros(3, 3)}, ValueError, "edge_bias has shape (3, 3); it must be broadcastable"),
        ({"edge_bias": torch.zeros(2, 1)}, ValueError, "edge_bias has shape (2, 1); its last size must be edges=3"),
        ({"edge_bias": torch.zeros(())}, ValueError, "edge_bias has shape (); its last size must be edges=3"),
        ({"edge_bias": torch.zeros(1, 1, 2, 3)}, ValueError, "edge_bias has shape (1, 1, 2, 3); it must be"),
        ({"edge_bias": torch.zeros(3).int()}, TypeError, "edge_bias has dtype torch.int32; supported are float16, "),
        ({"edge_bias": 0.5}, TypeError, "edge_bias must be a torch.Tensor, got float"),
        ({"edge_bias": torch.zeros(3, device="meta")}, ValueError, "edge_bias is on meta, q on cpu"),
        ({"indices": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "indices is on meta, q on cpu"),
        ({"q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
        ({"q": torch.zeros(3, 8)}, ValueError, "q has shape (3, 8); it must be [batch, num_heads, seqlen, head_dim]"),
        ({"k": torch.zeros(1, 2, 5, 8).double()}, TypeError, "q, k, v have dtypes"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale"),
        ({"backend": "gpu"}, ValueError, "backend='gpu' is not a backend"),
        ({"causal": True}, TypeError, "unexpected keyword argument 'causal'"),
    ],
    ids=lambda x: str(x)[:30] if isinstance(x, str) else None,
)  # fmt: skip
def test_wrong_arguments(changes, error, message):
    arguments = dict(zip("qkv", (torch.zeros(1, 2, n, 8) for n in (3, 5, 5)), strict=True))
    arguments |= {"indptr": torch.tensor([0, 1, 2, 3]), "indices": torch.tensor([0, 1, 2])}
    fastattn.attention_csr(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        fastattn.attention_csr(**(arguments | changes))


NATIVE = {  # place in csr_forward, or name in its Edges: what it must not be
    3: (torch.ones(1, 2, 3, 7), torch.ones(1, 2, 3, 8).half()),
    4: (torch.ones(1, 2, 4), torch.ones(1, 2, 3).double()),
    "indptr": (torch.zeros(4), torch.zeros(3).long(), torch.zeros(2, 4).long(), None),
    "indices": (torch.zeros(3), torch.zeros(1, 3).long(), 5),
    "bias": (torch.zeros(4), torch.zeros(3).int(), torch.zeros(3, 1, 3)),
    6: (torch.ones(1, 2, 3, 8).half(),),
}


@pytest.mark.parametrize("place", NATIVE)
def test_the_native_entry_refuses_what_does_not_fit(place):
    q = torch.ones(1, 2, 3, 8)
    edges = Edges(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2]), None, 0.5)
    good = [q, q, q, torch.empty_like(q), None, None, None, edges, 1]
    cpu._C.csr_forward(*good)
    for wrong in NATIVE[place]:
        by_name = isinstance(place, str)
        argument, wrong = (7, edges._replace(**{place: wrong})) if by_name else (place, wrong)
        with pytest.raises((ValueError, TypeError, AttributeError)):
            cpu._C.csr_forward(*good[:argument], wrong, *good[argument + 1 :])
    with pytest.raises(ValueError, match="9 arguments"):
        cpu._C.csr_forward(*good[:-1])


# --- the table -------------------------------------------------------------------------------------------------------


def test_record_and_explain(fresh_fallbacks):
    (q, k, v, indptr, indices), kwargs = inputs(Graph(bias="head"))
    with fastattn.record() as calls:
        fastattn.attention_csr(q.requires_grad_(), k, v, indptr, indices, **kwargs).sum().backward()
    assert [(c.kernel, c.isa, c.reason) for c in calls] == [
        (name, cpu.isa(), "") for name in ("cpu.csr", "cpu.csr_backward")
    ]
    problem = calls[0].problem
    assert str(problem) == "cpu float32 B2 H4/2 S37x53 D16 csr bias:float32 needs_grad"
    text = fastattn.explain(q, k, v, indptr, indices, **kwargs)
    names = ["cpu.csr", "reference.csr", "cpu.csr_backward", "reference.csr_backward"]
    assert text.splitlines()[0] == str(problem) and [line.split()[0] for line in text.splitlines()[1:]] == names
    assert text == fastattn.explain(q, k, v, indptr=indptr, indices=indices, **kwargs)
    assert "csr" not in fastattn.explain(q, k, v)
    assert not fresh_fallbacks


def test_backends(fresh_fallbacks):
    (q, k, v, indptr, indices), _ = inputs(Graph())
    with fastattn.use("reference"):
        fastattn.attention_csr(q, k, v, indptr, indices)
    assert fastattn.last_call().kernel == "reference.csr" and not fresh_fallbacks
    torch.func.grad(lambda q: fastattn.attention_csr(q, k, v, indptr, indices, backend="cpu").sum())(q)
    assert fastattn.last_call().kernel == "cpu.csr_backward" and not fresh_fallbacks
    meta = [x.to("meta") for x in (q, k, v)]
    assert fastattn.attention_csr(*meta, indptr.to("meta"), indices.to("meta")).is_meta and not fresh_fallbacks
    with pytest.raises(UnsupportedError, match="cpu.csr: device='meta'"):
        fastattn.attention_csr(*meta, indptr.to("meta"), indices.to("meta"), backend="cpu")


@pytest.mark.parametrize("row", [row for row in dispatch.KERNELS if "csr" in row.name], ids=lambda row: row.name)
def test_each_row_accepts_some_call(row):
    (q, k, v, indptr, indices), kwargs = inputs(Graph(bias="edge"))
    run(q.requires_grad_(), k, v, indptr, indices, **kwargs)
    problem = fastattn.last_call().problem
    problem = problem._replace(needs_grad=False)
    for direction in ("forward", "backward", "tangent", "second"):
        is_its = row.name.partition("csr")[2] == ("" if direction == "forward" else f"_{direction}")
        assert is_its == (not dispatch.refuse(row, problem._replace(direction=direction)))


# --- torch's machinery -----------------------------------------------------------------------------------------------


def test_functorch_and_forward_mode():
    (q, k, v, indptr, indices), kwargs = inputs(Graph(dtype="float64", bias="edge"))

    def call(q):
        return fastattn.attention_csr(q, k, v, indptr, indices, **kwargs)

    batched = torch.func.vmap(call)(torch.stack([q, 2 * q]))
    torch.testing.assert_close(batched, torch.stack([call(q), call(2 * q)]))
    tangent = torch.randn_like(q)
    _, derivative = torch.func.jvp(call, (q,), (tangent,))
    dout = torch.randn_like(derivative)
    grad = torch.autograd.grad(call(x := q.detach().requires_grad_()), x, dout)[0]
    torch.testing.assert_close((derivative * dout).sum(), (grad * tangent).sum())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    (q, k, v, indptr, indices), _ = inputs(Graph())
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        return fastattn.attention_csr(q, k, v, indptr, indices)

    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    checkpoint(call, *leaves, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip(leaves, expected, strict=True))
