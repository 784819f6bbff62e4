"""The specification: attention in plain torch, forward and backward, any float dtype including float64.

O(seqlen_q * seqlen_k) memory. Every kernel is compared with this file in float64. `attention` is differentiable by
autograd to any order; `backward` is the explicit formula that the backward kernels follow.
Source: Vaswani et al., arXiv 1706.03762; lse and the backward as in FlashAttention-2, arXiv 2307.08691.
"""

import math

import torch

from .scores import Place
from .scores.dropout import DropoutStart, dropout_mask_at
from .scores.relative import spread
from .scores.rotary import turn_rows
from .terms import SCORE_TERMS
from .torch_internals import is_traced


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    visible: torch.Tensor | None = None,
    query_start: int | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    dropout_start: DropoutStart | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    **modifications,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) for q [B, H, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], H a multiple of Hk.

    Order: scale, softcap, bias (dense, ALiBi), mask, softmax with sinks in the denominator, dropout.
    visible        bool, broadcastable to [B, H, Sq, Sk], True = attend; a bias of -inf masks as False does
    query_start    key position of query 0, from which ALiBi counts; default Sk - Sq
    sinks          [H]
    dropout_start  where the call stands in another one, whose weights it drops; None: nowhere else
    rotary_cos     [Sk, pairs] or [B, Sk, pairs], as rotary_sin: q and k are turned first (`fastattn.scores.rotary`)
    modifications  of the scores, by the names of `fastattn.terms.SCORE_TERMS`:
                   softmax_scale, a number, or a tensor with one or with [H], default D ** -0.5; softcap;
                   alibi_slopes [H] or [B, H]; bias broadcastable to [B, H, Sq, Sk]; relative
                   [B|1, H|1, Sq + Sk - 1], entry i - j + Sk - 1 for query i and key j
    out [B, H, Sq, Dv] in q's dtype; lse [B, H, Sq], natural log, float32 (float64 for float64)

    A row that sees no key gives out = 0 and lse = -inf (the sink, if there is one). A masked key takes no part at
    all: NaN or Inf in it never reaches the result.
    """
    q, k, v, dtype = *_upcast(q, k, v), q.dtype
    if rotary_cos is not None:
        angles = rotary_cos, rotary_sin, rotary_interleaved
        first = k.shape[2] - q.shape[2] if query_start is None else query_start
        q, k = turn_rows(q, first, *angles), turn_rows(k, 0, *angles)
    scores, visible, _ = _scores(q, k, visible, query_start, modifications)
    p, lse = _softmax(scores, sinks)
    if dropout_p > 0.0:
        p = p * _dropout_factor(p, dropout_p, seed, dropout_start)
    return _weighted_sum(p, v, visible).to(dtype), lse


def attention_csr(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    *,
    edge_bias: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as `attention`, where query i sees the keys indices[indptr[i] : indptr[i + 1]]; a key that is listed
    twice counts twice. edge_bias broadcastable to [B, H, edges]; -inf takes an edge away. O(edges * D) memory.
    """
    q, k, v, dtype = *_upcast(q, k, v), q.dtype
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    rows = torch.arange(q.shape[2], device=q.device).repeat_interleave(indptr.diff(), output_size=len(indices))
    k, v = (_per_query_head(x, q.shape[1])[:, :, indices] for x in (k, v))
    if edge_bias is not None:
        edge_bias = edge_bias.to(q.dtype)
        masked = edge_bias == -math.inf
        k, v = (x.masked_fill(masked[..., None], 0.0) for x in (k, v))
    scores = scale * (q[:, :, rows] * k).sum(-1)
    if edge_bias is not None:
        scores = (scores + edge_bias).masked_fill(masked, -math.inf)
    zeros = q.new_zeros(q.shape[:3])
    m = (zeros - math.inf).scatter_reduce(2, rows.expand_as(scores), scores.detach(), "amax")
    m = m.masked_fill(m == -math.inf, 0.0)
    p = torch.exp(scores - m[:, :, rows]).masked_fill(scores == -math.inf, 0.0)
    total = zeros.index_add(2, rows, p)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    out = q.new_zeros(*q.shape[:3], v.shape[3]).index_add(2, rows, p[..., None] * v) / total[..., None]
    return out.to(dtype), (m + torch.log(total)).masked_fill(empty, -math.inf)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    query_start: int | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    dropout_start: DropoutStart | None = None,
    **modifications,
) -> dict[str, torch.Tensor]:
    """Gradients by name of `attention` for cotangents dout, dlse: q, k, v, and the other tensors that are given.

        P = exp(scores - lse)    dP = dropout(dout V^T)    delta = rowsum(dP * P) - dlse    dscores = P * (dP - delta)

    The same arguments as `attention`; each gradient has the shape and dtype of its tensor. Finite inputs only.
    """
    inputs = {"q": q, "k": k, "v": v, "sinks": sinks, **modifications}
    q, k, v, dout = _upcast(q, k, v, dout)
    scores, _, steps = _scores(q, k, visible, query_start, modifications)
    p, lse = _softmax(scores, sinks)

    keep = _dropout_factor(p, dropout_p, seed, dropout_start) if dropout_p > 0.0 else 1.0
    dp = (dout @ _per_query_head(v, q.shape[1]).transpose(-1, -2)) * keep
    delta = (dp * p).sum(-1) - (0.0 if dlse is None else dlse.to(p.dtype))
    dscores = p * (dp - delta[..., None])

    grads = {}
    for term, before, value, place in reversed(steps):
        dscores, dvalue = term.derive(dscores, before, value, place)
        if isinstance(value, torch.Tensor):
            grads[term.name] = _sum_to(dvalue, value)
    grads["q"] = dscores @ _per_query_head(k, q.shape[1])
    grads["k"] = _sum_over_group(dscores.transpose(-1, -2) @ q, k.shape[1])
    grads["v"] = _sum_over_group((p * keep).transpose(-1, -2) @ dout, k.shape[1])
    if sinks is not None:
        p_sink = torch.exp(sinks.to(p.dtype)[:, None] - lse)
        grads["sinks"] = -(p_sink * delta).sum((0, 2))
    return {name: grad.to(inputs[name].dtype) for name, grad in grads.items()}


