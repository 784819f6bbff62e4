"""docs/self_attention.md: its code runs, its pictures are there and show what it says."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import fastattn

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "self_attention.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pictures():
    pytest.importorskip("PIL")
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_runs():
    pytest.importorskip("matplotlib")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(block, "docs/self_attention.md", "exec"), names)
    assert names["page"].startswith("<!doctype html>") and names["out"].shape == (1, 4, 48, 16)


def test_pictures_are_there_and_small(pictures):
    shown = re.findall(r"!\[[^]]+\]\(pictures/(\w+)\.png\)", PAGE)
    assert sorted(shown) == sorted([*pictures.VARIANTS, "look_words", "look_photo", "look_speech"])
    for name in shown:
        assert 1_000 < (DOCS / "pictures" / f"{name}.png").stat().st_size < 60_000, name


def test_files_that_the_page_names_exist():
    named = re.findall(r"`((?:examples|docs|tests)/[\w./]+\.py)`", PAGE)
    assert named and [name for name in named if not (DOCS.parent / name).exists()] == []


QUERY, KEY = torch.arange(48)[:, None], torch.arange(48)
DOCUMENT = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 10, 18]))
ROW, COLUMN = torch.arange(64) // 8, torch.arange(64) % 8
SEEN = {  # the formulas of the page
    "causal": KEY <= QUERY,
    "window": (QUERY - 6 <= KEY) & (KEY <= QUERY + 2),
    "lengths": KEY < 30,
    "documents": (DOCUMENT[:, None] == DOCUMENT) & (KEY <= QUERY),
    "prefix_lm": (KEY < 10) | (KEY <= QUERY),
    "dilated": ((KEY - QUERY).abs() <= 12) & ((KEY - QUERY) % 3 == 0),
    "strided": (KEY <= QUERY) & ((QUERY - KEY < 6) | ((QUERY - KEY) % 6 == 0)),
    "streaming": (KEY <= QUERY) & ((KEY < 2) | (QUERY - KEY < 8)),
    "alibi": KEY <= QUERY,
    "self": KEY >= 0,
}


@pytest.mark.parametrize("name", SEEN)
def test_picture_shows_the_keys_that_the_formula_names(name, pictures):
    weights = pictures.VARIANTS[name]()
    assert torch.equal(weights > 0, SEEN[name].expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


def test_pictures_show_what_the_text_beside_them_says(pictures):
    shown = {name: make() for name, make in pictures.VARIANTS.items()}
    inside = (ROW[:, None] - ROW).abs().maximum((COLUMN[:, None] - COLUMN).abs()) <= 1
    assert (shown["neighborhood"][0] > 0)[inside].all()  # at an edge, windows are shifted inwards
    assert ((shown["neighborhood"][0] > 0).sum(-1) == 9).all()
    assert ((shown["graph"][0] > 0).sum(-1) <= 5).all()
    assert (shown["selected"][0, 96:, 64:96].sum(-1) > 0.5).all()
    assert shown["sinks"][0].sum(-1).min() > 0.99 and shown["sinks"][1].sum(-1).max() < 0.7
    largest = shown["temperature"].amax((1, 2))
    assert (largest.diff() > 0).all()
    assert 0.2 < (shown["dropout"][0][KEY <= QUERY] == 0).float().mean() < 0.4
    off = shown["bias"][0].diagonal(-1).mean() / shown["self"][0].diagonal(-1).mean()
    assert off > 5.0 and shown["cross"].shape == (1, 12, 48)
    # Two heads that share keys still differ, as their queries do.
    assert shown["grouped"].shape[0] == 4 and not torch.equal(shown["grouped"][0], shown["grouped"][1])
    assert fastattn.patterns.longformer(48, window=6, tokens=2).to_dense()[..., :2].all()
    assert (shown["longformer"][0, :, :2] > 0).all() and (shown["longformer"][0, :2] > 0).all()
