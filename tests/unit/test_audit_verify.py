"""`fastattn.audit` and `fastattn.verify`: what they see, what they say, and that they leave a model as it was."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastattn
from plain_models import CALLS, WIDTH, Block, net, tokens

X = tokens(length=40)


def state_of(model):
    return [dict(module.__dict__) for module in model.modules()]


class ByHand(nn.Module):
    """Attention written out, and a softmax of classes that is none."""

    def forward(self, x):
        return torch.softmax(torch.softmax(x @ x.mT, -1) @ x, -1).mean(1).softmax(-1)


class Shifted(nn.Module):
    """Attention with everything that keeps torch from its flash kernel, in turn."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, **self.options)


def qkv(heads_k=4, dim=16, dim_v=16):
    return torch.randn(2, 4, 33, dim), torch.randn(2, heads_k, 33, dim), torch.randn(2, heads_k, 33, dim_v)


def test_audit_of_a_model_as_it_is():
    model = net()
    before, expected = state_of(model), model(X)
    with torch.no_grad(), fastattn.record() as calls:
        found = fastattn.audit(model, X)
    assert calls and state_of(model) == before and torch.equal(model(X), expected)
    rows = {row.module: row for row in found.rows}
    assert list(rows) == ["blocks.0", "blocks.1", "blocks.2", "layer", "pool"]
    assert rows["blocks.0"].shape == "B2 H4 S40 D8 float32" and rows["blocks.0"].runs == "flash"
    assert [rows[name].mask for name in ("blocks.1", "blocks.2")] == ["none", "causal"]
    assert rows["layer"].runs == rows["pool"].runs == "fast path, n x n"
    for row in found.rows:
        assert row.calls == 1 and row.kernel == "cpu.prefill" and row.why == ""
        assert row.seconds > 0 < row.own_seconds and row.peak > 0 < row.own_peak
    assert rows["blocks.0"].own_peak >= X.numel() * 4
    assert found.seconds > 0 and found.saved_seconds == sum(row.saved for row in found.rows)
    assert json.loads(found.json)["rows"][3]["module"] == "layer"
    assert found.text.splitlines()[-3:] == [
        "import fastattn",
        "handle = fastattn.apply(model)",
        "print(handle.report())  # handle.remove() undoes it",
    ]


def test_audit_finds_attention_that_is_written_out():
    with torch.no_grad():
        found = fastattn.audit(nn.Sequential(ByHand()), X)
    (row,) = found.rows
    assert (row.module, row.calls, row.kernel, row.seconds) == ("0", 1, None, None)
    assert row.runs == "softmax by hand, n x n" and "not reached" in row.why and row.peak == 2 * 2 * 40 * 40 * 4
    assert "softmax by hand" in found.text and found.saved_seconds == 0


def test_audit_of_weights_in_training():
    model = net()  # gradients are on: no fast path
    rows = {row.module: row for row in fastattn.audit(model, X).rows}
    assert rows["layer.self_attn"].runs == "flash"
    assert rows["pool"].runs == "softmax by hand, n x n" and "replaces it, weights included" in rows["pool"].why


@pytest.mark.parametrize(
    "options, inputs, runs, mask",
    [
        ({}, qkv(), "flash", "none"),
        ({"dropout_p": 0.5}, qkv(), "math, n x n", "none"),
        ({"attn_mask": torch.ones(33, 33, dtype=torch.bool)}, qkv(), "flash", "bool [33, 33]"),
        ({"attn_mask": torch.zeros(1, 1, 33, 33, requires_grad=True)}, qkv(), "math, n x n", "float [1, 1, 33, 33]"),
        ({}, qkv(dim_v=8), "math, n x n", "none"),
        ({"enable_gqa": True, "is_causal": True}, qkv(heads_k=2), "flash", "causal"),
        ({}, tuple(x[0] for x in qkv()), "math, n x n", "none"),
    ],
)
def test_audit_says_what_torch_runs(options, inputs, runs, mask):
    (row,) = fastattn.audit(Shifted(**options), inputs).rows
    assert (row.runs, row.mask) == (runs, mask) and row.kernel.startswith("cpu.")
    scores = 2 * 4 * 33 * 33 * 4
    if runs.startswith("math") and inputs[0].dim() == 4:
        assert row.peak > scores > row.own_peak