def _sum_to(grad: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A gradient summed over what its tensor broadcasts over."""
    return grad.sum_to_size((1,) * (grad.dim() - value.dim()) + value.shape).view(value.shape)


def _upcast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(compute_dtype(tensor.dtype)) for tensor in tensors]


def _per_query_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    group_size = num_heads // x.shape[1] if x.shape[1] else 1
    return x if group_size == 1 else x.repeat_interleave(group_size, dim=1)


def _sum_over_group(x: torch.Tensor, num_heads_k: int) -> torch.Tensor:
    return x if x.shape[1] == num_heads_k else x.unflatten(1, (num_heads_k, -1)).sum(2)


def _product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ _per_query_head(k, q.shape[1]).transpose(-1, -2)


def _scores(q, k, visible, query_start, modifications: dict):
    """(scores with -inf where a query does not see a key, the visibility (None: everything), the steps to the scores)

    The steps are (term, scores before, value, place), in order.
    """
    if unknown := modifications.keys() - {term.name for term in SCORE_TERMS}:
        raise TypeError(f"attention() has no argument {min(unknown)!r}")
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    place = Place(seqlen_k - seqlen_q if query_start is None else query_start, seqlen_q, seqlen_k)
    scores, steps = _product(q, k), []
    for term in SCORE_TERMS:
        value = modifications.get(term.name, term.neutral)
        if value is None and term.name == "softmax_scale":
            value = q.shape[-1] ** -0.5
        if value is not None and not (isinstance(value, float) and value == term.neutral):
            steps.append((term, scores, value, place))
            scores = term.modify(scores, value, place)
    for bias in (modifications.get("bias"), spread(modifications.get("relative"), place)):
        if bias is not None:
            unmasked = (bias != -math.inf)[(None,) * (4 - bias.dim())]
            visible = unmasked if visible is None else visible & unmasked
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores, visible, steps


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, lse). Not exp(scores - lse): lse is rounded, which a bias of -1e38 (finfo.min) turns into factors."""
    sink = scores.new_full((1, 1, 1, 1), -math.inf) if sinks is None else sinks.to(scores.dtype).view(1, -1, 1, 1)
    with torch.no_grad():
        m = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1).amax(-1, keepdim=True)
        m = m.masked_fill(m == -math.inf, 0.0)
    # select after exp, so that the gradient at a masked key is 0 whatever stands there
    p = torch.exp(scores - m).masked_fill(scores == -math.inf, 0.0)
    total = p.sum(-1, keepdim=True) + torch.exp(sink - m)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    return p / total, (m + torch.log(total)).masked_fill(empty, -math.inf)[..., 0]


def _dropout_factor(p: torch.Tensor, dropout_p: float, seed: int, start: DropoutStart | None) -> torch.Tensor:
    keep = dropout_mask_at([(0, size) for size in p.shape], dropout_p, seed, p.device, start)
    return keep.to(p.dtype) / (1.0 - dropout_p)


def _weighted_sum(p: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """p @ v in which a masked key contributes nothing, not 0 * NaN."""
    v = _per_query_head(v, p.shape[1])
    # A trace has no values to look at: there a masked NaN does spread.
    if visible is None or is_traced() or torch.isfinite(v).all():
        return p @ v
    rows = torch.empty(*p.shape[:-1], v.shape[-1], dtype=p.dtype, device=p.device)
    visible = visible.expand(p.shape)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in p.shape[:-1])).tolist():
        seen = visible[b, h, i]
        rows[b, h, i] = p[b, h, i, seen] @ v[b, h, seen]
    return rows
