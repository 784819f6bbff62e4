"""`torch.nn.functional.scaled_dot_product_attention` on fastattn's kernels."""

import math

import torch
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import pad

from ..api import attention
from ..checks import check_tensors, one_line, refuse_subclasses
from ..masks.intervals import Mask
from ..torch_internals import is_any_autocast_enabled as _any_autocast

_TOP_LEFT = Mask.causal("top_left")  # torch's is_causal, also when the lengths differ


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's function of this name, argument by argument.

    query       [..., num_heads, seqlen_q, head_dim]; rank 2 or more, rank 2 has no heads
    key, value  [..., num_heads_k, seqlen_k, head_dim], [..., num_heads_k, seqlen_k, head_dim_v], same dtype; the
                dimensions before seqlen broadcast between the three, copied only where strides cannot express it
    attn_mask   broadcastable to [..., num_heads, seqlen_q, seqlen_k]: bool, True = attend, or float, added to scores
    dropout_p   probability in [0, 1], applied whenever it is above 0
    is_causal   query i sees keys 0 ... i: top-left aligned; not together with attn_mask
    scale       factor of the scores, default head_dim ** -0.5
    enable_gqa  num_heads is a multiple of num_heads_k; query head h reads key head h // (num_heads // num_heads_k)

    Returns [..., num_heads, seqlen_q, head_dim_v] in query's dtype, under torch.autocast in its dtype. A query that
    sees no key gives 0.

    Raises TypeError or ValueError where torch raises RuntimeError. Beyond torch: NaN in a masked key or value never
    reaches the result, masks of rank 0 and 1 work, and a float mask may have any float dtype.
    """
    if dropout_p.__class__ is not float or is_causal.__class__ is not bool:
        dropout_p, is_causal = _one_value("dropout_p", dropout_p), _one_value("is_causal", is_causal)
    try:
        if _any_autocast() and torch.is_autocast_enabled(query.device.type):
            query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
        q, k, v = query.shape, key.shape, value.shape
    except (AttributeError, RuntimeError):
        check_tensors(query=query, key=key, value=value)
        refuse_subclasses(query, key, value)
        raise
    if (
        len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and (q[1] == k[1] == v[1] or enable_gqa)
        and q[3]
        and v[3]
        and dropout_p != 1.0
    ):
        if attn_mask is None:
            mask = _TOP_LEFT if is_causal else None
            return attention(query, key, value, mask=mask, softmax_scale=scale, dropout_p=dropout_p)
        mask, bias = mask_and_bias(attn_mask, is_causal, (*q[:3], k[2]))
        return attention(query, key, value, mask=mask, bias=bias, softmax_scale=scale, dropout_p=dropout_p)
    return _any_rank(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _one_value(name: str, value):
    """A number or a flag that came as a tensor, as torch's function takes it."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise TypeError(f"{name}={one_line(value)} must be one number or flag")
    return value.item() if isinstance(value, torch.Tensor) else value


def _any_rank(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> torch.Tensor:
    """Fold the leading dimensions into [batch, num_heads, seqlen, head_dim], call `attention`, unfold the result."""
    check_tensors(query=query, key=key, value=value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2 + bool(enable_gqa):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be [..., seqlen, head_dim]"
                + (" with num_heads before seqlen for enable_gqa=True" if enable_gqa else ", rank 2 or more")
            )
    rank, head_dim_v = max(query.dim(), key.dim(), value.dim()), value.shape[-1]
    query, key, value = (x[(None,) * (max(rank, 3) - x.dim())] for x in (query, key, value))
    heads, heads_k = query.shape[-3], key.shape[-3]
    grouped = heads != heads_k == value.shape[-3] and (enable_gqa or heads_k == 1)
    batch_rank = -3 if grouped else -2
    try:
        lead = lead_k = torch.broadcast_shapes(*(x.shape[:batch_rank] for x in (query, key, value)))
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        hint = "" if enable_gqa else " (enable_gqa=True lets query have more heads)"
        raise ValueError(f"query, key, value have shapes {shapes}; all but the last two must broadcast{hint}") from None
    if grouped:
        lead, lead_k = (*lead, heads), (*lead, heads_k)
    scores = (*(lead if rank > 2 else ()), query.shape[-2], key.shape[-2])
    mask, bias = (None, None) if attn_mask is None else mask_and_bias(attn_mask, is_causal, scores)

    if query.shape[-1] == key.shape[-1] == 0:  # every score is 0: one column of zeros says the same
        query, key, scale = pad(query, (0, 1)), pad(key, (0, 1)), 0.0
    if head_dim_v == 0:
        value = pad(value, (0, 1))
    if dropout_p == 1.0:  # every weight is dropped
        value, dropout_p = value * 0.0, 0.0

    # The heads are the last leading dimension; where that takes a copy, another split of batch and heads may not.
    splits = [(split, False) for split in range(len(lead) - 1, len(lead) - 2 if grouped else -1, -1)]
    if is_dynamo_compiling():  # a view that fails cannot be caught in a graph
        splits = []
    for split, may_copy in (*splits, (len(lead) - 1, True)):
        batch, heads, heads_k = math.prod(lead[:split]), math.prod(lead[split:]), math.prod(lead_k[split:])
        try:
            q, k, v = (
                _fold(x, lead_x, split, may_copy).expand(batch, heads_x, -1, -1)
                for x, lead_x, heads_x in ((query, lead, heads), (key, lead_k, heads_k), (value, lead_k, heads_k))
            )
            masks = [x if x is None else _fold(x, lead, split, may_copy) for x in (mask, bias)]
        except RuntimeError:  # from .view: these strides cannot express the split
            continue
        break
    mask = _TOP_LEFT if is_causal else masks[0]
    out = attention(q, k, v, mask=mask, bias=masks[1], softmax_scale=scale, dropout_p=dropout_p)
    return out[..., :head_dim_v].reshape(*scores[:-1], head_dim_v)


def _autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tensors as torch.autocast hands them to torch's function: all floats but float64 in its dtype."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _fold(x: torch.Tensor, lead: tuple[int, ...], split: int, may_copy: bool) -> torch.Tensor:
    """[..., a, b] as [batch|1, heads|1, a, b], batch = lead[:split]; a view, RuntimeError where none exists."""
    own = (1,) * (len(lead) + 2 - x.dim()) + tuple(x.shape[:-2])
    groups = (own[:split], lead[:split]), (own[split:], lead[split:])
    batch, heads = (full if any(n != 1 for n in mine) else mine for mine, full in groups)
    x = x.expand(*batch, *heads, *x.shape[-2:])
    shape = (math.prod(batch), math.prod(heads), *x.shape[-2:])
    return x.reshape(shape) if may_copy else x.view(shape)


def mask_and_bias(attn_mask, is_causal: bool, scores: tuple[int, ...]):
    """attn_mask as `attention`'s (mask, bias), of rank 2 or more; `scores` is the shape it must broadcast to."""
    if is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other; combine them into one attn_mask")
    check_tensors(attn_mask=attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask has dtype {attn_mask.dtype}; it must be bool (True = attend) or float (added)")
    shape = tuple(attn_mask.shape)
    aligned = scores[max(len(scores) - len(shape), 0) :]
    if len(shape) > len(scores) or any(n not in (1, full) for n, full in zip(shape, aligned, strict=True)):
        raise ValueError(f"attn_mask has shape {shape}; it must be broadcastable to {scores}")
    attn_mask = attn_mask[(None,) * (2 - len(shape))]
    return (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
