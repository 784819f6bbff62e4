"""Cosine similarity attention with a learned temperature."""

import math

import torch
from torch.nn.functional import normalize

from ..checks import check_real, check_tensors
from .choosing import attend, refuse


def cosine_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    max_scale: float | None = 100.0,
    eps: float = 1e-12,
    **options,
):
    """softmax(t * cos(q, k) + bias, masked) v, with t = min(exp(logit_scale), max_scale) of each head.

    q, k, v      as in `fastattn.attention`; q and k are divided by their lengths (of at least eps) first
    logit_scale  the log of the temperature: one number, [num_heads] or, as Swin v2's parameter, [num_heads, 1, 1]
    max_scale    the largest temperature; None: no limit. Where it is reached, logit_scale has no gradient
    options      of `fastattn.attention` but softmax_scale, and normalizer and top_k of `fastattn.learned.attention`

    Returns what `fastattn.attention` returns. Fused but for the lengths, which are read and divided by in torch's own
    operators: q and k are copied once. Differentiable in q, k, v and logit_scale.

    Raises TypeError or ValueError that names the argument. Source: Swin Transformer V2, arXiv 2111.09883, section 3.2.
    """
    refuse("cosine", options, {"softmax_scale": "the temperature is exp(logit_scale)"})
    check_tensors(q=q, k=k, v=v, logit_scale=logit_scale)
    num_heads = q.shape[1] if q.dim() == 4 else 0  # attention says what is wrong
    if tuple(logit_scale.shape) not in ((), (1,), (num_heads,), (num_heads, 1, 1)):
        raise ValueError(
            f"logit_scale has shape {tuple(logit_scale.shape)}; it must be one number, [num_heads] or [num_heads, 1, "
            f"1], with num_heads={num_heads}"
        )
    if max_scale is not None:
        if check_real("max_scale", max_scale) <= 0.0:
            raise ValueError(f"max_scale={max_scale} must be > 0, or None for no limit")
        logit_scale = logit_scale.clamp(max=math.log(max_scale))
    scale = logit_scale.exp()
    scale = scale.flatten() if scale.dim() else scale
    return attend(normalize(q, dim=-1, eps=eps), normalize(k, dim=-1, eps=eps), v, softmax_scale=scale, **options)
