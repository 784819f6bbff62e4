"""Whether the Triton kernels are right on this device, in a minute: a few calls of each kind beside the reference.

`make test-gpu` compares many more. A result may differ from the reference in float32 by a share of its largest entry.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests/support", "")]

import torch

import fastattn
from cases import Case, inputs
from fastattn import BlockMask, Mask

ALLOWED = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-3}
BASE = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=300, seqlen_k=420, head_dim=64, dtype="bfloat16", causal=True)
CASES = (
    BASE,
    *(BASE._replace(head_dim=head_dim, causal=False) for head_dim in (32, 80, 128, 256)),
    *(BASE._replace(dtype=dtype) for dtype in ("float16", "float32")),
    BASE._replace(layout="bshd", head_dim=128, window_size=(100, 0), causal=False),
    BASE._replace(mask="intervals", causal=False, head_dim=128),
    BASE._replace(mask="documents", sinks=True, causal=False),
    BASE._replace(mask="blocks", causal=False, head_dim=128),
    BASE._replace(bias="per_head", mask="tensor_per_head", causal=False, dtype="float16"),
    BASE._replace(alibi=True, softcap=20.0, dropout_p=0.2, learned_scale="per_head"),
    BASE._replace(seqlen_q=1, seqlen_k=5000, head_dim=128),
    BASE._replace(seqlen_q=5, seqlen_k=900, mask="lengths", sinks=True, causal=False),
)


def results(device: str, cases: Iterable[Case] | None = None) -> list[dict]:
    """A row for each result of each case (CASES): whether it is right, how far it is from the reference and may be;
    where the call fails, how."""
    rows = []
    for case in CASES if cases is None else cases:
        named = {"case": str(case)}
        try:
            found, expected = (_attend(case, device, backend) for backend in ("triton", "reference"))
        except Exception as failure:  # the next case may run
            text = f"{type(failure).__name__}: {failure}".splitlines()[0]
            rows.append(named | {"result": "call", "right": False, "failed": text})
            continue
        for name, value in expected.items():
            allowed = ALLOWED[case.dtype] * value.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
            difference = torch.where(found[name] == value, 0.0, (found[name] - value).abs())
            error = difference.nan_to_num(torch.inf, torch.inf).max().item()
            rows.append(named | {"result": name, "right": error <= allowed, "error": error, "allowed": allowed})
    return rows


def _attend(case: Case, device: str, backend: str) -> dict[str, torch.Tensor]:
    """out, lse and gradients of q, k and v, in float32; the reference computes in it."""
    qkv, kwargs = inputs(case)
    dtype = torch.float32 if backend == "reference" else qkv[0].dtype
    decodes = case.seqlen_q <= 16
    q, k, v = (x.to(device, dtype).requires_grad_(not decodes) for x in qkv)
    kwargs = {name: _to(device, x) for name, x in kwargs.items()}
    backend = backend if device == "cuda" or backend == "reference" else None
    out, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=backend)
    found = {"out": out, "lse": lse}
    if not decodes:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, out.dtype)
        found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), dout), strict=True))
    return {name: x.detach().float() for name, x in found.items()}


def _to(device: str, x):
    if isinstance(x, Mask):
        bounds = (y if y is None else y.to(device) for y in (x.k_start, x.k_end))
        return Mask(x.windows, *bounds)
    return x.to(device) if isinstance(x, (torch.Tensor, BlockMask)) else x
