"""Attention by its formula, in float64 and n x n memory: what every way into fastattn must equal."""

import torch


def attention(
    q, k, v, *, keep=None, bias=None, scale=None, softcap=0.0, alibi=None, sinks=None, causal=None, window=None
):  # fmt: skip
    """[batch, num_heads, seqlen_q, head_dim_v] in float64; rows that see no key are 0.

    keep    bool, True = attend; causal: None, "top_left" or "bottom_right"; window: (left, right), bottom-right
    """
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    # distance of a key from the query's own place, which is bottom-right
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    scores = scores if alibi is None else scores - alibi.double()[:, None, None] * distance.abs()
    scores = scores if bias is None else scores + bias.double()
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool) if keep is None else keep
    if causal is not None:
        seen = seen & (distance <= (seqlen_q - seqlen_k if causal == "top_left" else 0))
    if window is not None:
        seen = seen & (distance >= -window[0]) & (distance <= window[1])
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(*scores.shape[:2], seqlen_q, 1)
        return (torch.softmax(torch.cat([scores, column], 3), 3)[..., :-1]) @ v
    return torch.softmax(scores, 3).nan_to_num() @ v
