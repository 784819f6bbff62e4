"""`attention_csr()`: attention along the edges of a graph, with its gradients.

The rows of dispatch.KERNELS with layout "csr" get `Edges` in the place of `Terms`; their gradients are those of q, k, v
and bias.
"""

import torch

from . import api, autograd, cpu, dispatch, reference
from .problem import FLOATS, Edges, Problem


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
    double backward, forward-mode derivatives and GPU tensors with a `FallbackWarning`, takes O(edges * head_dim). The
    bits of a row depend on its own edges and their order alone: not on the number of threads, the run or the batch.

    Raises TypeError or ValueError that names the argument, its value and the rule, also for each entry of the lists,
    before anything is computed; `UnsupportedError` if the named backend refuses. Method: graph attention (GAT,
    arXiv 1710.10903) with scaled dot products (arXiv 1706.03762), gradients as in FlashAttention-2 (arXiv 2307.08691).
    """
    api._raise_not_a_tensor(q=q, k=k, v=v, edge_bias=edge_bias)
    problem, edges = _problem(q, k, v, indptr, indices, edge_bias, softmax_scale, return_lse)
    if isinstance(backend, api._Explain):
        raise api._ProblemFound(problem)
    backend = dispatch.current_backend() if backend is None else dispatch.check_backend(backend, "backend")
    choice = dispatch.select(problem, backend)
    dispatch.note(choice)
    out, lse = choice.kernel(problem, q, k, v, edges)
    return (out, lse) if return_lse else out


def _problem(q, k, v, indptr, indices, edge_bias, softmax_scale, return_lse) -> tuple[Problem, Edges]:
    """Validate everything but the entries of the lists."""
    inputs = [x for x in (q, k, v, edge_bias) if x is not None]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    transformed = api._forward_ad._current_level >= 0 or api._functorch_level() is not None
    problem, terms = api._problem(
        *api._python_signature(q, k, v), needs_grad, transformed, (), softmax_scale, 0.0, 0.0, return_lse, None
    )
    for name, x in (("indptr", indptr), ("indices", indices)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {x.dtype}; it must be int32 or int64 (cast with .to)")
        if x.dim() != 1:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have one dimension, shared by batch and heads"
            )
    if len(indptr) != problem.seqlen_q + 1:
        raise ValueError(f"indptr has {len(indptr)} entries; it must have seqlen_q + 1 = {problem.seqlen_q + 1}")
    dtype = "none"
    if edge_bias is not None:
        dtype = str(edge_bias.dtype).removeprefix("torch.")
        if dtype not in FLOATS:
            raise TypeError(f"edge_bias has dtype {edge_bias.dtype}; supported are {', '.join(FLOATS)}")
        scores = (problem.batch, problem.num_heads, len(indices))
        api._check_broadcast("edge_bias", (edge_bias.shape,), scores, "[batch, num_heads, edges]")
        if edge_bias.dim() == 0 or edge_bias.shape[-1] != len(indices):
            raise ValueError(
                f"edge_bias has shape {tuple(edge_bias.shape)}; its last size must be edges={len(indices)}"
            )
    for name, x in (("indptr", indptr), ("indices", indices), ("edge_bias", edge_bias)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; they must be on one device")
    return problem._replace(layout="csr", bias=dtype), Edges(indptr, indices, edge_bias, terms.softmax_scale)


def forward(problem, q, k, v, edges):
    """(out, lse) of the compiled kernel (kernel signature of dispatch.Row)."""
    if problem.needs_grad:
        return autograd.differentiable(problem, q, k, v, edges, (edges.bias,), _forward, "cpu")
    out, lse, _ = _forward(problem, q, k, v, edges)
    return out, lse


def _forward(problem, q, k, v, edges):
    """(out, lse or None, what `backward` wants saved, as of cpu.forward_for_backward: None without needs_grad)"""
    _check_lists(edges.indptr, edges.indices, problem.seqlen_k)
    out, dtype = cpu._empty_out(problem, q), cpu._compute_dtype(problem)
    lse = q.new_empty(out.shape[:3], dtype=dtype) if problem.lse else None
    lse_parts = q.new_empty((*out.shape[:3], 2), dtype=dtype) if problem.needs_grad else None
    out_exact = torch.empty_like(out, dtype=dtype) if problem.needs_grad and out.dtype != dtype else None
    cpu._C.csr_forward(q, k, v, out, lse, lse_parts, out_exact, edges, torch.get_num_threads())
    return out, lse, (out if out_exact is None else out_exact, lse_parts)


def backward(problem, q, k, v, edges, saved, dout, dlse, wanted):
    """Gradients of q, k, v, bias of the compiled kernel (backward signature of dispatch.Row)."""
    out, lse_parts = saved
    dq, dk, dv = (torch.empty_like(x) if want else None for x, want in zip((q, k, v), wanted, strict=False))
    dbias = edges.bias.new_zeros(edges.bias.shape, dtype=out.dtype) if wanted[3] else None
    grads = Edges(None, None, dbias, None)
    cpu._C.csr_backward(q, k, v, out, lse_parts, edges, dout, dlse, dq, dk, dv, grads, torch.get_num_threads())
    return dq, dk, dv, dbias if dbias is None else dbias.to(edges.bias.dtype)


def run_reference(problem, q, k, v, edges):
    """`reference.attention_csr` as a kernel."""
    _check_lists(edges.indptr, edges.indices, problem.seqlen_k)
    return reference.as_kernel(problem, q, *_reference(edges)(q, k, v, edges.bias))


def run_reference_backward(problem, q, k, v, edges, saved, dout, dlse, wanted):
    """Gradients that can be differentiated again: the forward pass once more."""
    return reference.backward_by_autograd(problem, _reference(edges), (q, k, v, edges.bias), dout, dlse, wanted)


def _reference(edges):
    """`reference.attention_csr` of these edges as a function of q, k, v and bias."""

    def call(q, k, v, bias):
        return reference.attention_csr(
            q, k, v, edges.indptr, edges.indices, edge_bias=bias, softmax_scale=edges.softmax_scale
        )

    return call


def _check_lists(indptr: torch.Tensor, indices: torch.Tensor, seqlen_k: int) -> None:
    """ValueError for the first entry that is out of range, in the words of csrc/csr.cpp."""
    if indptr[0] != 0:
        raise ValueError(f"indptr[0]={indptr[0].item()} must be 0")
    if (decreasing := indptr.diff() < 0).any():
        i = int(decreasing.int().argmax()) + 1
        raise ValueError(
            f"indptr[{i}]={indptr[i].item()} is below indptr[{i - 1}]={indptr[i - 1].item()}; the starts of the rows "
            "must not decrease"
        )
    if indptr[-1] != len(indices):
        raise ValueError(f"indptr[{len(indptr) - 1}]={indptr[-1].item()} must be the number of indices, {len(indices)}")
    if (outside := (indices < 0) | (indices >= seqlen_k)).any():
        e = int(outside.int().argmax())
        raise ValueError(f"indices[{e}]={indices[e].item()} must be a key, 0 <= index < seqlen_k={seqlen_k}")
