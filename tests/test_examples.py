"""The examples run, and what they claim to check is checked."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import fastattn

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def train_char_lm():
    sys.path.append(str(EXAMPLES))  # as for a script
    spec = importlib.util.spec_from_file_location("train_char_lm", EXAMPLES / "train_char_lm.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(EXAMPLES))


def test_both_models_learn_the_same(train_char_lm, tmp_path, capsys):
    outcomes = train_char_lm.main(["--quick", "--steps", "25", "--out", str(tmp_path)])
    assert outcomes.keys() == {"causal", "alibi"}
    for name, outcome in outcomes.items():
        for losses in outcome.curves.losses.values():
            assert len(losses) == 25 and losses[-1] < losses[0] - 1.0
        assert outcome.agreement.same and outcome.gradient_difference < 1e-5
        assert (tmp_path / f"train_char_lm_{name}.png").stat().st_size > 10_000
    assert outcomes["causal"].agreement.difference < 1e-3  # no dropout: rounding alone
    if fastattn.cpu.unavailable() is None:
        assert "cpu.prefill" in outcomes["causal"].kernels and "cpu.backward" in outcomes["causal"].kernels
    assert " ".join(capsys.readouterr().out.split()).count("the same within noise") == 2


@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_another_attention_is_noticed(name, train_char_lm):
    """Scores of twice the scale show in the gradients of the first batch."""
    size = train_char_lm.QUICK
    (this,) = (r for r in train_char_lm.ROUNDS if r.name == name)
    right = this.attend[train_char_lm.OURS]
    attend = this.attend | {train_char_lm.OURS: lambda q, *args, **kwargs: right(2.0 * q, *args, **kwargs)}
    models = train_char_lm.twins(this._replace(attend=attend), size, 10)
    ids = torch.randint(10, (2, size.seqlen + 1))
    assert train_char_lm.difference_at_the_start(models, ids) > 1e-3


def test_curves_that_differ_are_not_the_same(train_char_lm):
    curve = [3.0 + 0.05 * (-1) ** i for i in range(40)]
    assert train_char_lm.agreement(curve, curve).same
    assert not train_char_lm.agreement([loss + 0.2 for loss in curve], curve).same


def test_too_few_steps_and_a_missing_text_are_said_clearly(train_char_lm, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train_char_lm.main(["--steps", "3"])
    assert "--steps 3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(SystemExit, match="pydoc_data.topics of the standard library"):
        train_char_lm.load_corpus()
