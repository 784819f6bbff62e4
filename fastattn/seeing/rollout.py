"""`rollout()`: what output tokens are made of, through all layers, as products with vectors."""

from collections.abc import Sequence

import torch

from .. import api
from ..calls import current_backend, note
from ..checks import check_real, one_line
from ..outputs import lse_parts
from ..plans import derivative_of
from ..torch_internals import outside_of_graphs
from .choice import check_places, checked_lse
from .weights import attention_weights

HEADS, METHODS = ("mean", "max", "min"), ("rollout", "widest_path")
_AT_ONCE = 64  # output rows; each is a vector, and vectors of one pass share its scores
_WEIGHTS = 1 << 21  # numbers of a block of weights


def rollout(
    layers: Sequence,
    rows=None,
    *,
    residual: float = 0.5,
    heads: str = "mean",
    method: str = "rollout",
) -> torch.Tensor:
    """How much of each input token is in chosen output tokens, [batch, rows, seqlen], through layers of self-attention.

    layers    (q, k) or (q, k, options) of each layer, the first one first: q [batch, num_heads, seqlen, head_dim], k
              [batch, num_heads_k, seqlen, head_dim]; options: the keyword arguments of `attention_weights` that say
              what the call was (mask, causal, softmax_scale, ...), and its lse, which saves a pass over the keys
    rows      output tokens, as in `attention_weights`; None: all, and the result is n x n
    residual  the share of a layer's output that came around the attention, in [0, 1]: A = residual I + (1 - residual) W
    heads     how the weights of the heads become W: their "mean"; or their "max" or "min", of which each row is divided
              by its sum
    method    "rollout": the rows of A_last ... A_first (arXiv 2005.00928)
              "widest_path": of all paths from an output to an input token the one whose smallest A is largest, and
              this smallest A: one path of attention flow (the same paper), so a lower bound of it

    Attention flow itself is a maximum flow, in which each of the layers * n * n edges is a variable: it has no form in
    O(n) memory, and is refused.

    Rows of a rollout sum to 1, unless sinks take a share or a token sees nothing. O(rows * seqlen) memory beside the
    layers. "rollout" of "mean" is the gradient of attention's values, x A = (A^T x^T)^T, which the backward kernels
    compute, 64 rows at a time; everything else sums over blocks of `attention_weights`. Result in float32 (float64 for
    float64), without a gradient; under torch.compile a call breaks the graph.

    Raises TypeError or ValueError that names the argument and the layer; NotImplementedError for attention flow.
    """
    residual = check_real("residual", residual)
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual={residual} must be in [0, 1]")
    if method == "flow":
        raise NotImplementedError(
            "attention flow is a maximum flow over layers * seqlen * seqlen edges, all of which it has to hold: it is "
            "n x n by nature; method='widest_path' is its strongest single path, in O(n)"
        )
    for name, value, known in (("heads", heads, HEADS), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(f"{name}={one_line(value)} must be one of {', '.join(known)}")
    layers = _checked(layers)
    q = layers[0][0]
    batch, _, seqlen, _ = q.shape
    chosen = range(seqlen) if rows is None else check_places("rows", rows, seqlen)
    dtype = torch.promote_types(q.dtype, torch.float32)
    found = torch.zeros(batch, len(chosen), seqlen, dtype=dtype, device=q.device)
    step = _by_kernel if (heads, method) == ("mean", "rollout") else _in_blocks
    for at in range(0, len(chosen), _AT_ONCE):
        part = chosen[at : at + _AT_ONCE]
        x = torch.zeros(batch, len(part), seqlen, dtype=dtype, device=q.device)
        x[:, range(len(part)), part] = 1.0
        with torch.no_grad():
            for q, k, options in reversed(layers):
                x = step(x, q, k, options, residual, heads, method)
        found[:, at : at + len(part)] = x
    return found


rollout = outside_of_graphs(rollout, "rollout looks at the values of its arguments: call it outside of torch.compile")


def _checked(layers) -> list[tuple]:
    """(q, k, options) of each layer, of float32 or float64."""
    if not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"layers={one_line(layers)} must be a list with a (q, k, options) for each layer")
    found = []
    for i, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or len(layer) not in (2, 3):
            raise TypeError(f"layers[{i}]={one_line(layer)} must be (q, k) or (q, k, options)")
        q, k, options = *layer[:2], dict(layer[2]) if len(layer) == 3 else {}
        for name, x in (("q", q), ("k", k)):
            if not isinstance(x, torch.Tensor) or x.dim() != 4:
                raise TypeError(f"layers[{i}]: {name} must be a tensor [batch, heads, seqlen, head_dim]")
        first = found[0][0] if found else q
        if not (q.shape[2] == k.shape[2] == first.shape[2] and q.shape[0] == first.shape[0]):
            shapes = f"{tuple(q.shape)}, {tuple(k.shape)}"
            expected = f"batch={first.shape[0]} and seqlen={first.shape[2]} of layer 0"
            raise ValueError(f"layers[{i}]: q and k have shapes {shapes}; both must have {expected}")
        if unknown := options.keys() & {"rows", "heads"}:
            raise TypeError(f"layers[{i}]: {min(unknown)} is no option of a layer; rollout has its own")
        dtype = torch.promote_types(q.dtype, torch.float32)  # 16 bits would round between the layers
        found.append((q.detach().to(dtype), k.detach().to(dtype), options))
    return found


