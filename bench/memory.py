"""Extra resident memory of one attention call, in a process of its own: `python bench/memory.py S H D PASSES`,

`... S H D PASSES PATTERN fastattn|dense|sdpa` of one with a sparse mask, `... build S` of building a mask.

Prints, as JSON, the highest resident size during the call minus the resident size before it and minus the output and
the gradients, in MiB. The peak of the process never falls, so that what the inputs needed for a moment counts too: an
upper bound. A sparse mask is made during the measurement: it is part of what the call needs.
"""

import json
import sys
from collections.abc import Callable


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
    with fastattn.record() as calls:
        extra = extra_mib(lambda: run(seqlen))
    kernels = " + ".join(dict.fromkeys(call.kernel for call in calls))
    print(json.dumps({"extra_mib": extra, "kernel": kernels, "isa": calls[-1].isa}))


def sparse(seqlen: int, num_heads: int, head_dim: int, passes: str, pattern: str, contender: str) -> None:
    """A call with the mask of `pattern` by fastattn or, as a dense tensor, by SDPA; "dense" is fastattn without one."""
    import torch
    import torch.nn.functional as F

    import fastattn
    from sparsity import PATTERNS

    def run(q, k, v, dout):
        if contender == "dense":
            out = fastattn.attention(q, k, v, backend="cpu")
        else:
            mask = PATTERNS[pattern].build(seqlen, num_heads)
            if contender == "sdpa":
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense())
            else:
                out = fastattn.attention(q, k, v, mask=mask, backend="cpu")
        return (out, *torch.autograd.grad(out, (q, k, v), dout)) if trains else (out,)

    torch.set_num_threads(1)
    trains = passes != "forward"
    tensors = [torch.randn(1, num_heads, seqlen, head_dim) for _ in range(4)]
    leaves = [x.requires_grad_(trains) for x in tensors[:3]]
    fastattn.attention(*(x[..., :64, :] for x in leaves))
    print(json.dumps({"extra_mib": extra_mib(lambda: run(*leaves, tensors[3]))}))


def build(seqlen: int) -> None:
    """Building the mask of suites.built_mask."""
    from suites import built_mask

    built_mask(1024)
    print(json.dumps({"extra_mib": extra_mib(lambda: built_mask(seqlen).tensors().values())}))


def extra_mib(run: Callable) -> float:
    """The highest resident size during `run`, minus that before it, minus the tensors that it returns."""
    before = resident("VmRSS")
    results = run()
    return (resident("VmHWM") - before - sum(x.nbytes for x in results)) / 2**20


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(int(sys.argv[2]))
    else:
        (sparse if len(sys.argv) > 5 else main)(*map(int, sys.argv[1:4]), *sys.argv[4:])
