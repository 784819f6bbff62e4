"""The tensors that a call returns, allocated the same way for every backend."""

import math
import os

import torch

ROUNDED_DELTA = os.environ.get("FASTATTN_ROUNDED_DELTA") == "1"
"""Whether delta of the backward pass of Triton is made of out as it was rounded to 16 bits, and there is no other."""

LARGEST_LSE = 2.0**14
"""Beyond it, the rounding of a float32 lse would be a factor of 1.001 and more in the weights."""


def compute_dtype(problem) -> torch.dtype:
    """The dtype of scores, sums and lse: float64 for float64, float32 for every other."""
    return torch.float64 if problem.dtype == "float64" else torch.float32


def empty_out(problem, q: torch.Tensor) -> torch.Tensor:
    """[batch, num_heads, seqlen_q, head_dim_v] in q's memory order."""
    if problem.head_dim == problem.head_dim_v and q.is_contiguous():
        return torch.empty_like(q)
    b, h, s, d = problem.batch, problem.num_heads, problem.seqlen_q, problem.head_dim_v
    strides = q.stride()
    if strides[1] < strides[2] and s > 1:  # [batch, seqlen, num_heads, head_dim] memory
        # Not a transposed view: autograd forbids to change a function's result in place if it is a view.
        return q.new_empty_strided((b, h, s, d), (s * h * d, d, h * d, 1))
    return q.new_empty((b, h, s, d))


def empty_results(
    problem, q: torch.Tensor, for_backward: bool, out=None, exact: bool = True
) -> tuple[torch.Tensor | None, ...]:
    """(out, lse, out_exact, lse_parts) for a kernel to fill; None where not needed. out: where there is one already.

    out_exact    out in the compute dtype, contiguous, where out is rounded to 16 bits: delta of the backward pass would
                 be off by what rounding takes (exact=False: let it be)
    lse_parts    [batch, num_heads, seqlen_q, 2], lse as the sum of two numbers; Triton's in units of log2
    """
    out, dtype = empty_out(problem, q) if out is None else out, compute_dtype(problem)
    rows = problem.batch, problem.num_heads, problem.seqlen_q
    lse = _empty(q, dtype, *rows) if problem.lse else None
    if not for_backward:
        return out, lse, None, None
    out_exact = None if out.dtype == dtype or not exact else _empty(q, dtype, *out.shape)
    return out, lse, out_exact, _empty(q, dtype, *rows, 2)


def _empty(q: torch.Tensor, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    """q.new_empty; a dtype that is q's, and sizes in a tuple, would take a tiny call's time."""
    return q.new_empty(*sizes) if q.dtype is dtype else q.new_empty(sizes, dtype=dtype)


def is_rough(lse: torch.Tensor) -> torch.Tensor:
    """Where lse is too large to be a denominator, as where finfo.min stands in a bias."""
    return (lse.abs() > LARGEST_LSE) & (lse > -torch.inf)


def lse_parts(lse: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor | None:
    """The lse_parts of `empty_results` from an lse that a call returned, for a kernel of `backend`; None if some is too
    large for that."""
    if is_rough(lse).any():
        return None
    top, blind = lse.to(dtype) * (math.log2(math.e) if backend == "triton" else 1.0), lse == -torch.inf
    return torch.stack([top.masked_fill(blind, 0.0), torch.zeros_like(top).masked_fill(blind, torch.inf)], -1)
