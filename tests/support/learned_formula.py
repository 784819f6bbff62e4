"""Learned attention as its papers write it, in float64 and n x n memory: sorting, and no blocks."""

import torch

from fastattn import BlockMask, Mask
from fastattn.scores import Place
from fastattn.scores.alibi import alibi_bias


def visible_pairs(q, k, mask=None, causal=False, window_size=None, bias=None) -> torch.Tensor:
    """bool, broadcastable to the scores."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    seen = torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool)
    if isinstance(mask, Mask):
        seen = seen & mask.to_dense(seqlen_q, seqlen_k)
    elif isinstance(mask, BlockMask):
        seen = seen & mask.to_dense()
    elif mask is not None:
        seen = seen & mask
    if causal:
        seen = seen & Mask.causal().to_dense(seqlen_q, seqlen_k)
    if window_size is not None:
        seen = seen & Mask.window(*window_size).to_dense(seqlen_q, seqlen_k)
    return seen if bias is None else seen & (bias != -torch.inf)


def scores_of(q, k, *, softmax_scale=None, softcap=0.0, alibi_slopes=None, bias=None) -> torch.Tensor:
    """[batch, num_heads, seqlen_q, seqlen_k]"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    s = q.double() @ k.double().mT * (scale.double().reshape(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias.double()
    if alibi_slopes is not None:
        s = s + alibi_bias(alibi_slopes.double(), Place(k.shape[2] - q.shape[2], q.shape[2], k.shape[2]))
    return s


def normalized(s: torch.Tensor, seen: torch.Tensor, normalizer: str, top_k: int | None = None) -> torch.Tensor:
    """The weights of scores, row by row."""
    seen = seen.expand(s.shape)
    if top_k is not None and s.shape[-1] > top_k:
        largest = s.detach().masked_fill(~seen, -torch.inf).sort(-1, descending=True).values[..., top_k - 1, None]
        seen = seen & (s.detach() >= largest)
    blind = ~seen.any(-1, keepdim=True)
    hidden = s.masked_fill(~seen, -torch.inf).masked_fill(blind, 0.0)
    if normalizer == "softmax":
        p = hidden.softmax(-1)
    elif normalizer == "softmax1":
        p = torch.nn.functional.pad(hidden, (0, 1)).softmax(-1)[..., :-1]
    elif normalizer == "sigmoid":
        p = torch.sigmoid(hidden)
    else:
        p = {"sparsemax": sparsemax, "entmax15": entmax15}[normalizer](hidden)
    return p.masked_fill(~seen, 0.0)


def sparsemax(s: torch.Tensor) -> torch.Tensor:
    """Martins and Astudillo, algorithm 1; -inf may stand among the scores."""
    if s.shape[-1] == 0:
        return s
    s = s - s.detach().amax(-1, keepdim=True)
    ordered = s.sort(-1, descending=True).values.clamp(min=-1e9)
    place = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    size = (1.0 + place * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    tau = (ordered.cumsum(-1).gather(-1, size - 1) - 1.0) / size
    return (s - tau).clamp(min=0.0)


def entmax15(s: torch.Tensor) -> torch.Tensor:
    """Peters, Niculae and Martins, algorithm 2; -inf may stand among the scores."""
    if s.shape[-1] == 0:
        return s
    s = (s - s.detach().amax(-1, keepdim=True)) / 2.0
    ordered = s.sort(-1, descending=True).values.clamp(min=-1e4)
    place = torch.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    mean = ordered.cumsum(-1) / place
    spread = ordered.square().cumsum(-1) - place * mean.square()
    tau = mean - ((1.0 - spread) / place).clamp(min=1e-30).sqrt()
    size = (tau <= ordered).sum(-1, keepdim=True)
    return (s - tau.gather(-1, size - 1)).clamp(min=0.0).square()


def attention(
    q, k, v, *, normalizer="softmax", top_k=None, mask=None, causal=False, window_size=None, keep=1.0, **options
):  # fmt: skip
    """[batch, num_heads, seqlen_q, head_dim_v]; keep: what dropout multiplies the weights by."""
    seen = visible_pairs(q, k, mask, causal, window_size, options.get("bias"))
    p = normalized(scores_of(q, k, **options), seen, normalizer, top_k)
    return (p * keep) @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
