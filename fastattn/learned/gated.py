"""A gate on the output of attention."""

import torch

from ..checks import broadcasts, check_tensors
from .choosing import attend, refuse


def gated_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, **options) -> torch.Tensor:
    """sigmoid(gate) * attention(q, k, v), element by element.

    q, k, v   as in `fastattn.attention`
    gate      logits that broadcast to the output [batch, num_heads, seqlen_q, head_dim_v]: one for each of its numbers,
              or [batch, num_heads, seqlen_q, 1], one for each head; usually a projection of the queries' input
    options   of `fastattn.attention` but return_lse, and normalizer and top_k of `fastattn.learned.attention`

    Returns [batch, num_heads, seqlen_q, head_dim_v] in q's dtype. The product is one of torch's own, after the fused
    call. Differentiable in all tensors.

    Raises TypeError or ValueError that names the argument. Source: gated attention, arXiv 2505.06708.
    """
    refuse("gated", options, {"return_lse": "ask fastattn.attention and multiply by gate.sigmoid()"})
    check_tensors(q=q, k=k, v=v, gate=gate)
    if not gate.is_floating_point():
        raise TypeError(f"gate has dtype {gate.dtype}; it must be a float tensor of logits")
    out = attend(q, k, v, **options)
    if not broadcasts(gate.shape, out.shape):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; it must broadcast to the output, here {tuple(out.shape)}"
        )
    return out * gate.sigmoid().to(out.dtype)
