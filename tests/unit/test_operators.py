"""torch.ops.fastattn: fakes, subclasses, and what torch.library asks of an operator."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor

import fastattn
from cases import Case, inputs
from compiling import SMALL
from fastattn import BlockMask, Mask, attention, attention_csr
from fastattn.operators import library
from fastattn.terms import TERMS
from fastattn.torch_internals import add_to_keys_of_compiled_graphs
from graphs import Graph
from graphs import inputs as graph_inputs

ops = torch.ops.fastattn
LEARNED = [term.name for term in TERMS if term.gradient]
CASES = [
    SMALL._replace(causal=True),
    SMALL._replace(layout="bshd", mask="lengths"),
    SMALL._replace(mask="blocks"),
    SMALL._replace(dtype="bfloat16", bias="full", alibi=True, sinks=True, learned_scale="per_head", dropout_p=0.3),
]


def tensors():
    return [torch.randn(2, 4, seqlen, 8) for seqlen in (5, 7, 7)]


def options_of(case: Case) -> tuple[list[torch.Tensor], dict]:
    """q, k, v and the options of the operators for `case`."""
    qkv, kwargs = inputs(case)
    options = {"return_lse": True}
    for name, x in kwargs.items():
        if isinstance(x, BlockMask):
            options |= {"block_mask": list(x.tensors().values()), "block_sizes": [*x.BLOCK_SIZE, *x.seq_lengths]}
        elif isinstance(x, Mask):
            bounds = {"k_start": x.k_start, "k_end": x.k_end}
            options |= {name: bound for name, bound in bounds.items() if bound is not None}
        else:
            options[name] = torch.tensor(x) if name == "seed" else x
    return list(qkv), options


def padded(x):
    return torch.nn.functional.pad(x, (0, 4))[..., : x.shape[-1]]


def check_all(names, qkv, options, learned, **checks):
    """opcheck of the four operators of a layout, inputs in their memory and padded, some and all gradients wanted."""
    attention, forward, forward_train, backward = (getattr(ops, name).default for name in names)
    for prepare in (lambda x: x, padded):
        q, k, v = map(prepare, qkv)
        leaves = [prepare(x.clone()).requires_grad_() for x in qkv]
        opcheck(attention, tuple(leaves), options, **checks)
        for operator in (forward, forward_train):
            opcheck(operator, (q, k, v), options, **checks)
        out, lse, exact, parts = forward_train(q, k, v, **options)
        dout = torch.randn(out.shape, dtype=torch.float64).to(out.dtype).transpose(1, 2)
        saved = exact if exact.numel() else out.transpose(1, 2)
        for wanted in (
            [True] * 3 + [name in options for name in learned],
            [False, True, False] + [False] * len(learned),
        ):
            opcheck(backward, (dout, lse, q, k, v, saved, parts, wanted), options, **checks)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    qkv, options = options_of(case)
    check_all(("attention", "forward", "forward_train", "backward"), qkv, options, LEARNED)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fakes_and_schemas(case):
    qkv, options = options_of(case)
    names = "attention", "forward", "forward_train", "backward"
    check_all(names, qkv, options, LEARNED, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_operator_of_plain_calls(scale):
    for prepare in (lambda x: x, padded):
        qkv = tuple(map(prepare, tensors()))
        opcheck(ops.forward_plain.default, (*qkv, True, scale))
        expected = attention(*qkv, causal=True, softmax_scale=scale)
        assert torch.equal(ops.forward_plain(*qkv, True, scale), expected)


@pytest.mark.parametrize("off", [{}, {"dropout_p": 0.0, "return_lse": False}])
@pytest.mark.parametrize("on", [{}, {"softcap": 3.0}, {"skip_negligible": False}, {"backend": "cpu"}])
def test_only_calls_without_options_are_plain(off, on):
    graph = make_fx(lambda *qkv: ops.attention(*qkv, **off, **on)[0])(*tensors())
    names = [str(node.target) for node in graph.graph.nodes if "fastattn" in str(node.target)]
    assert names == ["fastattn.forward.default" if on else "fastattn.forward_plain.default"]


@pytest.mark.parametrize("utils", [("test_schema", "test_faketensor"), pytest.param(None, marks=pytest.mark.slow)])
def test_operators_of_edges(utils):
    (*qkv, indptr, indices), kwargs = graph_inputs(Graph(bias="head"))
    options = {"indptr": indptr, "indices": indices, "bias": kwargs["edge_bias"], "return_lse": True}
    checks = {} if utils is None else {"test_utils": utils}
    check_all(("attention_csr", "csr_forward", "csr_forward_train", "csr_backward"), qkv, options, ["bias"], **checks)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_an_operator(mode):
    qkv = tensors()
    graph = make_fx(lambda *qkv: attention(*qkv, causal=True), tracing_mode=mode)(*qkv)
    assert "fastattn.forward_plain.default" in [str(node.target) for node in graph.graph.nodes]
    others = [x + 1 for x in qkv]
    assert torch.equal(graph(*others), attention(*others, causal=True))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_tensors_have_shapes_and_gradients():
    attention(*tensors())
    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, requires_grad=True) for x in tensors())
        out, lse = attention(q, k, v, return_lse=True)
        (dk,) = torch.autograd.grad(out.sum() + lse.sum(), k)
    assert (out.shape, lse.shape, dk.shape) == (q.shape, q.shape[:3], k.shape)
    assert attention(q, k, v).shape == q.shape  # outside of their mode, after a real call of the same kind
    assert "cpu.prefill" in fastattn.explain(q, k, v)


def test_meta_tensors_are_no_fallback(fresh_fallbacks):
    q, k, v = (x.to("meta").requires_grad_() for x in tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = attention(q, k, v, mask=Mask.window(3, 0), dropout_p=0.1)
        out.sum().backward()
        lists = torch.arange(6, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta")
        assert attention_csr(q, k, v, *lists).shape == out.shape
    assert out.shape == q.shape and q.grad.is_meta and not fresh_fallbacks
    assert fastattn.explain(q, k, v).startswith("meta float32")


def test_parameters_and_plain_subclasses_run_on_the_kernel():
    class Named(torch.Tensor):
        pass

    q, k, v = tensors()
    expected = attention(q, k, v, backend="cpu")
    for x in (torch.nn.Parameter(q, requires_grad=False), q.as_subclass(Named)):
        assert torch.equal(attention(x, k, v), expected) and fastattn.last_call().kernel == "cpu.decode"


def test_wrapper_subclasses_see_operators():
    pairs = [TwoTensor(x, x + 1) for x in tensors()]
    compiled = torch.compile(lambda *qkv: attention(*qkv, causal=True), backend="aot_eager", fullgraph=True)
    expected = [attention(*[getattr(x, side) for x in pairs], causal=True) for side in "ab"]
    for function in (lambda *qkv: attention(*qkv, causal=True), compiled):
        out = function(*pairs)
        assert torch.equal(out.a, expected[0]) and torch.equal(out.b, expected[1])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_dtensors_are_refused_by_name(tmp_path):
    code = f"""
