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

from ...scores.dropout import P, dropout_mask
from ...seeing.weights import attention_weights
from .arguments import dense, heads_first, open_sides, packed, refuse, unpacked, with_cache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


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
    seed = _seed(dropout_p, return_attn_probs)
    out, lse = dense(q, k, v, dropout_p=dropout_p, seed=seed, return_lse=return_attn_probs, **options)
    if not return_attn_probs:
        return out
    return out, lse, q.new_empty(0) if seed is None else _up_to_128(_signed_weights(q, k, dropout_p, seed, **options))


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


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention of packed sequences, each by itself.

    q             [total_q, num_heads, head_dim]
    k, v          [total_k, num_heads_k, head_dim]; with block_table pages [num_pages, page_size, num_heads_k, head_dim]
    cu_seqlens_q, cu_seqlens_k   int32 [sequences + 1]: where the sequences start and end
    max_seqlen_q, max_seqlen_k   int: of the longest; only S_dmask has need of them
    block_table   int32 [sequences, entries]: the pages of each sequence's keys, whose number is that of cu_seqlens_k;
                  without gradients

    Returns out [total_q, num_heads, head_dim], or with return_attn_probs (out, softmax_lse [num_heads, total_q],
    S_dmask [sequences, num_heads, max_seqlen_q, max_seqlen_k]).
    """
    options = {
        "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    seed = _seed(dropout_p, return_attn_probs)
    if seed is not None:
        refuse(**{"return_attn_probs with dropout_p and block_table": block_table})
    out, lse = packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=block_table, dropout_p=dropout_p,
        seed=seed, return_lse=return_attn_probs, **options,
    )  # fmt: skip
    if not return_attn_probs:
        return out
    if seed is None:
        return out, lse, q.new_empty(0)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    probs = _up_to_128(q.new_zeros(len(starts_q) - 1, q.shape[1], int(max_seqlen_q), int(max_seqlen_k)))
    for i, place in enumerate(probs):  # attention_varlen drops in sequence i what attention drops with seed + i
        q_i, k_i = q[None, starts_q[i] : starts_q[i + 1]], k[None, starts_k[i] : starts_k[i + 1]]
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            options["alibi_slopes"] = alibi_slopes[i : i + 1]
        weights = _signed_weights(q_i, k_i, dropout_p, (seed + i) % 2**63, **options)
        place[:, : weights.shape[2], : weights.shape[3]] = weights[0]
    return out, lse, probs


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` on qkv [total, 3, num_heads, head_dim]."""
    q, k, v = unpacked("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` on q and kv [total_k, 2, num_heads_k, head_dim]."""
    k, v = unpacked("kv", kv, 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Appends k and v to the caches in place, if they are given, and attends over what is there then. No gradients.

    q                 [batch, seqlen_q, num_heads, head_dim]
    k_cache, v_cache  [entries, capacity, num_heads_k, head_dim], or with block_table pages [num_pages, page_size,
                      num_heads_k, head_dim], any page size
    k, v              [batch, new keys, num_heads_k, head_dim]; ValueError if they do not fit into the cache
    rotary_cos, _sin  [positions, rotary_dim / 2], only together with k: turns k from position cache_seqlens on, and q
                      too if causal or window_size is given; else all of q by the angles of position cache_seqlens
    cache_seqlens     int, or int32 [batch]: keys before k is appended; None: the caches are full
    cache_batch_idx   int32 [batch]: the entry of each sequence
    cache_leftpad     int32 [batch]: where the keys of each sequence begin
    block_table       int32 [batch, entries]: the pages of each sequence
    num_splits        every value gives the same result here

    Returns out [batch, seqlen_q, num_heads, head_dim], or with return_softmax_lse (out, lse), lse [batch, num_heads,
    seqlen_q].
    """
    return with_cache(
        q, k_cache, v_cache, k, v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        block_table=block_table, causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap,
        alibi_slopes=alibi_slopes, num_splits=num_splits, return_lse=return_softmax_lse,
    )  # fmt: skip


def _seed(dropout_p, return_attn_probs) -> int | None:
    """A seed where the pattern of dropout is asked for, and so must be known."""
    return int(torch.randint(2**63 - 1, ())) if return_attn_probs and P.check(dropout_p) else None


@torch.no_grad()
def _signed_weights(q, k, dropout_p: float, seed: int, *, window_size, **options) -> torch.Tensor:
    """Softmax weights [batch, num_heads, seqlen_q, seqlen_k], negative where dropout drops them."""
    weights = attention_weights(heads_first(q), heads_first(k), window_size=open_sides(window_size), **options)
    return weights.where(dropout_mask(*weights.shape, dropout_p, seed, q.device), -weights).to(q.dtype)


def _up_to_128(weights: torch.Tensor) -> torch.Tensor:
    """Both lengths rounded up to a multiple of 128, with zeros."""
    return pad(weights, (0, -weights.shape[3] % 128, 0, -weights.shape[2] % 128))
