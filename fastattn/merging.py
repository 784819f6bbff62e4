"""`merge()`: partial attentions over parts of the keys, combined into the attention over all of them."""

import math
from collections.abc import Sequence

import torch

from .checks import check_tensors, dtype_name
from .scores import FLOATS


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention over all keys, from the results of `attention(..., return_lse=True)` over parts of them.

    outs   one tensor a part, [batch, num_heads, seqlen_q, head_dim_v] or any [..., head_dim_v], of one float dtype
    lses   as many tensors [batch, num_heads, seqlen_q] or [...], float: natural log of the softmax denominators

    Returns out in the dtype of outs, and lse [...] in that of lses. The combination is exact: out is the mean of outs
    weighted by exp(lse_i - lse), lse = log(sum of exp(lse_i)), in float32 (float64 if an input is). The sum is in the
    order of the parts, so the same parts give the same bits. A part in which a query sees no key (lse = -inf) takes
    no part in its row, whatever its out holds; a query that no part sees gives out = 0 and lse = -inf.

    Differentiable in outs and lses, to any order. Memory: O(size of outs). A sink belongs to one part only, or it is
    counted as often as there are parts; an lse of +inf gives NaN. Dropout keeps its meaning where each part drops its
    own keys.

    Raises TypeError or ValueError that names the argument. Method: the split of FlashAttention-2 and Flash-Decoding
    (arXiv 2307.08691; Dao, Haziza, Massa, Sizov, 2023).
    """
    outs, lses = _checked(outs, lses)
    dtype = torch.promote_types(lses[0].dtype, torch.promote_types(outs[0].dtype, torch.float32))
    logs = torch.stack([lse.to(dtype) for lse in lses])
    unseen = logs == -math.inf
    top = logs.detach().amax(0)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = torch.exp(logs.masked_fill(unseen, 0.0) - top).masked_fill(unseen, 0.0)
    total = weights.sum(0)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    # Selected before the product: what stands in a part that a row does not see may be NaN.
    parts = [
        out.to(dtype).masked_fill(hidden[..., None], 0.0) * (weight / total)[..., None]
        for out, hidden, weight in zip(outs, unseen, weights, strict=True)
    ]
    lse = (top + torch.log(total)).masked_fill(empty, -math.inf)
    return sum(parts[1:], parts[0]).to(outs[0].dtype), lse.to(lses[0].dtype)


def _checked(outs, lses) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, one a part, got {type(parts).__name__}")
        check_tensors(**{f"{name}[{i}]": x for i, x in enumerate(parts)})
        for i, x in enumerate(parts):
            if dtype_name(x.dtype) not in FLOATS:
                raise TypeError(f"{name}[{i}] has dtype {x.dtype}; supported are {', '.join(FLOATS)}")
            if (x.shape, x.dtype, x.device) != (parts[0].shape, parts[0].dtype, parts[0].device):
                raise ValueError(
                    f"{name}[{i}] is {x.dtype} {tuple(x.shape)} on {x.device}, {name}[0] {parts[0].dtype} "
                    f"{tuple(parts[0].shape)} on {parts[0].device}; they must be alike"
                )
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs has {len(outs)} parts and lses {len(lses)}; they must be as many, at least 1")
    if outs[0].shape[:-1] != lses[0].shape or not outs[0].dim():
        raise ValueError(
            f"lses[0] has shape {tuple(lses[0].shape)}; with outs[0] of shape {tuple(outs[0].shape)} it must be "
            f"{tuple(outs[0].shape[:-1])}"
        )
    if outs[0].device != lses[0].device:
        raise ValueError(f"lses are on {lses[0].device}, outs on {outs[0].device}; they must be on one device")
    return list(outs), list(lses)