def _by_kernel(x, q, k, options: dict, residual: float, heads: str, method: str) -> torch.Tensor:
    """x A, by the backward kernel that takes the call; in blocks where none does."""
    call, lse = {name: y for name, y in options.items() if name != "lse"}, options.get("lse")
    batch, count, seqlen = x.shape
    v = x.new_zeros(()).expand(batch, k.shape[1], seqlen, count)
    with torch.enable_grad():
        choice, problem, terms, _ = api.bind(q, k, v.requires_grad_(), backend=current_backend(), **call)
    if choice is None or choice.row.backend == "reference":
        return _in_blocks(x, q, k, options, residual, heads, method)
    bound = derivative_of(problem, "backward", choice.row.backend, False)
    parts = None if lse is None else lse_parts(checked_lse(lse, problem, q), x.dtype, bound.choice.row.backend)
    if parts is None:
        _, _, saved = choice.train(problem, q, k, v, terms)
    else:
        saved = x.new_zeros(()).expand(*q.shape[:3], count), parts
    note(bound)
    weights = (x.transpose(1, 2) * ((1.0 - residual) / q.shape[1]))[:, None].expand(-1, q.shape[1], -1, -1)
    wanted = False, False, True, terms._make([False] * len(terms))
    _, _, found, _ = bound.choice.forward(bound.problem, q, k, v, terms, saved, weights, None, wanted)
    return residual * x + found.sum(1).transpose(1, 2)


def _in_blocks(x, q, k, options: dict, residual: float, heads: str, method: str) -> torch.Tensor:
    """x A, or the largest of the smaller of x and A, in blocks of rows of A."""
    seqlen = q.shape[2]
    step = max(_WEIGHTS // max(q.shape[0] * q.shape[1] * seqlen, 1), 1)
    found = residual * x if method == "rollout" else torch.zeros_like(x)
    for start in range(0, seqlen, step):
        rows = range(start, min(start + step, seqlen))
        weights = _fused(attention_weights(q, k, rows=rows, **options), heads).mul_(1.0 - residual)
        part = x[:, :, start : rows.stop]
        if method == "rollout":
            found += part @ weights
            continue
        weights[:, range(len(rows)), rows] += residual
        for i in range(x.shape[1]):
            paths = torch.minimum(part[:, i, :, None], weights).amax(1)
            found[:, i] = torch.maximum(found[:, i], paths)
    return found


def _fused(weights: torch.Tensor, heads: str) -> torch.Tensor:
    """[batch, rows, seqlen] of [batch, heads, rows, seqlen]."""
    if heads == "mean":
        return weights.mean(1)
    weights = weights.amax(1) if heads == "max" else weights.amin(1)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
