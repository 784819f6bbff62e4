"""What it costs to look at the weights: times in turn against the forward pass, and memory beyond inputs and results.

    python bench/seeing.py [--seqlen 32768] [--threads 1] [--budget 60]

Each result is compared with the dense matrix in float64 first, at a short length. Exit status 1: a target is missed.
"""

import subprocess
import sys
from pathlib import Path

import torch

import fastattn
from ratios import compare, judge, options_of

HEADS, DIM, LAYERS, ROWS = 8, 64, 12, 64
SUMS = ("key_mass", "entropy", "distance")
MIB = 2**20
TARGETS = {  # what: (of, to, at most)
    "key_mass, entropy, distance / forward": ("statistics", "forward", 1.3),
    "the same, given lse / forward": ("statistics from lse", "forward", 1.3),
    "forward with 64 rows captured / forward": ("captured", "forward", 1.05),
    "capture switched off / forward": ("after a capture", "forward", 1.01),
}
ROLLOUT = {
    "12 layers from lse / 12 forwards": ("rollout from lse", "forward", 12.0),
    "12 layers without lse / 12 forwards": ("rollout", "forward", 12.0),
}


def tensors(seqlen: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, seqlen, DIM, generator=generator) for _ in range(3)]


def captured(q, k, v):
    """The forward pass with 64 rows of weights recorded."""
    with fastattn.capture(rows=range(0, q.shape[2], q.shape[2] // ROWS)) as seen:
        out = fastattn.attention(q, k, v)
    return out, seen[0].weights


def calls(seqlen: int) -> dict:
    """Calls by name; none needs more than O(n) memory."""
    q, k, v = tensors(seqlen)
    lse = fastattn.attention(q, k, v, return_lse=True)[1]
    return {
        "forward": lambda: fastattn.attention(q, k, v),
        "statistics": lambda: fastattn.attention_stats(q, k, stats=SUMS),
        "statistics from lse": lambda: fastattn.attention_stats(q, k, lse, stats=SUMS),
        "captured": lambda: captured(q, k, v),
        "after a capture": lambda: fastattn.attention(q, k, v),
    }


def rollouts(seqlen: int) -> dict:
    """One row through all layers."""
    q, k, v = tensors(seqlen)
    lse = fastattn.attention(q, k, v, return_lse=True)[1]
    return {
        "forward": lambda: fastattn.attention(q, k, v),
        "rollout from lse": lambda: fastattn.rollout([(q, k, {"lse": lse})] * LAYERS, [0]),
        "rollout": lambda: fastattn.rollout([(q, k)] * LAYERS, [0]),
    }


def check() -> None:
    """AssertionError where a result is not that of the dense matrix in float64."""
    q, k, v = tensors(256)
    p = torch.softmax(q.double() @ k.double().mT * DIM**-0.5, -1)
    distance = (torch.arange(256)[:, None] - torch.arange(256)).abs().double()
    exact = p.sum(2), torch.special.entr(p).sum(-1), (p * distance).sum(-1)
    found = fastattn.attention_stats(q, k, stats=SUMS)
    for name, x in zip(SUMS, exact, strict=True):
        torch.testing.assert_close(found[name].double(), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(captured(q, k, v)[1].double(), p[:, :, ::4], rtol=1e-5, atol=1e-6)
    a = torch.linalg.matrix_power(0.5 * torch.eye(256) + 0.5 * p.mean(1), LAYERS)
    torch.testing.assert_close(rollouts(256)["rollout"]().double(), a[:, :1], rtol=1e-5, atol=1e-6)


def extra_mib(seqlen: int) -> float:
    """Of the statistics, in a process of its own."""
    root = Path(__file__).parents[1]
    code = f"import test_memory_seeing; print(test_memory_seeing.extra_bytes('fused_statistics', {seqlen}))"
    paths = [str(root / folder) for folder in (".", "tests/unit", "tests/support")]
    code = f"import sys; sys.path[:0] = {paths!r}; {code}"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) / MIB


def main() -> int:
    options = options_of(__doc__, seqlen=32768, budget=60.0)
    torch.set_num_threads(options.threads)
    check()
    print(f"B1 H{HEADS} S{options.seqlen} D{DIM} float32, {options.threads} thread(s)")
    missed = compare(calls(options.seqlen), TARGETS, options)
    missed += judge("MiB of the statistics beyond their results", extra_mib(options.seqlen), 16.0)
    seqlen = min(options.seqlen, 4096)
    print(f"B1 H{HEADS} S{seqlen} D{DIM} float32, {LAYERS} layers, one row")
    missed += compare(rollouts(seqlen), ROLLOUT, options)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
