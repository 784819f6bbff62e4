"""What the pictures of attention weights show: values, extents, labels; and the alignment of frames with tokens."""

import itertools
import sys

import pytest
import torch

from fastattn import viz
from fastattn.viz.weights import grid_of


def probabilities(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2.0).softmax(-1)


def image_values(panel, index=0):
    return torch.tensor(panel.images[index].get_array().tolist(), dtype=torch.float32)


def labels(ticks):
    return [label.get_text() for label in ticks]


@pytest.fixture(autouse=True)
def matplotlib():
    return pytest.importorskip("matplotlib")


# --- heat map --------------------------------------------------------------------------------------------------------


def test_heat_map_shows_the_weights_of_each_head(tmp_path):
    weights, words = probabilities(4, 6, 6), ["the", "cat", "sat", "on", "$it$", "\n"]
    figure = viz.heat_map(weights, words)
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == ["head 0", "head 1", "head 2", "head 3"]
    for panel, values in zip(panels, weights, strict=True):
        torch.testing.assert_close(image_values(panel), values)
        assert panel.images[0].get_clim() == (0.0, pytest.approx(weights.max().item()))
    below, beside = labels(panels[2].get_xticklabels()), labels(panels[0].get_yticklabels())
    assert below == beside == ["the", "cat", "sat", "on", r"\$it\$", "⏎"]
    assert bar.get_ylabel() == "attention weight"
    figure.savefig(tmp_path / "picture.png")


def test_heat_map_of_one_head_names_queries_and_keys_apart():
    (panel, _) = viz.heat_map(probabilities(2, 3), ["a", "b"], ["x", "y", "z"]).axes
    assert labels(panel.get_yticklabels()) == ["a", "b"] and labels(panel.get_xticklabels()) == ["x", "y", "z"]
    assert panel.get_title() == "" and (panel.get_xlabel(), panel.get_ylabel()) == ("key", "query")


def test_heat_map_of_many_tokens_counts_them(tmp_path):
    figure = viz.heat_map(probabilities(1, 300, 300).bfloat16(), titles=["layer 3"])
    figure.savefig(tmp_path / "picture.png")
    ticks = [label for label in labels(figure.axes[0].get_xticklabels()) if label]
    assert figure.axes[0].get_title() == "layer 3" and 2 <= len(ticks) <= 20


@pytest.mark.parametrize(
    "weights, more, error",
    [
        (torch.ones(2, 2, dtype=torch.int64), {}, "weights has dtype torch.int64; attention weights are floats"),
        (torch.ones(1, 2, 3, 4), {}, r"weights has shape \(1, 2, 3, 4\); it must be \[heads, rows, keys\] or"),
        (torch.ones(2, 0), {}, r"weights has shape \(2, 0\): there is nothing to show"),
        (torch.full((2, 2), torch.nan), {}, "weights are probabilities, from 0 to 1"),
        (torch.full((2, 2), 1.5), {}, "values from 1.5 to 1.5"),
        (torch.full((2, 2), 0.5), {"rows": ["a"]}, r"rows has 1 labels, but weights.shape\[-2\] has 2"),
        (torch.full((2, 2), 0.5), {"rows": "ab"}, "rows='ab' must be a list of strings"),
        ([[0.5]], {}, "weights must be a torch.Tensor, got list"),
    ],
)
def test_heat_map_refuses(weights, more, error):
    with pytest.raises((TypeError, ValueError), match=error):
        viz.heat_map(weights, **more)


def test_grid_has_few_empty_places():
    assert [grid_of(count) for count in (1, 2, 4, 6, 7, 12, 16)] == [
        (1, 1), (1, 2), (2, 2), (2, 3), (2, 4), (3, 4), (4, 4),
    ]  # fmt: skip


def test_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        viz.heat_map(probabilities(2, 2))


# --- overlay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_overlay_lays_patches_over_the_image(kind, tmp_path):
    image = torch.randint(256, (20, 40, 3), dtype=torch.uint8)
    image = image if kind == torch.uint8 else image / 255.0
    weights = probabilities(2, 1 + 8)
    figure = viz.overlay(image, weights, (2, 4), num_prefix_tokens=1, query=6)
    first, *heads = figure.axes
    torch.testing.assert_close(image_values(first), image, check_dtype=False)
    for panel, row in zip(heads, weights, strict=True):
        torch.testing.assert_close(image_values(panel, 1), row[1:].view(2, 4))
        assert panel.images[1].get_extent() == [0, 40, 20, 0] == panel.images[0].get_extent()
        (mark,) = panel.lines
        assert (mark.get_xdata(), mark.get_ydata()) == ([25.0], [15.0])  # patch 6: second row, third column
    assert heads[1].get_title() == f"head 1: {weights[1, 1:].sum():.0%} on patches"
    figure.savefig(tmp_path / "picture.png")


