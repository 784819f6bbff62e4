"""Whether the Triton kernels are right on this device: a few calls of each kind beside the reference.

`make test-gpu` compares many more. The reference computes in float32; ALLOWED says how far from it a result may be.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests/support", "")]

import torch

import fastattn
from cases import Case, inputs
from fastattn import BlockMask, Mask
from fastattn.layouts.quantization import quantized
from sequences import into_pages, packed

ALLOWED = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-3}
"""`share_off` of a right result, with room."""

ROWS = 64
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
    BASE._replace(seqlen_q=4, seqlen_k=900, mask="shared_blocks", causal=False),
    BASE._replace(batch=1, seqlen_q=100, seqlen_k=5000, head_dim=128),  # split keys
    BASE._replace(batch=1, seqlen_q=64, seqlen_k=5000, mask="shared_blocks", causal=False),
)
LENGTHS = ((5, 9), (0, 4), (133, 133), (1, 300), (7, 0), (150, 170))
"""(queries, keys) of packed sequences."""

FORWARD_ONLY = 100
"""Calls of at most so many queries are those of generation: without gradients."""


def results(device: str, calls: dict[str, Callable] | None = None) -> list[dict]:
    """A row for each result of each call (all_calls()): whether it is right, how far it is from the reference and may
    be; where the call fails, how."""
    rows = []
    for name, call in (all_calls() if calls is None else calls).items():
        try:
            (found, dtype), (expected, _) = (call(device, backend) for backend in ("triton", "reference"))
        except Exception as failure:  # the next call may run
            text = f"{type(failure).__name__}: {failure}".splitlines()[0]
            rows.append({"case": name, "result": "call", "right": False, "failed": text})
            continue
        for result, value in expected.items():
            error, allowed = share_off(found[result], value), ALLOWED[dtype]
            rows.append({"case": name, "result": result, "right": error <= allowed, "error": error, "allowed": allowed})
    return rows


def share_off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far a result [..., rows, dim], or an lse [batch, heads, rows], is from the expected one. The larger of two:

    the largest difference over the largest element of all;
    the root of the mean square of the difference over that of the expected one, in the block of ROWS rows of a head
    where it is largest. Each block goes by its own size: late rows of a causal mask are means of many values, so small
    ones, and what is allowed to the first rows would hide that the last ones are all wrong.

    Infinities have to be where they are.
    """
    if expected.dim() == 3:
        found, expected = found[..., None], expected[..., None]
    found, expected = found.detach().float(), expected.detach().float()
    difference = torch.where(found == expected, 0.0, (found - expected).abs()).nan_to_num(torch.inf, torch.inf)
    sizes = expected.nan_to_num(0.0, 0.0, 0.0)
    floor = 1e-6 * sizes.square().mean().sqrt() + 1e-30  # of blocks where all is 0
    shares = [difference.max() / (sizes.abs().max() + 1e-30)]
    shares += [
        (one.square().mean((-2, -1)).sqrt() / (size.square().mean((-2, -1)).sqrt() + floor)).max()
        for one, size in zip(difference.split(ROWS, -2), sizes.split(ROWS, -2), strict=True)
    ]
    return torch.stack(shares).max().item()


def all_calls() -> dict[str, Callable]:
    """Name -> call(device, backend), which gives results by name, in float32, and the dtype that decides what they may
    differ by."""
    calls = {str(case): of_case(case) for case in CASES}
    calls["packed sequences"] = _attend_packed
    for name in ("pages", "pages of int8"):
        calls[f"a cache in {name}"] = _of_cache(is_int8="int8" in name)
    return calls


def of_case(case: Case) -> Callable:
    def call(device: str, backend: str):
        return _attend(case, device, backend), case.dtype

    return call


def _attend(case: Case, device: str, backend: str) -> dict[str, torch.Tensor]:
    """out, lse and gradients of q, k and v."""
    qkv, kwargs = inputs(case)
    has_gradients = case.seqlen_q > FORWARD_ONLY
    dtype = _dtype(backend, qkv[0].dtype)
    q, k, v = (x.to(device, dtype).requires_grad_(has_gradients) for x in qkv)
    kwargs = {name: _to(device, x) for name, x in kwargs.items()}
    out, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=_backend(device, backend))
    return _with_gradients(out, lse, (q, k, v) if has_gradients else ())


def _attend_packed(device: str, backend: str):
    *qkv, starts_q, starts_k = packed(LENGTHS, dtype=torch.bfloat16)
    dtype = _dtype(backend, torch.bfloat16)
    q, k, v = (x.to(device, dtype).requires_grad_() for x in qkv)
    starts = starts_q.to(device), starts_k.to(device)
    out, lse = fastattn.attention_varlen(
        q, k, v, *starts, causal=True, return_lse=True, backend=_backend(device, backend)
    )
    found = _with_gradients(out, lse, (q, k, v))
    return {name: (x.transpose(0, 1) if x.dim() == 3 else x)[None] for name, x in found.items()}, "bfloat16"


def _of_cache(is_int8: bool) -> Callable:
    def call(device: str, backend: str):
        generator = torch.Generator().manual_seed(3)
        sizes = (8, 1), (2, 600), (2, 600)  # heads, rows
        q, *caches = (torch.randn(2, *size, 64, generator=generator) for size in sizes)
        options, dtype = {}, torch.bfloat16
        if is_int8:
            caches, factors = zip(*(quantized(x) for x in caches), strict=True)
            held = [into_pages(x[..., None], 64)[0][..., 0].to(device) for x in factors]
            options = dict(zip(("k_scale", "v_scale"), held, strict=True))
        pages, tables = zip(*(into_pages(x if is_int8 else x.to(dtype), 64) for x in caches), strict=True)
        pages = [x.to(device) if is_int8 else x.to(device, _dtype(backend, dtype)) for x in pages]
        out, lse = fastattn.attention_with_kvcache(
            q.to(dtype).to(device, _dtype(backend, dtype)), *pages, **options, return_lse=True,
            cache_seqlens=torch.tensor([600, 333], dtype=torch.int32, device=device),
            block_table=tables[0].to(device), backend=_backend(device, backend),
        )  # fmt: skip
        return _with_gradients(out, lse, ()), "bfloat16"

    return call


def _with_gradients(out, lse, inputs: tuple) -> dict[str, torch.Tensor]:
    found = {"out": out, "lse": lse}
    if inputs:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
        found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, dout), strict=True))
    return {name: x.detach().float() for name, x in found.items()}


def _dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if backend == "reference" else dtype


def _backend(device: str, backend: str) -> str | None:
    return backend if device == "cuda" or backend == "reference" else None


def _to(device: str, x):
    if isinstance(x, Mask):
        bounds = (y if y is None else y.to(device) for y in (x.k_start, x.k_end))
        return Mask(x.windows, *bounds)
    return x.to(device) if isinstance(x, (torch.Tensor, BlockMask)) else x
