"""The arguments of `attention_csr`, checked and bound to a kernel."""

import torch

from .. import dispatch
from ..checks import broadcasts, check_flag, check_tensors, dtype_name
from ..plans import Bound
from ..problem import FLOATS
from ..scores import scale
from ..torch_internals import is_transformed
from ..validation import check_qkv
from .edges import Edges


def bind(
    q, k, v, indptr, indices, *, edge_bias=None, softmax_scale=None, return_lse=False, backend=None,
    needs_grad=None,
) -> Bound:  # fmt: skip
    """The call that these arguments of `attention_csr` are, checked but for the entries of the lists.

    needs_grad   None: whether a gradient can be asked of the tensors
    """
    problem = check_qkv(q, k, v)
    check_tensors(indptr=indptr, indices=indices)
    _check_lists(indptr, indices, problem.seqlen_q)
    inputs = [q, k, v]
    if edge_bias is not None:
        _check_bias(edge_bias, problem, len(indices))
        inputs.append(edge_bias)
    for name, x in (("indptr", indptr), ("indices", indices), ("edge_bias", edge_bias)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; they must be on one device")
    softmax_scale = scale.TERM.check(softmax_scale)
    if needs_grad is None:
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    problem = problem._replace(
        layout="csr",
        bias="none" if edge_bias is None else dtype_name(edge_bias.dtype),
        lse=check_flag("return_lse", return_lse),
        needs_grad=needs_grad,
        transformed=is_transformed(),
    )
    edges = Edges(indptr, indices, edge_bias, problem.head_dim**-0.5 if softmax_scale is None else softmax_scale)
    choices = dispatch.choices_of(problem, dispatch.check_backend(backend, "backend"))
    return Bound(dispatch.first_that_takes(choices, problem), problem, edges, backend)


def _check_lists(indptr, indices, seqlen_q: int) -> None:
    for name, x in (("indptr", indptr), ("indices", indices)):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {x.dtype}; it must be int32 or int64 (cast with .to)")
        if x.dim() != 1:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have one dimension, shared by batch and heads"
            )
    if len(indptr) != seqlen_q + 1:
        raise ValueError(f"indptr has {len(indptr)} entries; it must have seqlen_q + 1 = {seqlen_q + 1}")


def _check_bias(edge_bias, problem, num_edges: int) -> None:
    check_tensors(edge_bias=edge_bias)
    if dtype_name(edge_bias.dtype) not in FLOATS:
        raise TypeError(f"edge_bias has dtype {edge_bias.dtype}; supported are {', '.join(FLOATS)}")
    shape, scores = tuple(edge_bias.shape), (problem.batch, problem.num_heads, num_edges)
    if not broadcasts(shape, scores):
        raise ValueError(
            f"edge_bias has shape {shape}; it must be broadcastable to [batch, num_heads, edges], here {scores}"
        )
    if not shape or shape[-1] != num_edges:
        raise ValueError(f"edge_bias has shape {shape}; its last size must be edges={num_edges}")
