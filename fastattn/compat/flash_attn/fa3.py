"""FlashAttention-3's functions (module `flash_attn_interface`), argument by argument, on any device.

Beside what `flash_attn_interface.py` says of layouts, causal, window_size and softcap:

qv               [batch, seqlen_q, num_heads, head_dim_v]: scores are q k^T + qv v^T, and the default scale counts
                 the columns of both; q and k are copied beside qv and v
attention_chunk  c > 0: the query at position p = i + seqlen_k - seqlen_q sees the keys of its chunk p // c only
num_splits, pack_gqa, sm_margin, deterministic, scheduler_metadata
                 say how to compute, not what: every value gives the same result here
q_descale, k_descale, v_descale
                 UnsupportedError, as there are no fp8 inputs

return_attn_probs=True returns (out, softmax_lse).
"""

from ...checks import check_tensors
from ...dispatch import UnsupportedError
from ...merging import merge
from .arguments import dense, packed, refuse, unpacked, with_cache, with_qv

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention on q [batch, seqlen_q, num_heads, head_dim] and k, v [batch, seqlen_k, num_heads_k, head_dim]."""
    refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    q, k, softmax_scale = with_qv(q, k, v, qv, softmax_scale)
    out, lse = dense(
        q, k, v, causal=causal, window_size=window_size, attention_chunk=attention_chunk, softmax_scale=softmax_scale,
        softcap=softcap, return_lse=return_attn_probs,
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    """`flash_attn_func` on qkv [batch, seqlen, 3, num_heads, head_dim], or with num_heads_q [batch, seqlen,
    num_heads_q + 2 * num_heads_k, head_dim]."""
    if num_heads_q is None:
        q, k, v = unpacked("qkv", qkv, 3, 5)
    else:
        check_tensors(qkv=qkv)
        num_heads_k, odd = divmod(qkv.shape[2] - num_heads_q, 2) if qkv.dim() == 4 else (0, 0)
        if odd or num_heads_k < 1:
            raise ValueError(
                f"qkv has shape {tuple(qkv.shape)}; with num_heads_q={num_heads_q} it must be [batch, seqlen, "
                "num_heads_q + 2 * num_heads_k, head_dim]"
            )
        q, k, v = qkv.split((num_heads_q, num_heads_k, num_heads_k), dim=2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention of packed sequences q [total_q, num_heads, head_dim], k, v [total_k, num_heads_k, head_dim].

    seqused_q, seqused_k  int32 [sequences]: of each sequence the first so many; rows of q beyond give 0. Not together
                          with attention_chunk
    """
    refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    q, k, softmax_scale = with_qv(q, k, v, qv, softmax_scale)
    out, lse = packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k,
        causal=causal, window_size=window_size, attention_chunk=attention_chunk, softmax_scale=softmax_scale,
        softcap=softcap, return_lse=return_attn_probs,
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    """flash-attn 2's `flash_attn_with_kvcache`, with these more:

    page_table    is its block_table
    qv            only where nothing is appended; the caches are copied
    cu_seqlens_q  q is packed [total_q, num_heads, head_dim] then, and max_seqlen_q the longest; only with a page_table
                  and where nothing is appended. lse is [num_heads, total_q]
    cu_seqlens_k_new, rotary_seqlens, attention_chunk   UnsupportedError

    With return_softmax_lse (out, lse).
    """
    refuse(
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens, attention_chunk=attention_chunk,
    )  # fmt: skip
    if qv is not None:
        refuse(**{"k together with qv": k})
        q, k_cache, softmax_scale = with_qv(q, k_cache, v_cache, qv, softmax_scale)
    options = {
        "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
        "block_table": page_table, "return_lse": return_softmax_lse,
    }  # fmt: skip
    if cu_seqlens_q is None:
        return with_cache(
            q, k_cache, v_cache, k, v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
            rotary_interleaved=rotary_interleaved, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
            num_splits=num_splits, **options,
        )  # fmt: skip
    if page_table is None:
        raise UnsupportedError("cu_seqlens_q without page_table is not supported: pass q as [batch, seqlen_q, ...]")
    alone = {"k": k, "rotary_cos": rotary_cos, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    refuse(**{f"{name} together with cu_seqlens_q": value for name, value in alone.items()})
    out, lse = packed(q, k_cache, v_cache, cu_seqlens_q, None, max_seqlen_q, seqused_k=cache_seqlens, **options)
    return (out, lse) if return_softmax_lse else out


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """(out, lse) of attention over all keys from the parts' out_partial [parts, batch, seqlen, num_heads, head_dim] and
    lse_partial [parts, batch, seqlen, num_heads], lse [batch, seqlen, num_heads]; batch may be missing in all.

    out        written into, if given
    out_dtype  default: that of out_partial
    """
    found, lse = merge(list(out_partial), list(lse_partial))
    found = found.to(out_dtype or found.dtype)
    return (found if out is None else out.copy_(found)), lse
