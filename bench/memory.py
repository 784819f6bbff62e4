"""Extra resident memory of one attention call, measured in a process of its own: `python bench/memory.py S H D`.

Prints, as JSON, the highest resident size during the call minus the resident size before it and minus the output, in
MiB. The peak of the process never falls, so that what the inputs needed for a moment counts too: an upper bound.
"""

import json
import sys


def resident(field: str) -> int:
    """Bytes of a field of Linux's /proc/self/status: VmRSS (now) or VmHWM (highest so far)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def main(seqlen: int, num_heads: int, head_dim: int) -> None:
    """Causal attention with a bias row vector [1, 1, 1, seqlen]; only the compiled kernels, never the reference."""
    import torch

    import fastattn

    q, k, v = (torch.randn(1, num_heads, seqlen, head_dim) for _ in range(3))
    bias = torch.randn(1, 1, 1, seqlen)
    warm = [x[:, :, :64] for x in (q, k, v)]
    fastattn.attention(*warm, causal=True, bias=bias[..., :64], backend="cpu")  # starts the threads
    before = resident("VmRSS")
    out = fastattn.attention(q, k, v, causal=True, bias=bias, backend="cpu")
    extra = resident("VmHWM") - before - out.nbytes
    call = fastattn.last_call()
    print(json.dumps({"extra_mib": extra / 2**20, "kernel": call.kernel, "isa": call.isa}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
