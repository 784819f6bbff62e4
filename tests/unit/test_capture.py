"""`capture` of models: what it records, and that nobody notices it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import attention_stats, attention_weights, capture
from forward import assert_same_bits
from isas import needs_cpu

pytestmark = needs_cpu


class Attention(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.inputs, self.outputs = call, nn.Linear(32, 96), nn.Linear(32, 32)

    def qkv(self, x):
        return self.inputs(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        out = self.call(*self.qkv(x), 0.1 if self.training else 0.0)
        return self.outputs(out.transpose(1, 2).flatten(2))


def direct(q, k, v, dropout_p):
    return fastattn.attention(q, k, v, causal=True, dropout_p=dropout_p)


def drop_in(q, k, v, dropout_p):
    return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


class Model(nn.Module):
    def __init__(self, call=direct, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.reentrant = nn.ModuleList(Attention(call) for _ in range(3)), reentrant

    def forward(self, x):
        for layer in self.layers:
            again = self.reentrant is not None
            x = x + (checkpoint(layer, x, use_reentrant=self.reentrant) if again else layer(x))
        return x


X = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1))
LAYERS = [(0, "layers.0"), (1, "layers.1"), (2, "layers.2")]


def trained(model, **options):
    """(seen, results and gradients) of a step of training with dropout."""
    torch.manual_seed(2)
    x = X.clone().requires_grad_()
    with capture(model, **options) as seen:
        out = model(x)
        out.square().sum().backward()
    return seen, [out.detach(), x.grad, *[y.grad for y in model.parameters()]]


@pytest.mark.parametrize("call", [direct, drop_in])
def test_weights_and_statistics_are_those_of_the_calls(call):
    model = Model(call).eval()
    with capture(model, rows=[-1, 3], heads=[2, 0], stats={"entropy", "top_k"}, top_k=4) as seen:
        out = model(X)
    assert [(s.layer, s.name) for s in seen] == LAYERS
    assert_same_bits(out.detach(), model(X).detach())
    with torch.no_grad():
        q, k, _ = model.layers[0].qkv(X)
        weights = attention_weights(q, k, rows=[-1, 3], heads=[2, 0], causal=True)
        stats = attention_stats(q, k, heads=[2, 0], causal=True, stats={"entropy", "top_k"}, top_k=4)
    assert torch.equal(seen[0].weights, weights) and torch.equal(seen[0].stats["entropy"], stats["entropy"])
    assert torch.equal(seen[0].stats["top_k"].keys, stats["top_k"].keys)
    assert not seen[0].weights.requires_grad and seen[0].problem.seqlen_q == 21


def test_training_keeps_its_bits_and_its_random_numbers():
    expected = trained_without()
    seen, results = trained(Model(), stats=fastattn.seeing.stats.STATISTICS, rows=[0])
    assert_same_bits(results, expected)
    assert [(s.layer, s.name) for s in seen] == LAYERS
    torch.testing.assert_close(seen[1].weights.sum(-1), torch.ones(2, 4, 1))  # before dropout


def trained_without():
    torch.manual_seed(2)
    model, x = Model(), X.clone().requires_grad_()
    torch.manual_seed(2)
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *[y.grad for y in model.parameters()]]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_seen_once(reentrant):
    seen, results = trained(Model(reentrant=reentrant))
    assert [(s.layer, s.name) for s in seen] == LAYERS
    assert_same_bits(results, trained_without())


def test_layers_are_chosen_by_number_and_by_name():
    model = Model().eval()
    with capture(model, layers=[0, "layers.2"]) as seen:
        model(X)
        model(X)
    assert [(s.layer, s.name) for s in seen] == 2 * [LAYERS[0], LAYERS[2]]
    assert seen.of(2) == seen.of("layers.2") == [seen[1], seen[3]] and len(seen.of("layers")) == 4
    assert seen[0].weights.shape == (2, 4, 21, 21) and seen[0].stats == {}


def test_only_the_model_is_seen_unless_there_is_none():
    model, q = Model().eval(), torch.randn(1, 1, 4, 8)
    with capture(model, stats=["max"]) as seen, capture(stats=["max"]) as all_seen:
        fastattn.attention(q, q, q)
        model(X)
    assert len(seen) == 3 and [(s.layer, s.name) for s in all_seen] == [(0, ""), (1, ""), (2, ""), (3, "")]
    assert all(s.weights is None for s in seen)


def test_a_compiled_model_is_seen_by_number():
    model = Model().eval()
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(X)
    with capture(compiled, rows=[1]) as seen:
        for _ in range(2):
            assert_same_bits(compiled(X).detach(), expected.detach())
    assert [(s.layer, s.name) for s in seen] == 2 * [(0, ""), (1, ""), (2, "")]
    with capture(model, rows=[1]) as of_model:
        model(X)
    torch.testing.assert_close(seen[2].weights, of_model[2].weights)


def test_nothing_stays_behind():
    model = Model().eval()
    with pytest.raises(ValueError, match=r"rows=\[21\]"), capture(model, rows=[21]):
        model(X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with capture(model, stats=["max"]) as seen:
        fastattn.attention(torch.ones(1, 1, 2, 8), *[torch.ones(1, 1, 2, 8)] * 2)
        model(X)
        assert fastattn.last_call().kernel == "cpu.prefill"  # not what was computed to look at it
    with fastattn.record() as calls:
        model(X)
    assert len(calls) == len(seen) == 3


def test_what_is_not_seen_warns():
    q = torch.randn(1, 1, 3, 8)
    with pytest.warns(RuntimeWarning, match="layout csr"), capture():
        fastattn.attention_csr(q, q, q, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2]))
    with pytest.warns(RuntimeWarning, match="torch.func"), capture():
        torch.func.grad(lambda q: fastattn.attention(q, q, q).sum())(q)
    with pytest.warns(RuntimeWarning, match="saw no attention call"), capture(Model()):
        pass


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"model": 3}, TypeError, "model must be"),
        ({"layers": "layers.0"}, TypeError, "layers='layers.0'"),
        ({"layers": [1.0]}, TypeError, "1.0 must be an int or the name"),
        ({"stats": ["x"]}, ValueError, "'x' must be one of"),
        ({"top_k": 0}, ValueError, "top_k"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text), capture(**arguments):
        pass
