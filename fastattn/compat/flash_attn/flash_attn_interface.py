"""The seven functions of flash-attn 2.8, argument by argument.

What they share:

q, k, v            [batch, seqlen, num_heads, head_dim], heads behind positions; fewer heads of k and v are grouped
                   queries. float16 and bfloat16 as theirs, float32 and float64 too; v may have other columns
causal             bottom-right: query i sees keys up to i + seqlen_k - seqlen_q
window_size        (left, right), inclusive, around i + seqlen_k - seqlen_q; a negative side is open
softcap            c > 0: scores s become c * tanh(s / c), before ALiBi and the mask
alibi_slopes       [num_heads] or [batch, num_heads]: adds -slope * |i + seqlen_k - seqlen_q - j|
dropout_p          applied whenever it is above 0; drawn from torch's generator
deterministic      gradients always are
return_attn_probs  returns (out, softmax_lse, S_dmask). softmax_lse is float32 (float64 for float64) and has a gradient,
                   [batch, num_heads, seqlen_q], in the packed functions [num_heads, total_q]; -inf in a row that sees
                   no key. S_dmask is empty without dropout; with it, the weights [batch, num_heads, seqlen_q, seqlen_k]
                   before dropout, both lengths rounded up to 128, negative where dropped: O(n^2) memory, for tests

A query that sees no key gives 0. All arguments are checked by `fastattn.attention`, which raises.
"""

import torch
from torch.nn.functional import pad

from ...api import attention
from ...scores.dropout import dropout_mask
from .arguments import dense, heads_first, open_sides, unpacked

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"]


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention on q [batch, seqlen_q, num_heads, head_dim] and k, v [batch, seqlen_k, num_heads_k, head_dim].

    Returns out [batch, seqlen_q, num_heads, head_dim], or with return_attn_probs (out, softmax_lse, S_dmask).
    """
    options = {
        "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    seed = int(torch.randint(2**63 - 1, ())) if dropout_p and return_attn_probs else None
    out, lse = dense(q, k, v, dropout_p=dropout_p, seed=seed, return_lse=return_attn_probs, **options)
    if not return_attn_probs:
        return out
    return out, lse, q.new_empty(0) if seed is None else _signed_weights(q, k, dropout_p, seed, **options)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` on qkv [batch, seqlen, 3, num_heads, head_dim]."""
    q, k, v = unpacked("qkv", qkv, 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` on q and kv [batch, seqlen_k, 2, num_heads_k, head_dim]."""
    k, v = unpacked("kv", kv, 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def _signed_weights(q, k, dropout_p: float, seed: int, *, window_size, **options) -> torch.Tensor:
    """S_dmask: softmax weights, negative where dropout drops them, padded with 0 to multiples of 128."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    with torch.no_grad():
        eye = torch.eye(seqlen_k, dtype=q.dtype, device=q.device).expand(*k.shape[::2], -1, -1)
        weights = attention(
            heads_first(q), heads_first(k), eye, window_size=open_sides(window_size), backend="reference", **options
        )
        kept = dropout_mask(*weights.shape, dropout_p, seed, q.device)
        return pad(weights.where(kept, -weights), (0, -seqlen_k % 128, 0, -seqlen_q % 128))
