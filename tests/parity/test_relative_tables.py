"""Biases of grids: Swin's and BEiT's tables, ViTDet's decomposed ones; transformers' own modules are the oracle."""

import pytest
import torch
from torch.autograd import gradcheck

import fastattn
from compiling import assert_compiles
from fastattn import relative
from guarded import printed_by_child, reset_peak, status
from isas import needs_cpu
from refusals import assert_refused

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def heads_of(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def assert_same_layer(actual, expected, parameters, error=1e-11):
    """Results, and the gradients of all parameters; error: of models that compute the softmax in float32."""
    torch.testing.assert_close(actual, expected, atol=error, rtol=error)
    grads = [torch.autograd.grad(y.square().sum(), parameters, retain_graph=True) for y in (actual, expected)]
    torch.testing.assert_close(*grads, atol=10 * error, rtol=10 * error)


def randomized(module):
    """In float64, with tables that are not 0."""
    for p in module.double().parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def test_swin_of_transformers():
    """Shifted windows: their mask is -100, which a bool mask makes exact."""
    pytest.importorskip("transformers")
    from transformers.models.swin import modeling_swin as modeling

    config = modeling.SwinConfig(attn_implementation="eager", attention_probs_dropout_prob=0.0)
    layer = randomized(modeling.SwinAttention(config, 24, 4, 5))
    x, seen = double(6, 25, 24), torch.rand(3, 25, 25) < 0.7
    expected = layer(x, torch.zeros(3, 25, 25).double().masked_fill(~seen, float("-inf")))[0]
    q, k, v = (heads_of(f(x), 4) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    table = layer.relative_position_bias.relative_position_bias_table
    mask = seen.repeat(2, 1, 1)[:, None]
    out = fastattn.attention(q, k, v, bias=relative.swin(table, 5), mask=mask, backend="cpu")
    assert_same_layer(layer.o_proj(out.transpose(1, 2).flatten(2)), expected, list(layer.parameters()), 1e-5)


def test_swin_v2_of_transformers():
    """Cosine similarity with a learned temperature, and a table that a network makes of the offsets."""
    pytest.importorskip("transformers")
    from transformers.models.swinv2 import modeling_swinv2 as modeling

    config = modeling.Swinv2Config(attention_probs_dropout_prob=0.0)
    layer = randomized(modeling.Swinv2SelfAttention(config, 24, 4, (3, 5)))
    x = double(4, 15, 24)
    expected = layer(x)[0]
    q, k, v = (heads_of(f(x), 4) for f in (layer.query, layer.key, layer.value))
    q, k = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
    scale = layer.logit_scale.clamp(max=torch.log(torch.tensor(100.0))).exp().view(4)
    table = 16 * torch.sigmoid(layer.continuous_position_bias_mlp(layer.relative_coords_table).view(-1, 4))
    out = fastattn.attention(q, k, v, bias=relative.swin(table, (3, 5)), softmax_scale=scale, backend="cpu")
    assert_same_layer(out.transpose(1, 2).flatten(2), expected, list(layer.parameters()))


@pytest.mark.parametrize("window", [(3, 3), (2, 4)])
def test_beit_of_transformers(window):
    pytest.importorskip("transformers")
    from transformers.models.beit import modeling_beit as modeling

    size = [4 * side for side in window]
    config = modeling.BeitConfig(image_size=size, patch_size=4, num_attention_heads=4, hidden_size=24)
    module = randomized(modeling.BeitRelativePositionBias(config))
    table, tokens = module.relative_position_bias_table, window[0] * window[1] + 1
    index = module.generate_relative_position_index(window)
    dense = table[index].permute(2, 0, 1)
    q, k, v = (double(2, 4, tokens, 6) for _ in range(3))
    calls = [fastattn.attention(q, k, v, bias=b, backend="cpu") for b in (relative.beit(table, window), dense)]
    assert_same_layer(*calls, [table])


def test_video_windows():
    """Three sides, as in Video Swin: the formula, entry by entry."""
    window, table = (2, 3, 2), double(3 * 5 * 3, 2).requires_grad_()
    places = torch.cartesian_prod(*map(torch.arange, window))
    offsets = places[:, None] - places[None] + torch.tensor(window) - 1
    dense = table[offsets[..., 0] * 15 + offsets[..., 1] * 3 + offsets[..., 2]].permute(2, 0, 1)
    q, k, v = (double(5, 2, 12, 6) for _ in range(3))
    calls = [fastattn.attention(q, k, v, bias=b, backend="cpu") for b in (relative.swin(table, window), dense)]
    assert_same_layer(*calls, [table])


# --- decomposed ------------------------------------------------------------------------------------------------------


def dense_of(q, tables, grid, grid_k):
    """The eager formula: q_i . rel_h[row] + q_i . rel_w[column]."""
    bias = 0.0
    for axis, (table, side, side_k) in enumerate(zip(tables, grid, grid_k, strict=True)):
        at_q = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))[:, axis, None]
        at_k = torch.cartesian_prod(*map(torch.arange, grid_k)).view(-1, len(grid))[None, :, axis]
        offset = at_q * max(side_k / side, 1.0) - at_k * max(side / side_k, 1.0)
        vectors = table[(offset + (side_k - 1) * max(side / side_k, 1.0)).long()]
        bias = bias + torch.einsum("bhid,ijd->bhij", q, vectors)
    return bias


