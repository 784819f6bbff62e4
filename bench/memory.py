"""Extra resident memory of one attention call, in a process of its own: `python bench/memory.py S H D PASSES`.

Prints, as JSON, the highest resident size during the call minus the resident size before it and minus the output and
the gradients, in MiB. The peak of the process never falls, so that what the inputs needed for a moment counts too: an
upper bound.
"""

import json
import sys


def resident(field: str) -> int:
    """Bytes of a field of Linux's /proc/self/status: VmRSS (now) or VmHWM (highest so far)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def main(seqlen: int, num_heads: int, head_dim: int, passes: str) -> None:
    """Causal attention with a bias row vector [1, 1, 1, seqlen]; only the compiled kernels, never the reference.

    passes   "forward", or "forward+backward" with the gradients of q, k, v and bias
    """
    import torch

    import fastattn

    def run(length):
        leaves = [x[..., :length, :].detach().requires_grad_(trains) for x in qkv]
        leaves.append(bias[..., :length].detach().requires_grad_(trains))
        out = fastattn.attention(*leaves[:3], causal=True, bias=leaves[3], backend="cpu")
        return (out, *torch.autograd.grad(out, leaves, dout[..., :length, :])) if trains else (out,)

    trains = passes == "forward+backward"
    qkv = [torch.randn(1, num_heads, seqlen, head_dim) for _ in range(3)]
    bias, dout = torch.randn(1, 1, 1, seqlen), torch.randn(1, num_heads, seqlen, head_dim)
    run(64)  # starts the threads
    before = resident("VmRSS")
    with fastattn.record() as calls:
        results = run(seqlen)
    extra = resident("VmHWM") - before - sum(x.nbytes for x in results)
    kernels = " + ".join(dict.fromkeys(call.kernel for call in calls))
    print(json.dumps({"extra_mib": extra / 2**20, "kernel": kernels, "isa": calls[-1].isa}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
