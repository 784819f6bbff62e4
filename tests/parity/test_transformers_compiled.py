"""Models of transformers with fastattn under torch.compile: as many graphs as with torch's attention, equal results."""

import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers")

from fastattn.integrations import transformers as integration  # noqa: E402
from models import CONFIGS, MORE, SEQ2SEQ_MODELS, WITHOUT_PADDING, build, model_inputs, text  # noqa: E402

integration.register()
transformers.logging.set_verbosity_error()
FAST = [("bert", "unpadded"), ("gemma2", "left"), ("t5", "right")]
ALL = [
    pytest.param(name, padding, marks=() if (name, padding) in FAST else pytest.mark.slow)
    for name in (*CONFIGS, *MORE)
    for padding in ("unpadded", "right", "left")
    if padding == "unpadded" or name not in (*WITHOUT_PADDING, "wav2vec2")
]


@pytest.mark.parametrize("name, padding", ALL)
def test_one_graph(name, padding):
    model, inputs = build(name), model_inputs(name, padding)
    if hasattr(model.config, "use_cache"):
        inputs |= {"use_cache": False}
    model.set_attn_implementation("fastattn")
    torch._dynamo.reset()
    with torch.no_grad():
        with fastattn.record() as expected_calls:
            expected = model(**inputs).last_hidden_state
        with fastattn.record() as calls:
            result = torch.compile(model, backend="eager", fullgraph=True)(**inputs).last_hidden_state
    assert [call.kernel for call in calls] == [call.kernel for call in expected_calls]
    tokens = inputs.get("attention_mask")
    if tokens is not None and name not in SEQ2SEQ_MODELS:  # a padding token's own output is arbitrary
        result, expected = result[tokens.bool()], expected[tokens.bool()]
    # The mask of a graph is a bool tensor where that of an eager call is intervals.
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_training_step():
    model, (ids, mask) = build("llama", transformers.AutoModelForCausalLM), text("right")
    model.set_attn_implementation("fastattn")
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_decoding_with_a_cache():
    model, (ids, _) = build("llama", transformers.AutoModelForCausalLM), text("unpadded")
    model.set_attn_implementation("fastattn")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with fastattn.record() as calls:
        compiled = torch.compile(model.forward, backend="eager", dynamic=True)
        model.forward = compiled
        assert torch.equal(model.generate(ids, **options), expected)
    assert "reference" not in {call.kernel for call in calls}


def test_a_model_with_its_own_attention_is_refused():
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    model.config._attn_implementation = "fastattn"
    with pytest.raises(ValueError, match="Bloom.* computes attention by itself"):
        torch.compile(model, backend="eager")(text("unpadded")[0])
