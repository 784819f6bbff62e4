"""torch.compile: one graph, the same kernels, the same bits, and no compilation for other lengths."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fastattn
from compiling import BLOCKS, CASES, EVERYTHING, assert_compiles, assert_equal, attend, leaves_of, num_graphs
from fastattn import Mask, attention, attention_csr, merge, patterns
from fastattn.operators import dense
from graphs import Graph
from graphs import inputs as graph_inputs

AOT = {"backend": "aot_eager", "fullgraph": True}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def tensors(seqlen_q=5, seqlen_k=7, **options):
    return [torch.randn(2, 4, seqlen, 16, **options) for seqlen in (seqlen_q, seqlen_k, seqlen_k)]


def test_all_arguments_in_one_graph():
    """Calls share a graph because tracing a graph costs more than a call in it; `test_each_call` has them apart."""
    prepared = [leaves_of(case) for case in CASES]
    counts = [len(leaves) for leaves, _ in prepared]

    def model(*leaves):
        parts = torch.utils._pytree.tree_map(lambda x: x, leaves)
        found, start = [], 0
        for (_, kwargs), count in zip(prepared, counts, strict=True):
            found += attend(*parts[start : start + count], **kwargs)
            start += count
        return found

    assert_compiles(model, [x for leaves, _ in prepared for x in leaves])
    assert num_graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend, dynamic", [("aot_eager", False), ("inductor", None), ("inductor", True)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_call(case, backend, dynamic):
    leaves, kwargs = leaves_of(case)
    assert_compiles(lambda *leaves: attend(*leaves, **kwargs), leaves, backend, dynamic=dynamic)


@pytest.mark.slow
def test_inductor_around_a_call():
    """Inductor may round what it fuses in another way, so close is what is asked."""

    def block(x, w):
        q, k, v = (x @ w).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = attention(torch.nn.functional.silu(q), k.cos(), v + 1, causal=True, softcap=3.0)
        return (out.transpose(1, 2).flatten(2).sin(),)

    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 9, 16), (16, 96)))
    results = [f(x, w)[0] for f in (block, torch.compile(block, fullgraph=True))]
    gradients = [torch.autograd.grad(out.square().sum(), (x, w)) for out in results]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
def test_reduce_overhead():
    """A mode for GPUs: elsewhere it is inductor's usual one."""
    compiled = torch.compile(lambda *qkv: attention(*qkv, causal=True), mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        qkv = tensors()
        assert torch.equal(compiled(*qkv), attention(*qkv, causal=True))


@pytest.mark.parametrize("dynamic, expected", [(True, 1), (None, 2)])
def test_other_lengths_compile_nothing(dynamic, expected):
    """With dynamic=None torch makes one graph of the first lengths and one for all others."""
    compiled = torch.compile(lambda *qkv: attention(*qkv, causal=True, window_size=(6, None)), **AOT, dynamic=dynamic)
    # At first no length is that of another dimension: torch would take it for a rule.
    for seqlen in (5, 9, 33, 11, 150):
        qkv = tensors(seqlen, seqlen + 3)
        assert torch.equal(compiled(*qkv), attention(*qkv, causal=True, window_size=(6, None)))
    assert num_graphs() == expected


@pytest.mark.parametrize("dynamic, expected", [(True, 1), (None, 2)])
def test_other_scales_compile_nothing(dynamic, expected):
    def step(q, k, v, scale):
        out = attention(q, k, v, softmax_scale=scale, causal=True)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    compiled = torch.compile(
        lambda *qkvs: attention(*qkvs[:3], softmax_scale=qkvs[3], causal=True), **AOT, dynamic=dynamic
    )
    q, k, v = tensors(requires_grad=True)
    for scale in (0.1, 0.2, -0.7, 3.0):
        out, *expected_grads = step(q, k, v, scale)
        found = compiled(q, k, v, scale)
        assert_equal([found, *torch.autograd.grad(found.square().sum(), (q, k, v))], [out, *expected_grads])
    assert num_graphs() == expected


def test_marked_lengths_stay_dynamic():
    compiled = torch.compile(lambda q, k, v, mask: attention(q, k, v, mask=mask), **AOT)
    for seqlen in (5, 9, 33):
        qkv, mask = tensors(seqlen, seqlen), torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
        for x in qkv:
            torch._dynamo.mark_dynamic(x, (0, 2))
        torch._dynamo.mark_dynamic(mask, (0, 1))
        assert torch.equal(compiled(*qkv, mask), attention(*qkv, mask=mask))
    assert num_graphs() == 1


def test_lengths_of_zero_and_one():
    compiled = torch.compile(lambda *qkv: attention(*qkv, causal=True, return_lse=True), **AOT, dynamic=True)
    for seqlens in ((0, 3), (1, 1), (1, 9), (3, 0), (4, 1), (3, 5)):
        qkv = tensors(*seqlens)
        assert_equal(compiled(*qkv), attention(*qkv, causal=True, return_lse=True))


def test_any_strides():
    """The result of an operator has one memory order, whatever those of q, k, v are."""
    x = torch.randn(2, 4, 9, 8)
    views = [x, x.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([x, x], -1)[..., :8]]
    views += [x[:1, :1].expand(2, 4, 9, 8), x.mT.contiguous().mT]

    def model(*views):
        return [attention(q, q, views[0]).flatten(2) for q in views]

    assert_equal(torch.compile(model, **AOT)(*views), model(*views))


def test_dropout_draws_again_and_the_backward_pass_sees_the_same_mask():
    compiled = torch.compile(lambda *qkv: attention(*qkv, dropout_p=0.5), **AOT)
    q, k, v = tensors(9, 33, requires_grad=True)
    first, second = compiled(q, k, v), compiled(q, k, v)
    assert not torch.equal(first, second)
    for out in (first, second):  # out is linear in v
        dout = torch.randn_like(out)
        (dv,) = torch.autograd.grad(out, v, dout)
        torch.testing.assert_close((dv * v).sum(), (dout * out).sum(), rtol=1e-4, atol=1e-4)
    torch.manual_seed(3)
    expected = attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(compiled(q, k, v), expected)


def test_around_a_call():
    """Autocast, checkpointing, no_grad, `use`, torch's function of any rank, `merge`, masks made inside."""
    ids, keep = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]), torch.arange(7) < torch.tensor([[3], [7]])
    block_mask, lengths = patterns.causal(5, 7), torch.tensor([3, 6])

    def model(q, k, v):
        sdpa = fastattn.scaled_dot_product_attention
        with torch.autocast("cpu", torch.bfloat16):
            found = [sdpa(q, k, v, is_causal=True), sdpa(q, k, v, attn_mask=keep[:, None, None])]
        found += [checkpoint(lambda *qkv: attention(*qkv, dropout_p=0.3), q, k, v, use_reentrant=False)]
        with torch.no_grad():
            found += [attention(q, k, v, causal=True)]
        with fastattn.use("reference"):
            found += [attention(q, k, v, softcap=2.0)]
        found += [sdpa(q[0], k[0], v[0]), sdpa(q[0, 0], k[0, 0], v[0, 0]), sdpa(q, k, v, dropout_p=1.0)]
        found += [sdpa(q[None].expand(3, -1, -1, -1, -1), k[None], v[None]), sdpa(q, k[:, :2], v[:, :2], enable_gqa=1)]
        parts = [
            attention(q, x, y, return_lse=True) for x, y in ((k[:, :, :3], v[:, :, :3]), (k[:, :, 3:], v[:, :, 3:]))
        ]
        found += merge([part[0] for part in parts], [part[1] for part in parts])
        masks = [Mask.causal("top_left") & Mask.window(3, None), Mask.lengths(lengths), Mask.padding(keep)]
        masks += [Mask.prefix_lm(lengths, 5, 7), block_mask]
        found += [attention(q, k, v, mask=mask) for mask in masks]
        return [*found, attention(q, k[:, :, :5], v[:, :, :5], mask=Mask.documents(ids))]

    def run(function):
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in tensors()]
        results = function(*leaves)
        loss = sum([x.double().square().sum() for x in results if x.requires_grad])
        return [*results, *torch.autograd.grad(loss, leaves)]

    assert_equal(run(torch.compile(model, **AOT)), run(model))


