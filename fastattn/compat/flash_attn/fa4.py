"""FlashAttention-4's functions (module `flash_attn.cute`), argument by argument, on any device.

As `fa3.py`, with these differences:

window_size      (left, right), None is open; a negative side is refused unless both are -1, as two versions of
                 FlashAttention-4 take it differently
learnable_sink   [num_heads]: one more logit a head in the softmax denominator; it has a gradient
return_lse       the functions always return (out, lse); lse is None unless it is asked for, or an argument wants a
                 gradient
gather_kv_indices, score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors,
block_sparse_tensors_bwd
                 UnsupportedError that names what fastattn has instead
num_splits, pack_gqa, deterministic, gather_bwd_recompute_p, gather_bwd_token_chunk, min_seqlen_k,
scheduler_metadata, disable_scheduler_metadata, seqlen_k_per_split
                 say how to compute, not what
"""

import torch

from .arguments import DENSE, dense, packed, refuse, with_qv
from .fa3 import flash_attn_combine

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """(out, lse) of attention on q [batch, seqlen_q, num_heads, head_dim], k, v [batch, seqlen_k, num_heads_k,
    head_dim]; lse [batch, num_heads, seqlen_q] float32 or None."""
    refuse(
        gather_kv_indices=gather_kv_indices, score_mod=score_mod, score_mod_bwd=score_mod_bwd, mask_mod=mask_mod,
        aux_tensors=aux_tensors, aux_scalars=aux_scalars, block_sparse_tensors=block_sparse_tensors,
        block_sparse_tensors_bwd=block_sparse_tensors_bwd,
    )  # fmt: skip
    return_lse = return_lse or _wants_gradient(q, k, v, qv, learnable_sink)
    q, k, softmax_scale = with_qv(q, k, v, qv, softmax_scale)
    return dense(
        q, k, v, causal=causal, window_size=_window(window_size), softmax_scale=softmax_scale, softcap=softcap,
        sinks=learnable_sink, return_lse=return_lse,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """(out, lse) of attention of sequences of different lengths, each by itself.

    q             [total_q, num_heads, head_dim] with cu_seqlens_q, else [batch, seqlen_q, num_heads, head_dim]
    k, v          the same with cu_seqlens_k; with page_table pages [num_pages, page_size, num_heads_k, head_dim], whose
                  lengths are those of cu_seqlens_k or seqused_k
    seqused_q, seqused_k  int32 [sequences]: of each sequence the first so many; rows of q beyond give 0

    out is as q, lse [num_heads, total_q] or [batch, num_heads, seqlen_q], or None.
    """
    refuse(
        gather_kv_indices=gather_kv_indices, score_mod=score_mod, score_mod_bwd=score_mod_bwd, mask_mod=mask_mod,
        aux_tensors=aux_tensors, aux_scalars=aux_scalars, block_sparse_tensors=block_sparse_tensors,
    )  # fmt: skip
    return_lse = return_lse or _wants_gradient(q, k, v, qv, learnable_sink)
    q, k, softmax_scale = with_qv(q, k, v, qv, softmax_scale)
    batch = None if cu_seqlens_q is not None else q.shape[:2]
    if batch is not None:
        q, cu_seqlens_q = _joined("q", q)
    if cu_seqlens_k is None and page_table is None:
        (k, cu_seqlens_k), (v, _) = _joined("k", k), _joined("v", v)
    out, lse = packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=seqused_q, seqused_k=seqused_k,
        block_table=page_table, causal=causal, window_size=_window(window_size), softmax_scale=softmax_scale,
        softcap=softcap, sinks=learnable_sink, return_lse=return_lse,
    )  # fmt: skip
    if batch is not None:
        out = out.unflatten(0, batch)
        lse = None if lse is None else lse.unflatten(1, batch).transpose(0, 1)
    return out, lse


def _joined(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of sequences of one length, packed, and its cu_seqlens."""
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; without cu_seqlens_{name} it must be {DENSE}")
    starts = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
    return x.flatten(0, 1), starts


def _wants_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def _window(window_size):
    if isinstance(window_size, (tuple, list)) and tuple(window_size) != (-1, -1):
        if any(isinstance(side, int) and side < 0 for side in window_size):
            raise ValueError(f"window_size={tuple(window_size)}: a side must be >= 0, or None where it is open")
    return window_size