def test_audit_counts_alike_calls_and_keeps_randomness():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(dropout_p=0.5)

        def forward(self, x):
            return self.block(self.block(x))

    model = Twice()
    torch.manual_seed(0)
    model(X)
    model(X)
    expected = torch.rand(1)
    torch.manual_seed(0)
    (row,) = fastattn.audit(model, X).rows
    assert row.calls == 2 and torch.equal(torch.rand(1), expected)


def test_audit_of_calls_that_fastattn_refuses_and_of_none():
    (row,) = fastattn.audit(Shifted(), (torch.randn(1, 1, 3, 600),) * 3).rows
    assert row.kernel is row.own_seconds is None and "head_dim=600" in row.why and row.saved == 0
    assert "no attention was seen" in fastattn.audit(nn.Linear(WIDTH, 3), X).text
    with pytest.raises(TypeError, match="torch.nn.Module, got int"):
        fastattn.audit(3, X)


def test_audit_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    with torch.no_grad():
        fastattn.audit(net(), X).picture(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_verify_holds_for_a_model_that_is_replaced():
    model = net()
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before = state_of(model)
    found = fastattn.verify(model, X)
    assert found and found.calls == CALLS and found.first is None
    assert state_of(model) == before and [module.training for module in model.modules()] == modes
    assert [row.name for row in found.rows] == [
        "blocks.0", "blocks.1", "blocks.2", "layer", "pool 0", "pool 1", "", "",
    ]  # fmt: skip
    assert found.rows[-1].what == "output"
    assert all(row.ours <= 2 * row.theirs + 1.2e-7 for row in found.rows)
    verdict = f"holds: all 8 results are as right as they were, {CALLS} attention calls on fastattn"
    assert found.text.splitlines()[-1] == verdict
    assert found.data["holds"] and len(json.dumps(found.data)) > 100


def test_verify_of_gradients_leaves_none_behind():
    model = net()
    found = fastattn.verify(model, {"x": X}, gradients=True)
    assert found and all(x.grad is None for x in model.parameters())
    assert {row.name for row in found.rows if row.what == "gradient"} == {name for name, _ in model.named_parameters()}


def test_verify_names_the_first_layer_that_differs():
    model = net()

    @contextmanager
    def wrong(model):
        old = model.blocks[1].forward
        model.blocks[1].forward = lambda x: old(x) * (1 + 1e-5)
        try:
            yield None
        finally:
            del model.blocks[1].forward

    found = fastattn.verify(model, X, replace=wrong)
    assert not found and found.first.name == "blocks.1" and found.calls is None
    assert "the first to differ is the layer 'blocks.1'" in found.text and "<- differs" in found.text
    assert fastattn.verify(model, X)


def test_verify_says_when_nothing_was_replaced():
    found = fastattn.verify(nn.Sequential(ByHand()), X)
    assert not found and found.first is None and "nothing was replaced" in found.text


def test_verify_without_float64_and_under_a_handle_of_the_user():
    model = net()
    with fastattn.apply(model) as handle:
        found = fastattn.verify(model, (X,), exact=False)
        assert found and all(row.theirs is None for row in found.rows)
        assert sum(row.calls for row in handle.report().rows) == 0  # what it was is torch, and what it becomes is new
        assert handle.is_active


def test_verify_compares_tokens_exactly_and_takes_a_call():
    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = net(), nn.Linear(WIDTH, 50)

        def write(self, x, steps):
            tokens = []
            for _ in range(steps):
                y = self.net(x)[:, -1:]
                tokens.append(self.head(y).argmax(-1))
                x = torch.cat([x, y], 1)
            return torch.cat(tokens, 1)

    torch.manual_seed(0)
    found = fastattn.verify(Writer().eval(), {"x": X, "steps": 3}, call=lambda model, inputs: model.write(**inputs))
    assert found and found.calls == 3 * CALLS
    (tokens_row,) = (row for row in found.rows if row.what == "output")
    assert (tokens_row.ours, tokens_row.theirs) == (0.0, None)


def test_verify_sees_infinite_and_missing_results():
    class Odd(Block):
        def forward(self, x):
            y = super().forward(x)
            return {"out": y, "inf": y / 0, "nan": y * math.nan, "none": None, "empty": y[:0]}

    assert fastattn.verify(Odd().eval(), X)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        fastattn.verify(None, X)