@pytest.mark.parametrize(
    "grid, grid_k", [((3, 5), (3, 5)), ((4, 4), (2, 4)), ((1, 6), (1, 6)), ((5,), (5,)), ((2, 3, 2),) * 2]
)
@pytest.mark.parametrize("scale", [None, 0.3, "learned"])
def test_decomposed(grid, grid_k, scale):
    n, n_k = (torch.Size(g).numel() for g in (grid, grid_k))
    q, k, v = double(2, 4, n, 6), double(2, 2, n_k, 6), double(2, 2, n_k, 5)
    tables = [double(2 * max(sides) - 1, 6) for sides in zip(grid, grid_k, strict=True)]
    options = {} if scale is None else {"softmax_scale": torch.rand(4).double() + 0.1 if scale == "learned" else scale}
    leaves = [x.requires_grad_() for x in (q, k, v, *tables, *(x for x in options.values() if scale == "learned"))]
    calls = []
    for bias in (relative.decomposed(*tables, grid=grid, grid_k=grid_k), dense_of(q, tables, grid, grid_k)):
        calls.append(fastattn.attention(q, k, v, bias=bias, causal=True, return_lse=True, backend="cpu", **options))
    for actual, expected in zip(*calls, strict=True):
        assert_same_layer(actual.masked_fill(actual.isinf(), 0), expected.masked_fill(expected.isinf(), 0), leaves[:2])
    assert_same_layer(calls[0][0], calls[1][0], leaves)


def test_sam_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.sam import modeling_sam as modeling

    config = modeling.SamVisionConfig(
        hidden_size=24, num_attention_heads=4, attention_dropout=0.0, image_size=48, patch_size=8, use_rel_pos=True
    )
    layer = randomized(modeling.SamVisionAttention(config, window_size=5))
    x = double(3, 5, 5, 24)
    expected = layer(x)[0]
    q, k, v = layer.qkv(x).reshape(3, 25, 3, 4, 6).permute(2, 0, 3, 1, 4)
    bias = relative.decomposed(layer.rel_pos_h, layer.rel_pos_w, grid=5)
    out = fastattn.attention(q, k, v, bias=bias, backend="cpu")
    actual = layer.proj(out.transpose(1, 2).reshape(3, 5, 5, 24))
    assert_same_layer(actual, expected, list(layer.parameters()), 1e-5)


def test_gradcheck():
    q, k, v = (double(1, 2, 6, 3) for _ in range(3))
    rel_h, rel_w = double(3, 3).requires_grad_(), double(5, 3).requires_grad_()
    table = double(15, 2).requires_grad_()

    def by_offsets(rel_h, rel_w):
        return fastattn.attention(q, k, v, bias=relative.decomposed(rel_h, rel_w, grid=(2, 3)), backend="cpu")

    assert gradcheck(by_offsets, (rel_h, rel_w))
    assert gradcheck(lambda t: fastattn.attention(q, k, v, bias=relative.swin(t, (2, 3)), backend="cpu"), (table,))