def test_masks_made_inside_ask_for_their_rules_when_the_graph_runs():
    qkv = tensors()
    padded = torch.compile(lambda keep: attention(*qkv, mask=Mask.padding(keep)), **AOT)
    packed = torch.compile(lambda ids: attention(*qkv, mask=Mask.documents(ids[:, :5], ids)), **AOT)
    keep, ids = torch.arange(7).expand(2, 7) < 4, torch.arange(7).expand(2, 7).clone()
    padded(keep), packed(ids)
    with pytest.raises(RuntimeError, match="gaps between its tokens"):
        padded(keep ^ (torch.arange(7) == 1))
    with pytest.raises(RuntimeError, match="must not decrease"):
        packed(ids.flip(1))


def test_a_block_mask_that_still_exists_is_not_built_again(monkeypatch):
    leaves, kwargs = leaves_of(BLOCKS._replace(mask="blocks"))
    found, together = [], dense._together
    monkeypatch.setattr(dense, "_together", lambda *lists: found.append(together(*lists)) or found[-1])
    torch.compile(lambda *leaves: attend(*leaves, **kwargs), **AOT)(*leaves)[0].sum().backward()
    assert len(found) == 2 and all(mask is kwargs["mask"] for mask in found)
    copies = [x.clone() for x in kwargs["mask"].tensors().values()]
    again = together(copies, [*kwargs["mask"].BLOCK_SIZE, *kwargs["mask"].seq_lengths])
    assert again is not kwargs["mask"] and again.equal(kwargs["mask"])


