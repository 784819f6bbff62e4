"""The benchmark of the kinds of attention: each is its eager formula, and rows are written."""
# ruff: noqa: E402 (bench/ is no package)

import json
import sys
from pathlib import Path

import pytest
import torch

from isas import needs_cpu

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import kinds

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("name", kinds.KINDS)
def test_kinds_are_their_eager_formulas(name):
    kinds.compare(kinds.KINDS[name])


def test_from_end_to_end(tmp_path, capsys, monkeypatch):
    """With a bound that no machine reaches, which is said."""
    monkeypatch.setattr(kinds, "asked", lambda *bounds, **others: {(kinds.AS_PLAIN, "forward"): 0.0})
    arguments = ["--only", "toeplitz", "--seqlen", "64", "--budget", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kinds.py", *arguments])
    assert kinds.main() == 1
    rows = json.loads((tmp_path / "kinds.json").read_text())["rows"]
    assert [(row["kind"], row["passes"]) for row in rows] == [("toeplitz", "forward"), ("toeplitz", "forward+backward")]
    assert rows[0]["missed"] == [kinds.AS_PLAIN] and not rows[1]["missed"] and set(rows[0]["ms"]) == set(kinds.NAMES)
    table = (tmp_path / "kinds.md").read_text()
    assert "at most 0, missed" in table and table.splitlines()[-1] in capsys.readouterr().out


def test_a_wrong_kind_is_not_timed(monkeypatch):
    monkeypatch.setattr(kinds.fastattn, "attention", lambda q, k, v, **options: q + v)
    with pytest.raises(AssertionError):
        kinds.compare(kinds.toeplitz)


def test_what_is_asked():
    assert kinds.asked(1.1, 1.2, faster=4.0)[kinds.FASTER, "forward+backward"] == 4.0
    assert kinds.asked(1.1, 1.2, faster_both=5.0).get((kinds.FASTER, "forward")) is None
    assert kinds.tensors(kinds.Sizes(1, 8, torch.float32), (2, 3))[0].requires_grad
