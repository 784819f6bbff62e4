"""`Edges`: what a call along the edges of a graph adds to q, k and v."""

from typing import NamedTuple

import torch


class Edges(NamedTuple):
    """In the place of `fastattn.terms.Terms` for layout "csr"; checked but for the entries of the lists.

    indptr, indices  int32 or int64, [seqlen_q + 1] and [edges]: query i sees keys indices[indptr[i] : indptr[i + 1]]
    bias             float, broadcastable to [batch, num_heads, edges] with all edges, or None
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    bias: torch.Tensor | None
    softmax_scale: float
