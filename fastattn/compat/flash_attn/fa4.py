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
gather_bwd_recompute_p, gather_bwd_token_chunk
                 say how to compute, not what
"""

import torch

from .arguments import dense, refuse, with_qv
from .fa3 import flash_attn_combine

__all__ = ["flash_attn_combine", "flash_attn_func"]


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
        q, k, v, causal=causal, window_size=_window(window_size), softmax_scale=softmax_scale, softcap=softcap or 0.0,
        sinks=learnable_sink, return_lse=return_lse,
    )  # fmt: skip


def _wants_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _window(window_size):
    if isinstance(window_size, (tuple, list)) and tuple(window_size) != (-1, -1):
        if any(isinstance(side, int) and side < 0 for side in window_size):
            raise ValueError(f"window_size={tuple(window_size)}: a side must be >= 0, or None where it is open")
    return window_size