def test_compile_and_transforms():
    q, k, v = (torch.randn(2, 2, 6, 8).requires_grad_() for _ in range(3))
    table, rel_h, rel_w = torch.randn(15, 2), torch.randn(3, 8), torch.randn(5, 8)
    leaves = [x.requires_grad_() for x in (q, k, v, table, rel_h, rel_w)]

    def attend(q, k, v, table, rel_h, rel_w):
        out = fastattn.attention(q, k, v, bias=relative.swin(table, (2, 3)))
        return out, fastattn.attention(q, k, v, bias=relative.decomposed(rel_h, rel_w, grid=(2, 3)))

    assert_compiles(attend, leaves)
    many = [torch.stack([x, 2 * x]).detach() for x in leaves]
    one_by_one = [attend(*sample) for sample in zip(*many, strict=True)]
    for actual, *expected in zip(torch.vmap(attend)(*many), *one_by_one, strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))


# --- memory and refusals ---------------------------------------------------------------------------------------------


def extra_bytes(side: int) -> int:
    """Of a step on a grid, beyond its inputs."""
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 1, side * side, 16).requires_grad_() for _ in range(3))
    rel_h, rel_w = (torch.randn(2 * side - 1, 16).requires_grad_() for _ in range(2))

    def step(q, k, v, rel_h, rel_w, grid):
        bias = relative.decomposed(rel_h, rel_w, grid=grid)
        out = fastattn.attention(q, k, v, bias=bias, window_size=(64, 64), backend="cpu")
        torch.autograd.grad(out.sum(), (q, k, v, rel_h, rel_w))

    step(*(x[:, :, :16] for x in (q, k, v)), rel_h[:7], rel_w[:7], 4)
    before = reset_peak()
    step(q, k, v, rel_h, rel_w, side)
    return status("VmHWM") - before


def test_memory_is_linear():
    """16384 tokens, of which n x n would be 1 GiB, and 256 columns more."""
    assert printed_by_child("test_relative_tables.extra_bytes(128)") < 448 * 2**20


def test_refusals():
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))

    def call(bias, **options):
        return lambda: fastattn.attention(q, k, v, bias=bias(), **options)

    swin, beit, decomposed = relative.swin, relative.beit, relative.decomposed
    rel = torch.ones(3, 8), torch.ones(5, 8)
    for bias, error, pattern in (
        (lambda: swin("table", 2), TypeError, "swin: table must be a torch.Tensor"),
        (lambda: swin(torch.ones(15, 4), (3, 3)), ValueError, r"table has 15 rows; .* must have .* = 25"),
        (lambda: swin(torch.ones(15, 4), (2, 0)), ValueError, "swin: window=0 must be >= 1"),
        (lambda: swin(torch.ones(15, 4), 2.0), TypeError, "swin: window=2.0 must be an int or a tuple"),
        (lambda: swin(torch.ones(15, 3), (2, 3)), ValueError, "swin: table is of 3 heads"),
        (lambda: swin(torch.ones(25, 4), 3), ValueError, "seqlen_q=6 .* must be 9, the tokens of a window of 3 x 3"),
        (lambda: beit(torch.ones(18, 4), (2, 3)), ValueError, "must be 7, .* of a window of 2 x 3 and the class"),
        (lambda: beit(torch.ones(15, 4), (2, 3)), ValueError, r"beit: table has 15 rows; .* \+ 3 = 18"),
        (lambda: decomposed(grid=3), TypeError, "decomposed takes a table for each axis"),
        (lambda: decomposed(*rel, grid=(2, 3, 4)), TypeError, r"decomposed: grid=\(2, 3, 4\) must be"),
        (lambda: decomposed(*rel, grid=(2, 4)), ValueError, r"table 1 has .* it must be \[7, 8\]"),
        (lambda: decomposed(torch.ones(3, 7), torch.ones(5, 7), grid=(2, 3)), ValueError, "the tables have 7 columns"),
        (lambda: decomposed(torch.ones(3, 8), torch.ones(3, 8), grid=2), ValueError, "a grid of 2 x 2 has 4"),
    ):  # fmt: skip
        assert_refused(call(bias), error, pattern)
    bias = decomposed(*rel, grid=(2, 3))
    assert_refused(call(lambda: bias, softcap=2.0), ValueError, "softcap=2.0 would act on the bias too")
    assert_refused(call(lambda: bias, softmax_scale=0), ValueError, "softmax_scale=0 would hide the bias")
    assert_refused(lambda: fastattn.attention("q", k, v, bias=bias), TypeError, "q='q' must be a tensor")
    assert_refused(lambda: fastattn.explain(q, k, v, bias=bias), TypeError, "follows from q and k")
