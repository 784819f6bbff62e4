"""Positions: formulas of their papers, and of transformers where it has them."""

import math

import pytest
import torch

from fastattn.nn import LearnedPositions, Rotary, SinusoidalPositions, apply_rotary


@pytest.fixture
def llama():
    pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    return modeling_llama


@pytest.fixture
def gptj():
    pytest.importorskip("transformers")
    from transformers.models.gptj import modeling_gptj

    return modeling_gptj


@pytest.fixture
def rope():
    pytest.importorskip("transformers")
    from transformers import modeling_rope_utils

    return modeling_rope_utils


def test_sinusoidal():
    x = torch.randn(2, 5, 8)
    found = SinusoidalPositions(8)(x)
    for position in range(5):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            for column, value in ((2 * i, math.sin(angle)), (2 * i + 1, math.cos(angle))):
                torch.testing.assert_close(found[:, position, column], x[:, position, column] + value)
    assert torch.equal(SinusoidalPositions(8)(x[:, 3:], torch.arange(3, 5)), found[:, 3:])
    assert SinusoidalPositions(8)(x.bfloat16()).dtype == torch.bfloat16


def test_learned():
    module, x = LearnedPositions(6, 8), torch.randn(2, 5, 8)
    assert torch.equal(module(x), x + module.weight[:5])
    positions = torch.tensor([[0, 1, 2, 0, 1], [5, 4, 3, 2, 1]])
    assert torch.equal(module(x, positions), x + module.weight[positions])
    with pytest.raises(ValueError, match="has more than max_seqlen=6 positions"):
        module(torch.randn(7, 8))


def test_rotary_is_llamas(llama):
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    positions = torch.stack((torch.arange(7), torch.arange(3, 10)))
    module = Rotary(16)
    cos, sin = (torch.cat((x, x), -1) for x in module.tables(positions))
    for ours, theirs in zip(module(q, k, positions), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_interleaved_and_partial_rotary_is_gptjs(gptj):
    x = torch.randn(2, 7, 4, 16)  # [batch, seqlen, heads, head_dim], as GPT-J has it
    table = gptj.create_sinusoidal_positions(7, 8)
    sin, cos = table.split(4, -1)
    expected = torch.cat((gptj.apply_rotary_pos_emb(x[..., :8], sin[None], cos[None]), x[..., 8:]), -1)
    ours, _ = Rotary(16, fraction=0.5, interleaved=True)(x.transpose(1, 2), x.transpose(1, 2))
    torch.testing.assert_close(ours.transpose(1, 2), expected)
    assert torch.equal(apply_rotary(x.transpose(1, 2), cos, sin, True), ours)


@pytest.mark.parametrize(
    "scaling, options",
    [
        ("linear", {"factor": 4.0}),
        ("yarn", {"factor": 8.0, "trained_seqlen": 512}),
        ("yarn", {"factor": 2.5, "trained_seqlen": 2048, "beta_fast": 16.0, "beta_slow": 2.0}),
    ],
)
def test_scalings_are_transformers(scaling, options, llama, rope):
    parameters = {"rope_type": scaling, "rope_theta": 10000.0, "factor": options["factor"]}
    parameters |= {name: options[name] for name in ("beta_fast", "beta_slow") if name in options}
    trained = options.get("trained_seqlen", 512)
    parameters["original_max_position_embeddings"] = trained
    config = llama.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=trained, rope_parameters=parameters
    )
    rates, sharpening = rope.ROPE_INIT_FUNCTIONS[scaling](config, "cpu")
    module = Rotary(64, scaling=scaling, **options)
    torch.testing.assert_close(module.rates, rates)
    assert module.sharpening == pytest.approx(sharpening)


def test_ntk_stretches_the_longest_wavelength_alone(llama, rope):
    plain, scaled = Rotary(64), Rotary(64, scaling="ntk", factor=4.0)
    torch.testing.assert_close(scaled.rates[-1] * 4.0, plain.rates[-1])
    assert scaled.rates[0] == plain.rates[0] and scaled.rates[1] > plain.rates[1] / 1.1
    config = llama.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=512,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0},
    )  # fmt: skip
    theirs, _ = rope.ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=2048)  # 4 times as long
    torch.testing.assert_close(scaled.rates, theirs)


def test_scores_depend_on_distances_alone():
    q, k = torch.randn(1, 1, 5, 32, dtype=torch.float64), torch.randn(1, 1, 5, 32, dtype=torch.float64)
    scores = []
    for start in (0, 1000):
        a, b = Rotary(32)(q, k, torch.arange(5) + start)
        scores.append(a @ b.transpose(-1, -2))
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)  # angles are float32


def test_rotary_of_other_lengths_and_dtypes():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8)
    a, b = Rotary(8)(q, k, torch.arange(3, 6))
    assert torch.equal(a, Rotary(8)(q, q, torch.arange(3, 6))[0]) and torch.equal(b, Rotary(8)(k, k)[1])
    assert all(x.dtype == torch.float16 for x in Rotary(8)(q.half(), k.half()))
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(Rotary(8)(q, k)[0].square().sum(), q)
    torch.testing.assert_close(gradient, 2 * q.detach())  # a rotation keeps lengths


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"head_dim": 8, "scaling": "cubic"}, "scaling='cubic' must be one of"),
        ({"head_dim": 9}, "9 columns; it must be an even number"),
        ({"head_dim": 8, "fraction": 0.1}, "0 columns"),
        ({"head_dim": 8, "scaling": "yarn"}, "needs trained_seqlen="),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rotary(**arguments)
    with pytest.raises(ValueError, match="must be even"):
        SinusoidalPositions(7)
