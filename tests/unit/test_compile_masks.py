"""Block masks that are made inside a graph: one operator each, the lists of an eager call, no graph break."""

import inspect

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

import fastattn
from compiling import num_graphs
from fastattn import BlockMask, Mask, attention, patterns
from fastattn.masks import graphs

AOT = {"backend": "aot_eager", "fullgraph": True}
IDS = (torch.arange(70) // 20).expand(2, -1)
STARTS, COLUMNS = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1])
MASK = patterns.causal(70, block_size=32)
FLEX = create_block_mask(
    lambda b, h, i, j: (i >= j) & (i - j < 30), None, None, 70, 70, device="cpu", BLOCK_SIZE=(32, 32)
)

PATTERNS = {
    "causal": lambda ids: patterns.causal(70, block_size=(32, 64)),
    "sliding_window": lambda ids: patterns.sliding_window(70, 90, left=9, right=None),
    "dilated_window": lambda ids: patterns.dilated_window(70, left=3, right=0, dilation=2),
    "strided": lambda ids: patterns.strided(70, stride=8),
    "prefix_lm": lambda ids: patterns.prefix_lm(ids[:, 30] + 5, 70, 90),
    "documents": lambda ids: patterns.documents(ids, block_size=16),
    "streaming": lambda ids: patterns.streaming(70, num_sinks=4, window=20),
    "a_shape": lambda ids: patterns.a_shape(70, num_sinks=4, window=20),
    "vertical_slash": lambda ids: patterns.vertical_slash(70, columns=ids[:, 20:22], distances=ids[:, ::30]),
    "global_tokens": lambda ids: patterns.global_tokens(70, [1, 69]),
    "longformer": lambda ids: patterns.longformer(70, window=5, tokens=range(2), dilation=2),
    "random_blocks": lambda ids: patterns.random_blocks(70, num_blocks=2, num_heads=2, block_size=16),
    "bigbird": lambda ids: patterns.bigbird(128, num_heads=2, block_size=16),
    "deepspeed_fixed": lambda ids: patterns.deepspeed_fixed(70),
    "deepspeed_variable": lambda ids: patterns.deepspeed_variable(70, local_window_blocks=(1, 2), num_random_blocks=1),
    "neighborhood": lambda ids: patterns.neighborhood((8, 9), kernel_size=(3, 5), causal=(True, False)),
}
METHODS = {
    "from_mask": lambda ids: BlockMask.from_mask(Mask.causal() & Mask.documents(ids), seqlen_q=70),
    "from_mask_mod": lambda ids: BlockMask.from_mask_mod(
        lambda b, h, i, j: ids[b, i] == ids[b, j], batch=2, seqlen_q=9
    ),
    "from_dense": lambda ids: BlockMask.from_dense(ids[:, None, :, None] == ids[:, None, None]),
    "from_tokens": lambda ids: BlockMask.from_tokens(ids[0] == 1, ids[1] > 1),
    "from_bsr": lambda ids: BlockMask.from_bsr(STARTS, COLUMNS, seqlen_q=64, block_size=32),
    "from_csr": lambda ids: BlockMask.from_csr(STARTS, COLUMNS, seqlen_q=2),
    "from_coo": lambda ids: BlockMask.from_coo(ids[0, ::20], ids[0, ::20], seqlen_q=70),
    "from_flex": lambda ids: BlockMask.from_flex(FLEX),
    "cat": lambda ids: BlockMask.cat([patterns.documents(ids, block_size=32), MASK]),
    "__init__": lambda ids: BlockMask(**MASK.tensors(), BLOCK_SIZE=MASK.BLOCK_SIZE, seq_lengths=MASK.seq_lengths),
    "__and__": lambda ids: MASK & patterns.documents(ids, block_size=32) & Mask.window(5, None),
    "__rand__": lambda ids: Mask.window(5, None) & MASK,
    "__or__": lambda ids: MASK | patterns.documents(ids, block_size=32),
    "__invert__": lambda ids: MASK.__invert__(),
    "where": lambda ids: MASK.where(lambda b, h, i, j: (j - i) % 3 == 0, by_distance=True),
    "reblock": lambda ids: MASK.reblock(64),
    "transpose": lambda ids: MASK.transpose(),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def all_of(cases, backend):
    made = torch.compile(lambda ids: [make(ids) for make in cases.values()], backend=backend, fullgraph=True)(IDS)
    for name, mask in zip(cases, made, strict=True):
        expected = cases[name](IDS)
        assert type(mask) is BlockMask and mask.equal(expected), name
        assert (mask.shape, mask.BLOCK_SIZE) == (expected.shape, expected.BLOCK_SIZE), name
    assert num_graphs() == 1


def test_every_pattern():
    names = [name for name, x in vars(patterns).items() if inspect.isfunction(x) and name[0] != "_"]
    assert set(PATTERNS) == {name for name in names if getattr(patterns, name).__module__ == patterns.__name__}
    all_of(PATTERNS, "eager")


def test_every_method():
    annotated = {name for name, x in vars(BlockMask).items() if "BlockMask" in str(_returns(x))}
    assert set(METHODS) == annotated - {"to"} | {"__init__"}
    all_of(METHODS, "eager")


def _returns(x):
    function = getattr(x, "__func__", x)
    return getattr(function, "__annotations__", {}).get("return", "")


@pytest.mark.slow
@pytest.mark.parametrize("cases", [PATTERNS, METHODS], ids=["patterns", "methods"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_one_with_all_of_a_compiler(cases, backend):
    all_of(cases, backend)


def model(q, k, v, ids, flex):
    found = [attention(q, k, v, mask=patterns.causal(q.shape[2], k.shape[2], block_size=16))]
    found += [attention(q, k, v, mask=fastattn.select_blocks(q, k, top_k=2, causal=True, block_size=16))]
    both = patterns.documents(ids, block_size=32) & Mask.causal()
    return [*found, attention(q, q, q, mask=both), attention(q, q, q, mask=flex)]


def run(function, seqlen_q, seqlen_k):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16, generator=generator).requires_grad_() for n in (seqlen_q, seqlen_k, seqlen_k))
    flex = create_block_mask(
        lambda b, h, i, j: i >= j, None, None, seqlen_q, seqlen_q, device="cpu", BLOCK_SIZE=(32, 32)
    )
    found = function(q, k, v, IDS[:, :seqlen_q], flex)
    return [*found, *torch.autograd.grad(sum([x.square().sum() for x in found]), (q, k, v))]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_calls_and_gradients(backend):
    """Also where torch may break the graph, as it does for others' lists of unknown length."""
    compiled = torch.compile(model, backend=backend)
    assert all(map(torch.equal, run(compiled, 70, 90), run(model, 70, 90)))
    assert num_graphs() == 1 and not counters["graph_break"]


@pytest.mark.parametrize("dynamic, expected", [(True, 1), (None, 2)])
def test_other_lengths_compile_nothing(dynamic, expected):
    compiled = torch.compile(
        lambda q, ids: [
            attention(q, q, q, mask=patterns.sliding_window(q.shape[2], left=9, right=0, block_size=16)),
            attention(q, q, q, mask=patterns.documents(ids)),
        ],
        **AOT,
        dynamic=dynamic,
    )
    for seqlen in (70, 33, 41):
        q, ids = torch.randn(2, 3, seqlen, 16), IDS[:, :seqlen].contiguous()
        window, documents = compiled(q, ids)
        mask = patterns.sliding_window(seqlen, left=9, right=0, block_size=16)
        assert torch.equal(window, attention(q, q, q, mask=mask))
        assert torch.equal(documents, attention(q, q, q, mask=patterns.documents(ids)))
    assert num_graphs() == expected


def test_a_constant_mask_is_built_once(monkeypatch):
    built = []
    build = graphs._build
    monkeypatch.setattr(graphs, "_build", lambda *arguments: built.append(arguments[0]) or build(*arguments))
    graphs._constant.cache_clear()
    compiled = torch.compile(lambda q: attention(q, q, q, mask=patterns.causal(70)), **AOT)
    for _ in range(3):
        compiled(torch.randn(1, 1, 70, 8))
    assert built == ["causal"]


def test_errors_show_when_the_graph_runs():
    compiled = torch.compile(lambda ids: patterns.documents(ids).kv_indices, **AOT)
    compiled(IDS)
    with pytest.raises(ValueError, match="must not decrease"):
        compiled(IDS.flip(1))
    with pytest.raises(Exception, match="cannot be an argument of a block mask inside a graph"):
        torch.compile(lambda ids: BlockMask.from_mask(print, seqlen_q=5), **AOT)(IDS)


class Sparse(torch.nn.Module):
    def forward(self, q, ids):
        return attention(q, q, q, mask=patterns.documents(ids) & Mask.window(20, 0))


def test_export():
    q = torch.randn(2, 2, 70, 8)
    for strict in (False, True):
        program = torch.export.export(Sparse(), (q, IDS), strict=strict)
        assert torch.equal(program.module()(q, IDS), Sparse()(q, IDS))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    q = torch.randn(2, 2, 70, 8)
    with torch.no_grad():
        program = torch.export.export(Sparse(), (q, IDS))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "sparse.pt2"))
        assert torch.equal(torch._inductor.aoti_load_package(path)(q, IDS), Sparse()(q, IDS))
