"""nn.MultiheadAttention and what contains it, replaced: equal to torch in float64, whatever its arguments."""

import itertools

import pytest
import torch
from torch import nn

import fastattn

BATCH, LENGTH, WIDTH, HEADS = 3, 7, 24, 4
GENERATOR = torch.Generator().manual_seed(0)
LOWER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDED = torch.arange(LENGTH) >= torch.tensor([7, 4, 1])[:, None]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDED},
    "float padding": {"key_padding_mask": torch.zeros(BATCH, LENGTH, dtype=torch.float64).masked_fill(PADDED, -2.0)},
    "causal": {"attn_mask": LOWER, "is_causal": True},
    "both": {"attn_mask": LOWER, "key_padding_mask": PADDED},
    "a mask a head": {"attn_mask": draw(BATCH * HEADS, LENGTH, LENGTH) > 1.5},
    "float": {"attn_mask": draw(LENGTH, LENGTH)},
}
LAYERS = {
    "plain": {"batch_first": True},
    "seqlen first": {},
    "without bias": {"batch_first": True, "bias": False},
    "bias_kv": {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    "own widths": {"batch_first": True, "kdim": 10, "vdim": 12},
}


def attention_of(layer):
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **LAYERS[layer]).eval()


def inputs_of(layer, module):
    x = draw(BATCH, LENGTH, WIDTH)
    key, value = (draw(BATCH, LENGTH, 10), draw(BATCH, LENGTH, 12)) if layer == "own widths" else (x, x)
    return (x, key, value) if module.batch_first else (x.transpose(0, 1),) * 3


def compare(run, module, calls=1, tolerance=1e-12):
    expected = run()
    with fastattn.apply(module, on_unsupported="error") as handle:
        found = run()
    assert sum(row.calls for row in handle.report().rows) == calls
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_multihead_attention(layer, mask):
    module = attention_of(layer)
    inputs = inputs_of(layer, module)
    for grad, need_weights, average in itertools.product((False, True), (False, True), (False, True)):
        with torch.set_grad_enabled(grad):
            options = {"need_weights": need_weights, "average_attn_weights": average}
            compare(lambda options=options: module(*inputs, **MASKS[mask], **options), module)


@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched_and_positional(need_weights):
    module = attention_of("plain")
    x = draw(LENGTH, WIDTH)
    compare(lambda: module(x, x, x, None, need_weights, LOWER, False), module)
    compare(lambda: module(x, x[:4], x[:4], PADDED[1, :4], need_weights), module)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder(activation, norm_first, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 32, 0.0, activation, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    module = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH, dtype=torch.float64), not norm_first).eval()
    x = draw(BATCH, LENGTH, WIDTH)
    with torch.set_grad_enabled(grad):
        for options in (
            {},
            {"src_key_padding_mask": PADDED},  # nested tensors without gradients
            {"mask": LOWER, "is_causal": True},
            {"mask": LOWER, "src_key_padding_mask": PADDED},
        ):
            compare(lambda options=options: module(x, **options), module, calls=2)


def test_a_float_mask_of_an_encoder_is_added_where_torchs_fast_path_takes_it_for_a_bool_one():
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, dtype=torch.float64).eval()
    x, mask = draw(BATCH, LENGTH, WIDTH), draw(LENGTH, LENGTH)
    expected = module(x, mask)  # the slow path
    with torch.no_grad(), fastattn.apply(module, on_unsupported="error"):
        torch.testing.assert_close(module(x, mask), expected, rtol=1e-12, atol=1e-12)


def test_whole_transformer_with_gradients():
    torch.manual_seed(0)
    module = nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    source, target = draw(BATCH, 5, WIDTH), draw(BATCH, LENGTH, WIDTH)

    def run():
        out = module(source, target, tgt_mask=LOWER, tgt_key_padding_mask=PADDED)
        return [out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))]

    compare(run, module, calls=3)


def test_gradients_through_the_weights():
    module = attention_of("plain")
    x = draw(BATCH, LENGTH, WIDTH).requires_grad_()
    cotangent = draw(BATCH, HEADS, LENGTH, LENGTH)

    def run():
        out, weights = module(x, x, x, key_padding_mask=PADDED, average_attn_weights=False)
        return torch.autograd.grad(out.sum() + (weights * cotangent).sum(), [x, module.in_proj_weight])

    compare(run, module)


def test_a_query_that_sees_no_key_gives_zeros():
    module = attention_of("plain")
    x = draw(BATCH, LENGTH, WIDTH)
    with fastattn.apply(module):
        out, weights = module(x, x, x, key_padding_mask=torch.ones(BATCH, LENGTH, dtype=torch.bool))
    assert torch.equal(weights, torch.zeros_like(weights))
    torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))


def test_weights_under_dropout_are_those_that_made_the_result():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(HEADS, HEADS, dropout=0.5, batch_first=True, dtype=torch.float64)
    x = draw(BATCH, LENGTH, HEADS)
    with torch.no_grad():
        module.out_proj.weight.copy_(torch.eye(HEADS))
    with fastattn.apply(module, on_unsupported="error") as handle:
        out, weights = module(x, x, x, average_attn_weights=False)
    assert handle.report().rows[0].calls == 1
    assert 0.2 < (weights == 0).double().mean() < 0.8
    values = nn.functional.linear(x, module.in_proj_weight[2 * HEADS :], module.in_proj_bias[2 * HEADS :])
    by_hand = torch.einsum("bhqk,bkh->bqh", weights, values) + module.out_proj.bias
    torch.testing.assert_close(out, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    module, x = attention_of("plain").to(dtype), draw(BATCH, LENGTH, WIDTH).to(dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            compare(lambda: module(x, x, x, key_padding_mask=PADDED), module, tolerance=50 * torch.finfo(dtype).eps)


def test_subclasses_that_call_torchs_forward_are_reached_in_the_fast_path():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    torch.manual_seed(0)
    module, x = Own(WIDTH, HEADS, batch_first=True, dtype=torch.float64).eval(), draw(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        compare(lambda: module(x), module)


def test_empty_batches():
    module = attention_of("plain")
    for shape in ((0, LENGTH, WIDTH), (BATCH, 1, WIDTH)):
        x = draw(*shape)
        with torch.no_grad(), fastattn.apply(module, on_unsupported="error"):
            assert module(x, x, x)[0].shape == shape