import torch, torch.distributed as dist, fastattn
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
x = distribute_tensor(torch.randn(1, 2, 3, 8), init_device_mesh("cpu", (1,)), [Replicate()])
for call in (lambda: fastattn.attention(x, x, x), torch.compile(lambda: fastattn.attention(x, x, x), backend="eager")):
    try:
        call()
    except TypeError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.count("a DTensor is not supported") == 2, result.stderr


def test_compiled_graphs_of_other_operators_are_not_found_again(monkeypatch):
    """torch's cache of graphs on disk knows operators by their names, whatever arguments they had."""
    tags = torch.compiler.config.cache_key_tag.split()
    assert library.fingerprint() in tags
    add_to_keys_of_compiled_graphs(library.fingerprint())
    assert torch.compiler.config.cache_key_tag.split() == tags
    changed = library.SCHEMAS[0].replace("Tensor q", "Tensor query")
    monkeypatch.setattr(library, "SCHEMAS", [changed, *library.SCHEMAS[1:]])
    assert library.fingerprint() not in tags


def test_import_of_fastattn_leaves_the_compiler_alone():
    code = "import sys, fastattn; print([x for x in ('torch._dynamo', 'torch._inductor') if x in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code.replace("fastattn", "torch")], capture_output=True, text=True)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == loaded.stdout
