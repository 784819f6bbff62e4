"""Tensors to the arguments of the C++ extension; no policy."""

from pathlib import Path

import torch

try:
    from . import _C
except ImportError as error:  # a wheel built without a compiler, or for another platform
    _C, _import_error = None, error

_empty_like, _get_num_threads = torch.empty_like, torch.get_num_threads


def unavailable() -> str | None:
    """None if the compiled kernels can run here, else why not."""
    if _C is None:
        build_error = Path(__file__).with_name("_build_error.txt")  # setup.py writes it
        why = build_error.read_text().strip() if build_error.exists() else _import_error
        return f"the compiled CPU kernels are missing ({why}); reinstall with a C++ compiler to build them"
    return None


def signature(q, k, v) -> bytes | None:
    """Shapes and dtypes of three plain 4-D CPU tensors as a dictionary key; None for any other."""
    return None


if _C is not None:
    signature = _C.signature  # noqa: F811  (straight, without a Python frame)


def isa() -> str:
    """The instruction set that the kernels run on: avx512, avx2, neon or scalar (FASTATTN_CPU_ISA narrows it)."""
    return _C.isa()


def prefill(
    problem, q, k, v, softmax_scale, softcap, diagonal_lo, diagonal_hi, k_start, k_end, mask, bias, alibi_slopes,
    sinks, dropout_p, seed,
):  # fmt: skip
    """Forward pass (kernel signature of dispatch.Row)."""
    if problem.needs_grad:
        from . import autograd

        return autograd.attention(
            problem, q, k, v, softmax_scale, softcap, diagonal_lo, diagonal_hi, k_start, k_end, mask, bias,
            alibi_slopes, sinks, dropout_p, seed,
        )  # fmt: skip
    out, lse, _ = forward(
        problem, q, k, v, softmax_scale, softcap, diagonal_lo, diagonal_hi, k_start, k_end, mask, bias, alibi_slopes,
        sinks,
    )  # fmt: skip
    return out, lse


def forward(
    problem, q, k, v, softmax_scale, softcap, diagonal_lo, diagonal_hi, k_start, k_end, mask, bias, alibi_slopes,
    sinks, for_backward=False,
):  # fmt: skip
    """(out, lse or None, lse_parts or None); `out` follows q's memory order.

    lse_parts [batch, num_heads, seqlen_q, 2], for `backward`: lse in units of log2 as the sum of two numbers.
    """
    if q.is_contiguous() and problem.head_dim == problem.head_dim_v:
        out = _empty_like(q)
    else:
        b, h, s, d = problem.batch, problem.num_heads, problem.seqlen_q, problem.head_dim_v
        strides = q.stride()
        if strides[1] < strides[2] and s > 1:  # [batch, seqlen, num_heads, head_dim] memory
            out = q.new_empty((b, s, h, d)).transpose(1, 2)
        else:
            out = q.new_empty((b, h, s, d))
    lse = lse_parts = None
    if problem.lse:
        lse = q.new_empty(out.shape[:3], dtype=_compute_dtype(problem))
    if for_backward:
        lse_parts = q.new_empty((*out.shape[:3], 2), dtype=_compute_dtype(problem))
    _C.forward(
        q, k, v, out, lse, lse_parts, softmax_scale, softcap, diagonal_lo, diagonal_hi, k_start, k_end, mask, bias,
        alibi_slopes, sinks, _get_num_threads(),
    )  # fmt: skip
    return out, lse, lse_parts


def backward(
    problem, q, k, v, softmax_scale, softcap, diagonal_lo, diagonal_hi, k_start, k_end, mask, bias, alibi_slopes,
    sinks, dropout_p, seed, out, lse_parts, dout, dlse, wanted,
):  # fmt: skip
    """Gradients of q, k, v, bias, alibi_slopes, sinks, None where not `wanted` (backward signature of dispatch.Row)."""
    dq, dk, dv = (_empty_like(x) if want else None for x, want in zip((q, k, v), wanted, strict=False))
    inputs, sums = (bias, alibi_slopes, sinks), [None] * 3
    for i, x in enumerate(inputs):
        if wanted[3 + i]:  # a sum of many terms, unless it is of as many as there are scores
            dense = i == 0 and x.dim() > 1 and x.shape[-1] != 1 and x.shape[-2] != 1
            sums[i] = x.new_zeros(x.shape, dtype=_compute_dtype(problem) if dense else torch.float64)
    _C.backward(
        q, k, v, out, None, lse_parts, softmax_scale, softcap, diagonal_lo, diagonal_hi, k_start, k_end, mask, bias,
        alibi_slopes, sinks, dout, dlse, dq, dk, dv, *sums, _get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv, *(y if y is None else y.to(x.dtype) for x, y in zip(inputs, sums, strict=True))


def _compute_dtype(problem) -> torch.dtype:
    return torch.float64 if problem.dtype == "float64" else torch.float32
