"""fastattn.nn.MultiHeadAttention and its layers beside torch's, with the same parameters."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastattn
from fastattn import BlockMask, Mask
from fastattn.nn import MultiHeadAttention, Rotary, TransformerDecoderLayer, TransformerEncoderLayer

N, H, E, L, S = 3, 4, 24, 7, 9
RANDOM = torch.Generator().manual_seed(5)
KEEP = torch.arange(S) < torch.tensor([9, 5, 7])[:, None]  # a run of tokens
GAPS = torch.rand(N, S, generator=RANDOM) < 0.6
GAPS[:, 0] = True
SEEN = torch.rand(L, S, generator=RANDOM) < 0.6
SEEN[:, 0] = True
PER_HEAD = torch.rand(N * H, L, S, generator=RANDOM) < 0.7
PER_HEAD[..., 0] = True
SQUARE = torch.ones(L, L, dtype=torch.bool)


def added(keep: torch.Tensor) -> torch.Tensor:
    return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": ~KEEP},
    "gaps": {"key_padding_mask": ~GAPS},
    "bool": {"attn_mask": ~SEEN},
    "per head": {"attn_mask": ~PER_HEAD},
    "float": {"attn_mask": torch.randn(L, S, generator=RANDOM, dtype=torch.float64)},
    "bool and padding": {"attn_mask": ~SEEN, "key_padding_mask": ~KEEP},
    "per head and gaps": {"attn_mask": ~PER_HEAD, "key_padding_mask": ~GAPS},
    "floats": {"attn_mask": added(PER_HEAD), "key_padding_mask": added(KEEP)},
}
MODULES = {
    "plain": {},
    "no bias": {"bias": False},
    "other widths": {"kdim": 10, "vdim": 14},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10},
}


def pair(theirs=nn.MultiheadAttention, ours=MultiHeadAttention, *args, **options):
    """torch's module and ours with its parameters, biases not 0."""
    old = theirs(*args, **options).double()
    for x in old.parameters():
        nn.init.normal_(x, std=0.3)
    new = ours(*args, **options).double()
    new.load_state_dict(old.state_dict())
    return old, new


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def inputs(module, batch_first=True):
    shapes = (N, L, module.embed_dim), (N, S, module.kdim), (N, S, module.vdim)
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [(x if batch_first else x.transpose(0, 1)).detach().requires_grad_() for x in made]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", MODULES)
def test_everything_is_torchs(options, masks, average):
    """Output, weights, and the gradients of inputs and parameters through both."""
    old, new = pair(nn.MultiheadAttention, MultiHeadAttention, E, H, batch_first=True, **MODULES[options])
    xs, found = inputs(old), []
    for module in (old, new):
        out, weights = module(*xs, **MASKS[masks], average_attn_weights=average)
        loss = (out**2).sum() + (weights**3).sum()
        found.append([out, weights, *torch.autograd.grad(loss, [*xs, *module.parameters()])])
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs)
    out, weights = new(*xs, **MASKS[masks], need_weights=False)
    assert weights is None
    close(out, found[0][0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_layouts_and_what_a_first_call_looks_like(batch_first):
    old, new = pair(nn.MultiheadAttention, MultiHeadAttention, E, H, batch_first=batch_first)
    q, k, v = inputs(old, batch_first)
    for module_inputs in ((q, k, v), (q, q, q), (q, k, k)):
        for ours, theirs in zip(new(*module_inputs), old(*module_inputs), strict=True):
            close(ours, theirs)
    one = [x[0] if batch_first else x[:, 0] for x in (q, k, v)]  # not batched
    for ours, theirs in zip(new(*one), old(*one), strict=True):
        close(ours, theirs)
    padding = ~KEEP[1]
    close(new(*one, key_padding_mask=padding)[0], old(*one, key_padding_mask=padding)[0])


def test_the_same_seed_gives_the_same_parameters():
    for options in MODULES.values():
        found = []
        for module in (nn.MultiheadAttention, MultiHeadAttention):
            torch.manual_seed(3)
            found.append(module(E, H, **options).state_dict())
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][name], x) for name, x in found[1].items())
    assert isinstance(MultiHeadAttention(E, H), nn.MultiheadAttention)


