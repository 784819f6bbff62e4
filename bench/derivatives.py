"""What forward-mode derivatives and double backward cost: times in turn, against the forward and the backward pass.

    python bench/derivatives.py [--seqlen 4096] [--threads 1] [--budget 20]

Each result is compared with plain torch in float64 first, at a short length. Exit status 1: a ratio above its target.
"""

import sys

import torch

import fastattn
from ratios import compare, options_of

TARGETS = {  # ratio: (of, to, at most)
    "jvp / forward": ("jvp", "forward", 4.0),
    "double backward / backward": ("double backward", "backward", 8.0),
    "vmap(grad) / forward and backward": ("vmap(grad)", "step", 1.3),
}


def plain(q, k, v, causal):
    """Attention in plain torch."""
    scores = q @ k.mT * q.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -torch.inf)
    return torch.softmax(scores, -1) @ v


def contenders(function, seqlen: int, causal: bool, dtype=torch.float32) -> dict:
    """Calls by name."""
    generator = torch.Generator().manual_seed(0)
    x, t = (tuple(torch.randn(1, 8, seqlen, 64, generator=generator).to(dtype) for _ in range(3)) for _ in range(2))
    leaves, cotangent = [y.clone().requires_grad_() for y in x], t[0].clone().requires_grad_()

    def call(*x):
        return function(*x, causal=causal)

    def loss(*x):
        return (call(*x) * t[0]).sum()

    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
    samples = [y[None] for y in x]
    return {
        "forward": lambda: call(*x),
        "jvp": lambda: torch.func.jvp(call, x, t),
        "backward": lambda: torch.autograd.grad(out, leaves, t[0], retain_graph=True),
        "double backward": lambda: torch.autograd.grad(grads, [*leaves, cotangent], t, retain_graph=True),
        "step": lambda: torch.autograd.grad(loss(*leaves), leaves),
        "vmap(grad)": lambda: torch.vmap(torch.func.grad(loss, (0, 1, 2)))(*samples),
    }


def check(causal: bool) -> None:
    """AssertionError where a result differs from plain torch's."""
    ours, exact = contenders(fastattn.attention, 300, causal), contenders(plain, 300, causal, torch.float64)
    for name in ("jvp", "double backward"):
        for x, y in zip(ours[name](), exact[name](), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def main() -> int:
    options = options_of(__doc__, seqlen=4096, budget=20.0)
    missed = 0
    for causal in (False, True):
        torch.set_num_threads(options.threads)
        check(causal)
        print(f"B1 H8 S{options.seqlen} D64 float32{' causal' * causal}, {options.threads} thread(s)")
        missed += compare(contenders(fastattn.attention, options.seqlen, causal), TARGETS, options)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
