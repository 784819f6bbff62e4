"""What a kernel writes its results to: dtypes and order in memory, the same for all backends."""

import torch

_empty_like = torch.empty_like


def compute_dtype(problem) -> torch.dtype:
    """What sums, lse and gradients of terms are computed in."""
    return torch.float64 if problem.dtype == "float64" else torch.float32


def empty_out(problem, q: torch.Tensor) -> torch.Tensor:
    """[batch, num_heads, seqlen_q, head_dim_v] in q's memory order."""
    if problem.head_dim == problem.head_dim_v and q.is_contiguous():
        return _empty_like(q)
    b, h, s, d = problem.batch, problem.num_heads, problem.seqlen_q, problem.head_dim_v
    strides = q.stride()
    if strides[1] < strides[2] and s > 1:  # [batch, seqlen, num_heads, head_dim] memory
        # no view: autograd forbids to change a function's result in place if it is one
        return q.new_empty_strided((b, h, s, d), (s * h * d, d, h * d, 1))
    return q.new_empty((b, h, s, d))


def empty_results(problem, q: torch.Tensor, for_backward: bool) -> tuple[torch.Tensor | None, ...]:
    """(out, lse, out_exact, lse_parts) to write to; None where not needed.

    lse_parts   lse in units of log2 as the sum of two numbers, [batch, num_heads, seqlen_q, 2], for a backward pass
    out_exact   for a backward pass, where out has 16 bits: out before it was rounded, by which delta would be off;
                contiguous
    """
    shape = (problem.batch, problem.num_heads, problem.seqlen_q)
    out, dtype = empty_out(problem, q), compute_dtype(problem)
    lse = q.new_empty(shape, dtype=dtype) if problem.lse else None
    if not for_backward:
        return out, lse, None, None
    lse_parts = q.new_empty((*shape, 2), dtype=dtype)
    out_exact = q.new_empty((*shape, problem.head_dim_v), dtype=dtype) if out.dtype != dtype else None
    return out, lse, out_exact, lse_parts
