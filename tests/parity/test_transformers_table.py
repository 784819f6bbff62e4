"""34 architectures of transformers with fastattn: forward, generation and gradients equal to eager, and no call falls
back."""

import pytest
import torch

import fastattn
from fastattn import record

transformers = pytest.importorskip("transformers")

from fastattn.integrations import transformers as integration  # noqa: E402
from models import CONFIGS, MORE, SEQ2SEQ_MODELS, WITHOUT_PADDING, build, model_inputs, text, tokens_of  # noqa: E402

integration.register()
transformers.logging.set_verbosity_error()
no_kernels = fastattn.backends.cpu.unavailable()
pytestmark = pytest.mark.filterwarnings(f"{'ignore' if no_kernels else 'error'}::fastattn.FallbackWarning")

CALLS = {**dict.fromkeys(("t5", "bart", "whisper"), 6), "swin": 4}  # in two layers; others: 2
DECODERS = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt_oss", "phi3", "gpt2",
    "gpt_neox", "opt", "deepseek_v3", "llama4_text", "cohere2", "granite", "olmo2", "starcoder2",
)  # fmt: skip
GRADIENTS = (
    "llama",
    "bert",
    "modernbert",
    "mistral",
    "gemma2",
    "gpt_oss",
    "gpt2",
    "deepseek_v3",
    "t5",
    "bart",
    "vit",
    "swin",
)
FAST = ("llama", "gemma2", "gpt_oss", "mistral", "gpt2", "deepseek_v3")


def slow_unless(is_fast, *values):
    return pytest.param(*values, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        slow_unless(name in CONFIGS, name, padding)
        for name in (*CONFIGS, *MORE)
        for padding in ("unpadded", "right", "left")
        if padding == "unpadded" or name not in WITHOUT_PADDING
    ],
)
def test_equals_eager(name, padding):
    model, inputs = build(name), model_inputs(name, padding)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("fastattn")
        with record() as calls:
            result = model(**inputs).last_hidden_state
    assert len(calls) == CALLS.get(name, 2)
    kinds = [call.problem.mask for call in calls]
    if padding != "unpadded":
        kinds = kinds[:2] + kinds[-1:] if name in SEQ2SEQ_MODELS else kinds  # the decoder itself is not padded
        assert set(kinds) == {"interval"}
    assert "tensor" not in kinds
    tokens = tokens_of(model, name, inputs, expected.shape[1])
    torch.testing.assert_close(result[tokens], expected[tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["unpadded", "left"])
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *(slow_unless(name in FAST, name, None) for name in DECODERS),
        *(slow_unless(name in FAST[:4], name, "static") for name in DECODERS),
    ],
)
def test_greedy_generation_equals_eager(name, cache, padding):
    model = build(name, transformers.AutoModelForCausalLM)
    ids, mask = text(padding)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True, "cache_implementation": cache}
    expected = model.generate(ids, attention_mask=mask, **options)
    model.set_attn_implementation("fastattn")
    with record() as calls:
        result = model.generate(ids, attention_mask=mask, **options)
    assert len(calls) == 2 * 8
    assert "tensor" not in {call.problem.mask for call in calls}
    assert torch.equal(result.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(result.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", [slow_unless(name == "llama", name) for name in GRADIENTS])
def test_training_gradients_equal_eager(name):
    model, inputs = build(name), model_inputs(name, "unpadded" if name in WITHOUT_PADDING else "right")
    gradients = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        out = model(**inputs).last_hidden_state
        out[tokens_of(model, name, inputs, out.shape[1])].square().sum().backward()
        gradients.append(torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]))
    scale = float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5 * max(scale, 1.0), rtol=1e-4)
