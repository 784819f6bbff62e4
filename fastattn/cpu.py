"""Tensors to the arguments of the C++ extension; no policy."""

from pathlib import Path

import torch

from .problem import Edges, Terms

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


def signature(q, k, v) -> tuple | None:
    """Shapes and dtypes of three plain 4-D CPU tensors as a dictionary key; None for any other."""
    return None


if _C is not None:
    signature = _C.signature  # noqa: F811  (straight, without a Python frame)
    _C.bind_fields("Terms", Terms._fields)
    _C.bind_fields("Edges", Edges._fields)


def isa() -> str:
    """The instruction set that the kernels run on: avx512, avx2, neon or scalar (FASTATTN_CPU_ISA narrows it)."""
    return _C.isa()


def skipped_pairs() -> int:
    """How many (query, key) pairs the calls of this process have skipped, all weights of their tiles being 0."""
    return _C.skipped_pairs() if _C is not None else 0


def prefill(problem, q, k, v, terms):
    """Forward pass (kernel signature of dispatch.Row)."""
    if problem.needs_grad:
        from . import autograd

        return autograd.attention(problem, q, k, v, terms, forward_for_backward, "cpu")
    out = _empty_out(problem, q)
    lse = q.new_empty(out.shape[:3], dtype=_compute_dtype(problem)) if problem.lse else None
    _C.forward(q, k, v, out, lse, None, None, terms, _get_num_threads())
    return out, lse


def forward_for_backward(problem, q, k, v, terms):
    """(out, lse or None, what `backward` wants saved).

    That is out, not rounded to 16 bits because delta would be off by as much, and lse in units of log2 as the sum of
    two numbers, [batch, num_heads, seqlen_q, 2].
    """
    out, dtype = _empty_out(problem, q), _compute_dtype(problem)
    lse = q.new_empty(out.shape[:3], dtype=dtype) if problem.lse else None
    lse_parts = q.new_empty((*out.shape[:3], 2), dtype=dtype)
    out_exact = None if out.dtype == dtype else _empty_like(out, dtype=dtype)
    _C.forward(q, k, v, out, lse, lse_parts, out_exact, terms, _get_num_threads())
    return out, lse, (out if out_exact is None else out_exact, lse_parts)


def backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients, None where not `wanted` (backward signature of dispatch.Row)."""
    dq, dk, dv = (_empty_like(x) if want else None for x, want in zip((q, k, v), wanted, strict=False))
    inputs = (terms.bias, terms.alibi_slopes, terms.sinks, terms.softmax_scale)
    names = ("bias", "alibi_slopes", "sinks", "softmax_scale")
    grads: dict[str, torch.Tensor | None] = dict.fromkeys(Terms._fields)
    for i, (name, x) in enumerate(zip(names, inputs, strict=True)):
        if wanted[3 + i]:  # a sum of many terms, unless it is of as many as there are scores
            dense = i == 0 and x.dim() > 1 and x.shape[-1] != 1 and x.shape[-2] != 1
            grads[name] = x.new_zeros(x.shape, dtype=_compute_dtype(problem) if dense else torch.float64)
    _C.backward(q, k, v, *saved, terms, dout, dlse, dq, dk, dv, Terms(**grads), _get_num_threads())
    sums = (grads[name] for name in names)
    return dq, dk, dv, *(y if y is None else y.to(x.dtype) for x, y in zip(inputs, sums, strict=True))


def _empty_out(problem, q) -> torch.Tensor:
    """[batch, num_heads, seqlen_q, head_dim_v] in q's memory order."""
    if q.is_contiguous() and problem.head_dim == problem.head_dim_v:
        return _empty_like(q)
    b, h, s, d = problem.batch, problem.num_heads, problem.seqlen_q, problem.head_dim_v
    strides = q.stride()
    if strides[1] < strides[2] and s > 1:  # [batch, seqlen, num_heads, head_dim] memory
        # no view: autograd forbids to change a function's result in place if it is one
        return q.new_empty_strided((b, h, s, d), (s * h * d, d, h * d, 1))
    return q.new_empty((b, h, s, d))


def _compute_dtype(problem) -> torch.dtype:
    return torch.float64 if problem.dtype == "float64" else torch.float32
