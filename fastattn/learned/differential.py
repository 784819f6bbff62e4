"""Differential attention: the difference of two softmaxes over the same values."""

import torch

from ..checks import check_tensors, one_line
from .choosing import attend, refuse

_DROPOUT = "no paper says what it would drop of a difference"


def differential_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: float | torch.Tensor, **options
) -> torch.Tensor:
    """(softmax(q1 k1^T) - weight * softmax(q2 k2^T)) v, in one fused call.

    q         [batch, 2 * num_heads, seqlen_q, head_dim]: all heads of q1, then all of q2; any strides
    k         [batch, 2 * num_heads_k, seqlen_k, head_dim]: those of k1, then those of k2; same dtype; num_heads is a
              multiple of num_heads_k
    v         [batch, num_heads_k, seqlen_k, head_dim_v], which both softmaxes share; head_dim_v is usually 2 * head_dim
    weight    lambda of the paper: a float, or a tensor of one number or [num_heads], see `differential_lambda`
    options   of `fastattn.attention` but dropout_p, seed and return_lse, for all 2 * num_heads heads, and normalizer
              and top_k of `fastattn.learned.attention`

    Returns [batch, num_heads, seqlen_q, head_dim_v] in q's dtype, before the norm of each head and the factor
    1 - lambda_init of the paper, which are yours:

        out = (1 - lambda_init) * torch.nn.functional.rms_norm(out, out.shape[-1:], eps=1e-5)

    The two softmaxes are heads of one call: its work is that of 2 * num_heads heads of plain attention, and v is copied
    once. Differentiable in all tensors.

    Raises TypeError or ValueError that names the argument. Source: Differential Transformer, arXiv 2410.05258.
    """
    return_lse = "the output is a difference, which has none"
    refuse("differential", options, {"dropout_p": _DROPOUT, "seed": _DROPOUT, "return_lse": return_lse})
    check_tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [batch, heads, seqlen, head_dim]")
    if q.shape[1] % 2 or k.shape[1] != 2 * v.shape[1]:
        raise ValueError(
            f"q, k, v have {q.shape[1]}, {k.shape[1]}, {v.shape[1]} heads; q must have 2 * num_heads and k twice those "
            "of v"
        )
    num_heads = q.shape[1] // 2
    if isinstance(weight, torch.Tensor):
        if tuple(weight.shape) not in ((), (1,), (num_heads,)):
            raise ValueError(f"weight={one_line(weight)} must be one number or [num_heads], num_heads={num_heads}")
        weight = weight.to(q.dtype).view(-1, 1, 1)
    elif not isinstance(weight, (int, float)):
        raise TypeError(f"weight={one_line(weight)} must be a float or a tensor")
    first, second = attend(q, k, v.repeat(1, 2, 1, 1), **options).split(num_heads, 1)
    return first - weight * second


def differential_lambda(
    lambda_q1: torch.Tensor,
    lambda_k1: torch.Tensor,
    lambda_q2: torch.Tensor,
    lambda_k2: torch.Tensor,
    lambda_init: float,
) -> torch.Tensor:
    """exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init: the weight of `differential_attention`.

    lambda_q1 ... lambda_k2  [head_dim], or [num_heads, head_dim] for one weight a head; the sum is over the last axis
    lambda_init              0.8 - 0.6 * exp(-0.3 * layer) in the paper, layers counted from 0

    Returns a tensor of one number, or [num_heads], in float32 (float64 for float64). TypeError for what is no tensor.
    """
    given = {"lambda_q1": lambda_q1, "lambda_k1": lambda_k1, "lambda_q2": lambda_q2, "lambda_k2": lambda_k2}
    check_tensors(**given)
    dtype = torch.promote_types(lambda_q1.dtype, torch.float32)
    first, second = (
        (a.to(dtype) * b.to(dtype)).sum(-1).exp() for a, b in zip(*[iter(given.values())] * 2, strict=True)
    )
    return first - second + lambda_init
