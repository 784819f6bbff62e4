"""Biases that are products with q and k: Transformer-XL, Shaw's keys, DeBERTa, in blocks of rows."""

import pytest
import torch
from torch.autograd import gradcheck

import fastattn
from fastattn import Mask, relative
from fastattn.relative import blocks
from guarded import printed_by_child, reset_peak, status
from isas import needs_cpu
from refusals import assert_refused

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows and of the batch, and a last one that is shorter."""
    monkeypatch.setattr(blocks, "_ROWS", range(4, 8))
    monkeypatch.setattr(blocks, "_SCORES", 1)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def distances(seqlen_q, seqlen_k):
    """j - (i + seqlen_k - seqlen_q)"""
    return torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)


def heads_of(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def transformer_xl(q, k, scale):
    r, u, v = double(4, q.shape[2] + k.shape[2] - 1, 6), double(4, 6), double(4, 6)
    leaves = [x.requires_grad_() for x in (r, u, v)]

    def eager():
        vectors = r[:, distances(q.shape[2], k.shape[2]) + k.shape[2] - 1]
        keys = k.repeat_interleave(2, 1)
        position = torch.einsum("bhid,hijd->bhij", q + v[:, None], vectors)
        return scale * (torch.einsum("hd,bhjd->bhj", u, keys)[:, :, None] + position)

    return relative.transformer_xl(r, u, v), eager, leaves


def shaw(q, k, scale):
    keys = double(7, 6).requires_grad_()

    def eager():
        vectors = keys[distances(q.shape[2], k.shape[2]).clamp(-3, 3) + 3]
        return scale * torch.einsum("bhid,ijd->bhij", q, vectors)

    return relative.shaw(keys), eager, [keys]


def shaw_per_head(q, k, scale):
    keys = double(4, 5, 6).requires_grad_()

    def eager():
        vectors = keys[:, distances(q.shape[2], k.shape[2]).clamp(-2, 2) + 2]
        return scale * torch.einsum("bhid,hijd->bhij", q, vectors)

    return relative.shaw(keys), eager, [keys]


def intervals(seqlen_q, seqlen_k):
    start = torch.randint(-2, seqlen_k, (2, 4, seqlen_q))
    return Mask.intervals(start, torch.randint(0, seqlen_k, (2, 1, seqlen_q)))


KINDS = {f.__name__: f for f in (transformer_xl, shaw, shaw_per_head)}
OPTIONS = {
    "plain": lambda sq, sk: {},
    "causal": lambda sq, sk: {"causal": True},
    "window": lambda sq, sk: {"window_size": (5, 2)},
    "top left": lambda sq, sk: {"mask": Mask.causal("top_left")},
    "lengths": lambda sq, sk: {"mask": Mask.lengths(torch.tensor([sk, sk // 2])), "causal": True},
    "intervals": lambda sq, sk: {"mask": intervals(sq, sk)},
    "tensor": lambda sq, sk: {"mask": torch.rand(2, 1, sq, sk) < 0.6, "window_size": (None, 3)},
    "key tensor": lambda sq, sk: {"mask": torch.rand(sk) < 0.6, "sinks": torch.randn(4).double().requires_grad_()},
    "scale": lambda sq, sk: {"softmax_scale": 0.2},
    "learned scale": lambda sq, sk: {"softmax_scale": torch.rand(4).double().requires_grad_()},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(11, 11), (6, 17), (17, 6), (1, 9)])
def test_parity(kind, options, lengths, small_blocks):
    """out, lse and all gradients are those of the bias as a tensor, in float64."""
    q, k, v = double(2, 4, lengths[0], 6), double(2, 2, lengths[1], 6), double(2, 2, lengths[1], 5)
    options = OPTIONS[options](*lengths)
    scale = options.get("softmax_scale", 6**-0.5)
    bias, eager, leaves = KINDS[kind](q, k, scale.view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale)
    leaves = [x.requires_grad_() for x in (q, k, v)] + leaves
    leaves += [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    found = []
    for b in (bias, eager()):
        out, lse = fastattn.attention(q, k, v, bias=b, return_lse=True, backend="cpu", **options)
        loss = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).square().sum()
        found.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, small_blocks):
    q, k, v = (torch.randn(2, 9, 4, 6).to(dtype).transpose(1, 2) for _ in range(3))
    r = torch.randn(4, 17, 6).to(dtype)
    out = fastattn.attention(q, k, v, bias=relative.transformer_xl(r), causal=True)
    expected = fastattn.attention(
        q.double(), k.double(), v.double(), bias=relative.transformer_xl(r.double()), causal=True
    )
    assert out.dtype == dtype and out.stride() == q.stride()
    torch.testing.assert_close(out.double(), expected, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    past = fastattn.attention(q, k, v, bias=relative.transformer_xl(r[:, :9]), causal=True)
    assert torch.equal(past, out)


def test_conformer_of_transformers(small_blocks):
    pytest.importorskip("transformers")
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as modeling

    config = modeling.Wav2Vec2ConformerConfig(
        hidden_size=24, num_attention_heads=4, attention_dropout=0.0, position_embeddings_type="relative",
        max_source_positions=40, attn_implementation="eager",
    )  # fmt: skip
    layer = modeling.Wav2Vec2ConformerSelfAttention(config).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = double(2, 19, 24)
    positions = modeling.Wav2Vec2ConformerRelPositionalEmbedding(config)(x)
    expected = layer(x, relative_position_embeddings=positions)[0]
    q, k, v = (heads_of(f(x), 4) for f in (layer.linear_q, layer.linear_k, layer.linear_v))
    r = heads_of(layer.linear_pos(positions), 4)[0]
    bias = relative.transformer_xl(r, layer.pos_bias_u, layer.pos_bias_v)
    out = fastattn.attention(q, k, v, bias=bias, backend="cpu")
    actual = layer.linear_out(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("terms", [["c2p"], ["p2c"], ["c2p", "p2c"]], ids="+".join)
@pytest.mark.parametrize("buckets, positions, shares", [(8, 40, False), (-1, 12, True), (6, 20, True)])
def test_deberta_of_transformers(terms, buckets, positions, shares, small_blocks):
    pytest.importorskip("transformers")
    from transformers.models.deberta_v2 import modeling_deberta_v2 as modeling

    config = modeling.DebertaV2Config(
        hidden_size=24, num_attention_heads=4, relative_attention=True, position_buckets=buckets, pos_att_type=terms,
        max_relative_positions=positions, share_att_key=shares, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = modeling.DisentangledSelfAttention(config).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, span = double(2, 33, 24), buckets if buckets > 0 else positions
    embeddings = double(2 * span, 24).requires_grad_()
    keep = torch.arange(33) < torch.tensor([33, 20])[:, None]
    expected = layer(x, keep[:, None, None, :] & keep[:, None, :, None], rel_embeddings=embeddings)[0]
    q, k, v = (heads_of(f(x), 4) for f in (layer.query_proj, layer.key_proj, layer.value_proj))
    tables = []
    for term, own, shared in (("c2p", "pos_key_proj", "key_proj"), ("p2c", "pos_query_proj", "query_proj")):
        project = getattr(layer, shared if shares else own, None)
        tables.append(heads_of(project(embeddings)[None], 4)[0] if term in terms else None)
    bias = relative.deberta(*tables, buckets=buckets if buckets > 0 else None, max_distance=positions)
    out = fastattn.attention(q, k, v, bias=bias, mask=Mask.padding(keep), backend="cpu")
    actual = out.transpose(1, 2).flatten(2)
    rows = keep[..., None]  # where padding asks, the model sees everything alike
    torch.testing.assert_close(actual * rows, expected * rows, atol=1e-5, rtol=1e-5)  # its scale is a float32
    leaves = [p for p in (*layer.parameters(), embeddings)]
    grads = [torch.autograd.grad((y * rows).square().sum(), leaves, allow_unused=True) for y in (actual, expected)]
    for name, a, b in zip([n for n, _ in layer.named_parameters()] + ["embeddings"], *grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck(small_blocks):
    q, k, v = (double(1, 2, 6, 3) for _ in range(3))
    leaves = [double(*shape).requires_grad_() for shape in ((2, 11, 3), (2, 3), (2, 3))]
    tables = [double(2, 6, 3).requires_grad_() for _ in range(2)]

    def call(bias):
        return fastattn.attention(q, k, v, bias=bias, causal=True, backend="cpu")

    assert gradcheck(lambda *x: call(relative.transformer_xl(*x)), leaves)
    assert gradcheck(lambda *x: call(relative.deberta(*x)), tables)
    assert gradcheck(lambda x: call(relative.shaw(x)), (double(5, 3).requires_grad_(),))


@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 5, 0), (0, 4, 4), (2, 1, 1)])
def test_sizes_of_0_and_1(sizes):
    batch, seqlen_q, seqlen_k = sizes
    q, k, v = (double(batch, 2, n, 6).requires_grad_() for n in (seqlen_q, seqlen_k, seqlen_k))
    r, table = double(2, max(seqlen_q + seqlen_k - 1, 0), 6), double(2, 8, 6).requires_grad_()
    for bias in (relative.transformer_xl(r), relative.shaw(double(5, 6)), relative.deberta(table, table)):
        out = fastattn.attention(q, k, v, bias=bias, causal=True, softmax_scale=0.3)
        assert out.shape == q.shape and (seqlen_k == 1 or not out.any())
        assert all(
            x is None or x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
        )


def test_dropout(small_blocks):
    """The gradient drops what the forward pass has dropped; another seed, another result."""
    q, k, v = (double(2, 2, 20, 6).requires_grad_() for _ in range(3))
    bias = relative.shaw(double(5, 6))

    def call(v, seed=3):
        return fastattn.attention(q, k, v, bias=bias, dropout_p=0.4, seed=seed)

    assert torch.equal(call(v), call(v)) and not torch.equal(call(v), call(v, seed=4))
    (grad,) = torch.autograd.grad(call(v).sum(), v)
    torch.testing.assert_close((grad * v).sum(), call(v).sum())  # it is linear in v
    weights = call(torch.eye(20).double().expand(2, 2, 20, 20))
    assert len({tuple(row.tolist()) for row in (weights[0, 0] == 0)}) > 15  # rows of different blocks differ
    torch.manual_seed(1)
    assert not torch.equal(call(v, seed=None), call(v, seed=None))


def test_inside_torch_compile():
    q, r = torch.randn(1, 2, 9, 8), torch.randn(2, 17, 8).requires_grad_()

    def attend(q, r):
        return fastattn.attention(2 * q, q, q, bias=relative.transformer_xl(r)).sin()

    expected = attend(q, r)
    torch._dynamo.reset()
    actual = torch.compile(attend, backend="aot_eager")(q, r)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), r) for x in (actual, expected)))


# --- memory and refusals ---------------------------------------------------------------------------------------------


def extra_bytes(kind: str, seqlen: int) -> int:
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 2, seqlen, 16).requires_grad_() for _ in range(3))

    def step(q, k, v):
        r = torch.randn(2, q.shape[2] * 2 - 1, 16).requires_grad_()
        bias = relative.transformer_xl(r) if kind == "xl" else relative.deberta(r[:, :64], r[:, 64:128], 32)
        out = fastattn.attention(q, k, v, bias=bias, window_size=(2048, 0), backend="cpu")
        torch.autograd.grad(out.sum(), (q, k, v, r))

    step(*(x[:, :, :128] for x in (q, k, v)))
    before = reset_peak()
    step(q, k, v)
    return status("VmHWM") - before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xl", "deberta"])
def test_memory_is_linear(kind):
    """n x n would be 2 GiB."""
    assert printed_by_child(f"test_relative_blocks.extra_bytes({kind!r}, 16384)") < 192 * 2**20


def test_refusals():
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))

    def call(bias, **options):
        return lambda: fastattn.attention(q, k, v, bias=bias(), **options)

    xl, shaw, deberta = relative.transformer_xl, relative.shaw, relative.deberta
    for bias, error, pattern in (
        (lambda: xl(torch.ones(11, 8)), ValueError, r"transformer_xl: r has shape \(11, 8\)"),
        (lambda: xl(torch.ones(4, 10, 8)), ValueError, "r has 10 distances; seqlen_q=6 and seqlen_k=6 have 11"),
        (lambda: xl(torch.ones(4, 6, 8)), ValueError, "causal=True also takes the 6 up to distance 0"),
        (lambda: xl(torch.ones(3, 11, 8)), ValueError, "r is of 3 heads"),
        (lambda: xl(torch.ones(4, 11, 7)), ValueError, "r has 7 columns; q has head_dim=8"),
        (lambda: xl(torch.ones(4, 11, 8), torch.ones(8)), ValueError, "u has shape"),
        (lambda: xl(torch.ones(4, 11, 8), v=torch.ones(4, 7)), ValueError, "v has 7 columns"),
        (lambda: shaw(torch.ones(4, 8)), ValueError, "shaw: keys has 4 distances; it must have an odd number"),
        (lambda: shaw(torch.ones(5, 7)), ValueError, "keys has 7 columns"),
        (lambda: deberta(None, None), TypeError, "give pos_key, pos_query or both"),
        (lambda: deberta(torch.ones(4, 5, 8), None), ValueError, "pos_key has 5 places"),
        (lambda: deberta(torch.ones(4, 6, 8), None, buckets=2), ValueError, "deberta: buckets=2 must be >= 4"),
        (lambda: deberta(torch.ones(4, 6, 8), None, 8, 5), ValueError, "max_distance=5 must be above 5"),
    ):
        assert_refused(call(bias), error, pattern)
    for options, error, pattern in (
        ({"softcap": 2.0}, ValueError, r"softcap=2.0 does not go with bias=fastattn.relative.shaw"),
        ({"alibi_slopes": torch.ones(4)}, ValueError, "alibi_slopes does not go with bias"),
        ({"mask": fastattn.patterns.causal(6, 6, block_size=16)}, ValueError, "mask, a BlockMask, does not go with"),
        ({"mask": torch.ones(5, 6).bool()}, ValueError, r"mask has shape \(5, 6\)"),
        ({"mask": torch.ones(6, 6)}, TypeError, "mask has dtype"),
    ):
        assert_refused(call(lambda: shaw(torch.ones(5, 8)), **options), error, pattern)
    with pytest.raises(NotImplementedError, match="takes no torch.func transform"):
        torch.vmap(lambda x: fastattn.attention(x, k, v, bias=shaw(torch.ones(5, 8))))(q[None])
    x = q.clone().requires_grad_()
    out = fastattn.attention(x, k, v, bias=shaw(torch.ones(5, 8)))
    with pytest.raises(NotImplementedError, match="has no gradients of gradients"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
