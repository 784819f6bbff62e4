"""`attention_csr`: against the reference in float64 and against dense attention with the same edges as a bool mask."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from backward import SLACK
from fastattn.backends import cpu
from forward import DTYPES, INF, TOLERANCE, exactly_these, max_error
from graphs import BIASES, Graph, assert_same, cotangents, inputs, results, run
from isas import run_tests_on, running_isa, supported_isas

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]


# --- values ----------------------------------------------------------------------------------------------------------


def extended_precision(tensors, kwargs, dout) -> dict[str, torch.Tensor]:
    """`results` of float64 tensors in numpy's longdouble.

    The reference in float64 is no oracle for float64: it adds edge after edge, and rounds more than the kernel where a
    query has hundreds.
    """
    dlse = cotangents(tensors[0], tensors[2])[1]
    q, k, v, dout, dlse = (x.numpy().astype(np.longdouble) for x in (*tensors[:3], dout, dlse))
    indptr, keys = (x.numpy() for x in tensors[3:])
    rows, scale = np.repeat(np.arange(q.shape[2]), np.diff(indptr)), np.longdouble(q.shape[-1] ** -0.5)
    group_size = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k_edges, v_edges = (x.repeat(group_size, 1)[:, :, keys] for x in (k, v))
    q_edges, dout_edges = q[:, :, rows], dout[:, :, rows]

    def sums(edges, places, size):
        result = np.zeros((*edges.shape[:2], size, *edges.shape[3:]), np.longdouble)
        np.add.at(result, (slice(None), slice(None), places), edges)
        return result

    scores = scale * (q_edges * k_edges).sum(-1)
    if kwargs:
        scores = scores + kwargs["edge_bias"].numpy()
    top = np.full(q.shape[:3], -np.inf, np.longdouble)
    np.maximum.at(top, (slice(None), slice(None), rows), scores)
    top[top == -np.inf] = 0
    p = np.exp(scores - top[:, :, rows])
    total = sums(p, rows, q.shape[2])
    empty = total == 0
    total[empty] = 1
    p /= total[:, :, rows]
    out = sums(p[..., None] * v_edges, rows, q.shape[2])
    delta = (dout * out).sum(-1) - dlse
    ds = p * ((dout_edges * v_edges).sum(-1) - delta[:, :, rows])
    found = {"out": out, "lse": np.where(empty, -np.inf, top + np.log(total))}
    found["dq"] = scale * sums(ds[..., None] * k_edges, rows, q.shape[2])
    by_key = scale * sums(ds[..., None] * q_edges, keys, k.shape[2]), sums(p[..., None] * dout_edges, keys, k.shape[2])
    for name, x, y in zip(("dk", "dv"), by_key, (k, v), strict=True):
        found[name] = x.reshape(k.shape[0], k.shape[1], group_size, *y.shape[2:]).sum(2)
    if kwargs:
        shape = kwargs["edge_bias"].shape
        axes = tuple(i for i, size in enumerate((1,) * (3 - len(shape)) + shape[:-1]) if size == 1)
        found["dedge_bias"] = ds.sum(axes, keepdims=True).reshape(shape)
    return {name: torch.from_numpy(x.astype(np.float64)) for name, x in found.items()}


def assert_parity(tensors, kwargs):
    """Each error is at most twice that of plain torch in the same dtype, against the reference in a wider one; those of
    dq and dk at most eight times where rows of v are long: dP - delta cancels, and leaves the rounding of long sums."""
    dout = cotangents(tensors[0], tensors[2])[0].to(tensors[0].dtype).double()  # the same number for all three
    actual, same_dtype = (results(tensors, kwargs, backend, dout=dout) for backend in ("cpu", "reference"))
    if tensors[0].dtype == torch.float64:
        oracle = extended_precision(tensors, kwargs, dout)
    else:
        double = [x.double() if x.is_floating_point() else x for x in tensors]
        oracle = results(double, {name: x.double() for name, x in kwargs.items()}, "reference", dout=dout)
    for name, z in oracle.items():
        x, y = actual[name], same_dtype[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        dtype = str(x.dtype).removeprefix("torch.")
        slack, limit = TOLERANCE[dtype] if name in ("out", "lse") else (SLACK[dtype], INF)
        times = 8.0 if name in ("dq", "dk") and tensors[2].shape[-1] > 512 else 2.0
        error, bound = max_error(x, z), min(times * max_error(y, z) + slack, limit)
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


def _parity_graphs() -> tuple[Graph, ...]:
    small, plain = Graph(), Graph(batch=1, num_heads=2)
    graphs = [plain._replace(head_dim=d, head_dim_v=d) for d in (1, 3, 8, 16, 17, 31, 32, 33, 48, 64, 65, 96, 128)]
    graphs += [plain._replace(head_dim=d, head_dim_v=dv) for d, dv in ((7, 65), (64, 24), (300, 16), (16, 600))]
    graphs += [plain._replace(degree=d, seqlen_q=s) for d, s in ((1, 40), (16, 12), (32, 20), (70, 9), (400, 5))]
    graphs += [Graph(1, 1, 100, 1, 1, 1, 1, 64, dtype="float64")]  # one key, 200 times
    graphs += [plain._replace(seqlen_q=s, seqlen_k=t) for s, t in ((1, 1), (1, 300), (300, 1), (130, 70))]
    graphs += [small._replace(num_heads_k=h) for h in (1, 4)] + [small._replace(index="int32")]
    graphs += [small._replace(seqlen_q=0), small._replace(seqlen_k=0), small._replace(degree=0)]
    graphs += [small._replace(batch=0), small._replace(num_heads=0, num_heads_k=0)]
    for dtype in DTYPES:
        graphs += [small._replace(dtype=dtype, bias=bias) for bias in BIASES]
        graphs += [small._replace(dtype=dtype, head_dim=64, head_dim_v=40, degree=50, bias=b) for b in (None, "head")]
    return tuple(dict.fromkeys(graphs))


@pytest.mark.parametrize("graph", _parity_graphs(), ids=str)
def test_parity(graph):
    assert_parity(*inputs(graph))


@settings(exactly_these, max_examples=60)
@given(st.data())
def test_parity_of_any_graph(data):
    draw, num_heads_k = data.draw, data.draw(st.integers(1, 2))
    sizes = st.integers(1, 40) | st.sampled_from((64, 65, 128))
    graph = Graph(
        seqlen_q=draw(st.integers(0, 70)),
        seqlen_k=draw(st.integers(0, 70)),
        degree=draw(st.sampled_from((0, 1, 5, 30, 60, 100))),
        batch=draw(st.integers(1, 2)),
        num_heads=num_heads_k * draw(st.integers(1, 3)),
        num_heads_k=num_heads_k,
        head_dim=draw(sizes),
        head_dim_v=draw(sizes),
        dtype=draw(st.sampled_from(DTYPES)),
        bias=draw(st.sampled_from(BIASES)),
        index=draw(st.sampled_from(("int32", "int64"))),
    )
    assert_parity(*inputs(graph, seed=draw(st.integers(0, 3))))


@pytest.mark.slow  # with prefill and backward, `make test` knows that the instruction sets agree
@pytest.mark.skipif("FASTATTN_CPU_ISA" in os.environ, reason="the suite runs on one ISA already")
@pytest.mark.parametrize("isa", supported_isas())
def test_every_isa(isa):
    if isa == running_isa():
        return  # this process runs on it
    files = "tests/parity/test_csr.py", "tests/parity/test_csr_rules.py"
    run_tests_on(isa, *files, "-k", "parity or guard or strides or threads")


def without_duplicates(indptr, indices):
    """(indptr, indices, bool mask [seqlen_q, 53]) of the distinct edges, in the order of their first appearance."""
    rows = torch.arange(len(indptr) - 1).repeat_interleave(indptr.diff())
    pairs = list(dict.fromkeys(zip(rows.tolist(), indices.tolist(), strict=True)))
    mask = torch.zeros(len(indptr) - 1, 53, dtype=torch.bool)
    for i, j in pairs:
        mask[i, j] = True
    return torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0)), torch.tensor([j for _, j in pairs]), mask


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_dense_attention_with_a_bool_mask(dtype, backend):
    (q, k, v, indptr, indices), _ = inputs(Graph(dtype=dtype))
    indptr, indices, mask = without_duplicates(indptr, indices)
    rows = torch.arange(len(indptr) - 1).repeat_interleave(indptr.diff())
    bias = torch.randn(2, 4, len(rows), dtype=torch.float64).to(q.dtype)
    dense_bias = torch.zeros(2, 4, *mask.shape, dtype=q.dtype)
    dense_bias[:, :, rows, indices] = bias
    actual = results([q, k, v, indptr, indices], {"edge_bias": bias}, backend)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, dense_bias)]
    out, lse = fastattn.attention(*leaves[:3], bias=leaves[3], mask=mask, return_lse=True)
    weights = [x.to(y.dtype) for x, y in zip(cotangents(q, v), (out, lse), strict=True)]
    grads = torch.autograd.grad([out, lse.masked_fill(lse == -INF, 0.0)], leaves, weights)
    expected = dict(zip(("out", "lse", "dq", "dk", "dv", "dedge_bias"), (out, lse, *grads), strict=True))
    expected["dedge_bias"] = expected["dedge_bias"][:, :, rows, indices]
    tolerance = {"float64": 1e-13, "float32": 3e-6, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x.detach(), atol=tolerance, rtol=tolerance)


def test_softmax_scale():
    (q, k, v, indptr, indices), _ = inputs(Graph(dtype="float64"))
    for scale in (0.0, -0.7, 3):
        actual = run(q, k, v, indptr, indices, softmax_scale=scale)
        expected = run(q, k, v, indptr, indices, softmax_scale=scale, backend="reference")
        torch.testing.assert_close(actual, expected, atol=1e-13, rtol=1e-13)


def test_a_key_that_is_listed_twice_weighs_twice():
    q, k, v = (torch.randn(1, 1, n, 16, dtype=torch.float64) for n in (1, 3, 3))
    twice = run(q, k, v, torch.tensor([0, 4]), torch.tensor([2, 0, 2, 1]))
    bias = torch.tensor([math.log(2.0), 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(twice, run(q, k, v, torch.tensor([0, 3]), torch.tensor([2, 0, 1]), edge_bias=bias))


def test_the_recipes_of_the_docstring():
    """Node features, an edge_index, nearest neighbours, and graphs of their own for each item."""
    x, edge_index = torch.randn(20, 4, 16), torch.randint(0, 20, (2, 70))
    bias = torch.randn(4, 70)
    order = edge_index[1].argsort(stable=True)
    indptr = torch.nn.functional.pad(edge_index[1].bincount(minlength=20).cumsum(0), (1, 0))
    h = x.transpose(0, 1)[None]
    out = run(h, h, h, indptr, edge_index[0][order], edge_bias=bias[..., order])[0]
    assert out[0].transpose(0, 1).is_contiguous()
    mask = torch.full((4, 20, 20), -INF)
    for e, (source, target) in enumerate(edge_index.T.tolist()):
        mask[:, target, source] = torch.logaddexp(mask[:, target, source], bias[:, e])
    torch.testing.assert_close(out, fastattn.attention(h, h, h, bias=mask), atol=1e-5, rtol=1e-5)

    q, k, v = (torch.randn(3, 4, 20, 16) for _ in range(3))
    neighbours = torch.randint(0, 20, (3, 20, 5))
    joined = [x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v)]
    indices = (neighbours + torch.arange(3)[:, None, None] * 20).flatten()
    together = run(*joined, torch.arange(0, 3 * 20 * 5 + 1, 5), indices)[0][0].unflatten(1, (3, 20))
    for b in range(3):
        alone = [x[b : b + 1] for x in (q, k, v)]
        alone = run(*alone, torch.arange(0, 20 * 5 + 1, 5), neighbours[b].flatten())[0]
        assert torch.equal(together[:, b], alone[0])


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
def test_gradcheck(bias):
    """Through the kernel in float64, out and lse; the second derivative through the reference, which is recorded."""
    graph = Graph(7, 5, 2, head_dim=3, head_dim_v=5, dtype="float64", bias=bias)
    (q, k, v, indptr, indices), kwargs = inputs(graph)
    leaves = [x.requires_grad_() for x in (q, k, v, *kwargs.values())]

    def call(q, k, v, *biases):
        names = dict(zip(kwargs, biases, strict=True))
        if names:  # the finite differences must not move an edge from and to -inf
            names["edge_bias"] = names["edge_bias"].masked_fill(kwargs["edge_bias"] == -INF, -INF)
        out, lse = fastattn.attention_csr(q, k, v, indptr, indices, **names, return_lse=True)
        return out, lse.masked_fill(lse == -INF, 0.0)

    if kwargs:
        leaves[3] = torch.where(leaves[3] == -INF, 0.0, leaves[3]).detach().requires_grad_()
    with fastattn.record() as calls:
        assert gradcheck(call, leaves, fast_mode=False)
    assert {c.kernel for c in calls} == {"cpu.csr", "cpu.csr_backward"}
    assert gradgradcheck(call, leaves, fast_mode=True)
    (grad,) = torch.autograd.grad(call(*leaves)[0].sum(), q, create_graph=True)
    assert fastattn.last_call().kernel == "cpu.csr_backward"
    grad.sum().backward()
    assert fastattn.last_call().kernel == "reference.csr_second"


def test_double_backward_of_one_tensor_thrice():
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64).requires_grad_()
    lists = torch.tensor([0, 2, 2, 5, 6]), torch.tensor([1, 3, 0, 2, 3, 2])
    (grad,) = torch.autograd.grad(fastattn.attention_csr(x, x, x, *lists).sum(), x)
    (again,) = torch.autograd.grad(fastattn.attention_csr(x, x, x, *lists).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, again)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (4, 1), (2, 4, 1), (2, 1, 1), (1, 4, 1)])
def test_bias_gradient_has_the_shape_of_the_bias(shape):
    """Broadcast over batch and heads, by its own shape or by expand."""
    (q, k, v, indptr, indices), _ = inputs(Graph())
    bias = torch.randn(*shape[:-1], len(indices)).requires_grad_()
    grads = [
        torch.autograd.grad(fastattn.attention_csr(q, k, v, indptr, indices, edge_bias=x).square().sum(), bias)[0]
        for x in (bias, bias.expand(2, 4, len(indices)))
    ]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "edge_bias", "qk", "qv", "kv"])
def test_only_what_is_asked_for(wanted):
    tensors, kwargs = inputs(Graph(bias="head"))
    expected = results(tensors, kwargs, dlse=torch.zeros(2, 4, 37))
    names = [wanted] if wanted == "edge_bias" else list(wanted)
    leaves = {
        n: x.clone().requires_grad_(n in names) for n, x in (dict(zip("qkv", tensors, strict=False)) | kwargs).items()
    }
    out = fastattn.attention_csr(*(leaves[n] for n in "qkv"), *tensors[3:], edge_bias=leaves["edge_bias"])
    out.backward(cotangents(tensors[0], tensors[2])[0].float())
    for name, x in leaves.items():
        assert torch.equal(x.grad, expected[f"d{name}"]) if name in names else x.grad is None


@pytest.mark.parametrize("result", ["out", "lse"])
def test_each_result_alone(result):
    tensors, kwargs = inputs(Graph(dtype="float64", bias="full"))
    grads = []
    for backend in ("cpu", "reference"):
        leaves = [x.detach().requires_grad_() for x in (*tensors[:3], kwargs["edge_bias"])]
        out, lse = run(*leaves[:3], *tensors[3:], edge_bias=leaves[3], backend=backend)
        loss = out.square().sum() if result == "out" else lse.masked_fill(lse == -INF, 0.0).square().sum()
        grads.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("dims", [(3,), (2,), (0, 1, 2, 3)])
def test_expanded_dout(dims):
    """What `out.sum().backward()` gives: one number with strides of 0."""
    tensors, kwargs = inputs(Graph())
    shape = (2, 4, 37, 16)
    dout = torch.randn([1 if d in dims else size for d, size in enumerate(shape)]).expand(shape)
    assert_same(results(tensors, kwargs, dout=dout), results(tensors, kwargs, dout=dout.contiguous()))


def test_lists_that_change_before_the_backward_pass_are_an_error():
    (q, k, v, indptr, indices), _ = inputs(Graph())
    out = fastattn.attention_csr(q.requires_grad_(), k, v, indptr, indices)
    indices[0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