def test_causal_as_a_hint_makes_no_square():
    old, new = pair(nn.MultiheadAttention, MultiHeadAttention, E, H, batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    hidden = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    expected = old(x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)[0]
    with fastattn.record() as calls:
        close(new(x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)[0], expected)
        close(new(x, x, x, is_causal=True)[0], expected)
        causal = MultiHeadAttention(E, H, batch_first=True, causal=True).double()
        causal.load_state_dict(old.state_dict())
        close(causal(x, x, x, key_padding_mask=torch.zeros(N, L, dtype=torch.bool))[0], expected)
    assert [call.problem.bias for call in calls] == ["none"] * 3


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_causal_beside_keys_without_a_position(options):
    old, new = pair(nn.MultiheadAttention, MultiHeadAttention, E, H, batch_first=True, **options)
    x, hidden = torch.randn(N, L, E, dtype=torch.float64), added(SQUARE.tril())
    for ours, theirs in zip(new(x, x, x, is_causal=True), old(x, x, x, attn_mask=hidden), strict=True):
        close(ours, theirs)


def test_dropout_in_training_alone():
    new = MultiHeadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(N, L, E)
    assert not torch.equal(new(x, x, x)[0], new(x, x, x)[0])
    assert torch.equal(new.eval()(x, x, x)[0], new(x, x, x)[0])
    torch.testing.assert_close(new.train()(x, x, x)[1].sum(-1), torch.ones(N, L))  # before dropout


# --- what torch's has not --------------------------------------------------------------------------------------------


def by_hand(module, x, scale, mask=None, norm=None, gate=None) -> torch.Tensor:
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).split(module.widths, -1)
    dims = (module.head_dim, module.head_dim, module.head_dim_v)
    q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y, d in zip((q, k, v), dims, strict=True))
    q, k = (q, k) if norm is None else (norm[0](q), norm[1](k))
    if module.rotary is not None:
        q, k = module.rotary(q, k)
    k, v = (y.repeat_interleave(module.num_heads // module.num_heads_k, 1) for y in (k, v))
    scores = scale * (q @ k.transpose(-1, -2))
    if module.alibi_slopes is not None:
        i = torch.arange(x.shape[1])
        scores = scores - module.alibi_slopes[:, None, None] * (i[:, None] - i).abs()
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    if module.sinks is not None:
        scores = torch.cat((scores, module.sinks[:, None, None].expand(len(x), -1, x.shape[1], 1)), -1)
    out = (scores.softmax(-1)[..., : x.shape[1]] @ v).transpose(1, 2).flatten(2)
    return module.out_proj(out if gate is None else out * gate)


NEWER = {
    "grouped": ({"num_heads_k": 2}, None),
    "head dims": ({"num_heads_k": 1, "head_dim": 10, "head_dim_v": 5}, None),
    "rotary": ({"rotary": Rotary(6)}, None),
    "rms": ({"qk_norm": "rms"}, None),
    "layer": ({"qk_norm": "layer", "num_heads_k": 2}, None),
    "cosine": ({"qk_norm": "l2"}, None),
    "temperature": ({"learned_scale": True}, None),
    "window": ({"causal": True, "window_size": (2, 0)}, SQUARE.tril() & SQUARE.triu(-2)),
    "alibi, sinks": ({"alibi": True, "sinks": True, "causal": True}, SQUARE.tril()),
    "gate": ({"gate": True}, None),
}


@pytest.mark.parametrize("name", NEWER)
def test_newer_options_by_hand(name):
    options, mask = NEWER[name]
    module = MultiHeadAttention(E, H, batch_first=True, **options).double()
    for x in module.parameters():
        nn.init.normal_(x, std=0.4)
    x = torch.randn(N, L, E, dtype=torch.float64)
    scale = module.head_dim**-0.5
    if module.log_scale is not None:
        scale = module.log_scale.exp().clamp(max=100.0)[:, None, None]
    norm = (module.q_norm, module.k_norm) if module.q_norm is not None else None
    if module.qk_norm == "l2":
        norm = (partial(F.normalize, dim=-1),) * 2
    gate = None if module.gate is None else module.gate(x).sigmoid()
    found, expected = module(x, x, x)[0], by_hand(module, x, scale, mask, norm, gate)
    close(found, expected)
    gradients = [torch.autograd.grad((y**2).sum(), list(module.parameters())) for y in (found, expected)]
    assert len(gradients[0]) == len(list(module.parameters()))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_a_block_mask_and_a_mask():
    module = MultiHeadAttention(E, H, batch_first=True).double()
    x = torch.randn(N, L, E, dtype=torch.float64)
    expected = by_hand(module, x, module.head_dim**-0.5, SQUARE.tril())
    blocks = BlockMask.from_mask(Mask.causal(), seqlen_q=L, block_size=16)
    for mask in (Mask.causal(), blocks):
        close(module(x, x, x, mask=mask)[0], expected)
    padded = torch.zeros(N, L, dtype=torch.bool)
    padded[:, 5:] = True
    close(module(x, x, x, mask=Mask.causal(), key_padding_mask=padded)[0],
          by_hand(module, x, module.head_dim**-0.5, SQUARE.tril() & ~padded[:, None, None]))  # fmt: skip


REFUSED = {
    "embed_dim=24 must be a multiple of num_heads=5": {"num_heads": 5},
    "num_heads=4 must be a multiple of num_heads_k=3": {"num_heads_k": 3},
    "qk_norm='l1' must be one of": {"qk_norm": "l1"},
    "rotary has head_dim=8, and this module 6": {"rotary": Rotary(8)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_constructor_refusals(message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**{"embed_dim": E, "num_heads": H} | REFUSED[message])


CALLS = {
    r"attn_mask=.* must be of shape \(7, 7\) or \(12, 7, 7\)": {"attn_mask": torch.ones(3, 7, dtype=torch.bool)},
    r"key_padding_mask=.* must be of shape \(3, 7\)": {"key_padding_mask": torch.ones(3, 8, dtype=torch.bool)},
    "positions are for rotary=": {"positions": torch.arange(7)},
    "BlockMask does not combine": {
        "mask": BlockMask.from_mask(Mask.causal(), seqlen_q=L, block_size=16),
        "is_causal": True,
    },  # fmt: skip
}


@pytest.mark.parametrize("message", CALLS)
def test_call_refusals(message):
    x = torch.randn(N, L, E)
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(E, H, batch_first=True)(x, x, x, **CALLS[message])


@pytest.mark.parametrize("heads", [1, 6, 8, 12])
def test_slopes_are_blooms(heads):
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[
        :, 0, 1
    ]  # slope times position 1
    torch.testing.assert_close(MultiHeadAttention(heads * 4, heads, alibi=True).alibi_slopes, theirs)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers(norm_first):
    old, new = pair(
        nn.TransformerEncoderLayer, TransformerEncoderLayer, E, H, 32, 0.0, batch_first=True, norm_first=norm_first
    )
    x, padded = torch.randn(N, L, E, dtype=torch.float64), ~KEEP[:, :L]
    for train in (True, False):
        with torch.set_grad_enabled(train), fastattn.record() as calls:
            old.train(train), new.train(train)
            close(new(x, src_key_padding_mask=padded), old(x, src_key_padding_mask=padded))
            close(new(x, is_causal=True, src_mask=added(SQUARE.tril())), old(x, src_mask=added(SQUARE.tril())))
        assert len(calls) == 2
    stack = nn.TransformerEncoder(new, 2, enable_nested_tensor=False).eval()
    theirs = nn.TransformerEncoder(old, 2, enable_nested_tensor=False).eval()
    with torch.no_grad(), fastattn.record() as calls:
        close(stack(x, src_key_padding_mask=padded), theirs(x, src_key_padding_mask=padded))
    assert len(calls) == 2


def test_decoder_layers():
    old, new = pair(nn.TransformerDecoderLayer, TransformerDecoderLayer, E, H, 32, 0.0, batch_first=True)
    x, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    kwargs = {"tgt_mask": added(SQUARE.tril()), "tgt_is_causal": True, "memory_key_padding_mask": ~KEEP}
    close(new(x, memory, **kwargs), old(x, memory, **kwargs))


def test_layers_take_the_newer_options():
    layer = TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, num_heads_k=2, rotary=Rotary(6), qk_norm="rms")
    assert layer.self_attn.num_heads_k == 2 and layer(torch.randn(N, L, E)).shape == (N, L, E)
    decoder = TransformerDecoderLayer(E, H, 32, 0.0, batch_first=True, causal=True)
    assert decoder.self_attn.causal and not decoder.multihead_attn.causal
    for ours, theirs in (
        (TransformerEncoderLayer, nn.TransformerEncoderLayer),
        (TransformerDecoderLayer, nn.TransformerDecoderLayer),
    ):
        found = []
        for made in (ours, theirs):
            torch.manual_seed(1)
            found.append(made(E, H, 32).state_dict())
        assert all(torch.equal(found[0][name], x) for name, x in found[1].items())
