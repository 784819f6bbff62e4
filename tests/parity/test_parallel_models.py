"""`fastattn.parallel.apply`: causal transformers models on two ranks give one process's logits, loss and gradients."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from fastattn import parallel
from isas import needs_cpu
from models import build
from processes import mesh_of, team_of

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]
MODELS = ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"]
MORE = [
    "qwen2",
    "qwen3",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "opt",
    "cohere2",
    "granite",
    "olmo2",
    "starcoder2",
    "gemma",
]


two = team_of(2)


def batch():
    """Tokens, labels of some of them, and padding on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (2, 21), generator=generator)
    keep = torch.ones_like(ids)
    keep[1, 17:] = 0
    labels = ids.masked_fill((torch.rand(2, 21, generator=generator) < 0.2) | (keep == 0), -100)
    return {"input_ids": ids, "attention_mask": keep, "labels": labels}


def train(model, inputs):
    out = model(**inputs)
    out.loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return out.logits.detach(), out.loss.detach(), torch.cat([g.flatten() for g in grads])


def _parallel(rank, name, schedule, shards):
    model = build(name, transformers.AutoModelForCausalLM)
    place = {"mesh": mesh_of(2), "shards": shards}
    handle = parallel.apply(model, **place, schedule=schedule)
    logits, loss, grads = train(model, batch())
    whole = parallel.unshard(logits, seq_dim=1, **place)
    handle.remove()
    model.zero_grad()
    return whole, loss, grads, train(model, batch())


def check(team, name, schedule, shards):
    logits, loss, grads = train(build(name, transformers.AutoModelForCausalLM), batch())
    found = team.run(_parallel, name, schedule, shards)
    tokens = batch()["attention_mask"].bool()
    close = {"rtol": 1e-4, "atol": 2e-5}
    for whole, _, _, again in found:
        torch.testing.assert_close(whole[tokens], logits[tokens], **close)
        torch.testing.assert_close(again[2], grads, **close)  # as it was before
    torch.testing.assert_close(sum(x[1] for x in found), loss, **close)
    torch.testing.assert_close(sum(x[2] for x in found), grads, **close)


@pytest.mark.parametrize("name", MODELS)
def test_models(two, name):
    check(two, name, None, "zigzag")


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_models(two, name):
    check(two, name, None, "zigzag")


@pytest.mark.parametrize(
    "schedule, shards", [("ring", "contiguous"), ("all_gather", "zigzag"), ("all_to_all", "zigzag")]
)
def test_schedules(two, schedule, shards):
    check(two, "llama", schedule, shards)


def _refusals(rank):
    found, mesh = [], mesh_of(2)
    ids = torch.randint(3, 99, (2, 8))
    for name, options in (
        ("llama", {"use_cache": True}),
        ("llama", {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]] * 2)}),
        ("llama", {"inputs_embeds": torch.randn(2, 8, 32), "input_ids": None}),
        ("llama4_text", {}),
        ("bert", {}),
    ):
        auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
        handle = parallel.apply(model := build(name, auto), mesh)
        try:
            model(**{"input_ids": ids} | options)
            found.append("nothing")
        except NotImplementedError as error:
            found.append(str(error))
        handle.remove()
    try:
        parallel.apply(torch.nn.Linear(2, 2), mesh)
    except NotImplementedError as error:
        found.append(str(error))
    return found


def test_refusals(two):
    cache, padding, embeds, chunks, both_ways, other = two.run(_refusals)[0]
    assert "use_cache=True is not supported" in cache and "pad on the right" in padding and "inputs_embeds" in embeds
    assert all("takes causal attention" in text for text in (chunks, both_ways))
    assert "Linear is no transformers model" in other


def dropping(name):
    """A model whose attention drops weights."""
    model = build(name, transformers.AutoModelForCausalLM).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


def _dropping(rank, name):
    model = dropping(name)
    parallel.apply(model, mesh_of(2))
    torch.manual_seed(9)
    logits, loss, grads = train(model, batch())
    return parallel.unshard(logits, mesh=mesh_of(2), seq_dim=1, shards="zigzag"), loss, grads


def test_attention_drops_the_weights_of_one_process(two):
    from fastattn.integrations.transformers import register

    register()
    model = dropping("llama")
    model.set_attn_implementation("fastattn")
    torch.manual_seed(9)
    logits, loss, grads = train(model, batch())
    whole, _, _ = train(build("llama", transformers.AutoModelForCausalLM), batch())
    assert (logits - whole).abs().max() > 1e-2
    found, tokens, close = two.run(_dropping, "llama"), batch()["attention_mask"].bool(), {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found[0][0][tokens], logits[tokens], **close)
    torch.testing.assert_close(found[0][1] + found[1][1], loss, **close)
    torch.testing.assert_close(found[0][2] + found[1][2], grads, **close)
