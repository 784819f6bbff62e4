"""Attention as one would write it in plain torch, without a branch on values: torch.func goes through it."""

import math

import torch

import fastattn
from fastattn import BlockMask, Mask
from fastattn.scores import Place
from fastattn.scores.alibi import alibi_bias


def eager(
    q, k, v, *, mask=None, causal=False, window_size=None, softmax_scale=None, softcap=0.0, alibi_slopes=None,
    bias=None, sinks=None, dropout_p=0.0, seed=0,
):  # fmt: skip
    """(out, lse), with lse = 0 in a row that sees nothing."""
    seqlen_q, seqlen_k, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    scores = q @ k.mT * (scale.reshape(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes, Place(seqlen_k - seqlen_q, seqlen_q, seqlen_k))
    visible = torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool)
    if isinstance(mask, (Mask, BlockMask)):
        visible = visible & (mask.to_dense(seqlen_q, seqlen_k) if isinstance(mask, Mask) else mask.to_dense())
    elif mask is not None:
        visible = visible & mask
    for part in ([Mask.causal()] if causal else []) + ([Mask.window(*window_size)] if window_size else []):
        visible = visible & part.to_dense(seqlen_q, seqlen_k)
    hidden = ~visible if bias is None else ~visible | (bias == -math.inf)
    sink = torch.full((), -math.inf) if sinks is None else sinks.reshape(-1, 1, 1)
    scores = torch.cat([scores.masked_fill(hidden, -math.inf), sink.expand(*scores.shape[:3], 1)], -1)
    blind = (hidden.all(-1, keepdim=True) if sinks is None else torch.zeros(1, dtype=torch.bool)).expand(scores.shape)
    scores = scores.masked_fill(blind, 0.0)
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    p = (weights / weights.sum(-1, keepdim=True)).masked_fill(blind, 0.0)[..., :-1]
    lse = weights.sum(-1).log() + scores.detach().amax(-1)
    if dropout_p:
        p = p * fastattn.dropout_mask(*p.shape, dropout_p, seed) / (1.0 - dropout_p)
    return p @ v, lse.masked_fill(blind[..., 0], 0.0)


def ours(q, k, v, **kwargs):
    """(out, lse), with lse = 0 in a row that sees nothing."""
    out, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True)
    return out, lse.masked_fill(lse == -math.inf, 0.0)
