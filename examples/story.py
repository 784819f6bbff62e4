"""A pretrained Llama of 260,000 parameters tells a story, token by token with a cache.

    python examples/story.py            needs: pip install "fastattn[demo]", and the weights that pretrained.py reads

Grouped queries (8 heads, 4 of keys) and rotary positions: the same tokens with torch's attention and with fastattn.
"""

import argparse

import torch
from beside_torch import OURS, SDPA, Comparison, compare, print_comparison
from pretrained import load_llama


def tell(budget: float, length: int = 120) -> tuple[Comparison, str]:
    """(Tokens [1, length + 1], the most probable each; what the model is)."""
    (model, what, _), start = load_llama(), torch.tensor([[1]])

    def generate(length: int) -> torch.Tensor:
        options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(start, attention_mask=torch.ones_like(start), **options)

    return compare(model, lambda: generate(length), budget, audited=lambda: generate(4)), what


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing (default: 10)")
    comparison, what = tell(parser.parse_args().budget)
    same = torch.equal(*(comparison.results[name] for name in (SDPA, OURS)))
    print_comparison(what, f"same {comparison.results[OURS].shape[1]} tokens: {same}", comparison)
