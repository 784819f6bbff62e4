"""torch.func, forward mode and double backward inside of graphs: the kernels and the bits of an eager call."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.export import export
from torch.func import grad, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastattn
from compiling import assert_equal, num_graphs
from fastattn import BlockMask, attention, attention_csr, patterns

SEQLEN = 21
BIAS, SLOPES = torch.linspace(-1, 1, SEQLEN**2).view(SEQLEN, SEQLEN), torch.tensor([0.5, 1.0])
ONE = patterns.causal(SEQLEN, block_size=16)
TWO = BlockMask.cat([ONE, patterns.strided(SEQLEN, stride=3, block_size=16)], dim=0)
LISTS = torch.arange(0, 2 * SEQLEN + 1, 2), torch.arange(2 * SEQLEN) % SEQLEN


def capped(q, k, v):
    return attention(q, k, v, causal=True, softcap=3.0, alibi_slopes=SLOPES).square().sum()


def along_edges(q, k, v):  # in a graph out has another order in memory, and a sum of it other bits
    return attention_csr(q, k, v, *LISTS).contiguous().square().sum()


def gradient_of_sum(function):
    return grad(lambda *x: sum([y.square().sum() for y in function(*x)]))


CASES = {
    "grad": lambda q, k, v: grad(capped, (0, 1, 2))(q, k, v),
    "vjp": lambda q, k, v: vjp(lambda *x: attention(*x, bias=BIAS, return_lse=True), q, k, v)[1]((q, q[..., 0])),
    "vmap": lambda q, k, v: vmap(lambda x: attention(x, k, v, window_size=(2, 0), mask=TWO))(torch.stack([q, -q])),
    "vmap with dropout": lambda q, k, v: vmap(lambda x: attention(x, k, v, dropout_p=0.3, seed=4))(torch.stack([q, k])),
    "vmap(grad)": lambda q, k, v: vmap(grad(capped), (0, None, None))(torch.stack([q, -q]), k, v),
    "jvp": lambda q, k, v: jvp(lambda q, k: attention(q, k, v, mask=ONE, softmax_scale=0.3), (q, k), (k, q)),
    "jvp(grad)": lambda q, k, v: jvp(grad(capped, (0, 1)), (q, k, v), (k, q, v)),
    "grad(grad)": lambda q, k, v: gradient_of_sum(grad(capped, (0, 1)))(q, k, v),
    "grad(grad(grad))": lambda q, k, v: gradient_of_sum(gradient_of_sum(grad(capped, (0, 1))))(q, k, v),
    "grad(jvp)": lambda q, k, v: gradient_of_sum(lambda q: jvp(lambda q: attention(q, k, v, bias=BIAS), (q,), (v,)))(q),
    "jacrev": lambda q, k, v: jacrev(lambda x: attention(x, k, v).sum((0, 1, 2)))(q),
    "edges": lambda q, k, v: (along_edges(q, k, v), vmap(along_edges, (0, None, None))(torch.stack([q, v]), k, v)),
    "grad(grad) along edges": lambda q, k, v: gradient_of_sum(grad(along_edges, (0, 1)))(q, k, v),
    "jvp along edges": lambda q, k, v: jvp(lambda q: attention_csr(q, k, v, *LISTS), (q,), (v,)),
}  # fmt: skip


QUICK = ("vjp", "vmap", "jvp(grad)", "grad(jvp)", "edges")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def inputs(seqlen=SEQLEN, **options):
    return torch.randn(3, 2, 2, seqlen, 8, **options).unbind()


def kernels_of(calls):
    return {(call.kernel, call.problem.direction) for call in calls}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["some", "all"])
def test_transforms_in_one_graph(names):
    cases = [CASES[name] for name in names]

    def model(q, k, v):
        return torch.utils._pytree.tree_leaves([case(q, k, v) for case in cases])

    q, k, v = inputs()
    with fastattn.record() as expected_calls:
        expected = model(q, k, v)
    with fastattn.record() as calls:
        actual = torch.compile(model, backend="aot_eager", fullgraph=True)(q, k, v)
    assert num_graphs() == 1
    assert_equal(actual, expected)
    assert kernels_of(calls) == kernels_of(expected_calls)
    assert not any("reference" in kernel for kernel, direction in kernels_of(calls) if direction == "forward")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_each_transform(name):
    for backend in ("eager", "inductor"):
        torch._dynamo.reset()
        q, k, v = inputs()
        actual = torch.compile(CASES[name], backend=backend, fullgraph=True)(q, k, v)
        torch.testing.assert_close(actual, CASES[name](q, k, v))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_lengths_compile_nothing():
    def model(q, k, v):
        return gradient_of_sum(grad(capped, (0, 1)))(q, k, v), vmap(capped, (0, None, None))(torch.stack([q, k]), k, v)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (21, 33, 40):
        qkv = inputs(seqlen)
        assert_equal(compiled(*qkv), model(*qkv))
    assert num_graphs() == 1


def test_make_fx_records_operators():
    """linearize, too, which make_fx is a part of."""
    q, k, v = inputs()
    graph = make_fx(CASES["grad(grad)"])(q, k, v)
    names = [str(node.target) for node in graph.graph.nodes if "fastattn" in str(node.target)]
    assert names and set(names) == {"fastattn.dense_work.default"}
    assert_equal(graph(q, k, v), CASES["grad(grad)"](q, k, v))
    pushed = linearize(lambda q: attention(q, k, v, causal=True), q)[1]
    with fastattn.record() as calls:
        tangent = pushed(v)
    kernels = [call.kernel for call in calls]
    assert "cpu.tangent" in kernels and not any("reference" in kernel for kernel in kernels)
    assert torch.equal(tangent, jvp(lambda q: attention(q, k, v, causal=True), (q,), (v,))[1])


def second_derivatives(function, qkv, options):
    out, lse = function(*qkv, **options)
    first = torch.autograd.grad(out.square().sum() + lse.sum(), qkv, create_graph=True)
    return [*first, *torch.autograd.grad(sum([x.square().sum() for x in first]), qkv)]


@pytest.mark.parametrize("options", [{}, {"mask": TWO, "softcap": 3.0}, {"dropout_p": 0.3, "seed": 5}], ids=str)
def test_a_gradient_of_a_graph_has_gradients(options):
    """Where the operators themselves run: backend="eager", and exported programs."""

    class Call(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True, return_lse=True, **options)

    qkv = inputs(requires_grad=True)
    expected = second_derivatives(Call(), qkv, {})
    compiled = torch.compile(Call(), backend="eager", fullgraph=True)
    for function in (compiled, export(Call(), tuple(qkv)).module()):
        assert_equal(second_derivatives(function, qkv, {}), expected)


def test_gradients_along_edges_have_gradients():
    qkv = inputs(requires_grad=True)
    call = torch.compile(lambda *qkv: attention_csr(*qkv, *LISTS, return_lse=True), backend="eager", fullgraph=True)
    expected = second_derivatives(lambda *qkv: attention_csr(*qkv, *LISTS, return_lse=True), qkv, {})
    assert_equal(second_derivatives(call, qkv, {}), expected)


@pytest.mark.parametrize("kind", ["Forward", "Backward", "Tangent", "Second"])
def test_the_operator(kind):
    q, k, v = inputs()
    extra, outs = {
        "Forward": ({}, ["out", "lse", "parts"]),
        "Backward": ({"d.out": q, "d.lse": q[..., 0]}, ["q", "v", "bias"]),
        "Tangent": ({"t.k": v, "t.bias": BIAS}, ["out", "lse"]),
        "Second": ({"d.out": q, "t.k": v}, ["q", "bias", "d.out"]),
    }[kind]
    given = {"q": q, "k": k, "v": v, "bias": BIAS, **extra}
    arguments = kind, list(given.values()), list(given), outs, kind == "Forward"
    opcheck(torch.ops.fastattn.dense_work.default, arguments, {"causal": True, "return_lse": True})
