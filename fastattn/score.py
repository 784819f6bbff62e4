"""Score modifications and their derivatives in plain torch, in the order that every kernel follows: softcap, bias.

The softmax scale comes before (in the product q k^T), the mask after.
"""

import torch


def softcap_scores(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(scores / softcap); 0 turns it off. (Gemma 2, arXiv 2408.00118.)"""
    return scores if softcap == 0.0 else softcap * torch.tanh(scores / softcap)


def softcap_derivative(capped: torch.Tensor, softcap: float) -> torch.Tensor | float:
    """d softcap_scores / d scores, from its result."""
    return 1.0 if softcap == 0.0 else 1.0 - (capped / softcap).square()


def alibi_bias(slopes: torch.Tensor, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """-slope * |i + seqlen_k - seqlen_q - j| as [batch|1, num_heads, seqlen_q, seqlen_k] (ALiBi, arXiv 2108.12409).

    slopes [num_heads] or [batch, num_heads].
    """
    slopes = slopes if slopes.dim() == 2 else slopes[None]
    query = torch.arange(seqlen_q, device=slopes.device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=slopes.device)[None, :]
    return -slopes[:, :, None, None] * (query - key).abs().to(slopes.dtype)