def test_edges():
    lists = [graph_inputs(Graph(bias=bias, dtype=dtype)) for bias, dtype in ((None, "bfloat16"), ("head", "float32"))]

    def model(*qkv):
        found = []
        for i, (given, kwargs) in enumerate(lists):
            found += attention_csr(*qkv[3 * i : 3 * i + 3], *given[3:], **kwargs, return_lse=True)
        return found

    assert_compiles(model, [x.requires_grad_() for given, _ in lists for x in given[:3]], dynamic=True)


def test_public_functions():
    """Masks and packed sequences have tests of their own, `attention`'s arguments the cases above."""
    q, k, v = tensors()
    lists = torch.arange(6), torch.zeros(5, dtype=torch.int64)
    mask = patterns.causal(5, 7)
    calls = {
        "attention": lambda q: attention(q, k, v),
        "attention_csr": lambda q: attention_csr(q, k, v, *lists),
        "coverage": lambda q: fastattn.coverage(q, k, mask, within=Mask.lengths(torch.tensor([5, 7])) & mask),
        "dropout_mask": lambda q: fastattn.dropout_mask(1, 2, q.shape[2], 7, 0.3, 5),
        "merge": lambda q: merge([q, q + 1], [q[..., 0], q[..., 1]])[0],
        "scaled_dot_product_attention": lambda q: fastattn.scaled_dot_product_attention(q, k, v),
        "select_blocks": lambda q: fastattn.select_blocks(q, k, top_k=1).kv_num_blocks,
    }
    assert set(calls) <= set(fastattn.__all__)
    found = torch.compile(lambda q: [call(q) for call in calls.values()], backend="eager", fullgraph=True)(q)
    assert_equal(found, [call(q) for call in calls.values()])
    assert num_graphs() == 1


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"causal": 2}, TypeError, "causal=2 must be True or False"),
        ({"softcap": -1.0}, ValueError, "softcap=-1.0 must be >= 0"),
        ({"mask": 5}, TypeError, "mask must be a Mask"),
        ({"bias": torch.ones(7, 7)}, ValueError, r"bias has shape \(7, 7\)"),
        ({"attn_mask": None}, TypeError, "unexpected keyword argument 'attn_mask'"),
        ({"seed": -1, "dropout_p": 0.1}, ValueError, "seed=-1"),
        ({"backend": "triton"}, fastattn.UnsupportedError, "refuses"),
    ],
)
def test_errors_are_those_of_an_eager_call(options, error, text):
    q, k, v = tensors()
    with pytest.raises(error, match=text):
        torch.compile(lambda: attention(q, k, v, **options), backend="eager")()


def test_what_a_graph_runs_is_decided_when_it_runs(fresh_fallbacks):
    q, k, v = tensors()
    compiled = torch.compile(lambda *qkv: attention(*qkv), **AOT)
    compiled(q, k, v)
    with fastattn.use("reference"):
        compiled(q, k, v)
    assert fastattn.last_call().kernel == "reference"
    wide = [torch.randn(1, 1, 3, 600) for _ in range(3)]
    with pytest.warns(fastattn.FallbackWarning, match="head_dim=600"):
        compiled(*wide)


def test_a_reference_forward_has_gradients_of_any_backend():
    """Its backward pass may run on a kernel: what it saves has the same meaning."""
    leaves, kwargs = leaves_of(EVERYTHING)
    compiled = torch.compile(lambda *leaves: attend(*leaves, **kwargs), **AOT)
    expected = torch.autograd.grad(compiled(*leaves)[0].square().sum(), leaves)
    with fastattn.use("reference"):
        out, _ = compiled(*leaves)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected, rtol=1e-4, atol=1e-4)
