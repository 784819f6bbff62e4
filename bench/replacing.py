"""What `fastattn.apply` costs: times in turn of an nn.TransformerEncoder in eval mode as it is and replaced.

    python bench/replacing.py [--threads 1] [--budget 20]

The two are compared first. Exit status 1: a figure above its target.
"""

import argparse
import copy
import sys

import torch
from torch import nn

import fastattn
from fastattn.cli.timing import Contender, in_turn

LAYERS = 4
OVERHEAD = 40e-6
"""Seconds a layer that a tiny encoder may take longer."""
SIZES = {"tiny": (1, 8, 64, 4), "MiniLM, 32 x 256": (32, 256, 384, 12)}  # batch, seqlen, width, heads
BESIDE = 20e-6
"""Seconds that a call of torch's attention elsewhere may take longer while a handle lives."""


def encoders(width: int, heads: int) -> tuple[nn.Module, nn.Module]:
    """Two alike, in eval mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
    plain = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    return plain, copy.deepcopy(plain)


def best_of(calls: dict, options) -> dict[str, float]:
    """Seconds of single calls by name, without gradients."""
    with torch.inference_mode():
        times = in_turn({name: Contender(call, options.threads) for name, call in calls.items()}, options.budget)
    return {name: min(seconds) for name, seconds in times.items()}


def compare(name: str, options) -> float:
    """Print the times of one size; how many seconds a layer the replaced encoder takes longer."""
    batch, seqlen, width, heads = SIZES[name]
    plain, replaced = encoders(width, heads)
    x = torch.randn(batch, seqlen, width)
    with fastattn.apply(replaced, on_unsupported="error") as handle:
        with torch.inference_mode():
            torch.testing.assert_close(replaced(x), plain(x), rtol=1e-4, atol=1e-4)
        handle.assert_all_replaced()
        best = best_of({"plain": lambda: plain(x), "replaced": lambda: replaced(x)}, options)
    longer = (best["replaced"] - best["plain"]) / LAYERS
    print(f"{name}: B{batch} S{seqlen} E{width} H{heads}, {LAYERS} layers, {options.threads} thread(s)")
    print("  " + ", ".join(f"{one} {1e3 * seconds:.3f} ms" for one, seconds in best.items()), end="; ")
    print(f"{best['plain'] / best['replaced']:.2f} times as fast, {1e6 * longer:+.1f} us a layer")
    return longer


def compare_beside(options) -> float:
    """Print what a call outside of the model costs while a handle lives; how many seconds longer that is."""
    q = torch.randn(3, 1, 4, 8, 16)
    call = nn.functional.scaled_dot_product_attention
    alone = best_of({"alone": lambda: call(*q)}, options)["alone"]
    with fastattn.apply(nn.Sequential(nn.Linear(1, 1))):
        beside = best_of({"beside": lambda: call(*q)}, options)["beside"]
    alone = min(alone, best_of({"alone": lambda: call(*q)}, options)["alone"])
    print(f"another model's call: {1e6 * alone:.1f} us, while a handle lives {1e6 * beside:.1f} us")
    return beside - alone


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each row")
    options = parser.parse_args()
    found = (
        ("a layer of a tiny encoder", compare("tiny", options), OVERHEAD),
        ("another model's call", compare_beside(options), BESIDE),
        ("a layer of MiniLM's size", compare("MiniLM, 32 x 256", options), 0.0),
    )
    for what, seconds, bound in found:
        verdict = "" if seconds <= bound else ": missed"
        print(f"  {what:<30}{1e6 * seconds:+10.1f} us  (at most {1e6 * bound:.0f}{verdict})")
    return int(any(seconds > bound for _, seconds, bound in found))


if __name__ == "__main__":
    sys.exit(main())
