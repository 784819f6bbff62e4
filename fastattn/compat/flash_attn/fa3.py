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

from ...merging import merge
from .arguments import dense, refuse, unpacked, with_qv

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_qkvpacked_func"]


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
        num_heads_k, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if qkv.dim() != 4 or odd or num_heads_k < 1:
            raise ValueError(
                f"qkv has shape {tuple(qkv.shape)}; with num_heads_q={num_heads_q} it must be [batch, seqlen, "
                "num_heads_q + 2 * num_heads_k, head_dim]"
            )
        q, k, v = qkv.split((num_heads_q, num_heads_k, num_heads_k), dim=2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """(out, lse) of attention over all keys from the parts' out_partial [parts, batch, seqlen, num_heads, head_dim] and
    lse_partial [parts, batch, seqlen, num_heads], lse [batch, seqlen, num_heads]; batch may be missing in all.

    out        written into, if given
    out_dtype  default: that of out_partial
    """
    found, lse = merge(list(out_partial), list(lse_partial))
    found = found.to(out_dtype or found.dtype)
    return (found if out is None else out.copy_(found)), lse
