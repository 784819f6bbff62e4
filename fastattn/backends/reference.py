"""The rows of `fastattn.reference`, the specification. Signatures: `fastattn.kernel_table.Row`."""

import torch

from .. import reference
from ..layouts.lists import check_entries
from ..masks.intervals import UNBOUNDED, dense
from ..torch_internals import is_traced
from ..transforms.blocks import BlockFunction, gradients, over_blocks, source
from ..transforms.dense import statistics as statistics_of_block
from ..transforms.formulas import second_function, tangent_function
from ..transforms.slots import Call

_NO_BOUNDS = (-UNBOUNDED, UNBOUNDED, None, None)
_VISIBILITY = ("diagonal_lo", "diagonal_hi", "k_start", "k_end", "mask", "block_mask", "skip_negligible")


def forward(problem, q, k, v, terms):
    """Forward pass, through which autograd can go."""
    return _as_returned(problem, q, *_dense(problem, q, terms)(q, k, v, terms))


def backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients: the forward pass once more, and autograd."""
    return _gradients(_dense(problem, q, terms), q, k, v, terms, dout, dlse, wanted)


def csr(problem, q, k, v, edges):
    """Forward pass along edges, through which autograd can go."""
    _check(problem, edges)
    return _as_returned(problem, q, *_along_edges(q, k, v, edges))


def csr_backward(problem, q, k, v, edges, saved, dout, dlse, wanted):
    """Gradients along edges."""
    return _gradients(_along_edges, q, k, v, edges, dout, dlse, wanted)


def tangent(problem, q, k, v, terms, tangents):
    """Tangents of out and lse, in blocks of rows."""
    outs = ("out", "lse") if problem.lse else ("out",)
    call, tensors = _transformed(problem, q, k, v, terms, tangents)
    out, *lse = over_blocks(tangent_function(call, tuple(tensors), outs), call, tensors)
    return out, lse[0] if lse else None


def second(problem, q, k, v, terms, tangents, dout, dlse, names):
    """Second derivatives, in blocks of rows."""
    call, tensors = _transformed(problem, q, k, v, terms, tangents)
    tensors |= {slot: x for slot, x in (("d.out", dout), ("d.lse", dlse)) if x is not None}
    found = over_blocks(second_function(call, tuple(tensors), tuple(names)), call, tensors)
    return dict(zip(names, found, strict=True))


def statistics(problem, q, k, terms, lse, names):
    """Statistics of the weights, in blocks of rows."""
    call = Call(problem, "reference", terms, False)
    tensors = {"q": q, "k": k, **{name: getattr(terms, name) for name in call.term_slots}}
    tensors |= {} if lse is None else {"lse": lse}
    found = over_blocks(BlockFunction(statistics_of_block, tuple(tensors), names), call, tensors)
    return dict(zip(names, found, strict=True))


def csr_tangent(problem, q, k, v, edges, tangents):
    """Tangents along edges."""
    _check(problem, edges)
    return tangent(problem, q, k, v, edges, tangents)


def csr_second(problem, q, k, v, edges, tangents, dout, dlse, names):
    """Second derivatives along edges."""
    _check(problem, edges)
    return second(problem, q, k, v, edges, tangents, dout, dlse, names)


def _transformed(problem, q, k, v, terms, tangents) -> tuple[Call, dict]:
    call = Call(problem, "reference", terms, False)
    tensors = {"q": q, "k": k, "v": v, **{name: getattr(terms, name) for name in call.term_slots}}
    pairs = zip(("q", "k", "v", *terms._fields), (*tangents[:3], *tangents[3]), strict=True)
    return call, tensors | {f"t.{name}": x for name, x in pairs if x is not None}


def _dense(problem, q, terms):
    """`reference.attention` of a dense call as a function of q, k, v and terms."""
    visible = _visible(problem, q, terms)

    def call(q, k, v, terms):
        arguments = {name: x for name, x in terms._asdict().items() if name not in _VISIBILITY}
        return reference.attention(q, k, v, visible=visible, **arguments)

    return call


def _check(problem, edges) -> None:
    if not is_traced():  # a trace has no values to look at
        check_entries(edges.indptr, edges.indices, problem.seqlen_k)


def _along_edges(q, k, v, edges):
    return reference.attention_csr(
        q, k, v, edges.indptr, edges.indices, edge_bias=edges.bias, softmax_scale=edges.softmax_scale
    )


def _visible(problem, q, terms) -> torch.Tensor | None:
    bounds = (terms.diagonal_lo, terms.diagonal_hi, terms.k_start, terms.k_end)
    mask = terms.mask if terms.block_mask is None else terms.block_mask.to_dense()
    if problem.mask == "none" or bounds == _NO_BOUNDS:
        return mask
    visible = dense(*bounds, problem.seqlen_q, problem.seqlen_k, q.device)
    return visible if mask is None else visible & mask


def _as_returned(problem, q, out, lse) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) as every kernel returns them: out in q's memory order, lse if it is asked for."""
    if q.stride(1) < q.stride(2) and problem.seqlen_q > 1:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse if problem.lse else None


def _gradients(call, q, k, v, terms, dout, dlse, wanted):
    """(dq, dk, dv, grads) of call(q, k, v, terms) = (out, lse) for cotangents, of which one may be None."""
    wanted = *wanted[:3], *wanted[3]
    with torch.enable_grad():
        inputs = [source(x) if want else x for x, want in zip((q, k, v, *terms), wanted, strict=True)]
        results = call(*inputs[:3], type(terms)._make(inputs[3:]))
        pairs = [(y, dy) for y, dy in zip(results, (dout, dlse), strict=True) if dy is not None and y.requires_grad]
        ys, dys = zip(*pairs, strict=True) if pairs else ((), ())
        sources = [x for x, want in zip(inputs, wanted, strict=True) if want]
        found = iter(gradients(ys, sources, dys, create_graph=False))
    dq, dk, dv, *grads = (next(found) if want else None for want in wanted)
    return dq, dk, dv, grads
