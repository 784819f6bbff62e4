"""Models of transformers with fastattn: equal to eager; what is registered, and refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import record

transformers = pytest.importorskip("transformers")


from fastattn.integrations import transformers as integration  # noqa: E402
from models import SIZES, build, model_inputs, text  # noqa: E402

integration.register()
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")


def both(model, inputs):
    """Last hidden states with eager and with fastattn, and the fastattn calls."""
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("fastattn")
        with record() as calls:
            result = model(**inputs).last_hidden_state
    return expected, result, calls


def test_chunked_prefill_equals_eager():
    for name in ("llama", "mistral"):
        model, (ids, mask) = build(name), text("left")
        results = []
        for implementation in ("eager", "fastattn"):
            model.set_attn_implementation(implementation)
            cache = transformers.DynamicCache(config=model.config)
            with torch.no_grad():
                for end in (6, 9, 10):
                    inputs = ids[:, cache.get_seq_length() : end]
                    out = model(inputs, attention_mask=mask[:, :end], past_key_values=cache).last_hidden_state
            results.append(out)
        torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_packed_sequences_equal_eager():
    ids, _ = text("unpadded")
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    model = build("llama")
    expected, result, _ = both(model, {"input_ids": ids[:1], "position_ids": positions, "use_cache": False})
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


WEIGHTS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


@pytest.mark.parametrize(
    ("name", "padding"),
    [("bert", "right"), ("llama", "left"), ("gemma2", "left"), ("gpt_oss", "right"), ("t5", "right"), ("bart", "left"),
     ("whisper", "unpadded"), ("swin", "unpadded"), ("vit", "unpadded"), ("deepseek_v3", "unpadded")],
)  # fmt: skip
def test_attention_weights_equal_eager(name, padding):
    model, inputs = build(name), model_inputs(name, padding)
    outputs = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(model(**inputs, output_attentions=True))
    eager, ours = outputs
    tokens = inputs.get("attention_mask")
    found = [key for key in WEIGHTS if getattr(eager, key, None)]
    assert found and found == [key for key in WEIGHTS if getattr(ours, key, None)]
    for key in found:
        assert len(getattr(ours, key)) == len(getattr(eager, key)) >= 2
        for expected, weights in zip(getattr(eager, key), getattr(ours, key), strict=True):
            assert weights.shape == expected.shape and weights.dtype == expected.dtype
            if tokens is not None and weights.shape[2] == tokens.shape[1]:  # a padding token's own row is arbitrary
                expected, weights = (x.transpose(1, 2)[tokens.bool()] for x in (expected, weights))
            torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)


def test_attention_weights_while_generating_equal_eager():
    model, (ids, mask) = build("gemma2", transformers.AutoModelForCausalLM), text("left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    steps = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        out = model.generate(ids, attention_mask=mask, output_attentions=True, return_dict_in_generate=True, **options)
        steps.append(out.attentions)
    for expected, weights in zip(*steps, strict=True):
        for one, other in zip(expected, weights, strict=True):
            last = mask.bool() if one.shape[2] > 1 else torch.ones(2, 1, dtype=torch.bool)
            assert one.shape == other.shape
            torch.testing.assert_close(other.transpose(1, 2)[last], one.transpose(1, 2)[last], atol=1e-5, rtol=1e-5)


OWN_ATTENTION = {
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "longformer": {**SIZES, "attention_window": 4},
    **dict.fromkeys(("mpnet", "deberta-v2", "megatron-bert", "big_bird"), SIZES),
}


@pytest.mark.filterwarnings("ignore:The `paged:FutureWarning")
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_their_own_attention_are_refused(name, tmp_path):
    config = transformers.AutoConfig.for_model(name, **{**OWN_ATTENTION[name], "vocab_size": 99})
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    refusal = f"attn_implementation='fastattn': {type(model).__name__} computes attention by itself"
    with pytest.raises(ValueError, match=refusal):
        model.set_attn_implementation("fastattn")
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    for implementation in ("fastattn", "paged|fastattn", {"": "fastattn"}):
        with pytest.raises(ValueError, match="computes attention by itself"):
            transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)


def test_a_refusal_that_the_configuration_got_around():
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    model.config._attn_implementation = "fastattn"
    with pytest.raises(ValueError, match="'fastattn': Bloom.* computes attention by itself"):
        model(text("unpadded")[0])


@pytest.mark.parametrize(
    "name", ["mistral", *(pytest.param(x, marks=pytest.mark.slow) for x in ("llama", "gemma2", "gpt_oss"))]
)
def test_continuous_batching_equals_eager(name, monkeypatch):
    """Requests of unequal lengths in one batch, whose pages of the cache fastattn reads as packed sequences."""
    model, prompts = build(name, transformers.AutoModelForCausalLM), [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20]]
    options = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    masks = []  # the batches run in a thread of their own, which `record` does not see

    def noted(*args, mask, **kwargs):
        masks.append(mask)
        return fastattn.attention(*args, mask=mask, **kwargs)

    monkeypatch.setattr(integration, "attention", noted)
    tokens = {}
    for implementation in ("paged|eager", "fastattn"):
        model.set_attn_implementation(implementation)
        outputs = model.generate_batch(prompts, generation_config=options, continuous_batching_config=batching)
        tokens[implementation] = [outputs[key].generated_tokens for key in sorted(outputs)]
    assert tokens["fastattn"] == tokens["paged|eager"] and {len(x) for x in tokens["fastattn"]} == {8}
    assert len(masks) >= 2 * 8 and all(isinstance(mask, fastattn.Mask) for mask in masks)


def test_register():
    integration.register("fastattn")
    integration.register("fastattn_again")
    for name in ("fastattn", "fastattn_again", "paged|fastattn"):
        assert transformers.AttentionInterface()[name] is integration.attention_forward
        assert transformers.AttentionMaskInterface()[name] is integration.make_mask
    for name in ("my_flash", "Flash", "owner/fastattn", "paged|fastattn", "sdpa", "eager", ""):
        with pytest.raises(ValueError, match="name"):
            integration.register(name)
    with pytest.raises(TypeError, match="name must be a string"):
        integration.register(None)


def test_import_fastattn_does_not_import_transformers():
    code = "import sys, fastattn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_python_of_its_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    exec(compile("".join(re.findall(r"```python\n(.*?)```", page, re.S)), "docs/transformers.md", "exec"), {})
    assert "interval" in capsys.readouterr().out
