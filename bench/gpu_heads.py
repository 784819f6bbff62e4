"""Whether what is timed is right: two heads of it, whole, beside the reference in float32.

Long rows are means of many values and their gradients sums of as many, so results go by their own size, block by block
(`gpu_parity.share_off`). Shapes are those of `gpu.Shape`.
"""

import torch

import fastattn
from gpu_parity import share_off

RESULTS = ("out", "dq", "dk", "dv")


def compared(x: torch.Tensor, shape) -> list[torch.Tensor]:
    """The first and the last head that share keys, of the first and the last entry of the batch, [1, heads, ...]."""
    group = x.shape[1] // shape.num_heads_k
    return [x[:1, :group], x[-1:, -group:]]


def expected(shape, passes: str, q, k, v, dout) -> list[list[torch.Tensor]]:
    """RESULTS of what is `compared`, by the reference in float32: O(n^2) memory for a head."""
    window = None if shape.window is None else (shape.window, None)
    found = []
    for *qkv, of_out in zip(*(compared(x.detach(), shape) for x in (q, k, v, dout)), strict=True):
        leaves = [x.float().requires_grad_(passes != "forward") for x in qkv]
        out = fastattn.attention(*leaves, causal=shape.causal, window_size=window, backend="reference")
        gradients = () if passes == "forward" else torch.autograd.grad(out, leaves, of_out.float())
        found.append([out.detach(), *gradients])
    return found


def error(shape, results: tuple, right: list[list[torch.Tensor]]) -> tuple[float, str]:
    """The largest `share_off` of what is compared, and of which result it is."""
    of_heads = zip(*(compared(x, shape) for x in results), strict=True)
    shares = [
        (share_off(x, y), name)
        for found, known in zip(of_heads, right, strict=True)
        for x, y, name in zip(found, known, RESULTS, strict=False)  # forward alone: out
    ]
    return max(shares)
