"""torch.export, AOTInductor and ONNX."""

import subprocess
import sys

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch.export import Dim, export

import fastattn
from fastattn import Mask, UnsupportedError, attention, attention_csr, patterns, relative
from fastattn.integrations import onnx as fastattn_onnx


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.slopes = torch.nn.Linear(32, 96), torch.nn.Parameter(torch.rand(4))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        out = attention(q, k, v, window_size=(5, 0), alibi_slopes=self.slopes)
        return out + fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)


DYNAMIC = {"x": {0: Dim("batch", min=1, max=64), 1: Dim("seqlen", min=2, max=512)}}


def fastattn_calls(program):
    return [str(node.target) for node in program.graph.nodes if "fastattn" in str(node.target)]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict):
    block, x, other = Block(), torch.randn(2, 9, 32), torch.randn(3, 33, 32)
    program = export(block, (x,), dynamic_shapes=DYNAMIC, strict=strict)
    assert fastattn_calls(program) == ["fastattn.attention.default"] * 2
    exported, decomposed = program.module(), program.run_decompositions()
    assert torch.equal(exported(other), block(other)) and torch.equal(decomposed.module()(other), block(other))
    assert fastattn_calls(decomposed) == ["fastattn.forward.default"] * 2
    gradients = [torch.autograd.grad(f(x).square().sum(), list(f.parameters())) for f in (exported, block)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_saved_program_runs_in_another_process(tmp_path):
    block, x = Block(), torch.randn(2, 9, 32)
    torch.export.save(export(block, (x,)), tmp_path / "block.pt2")
    torch.save((x, block(x).detach()), tmp_path / "tensors.pt")
    code = f"""
import torch
program = torch.export.load("{tmp_path}/block.pt2")
x, expected = torch.load("{tmp_path}/tensors.pt")
print(torch.equal(program.module()(x), expected))
"""
    run = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        for text in ("import fastattn" + code, code)
    ]
    assert run[0].stdout == "True\n", run[0].stderr
    assert run[1].returncode and "fastattn.attention" in run[1].stderr  # torch names the operator that it does not know


def test_a_block_mask_is_a_constant_of_the_program():
    class Sparse(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = patterns.sliding_window(40, left=9, right=0, block_size=16)

        def forward(self, q):
            return attention(q, q, q, mask=self.mask)

    q = torch.randn(1, 2, 40, 8)
    assert torch.equal(export(Sparse(), (q,)).module()(q), attention(q, q, q, mask=Sparse().mask))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    block, x, other = Block().eval(), torch.randn(2, 9, 32), torch.randn(2, 33, 32)
    with torch.no_grad():
        program = export(block, (x,), dynamic_shapes={"x": {1: DYNAMIC["x"][1]}})
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        with fastattn.record() as calls:
            out = torch._inductor.aoti_load_package(path)(other)
    torch.testing.assert_close(out, block(other).detach())
    assert [call.kernel for call in calls] == ["cpu.prefill"] * 2
    code = f"import torch; torch._inductor.aoti_load_package({path!r})(torch.randn(2, 5, 32))"
    for text, error in (("import fastattn;" + code, ""), (code, "Could not find schema for fastattn::forward")):
        assert error in subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stderr


# --- ONNX ------------------------------------------------------------------------------------------------------------


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


Q, K, V = (torch.randn(2, 4, seqlen, 8, generator=torch.Generator().manual_seed(0)) for seqlen in (5, 9, 9))
EXPRESSIBLE = {
    "plain": (lambda q, k, v: attention(q, k, v), ()),
    "causal": (lambda q, k, v: attention(q, k, v, causal=True), ()),
    "torch's causal": (lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True), ()),
    "window": (lambda q, k, v: attention(q, k[:, :2], v[:, :2], window_size=(3, 1)), ()),
    "mask": (lambda q, k, v, x: attention(q, k, v, mask=x, softmax_scale=0.3), (torch.ones(5, 9).tril().bool(),)),
    "bias": (lambda q, k, v, x: attention(q, k, v, bias=x, causal=True), (torch.ones(1, 4, 5, 9).cumsum(3),)),
    "alibi": (lambda q, k, v, x: attention(q, k, v, alibi_slopes=x), (torch.tensor([0.5, 1.0, 2.0, 3.0]),)),
    "learned scale": (lambda q, k, v, x: attention(q, k, v, softmax_scale=x), (torch.tensor([0.5, 1.0, 2.0, -3.0]),)),
    "negative scale": (lambda q, k, v: attention(q, k, v, softmax_scale=-0.3), ()),
    "lengths": (lambda q, k, v, x: attention(q, k, v, mask=Mask.lengths(x)), (torch.tensor([3, 8]),)),
    "softcap": (lambda q, k, v: attention(q, k, v, softcap=2.0), ()),
    "rotary": (lambda q, k, v, x: attention(q, k, v, rotary=(x, x + 1), rotary_interleaved=True), (torch.ones(9, 3),)),
}


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_lowered_to_onnx(name):
    """The program that torch.onnx.export gets; it computes in torch what ONNX's operator says."""
    function, others = EXPRESSIBLE[name]
    program = fastattn_onnx.lower(export(Call(function), (Q, K, V, *others)))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "onnx.Attention.opset23" in targets and not any("fastattn" in target for target in targets)
    torch.testing.assert_close(program.module()(Q, K, V, *others), function(Q, K, V, *others), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_onnx_files(name, tmp_path):
    function, others = EXPRESSIBLE[name]
    inputs = (Q, K, V, *others)
    program = fastattn_onnx.lower(export(Call(function), inputs))
    torch.onnx.export(program, inputs, opset_version=23, verbose=False).save(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert [node.op_type for node in model.graph.node].count("Attention") == 1
    names = [given.name for given in model.graph.input]
    (out, *_) = ReferenceEvaluator(model).run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    torch.testing.assert_close(torch.from_numpy(out), function(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"sinks": torch.ones(4)}, "sinks"),
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"return_lse": True}, "return_lse"),
        ({"softcap": 2.0, "causal": True}, "softcap together with causal"),
        ({"backend": "cpu"}, "backend"),
        ({"mask": patterns.causal(5, 9)}, "block_mask"),
        ({"bias": relative.toeplitz(torch.ones(4, 13))}, "relative"),
    ],
)
def test_what_onnx_cannot_say(options, name):
    program = export(Call(lambda q, k, v: attention(q, k, v, **options)), (Q, K, V))
    with pytest.raises(UnsupportedError, match=f"{name} cannot be written as ONNX's Attention"):
        fastattn_onnx.lower(program)


def test_edges_are_not_in_onnx():
    lists = torch.arange(6), torch.zeros(5, dtype=torch.int64)
    program = export(Call(lambda q, k, v: attention_csr(q, k, v, *lists)), (Q, K, V))
    with pytest.raises(UnsupportedError, match="fastattn.attention_csr.default cannot be written"):
        fastattn_onnx.lower(program)
