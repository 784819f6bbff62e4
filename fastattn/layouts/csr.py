"""`attention_csr()`: attention along the edges of a graph, with its gradients."""

import torch

from .. import dispatch
from ..calls import current_backend, in_graph
from ..checks import check_flag, check_one_device, check_tensors, refuse_subclasses
from ..differentiable import run
from ..operators import csr as operator
from ..scores import scale
from ..torch_internals import is_memoryless, num_dispatch_modes
from .csr_arguments import bind


def attention_csr(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    edge_bias: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T + edge_bias) v, where each query sees only the keys that are listed for it.

    For graphs, nearest neighbours, any sparsity at the granularity of single tokens. The lists are a compressed sparse
    row (CSR) matrix, as in scipy.sparse.csr_matrix and torch.sparse_csr_tensor (crow_indices, col_indices):

                       key 0 1 2 3
        query 0 sees      [. x . x]      row         0      2         3
        query 1 sees      [. . . .]      indices  = [1, 3,  0, 2, 3,  2]
        query 2 sees      [x . x x]      indptr   = [0, 2, 2, 5, 6]: query i sees indices[indptr[i] : indptr[i + 1]]
        query 3 sees      [. . x .]      edge_bias  one number for each of `indices`

    q             [batch, num_heads, seqlen_q, head_dim], any strides; float32, bfloat16, float16 or float64. Node
                  features x [nodes, num_heads, head_dim] go in as x.transpose(0, 1)[None], and the result comes back
                  in that memory order
    k             [batch, num_heads_k, seqlen_k, head_dim], same dtype; num_heads is a multiple of num_heads_k, and
                  query head h reads key head h // (num_heads // num_heads_k)
    v             [batch, num_heads_k, seqlen_k, head_dim_v], same dtype
    indptr        [seqlen_q + 1], int32 or int64: where each query's keys begin; from 0 up to edges
    indices       [edges], int32 or int64: the keys, in any order. A key that is listed twice for a query is two edges,
                  each with its own bias, and weighs twice
    edge_bias     float tensor of any dtype, broadcastable to [batch, num_heads, edges] with all edges: [edges],
                  [num_heads, edges], ...; added to the scores. An entry of -inf takes its edge away
    softmax_scale factor of the scores, default head_dim ** -0.5
    return_lse    also return the log of the softmax denominator
    backend       "cpu" or "reference": only its kernels, an error instead of a fallback

    Returns out [batch, num_heads, seqlen_q, head_dim_v] in q's dtype and memory order, or (out, lse) with lse
    [batch, num_heads, seqlen_q], natural log, float32 (float64 for float64 inputs). A query without edges gives
    out = 0, lse = -inf and zero gradients. A key that no query lists is never read, so NaN in it does not matter.

    The lists are shared by batch and heads. Graphs of their own for each item are one graph of unconnected parts: join
    the items along the sequence, q.transpose(0, 1).flatten(1, 2)[None], and add item * seqlen_k to its indices.
    Nearest neighbours [seqlen_q, K] are indices=x.flatten(), indptr=torch.arange(0, seqlen_q * K + 1, K). An edge_index
    [2, edges] (from, to) is order = to.argsort(stable=True), indices = from[order], edge_bias = bias[..., order],
    indptr = torch.nn.functional.pad(to.bincount(minlength=seqlen_q).cumsum(0), (1, 0)).

    Differentiable in q, k, v, edge_bias and through lse. Memory beyond inputs and outputs: O(seqlen_q) in the forward
    pass; the backward pass adds the transposed lists, 8 bytes an edge (16 with edge_bias). The reference, which runs
    GPU tensors with a `FallbackWarning`, takes O(edges * head_dim). The bits of a row depend on its own edges and their
    order alone: not on the number of threads, the run or the batch.

    Raises TypeError or ValueError that names the argument, its value and the rule, also for each entry of the lists,
    before anything is computed; `UnsupportedError` if the named backend refuses. Method: graph attention (GAT,
    arXiv 1710.10903) with scaled dot products (arXiv 1706.03762), gradients as in FlashAttention-2 (arXiv 2307.08691).
    """
    options = {"edge_bias": edge_bias, "softmax_scale": softmax_scale, "return_lse": return_lse}
    if torch.compiler.is_dynamo_compiling() or num_dispatch_modes():
        return _traced(q, k, v, indptr, indices, **options, backend=backend)
    options["backend"] = current_backend() if backend is None else backend
    bound = bind(q, k, v, indptr, indices, **options)
    if bound.choice and is_memoryless(q):
        return _traced(q, k, v, indptr, indices, **options)
    out, lse = run(bound, q, k, v)
    return (out, lse) if return_lse else out


def _traced(q, k, v, indptr, indices, edge_bias, softmax_scale, return_lse, backend):
    """`attention_csr` as an operator, as in `fastattn.api`."""
    check_tensors(q=q, k=k, v=v, indptr=indptr, indices=indices)
    refuse_subclasses(q, k, v)
    check_one_device(q, k, v)
    options = {"indptr": indptr, "indices": indices}
    if edge_bias is not None:
        check_tensors(edge_bias=edge_bias)
        options["bias"] = edge_bias
    return_lse = check_flag("return_lse", return_lse)
    if backend is None and in_graph:
        backend = in_graph[-1]
    out, lse = operator.attention_csr(
        q, k, v, **options, softmax_scale=scale.TERM.check(softmax_scale), return_lse=return_lse,
        backend=dispatch.check_backend(backend, "backend"),
    )  # fmt: skip
    return (out, lse) if return_lse else out