@pytest.mark.parametrize(
    "change, error",
    [
        ({"grid": (3, 3)}, "weights have 9 keys; with grid=.3, 3. and num_prefix_tokens=1 they must have 10"),
        ({"query": 8}, "query=8 must be a patch, below 8"),
        ({"image": torch.zeros(3, 20, 40)}, r"image has shape \(3, 20, 40\); it must be \[height, width, 3\]"),
        ({"image": torch.full((4, 4, 3), 255.0)}, "floats must be from 0 to 1"),
        ({"image": torch.zeros(4, 4, 3, dtype=torch.int64)}, "it must be uint8"),
    ],
)
def test_overlay_refuses(change, error):
    call = {"image": torch.zeros(20, 40, 3), "weights": probabilities(9), "grid": (2, 4), "num_prefix_tokens": 1}
    with pytest.raises((TypeError, ValueError), match=error):
        viz.overlay(**call | change)


# --- alignment -------------------------------------------------------------------------------------------------------


def scores(weights):
    """What `align` sums, spelt out."""
    weights = weights.double()
    spread = weights.std(0, correction=0)
    return torch.where(spread == 0, 0.0, (weights - weights.mean(0)) / spread.masked_fill(spread == 0, 1.0))


@pytest.mark.parametrize("tokens, frames", [(1, 1), (1, 5), (2, 7), (3, 9), (4, 8), (4, 4)])
def test_align_is_the_best_of_all_divisions(tokens, frames):
    for seed in range(5):
        weights = probabilities(tokens, frames, seed=seed)
        table = scores(weights)

        def total(borders, table=table):
            return sum(table[t, a:b].sum() for t, (a, b) in enumerate(itertools.pairwise(borders))).item()

        divisions = [(0, *inner, frames) for inner in itertools.combinations(range(1, frames), tokens - 1)]
        found = viz.align(weights).tolist()
        assert tuple(found) in divisions
        assert total(found) == pytest.approx(max(map(total, divisions)), abs=1e-9)


def test_align_averages_heads_and_refuses_too_few_frames():
    weights = probabilities(3, 4, 20)
    mean = torch.stack([scores(head) for head in weights]).mean(0)
    assert (
        torch.equal(viz.align(weights), viz.align(weights.half().float())) and viz.align(weights).dtype == torch.int64
    )
    first, *_, last = viz.align(weights).tolist()
    assert (first, last) == (0, 20) and mean.shape == (4, 20)
    with pytest.raises(ValueError, match="weights have 3 frames for 4 tokens; each token needs one"):
        viz.align(weights[..., :3])


def test_alignment_shows_seconds(tmp_path):
    centres = torch.tensor([10.0, 30.0, 50.0])
    weights = torch.exp(-(((torch.arange(60) - centres[:, None]) / 5) ** 2)) + 1e-3
    weights = weights / weights.sum(1, keepdim=True)
    figure = viz.alignment(weights, ["one", " two", " $3"], 3.0, waveform=torch.randn(48_000))
    above, panel, bar = figure.axes
    assert labels(panel.get_yticklabels()) == ["one", " two", r" \$3"]
    assert panel.get_xlabel() == "seconds" and panel.get_xlim() == (0.0, 3.0)
    assert panel.images[0].get_extent() == [0.0, 3.0, 2.5, -0.5]
    torch.testing.assert_close(image_values(panel), weights / weights.amax(1, keepdim=True))
    steps = [line.get_xdata() for line in panel.lines]
    assert [step[0] for step in steps] == pytest.approx([0.0, 1.0, 2.0], abs=0.06)
    assert [step[-1] for step in steps] == pytest.approx([1.0, 2.0, 3.0], abs=0.06)
    assert above.lines[0].get_xdata()[-1] == 3.0 and len(above.lines[0].get_ydata()) == 48_000
    assert len(viz.alignment(weights, ["one", " two", " $3"], 3.0).axes) == 2
    figure.savefig(tmp_path / "picture.png")


@pytest.mark.parametrize(
    "change, error",
    [
        ({"seconds": 0.0}, "seconds=0.0 must be > 0"),
        ({"tokens": ["a"]}, r"tokens has 1 labels, but weights.shape\[-2\] has 2"),
        ({"waveform": torch.zeros(2, 5)}, r"waveform is torch.float32 \(2, 5\); it must be floats, \[samples\]"),
    ],
)
def test_alignment_refuses(change, error):
    with pytest.raises(ValueError, match=error):
        viz.alignment(**{"weights": probabilities(2, 9), "tokens": ["a", "b"], "seconds": 1.0} | change)
