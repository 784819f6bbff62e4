"""The examples with pretrained models: the same result of the task as with torch's attention, on fastattn's kernels."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import fastattn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def compared(monkeypatch):
    """A function that runs examples/`name`.py and returns (the module, its comparison); skips without the weights."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, task: str, **options):
        try:
            module = importlib.import_module(name)
            return module, getattr(module, task)(0.0, **options)
        except SystemExit as missing:
            pytest.skip(str(missing))

    yield run
    for name in [name for name, module in sys.modules.items() if _is_example(module)]:
        del sys.modules[name]


def _is_example(module) -> bool:
    return str(getattr(module, "__file__", None) or "").startswith(str(EXAMPLES))


def assert_on_kernels(comparison, calls: int) -> None:
    """All calls are counted, none fell back, and the audit named the lines to write."""
    assert "register()" in str(comparison.audit)
    assert sum(comparison.kernels.values()) == calls
    if fastattn.backends.cpu.unavailable() is None:
        assert {kernel.split(".")[0] for kernel, _ in comparison.kernels} == {"cpu"}
    assert "tensor" not in {mask for _, mask in comparison.kernels}


def test_minilm_ranks_alike(compared):
    module, comparison = compared("minilm", "rank", max_length=64)
    assert module.same_ranking(comparison)
    hits = [module.TITLES[i] for i in comparison.results[module.OURS].argmax(dim=1)]
    assert "pretrained" not in module.load_encoder()[2] or hits[2:4] == ["lambda", "await"]
    assert_on_kernels(comparison, 2 * 6)


def test_dinov2_matches_alike(compared):
    module, comparison = compared("dinov2", "match", size=14 * 20)
    assert module.same_matches(comparison) > 0.99
    assert len(comparison.results[module.OURS].unique()) > 100  # places, not one
    assert_on_kernels(comparison, 12)


def test_whisper_hears_the_same_words(compared):
    module, (comparison, what) = compared("whisper_tiny", "transcribe")
    tokens, words = comparison.results[module.OURS]
    assert tokens == comparison.results[module.SDPA][0]
    assert "pretrained" not in what or "Ever tried, ever failed. No matter, try again." in words
    assert comparison.kernels["cpu.prefill", "none"] >= 2 or fastattn.backends.cpu.unavailable()


def test_a_llama_tells_the_same_story(compared):
    module, (comparison, what) = compared("story", "tell")
    assert torch.equal(comparison.results[module.OURS], comparison.results[module.SDPA])
    assert "random" in what or len(comparison.results[module.OURS].unique()) > 30  # a story, not a loop
    assert_on_kernels(comparison, 5 * 120)
