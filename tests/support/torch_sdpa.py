"""torch's scaled_dot_product_attention, an oracle on every torch that runs fastattn."""

import torch
import torch.nn.functional as F


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """torch's own; before torch 2.5, which knows no groups and gives a query that sees no key NaN, its formula."""
    if "enable_gqa" in F.scaled_dot_product_attention.__doc__:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    assert dropout_p == 0.0
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    real = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(real) @ key.to(real).mT * (max(query.shape[-1], 1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask.to(real)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return (weights @ value.to(real)).to(query.dtype)
