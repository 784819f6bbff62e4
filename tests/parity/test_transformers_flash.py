"""transformers' own flash_attention_2, on fastattn's functions and on a CPU."""

import importlib.util

import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations.transformers_flash import enable_flash_attention_2  # noqa: E402
from models import build, text  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn itself is installed"),
]


@pytest.fixture
def enabled():
    undo = enable_flash_attention_2()
    yield undo
    undo()


@pytest.mark.parametrize("padding", ["unpadded", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bert"])
def test_same_as_eager(name, padding, enabled):
    model = build(name)
    ids, mask = text(padding)
    expected = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("flash_attention_2")
    with fastattn.record() as calls:
        found = model(ids, attention_mask=mask).last_hidden_state
    tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[tokens], expected[tokens], rtol=0, atol=2e-5)
    assert {call.problem.layout for call in calls} == {"dense" if mask is None else "varlen"} and len(calls) == 2


def test_generation_of_padded_prompts(enabled):
    model = build("llama", transformers.AutoModelForCausalLM)
    ids, mask = text("left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    model.set_attn_implementation("flash_attention_2")
    assert torch.equal(model.generate(ids, **options), expected)


def test_gradients(enabled):
    model, (ids, _) = build("llama"), text("unpadded")
    grads = []
    for name in ("eager", "flash_attention_2"):
        model.set_attn_implementation(name)
        grads.append(torch.autograd.grad(model(ids).last_hidden_state.square().sum(), [*model.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_undo():
    undo = enable_flash_attention_2()
    model = build("llama")
    model.set_attn_implementation("flash_attention_2")
    undo()
    undo()  # harmless
    with pytest.raises(ImportError):
        build("llama").set_attn_implementation("flash_attention_2")
    assert importlib.util.find_spec("flash_attn") is None
    enable_flash_attention_2()()
