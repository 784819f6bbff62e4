"""`Problem`: what a kernel needs to know about one attention call, as plain hashable values.

The same value is the dispatch key, the tuning key, the id of a test, the row of a benchmark and the first line of
an error. If a kernel needs a fact to decide, that fact is a field here; tensors never are: those beside q, k and v are
in `Terms`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .block_mask import BlockMask

MASK_KINDS = ("none", "causal", "window", "interval", "tensor", "block")
"""From special to general; a call's `mask` field is the most general kind that it contains.

none      every query sees every key
causal    one diagonal bound: query i sees keys up to i + offset
window    two diagonal bounds, or one that is not causal
interval  per-row key intervals (padding, documents, prefix-LM), with diagonal bounds or without
tensor    a bool tensor, with any of the above or without
block     a BlockMask, with diagonal bounds or without
"""

FLOATS = ("float16", "bfloat16", "float32", "float64")


class Problem(NamedTuple):
    """One attention call without its tensors.

    device, dtype        "cpu" | "cuda" | ..., "float32" | "bfloat16" | "float16" | "float64" (of q, k and v)
    batch ... head_dim_v sizes: q [batch, num_heads, seqlen_q, head_dim], k [batch, num_heads_k, seqlen_k, head_dim],
                         v [batch, num_heads_k, seqlen_k, head_dim_v]
    layout               "dense", or "csr": the keys of each query are listed (`attention_csr`); "varlen" and "paged"
                         have their place
    mask                 one of MASK_KINDS
    bias                 dtype of the additive bias, or "none"
    alibi softcap sinks  whether that score modification is on
    learned_scale        softmax_scale is a tensor
    dropout lse          whether dropout is on, whether lse is returned
    direction            "forward" | "backward"
    needs_grad           a gradient will be asked of the result; with direction "backward", one of the gradient
    transformed          the call is inside forward-mode differentiation or a torch.func transform (grad, vmap, jvp)
    """

    device: str
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    layout: str = "dense"
    mask: str = "none"
    bias: str = "none"
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    learned_scale: bool = False
    dropout: bool = False
    lse: bool = False
    direction: str = "forward"
    needs_grad: bool = False
    transformed: bool = False

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_heads_k if self.num_heads_k else 1

    def __str__(self) -> str:
        heads = f"H{self.num_heads}" + (f"/{self.num_heads_k}" if self.num_heads_k != self.num_heads else "")
        dims = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        seqs = f"S{self.seqlen_q}" + (f"x{self.seqlen_k}" if self.seqlen_k != self.seqlen_q else "")
        parts = [self.device, self.dtype, f"B{self.batch}", heads, seqs, dims]
        parts += [] if self.layout == "dense" else [self.layout]
        parts += [] if self.mask == "none" else [self.mask]
        parts += [] if self.bias == "none" else [f"bias:{self.bias}"]
        flags = ("alibi", "softcap", "sinks", "learned_scale", "dropout", "lse", "needs_grad", "transformed")
        parts += [name for name in flags if getattr(self, name)]
        parts += [] if self.direction == "forward" else [self.direction]
        return " ".join(parts)


class Terms(NamedTuple):
    """What a call adds to q, k and v, as every kernel gets it; its validity and shapes have been checked.

    softmax_scale        a float, or a tensor: one number or [num_heads]
    softcap              0.0: off
    diagonal_lo, _hi     query i sees keys j with diagonal_lo <= j - i <= diagonal_hi (masks.UNBOUNDED: no bound)
    query_start          position of query 0 among the keys: seqlen_k - seqlen_q
    k_start, k_end       int32, broadcastable to [batch, num_heads, seqlen_q]: query i sees k_start <= j < k_end
    mask, bias           broadcastable to [batch, num_heads, seqlen_q, seqlen_k]
    block_mask           of batch or 1, num_heads or 1, and these lengths; with it, no k_start, k_end, mask
    alibi_slopes         [num_heads] or [batch, num_heads]
    sinks                [num_heads]
    dropout_p, seed      seed is an int where dropout_p > 0
    skip_negligible      whether a kernel looks for keys whose weights are all 0, to skip them; None: where it knows
                         that this pays. No result depends on it
    """

    softmax_scale: float | torch.Tensor
    softcap: float
    diagonal_lo: int
    diagonal_hi: int
    k_start: torch.Tensor | None = None
    k_end: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    block_mask: "BlockMask | None" = None
    bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    skip_negligible: bool | None = None
    query_start: int = 0


class Edges(NamedTuple):
    """What a call adds to q, k and v, checked but for the entries of the lists; see `attention_csr`."""

    indptr: torch.Tensor
    indices: torch.Tensor
    bias: torch.Tensor | None
    softmax_scale: float
