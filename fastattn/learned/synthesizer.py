"""Synthesizers: logits that are learned or predicted, in the place of q k^T."""

import torch

from ..checks import check_tensors
from .choosing import attend, refuse

_LOGITS = "the logits are given: multiply them yourself"


def synthesizer_attention(logits: torch.Tensor, v: torch.Tensor, **options):
    """softmax(logits, masked) v.

    logits    [batch, num_heads, seqlen_q, seqlen_k], or what broadcasts to it over batch: a parameter [1, num_heads,
              seqlen, seqlen] is the random synthesizer, what a network says of each token ([..., seqlen, seqlen]) the
              dense one. Any float dtype. They are yours, and n x n; see `factorized_synthesizer_attention`
    v         [batch, num_heads_k, seqlen_k, head_dim_v]; num_heads is a multiple of num_heads_k
    options   of `fastattn.attention` but bias and softmax_scale, and normalizer and top_k of
              `fastattn.learned.attention`

    Returns what `fastattn.attention` returns. It is that call with queries and keys of one zero and bias=logits: fused,
    with the gradient of logits. Nothing else is n x n.

    Raises TypeError or ValueError that names the argument. Source: Synthesizer, arXiv 2005.00743.
    """
    refuse("synthesizer", options, {"bias": "add it to logits", "softmax_scale": _LOGITS})
    check_tensors(logits=logits, v=v)
    if v.dim() != 4:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be [batch, num_heads_k, seqlen_k, head_dim_v]")
    if logits.dim() != 4 or logits.shape[0] not in (1, v.shape[0]) or logits.shape[3] != v.shape[2]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; with v of shape {tuple(v.shape)} it must be [batch or 1, "
            f"num_heads, seqlen_q, seqlen_k], here [{v.shape[0]} or 1, num_heads, seqlen_q, {v.shape[2]}]"
        )
    zero = v.new_zeros(1, 1, 1, 1)
    q, k = zero.expand(v.shape[0], *logits.shape[1:3], 1), zero.expand(*v.shape[:3], 1)
    return attend(q, k, v, bias=logits, softmax_scale=1.0, **options)


def factorized_synthesizer_attention(left: torch.Tensor, right: torch.Tensor, v: torch.Tensor, **options):
    """softmax(left right^T, masked) v: the random synthesizer of low rank, O(n) memory.

    left      [batch or 1, num_heads, seqlen_q, rank]: parameters, in v's dtype
    right     [batch or 1, num_heads_k, seqlen_k, rank]
    v         [batch, num_heads_k, seqlen_k, head_dim_v]; num_heads is a multiple of num_heads_k
    options   of `fastattn.attention` but softmax_scale, and normalizer and top_k of `fastattn.learned.attention`

    Returns what `fastattn.attention` returns. It is that call with left for queries, right for keys and a scale of 1.

    Raises TypeError or ValueError that names the argument. Source: Synthesizer, arXiv 2005.00743, section 3.1.
    """
    refuse("factorized_synthesizer", options, {"softmax_scale": _LOGITS})
    check_tensors(left=left, right=right, v=v)
    for name, x in (("left", left), ("right", right), ("v", v)):
        if x.dim() != 4 or x.shape[0] not in (1, v.shape[0]):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be [batch or 1, heads, seqlen, size], batch that of v "
                f"{tuple(v.shape)}"
            )
    left, right = (x.expand(v.shape[0], -1, -1, -1) for x in (left, right))
    return attend(left, right, v, softmax_scale=1.0, **options)
