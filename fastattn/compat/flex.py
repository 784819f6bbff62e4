"""`flex_attention` of torch.nn.attention.flex_attention, argument by argument, on any device, forward and backward.

    score_mod that the kernels can do     one fused call: a mask, a scale, tanh soft-capping, ALiBi, a bias that is a
    (see `score_mods`)                    tensor, that depends on q_idx - kv_idx or on one of them, and combinations
    any other score_mod                   in torch's own operators, in blocks of query rows, O(rows * seqlen_k) memory

Both are exact, and tensors that the score_mod captures get their gradients.
"""

import functools
from collections.abc import Callable

import torch

from ..api import attention, bind
from ..checks import check_flag, check_tensors, one_line
from ..dispatch import UnsupportedError
from ..masks import flex as flex_masks
from ..masks.block_mask import BlockMask
from ..torch_internals import outside_of_graphs
from .lowering import combined, lowered
from .score_mods import LookUps, read

__all__ = ["create_block_mask", "flex_attention"]

_SCORES = 1 << 20  # of a block of rows
_ROWS = 16, 64  # of a block, at least and at most


def create_block_mask(mask_mod: Callable, B, H, Q_LEN: int, KV_LEN: int, device="cpu", **options):
    """torch's function of this name (on the CPU unless `device` says otherwise), which evaluates mask_mod for all pairs
    at once; `fastattn.BlockMask.from_mask_mod` does it in rows of blocks."""
    from torch.nn.attention.flex_attention import create_block_mask as theirs

    return theirs(mask_mod, B, H, Q_LEN, KV_LEN, device=device, **options)


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable | None = None,
    block_mask=None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict | None = None,
    *,
    return_aux=None,
):
    """softmax(score_mod(scale * query key^T, b, h, q_idx, kv_idx), masked) value.

    query           [batch, num_heads, seqlen_q, head_dim]; float32, bfloat16, float16 or float64
    key, value      [batch or 1, num_heads_k, seqlen_k, head_dim], [batch or 1, num_heads_k, seqlen_k, head_dim_v]
    score_mod       (score, b, h, q_idx, kv_idx) -> score, each a tensor of one number; it may index tensors that it
                    captures (`table[h, q_idx - kv_idx]`), and those get gradients
    block_mask      torch's BlockMask or `fastattn.BlockMask`
    scale           factor of the scores before score_mod, default head_dim ** -0.5
    enable_gqa      num_heads may be a multiple of num_heads_k
    return_lse      also return the log of the softmax denominator; return_aux=AuxRequest(lse=True) likewise
    kernel_options  says how to compute, not what: every value gives the same result here

    Returns [batch, num_heads, seqlen_q, head_dim_v] in query's dtype; with return_lse (out, lse [batch, num_heads,
    seqlen_q], natural log, float32, float64 for float64); with return_aux (out, AuxOutput). A query that sees no key
    gives 0 and lse = -inf.

    What the kernels do is done by `fastattn.attention` (`fastattn.last_call()` tells); masks that a score_mod makes are
    evaluated anew in each call, so pass them as block_mask where they are large. Any other score_mod is applied to a
    block of 16 to 64 rows of scores at a time, all keys of them, and again in the backward pass; it has to be the same
    function then. There are first derivatives in reverse mode only, there; under torch.func a score_mod may capture no
    tensor; under torch.compile a call breaks the graph.

    Raises TypeError or ValueError that names the argument; `UnsupportedError` for AuxRequest(max_scores=True).
    Source: FlexAttention, arXiv 2412.05496.
    """
    check_tensors(query=query, key=key, value=value)
    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"score_mod={one_line(score_mod)} must be a function (score, b, h, q_idx, kv_idx) -> score")
    wants_lse = _wants_lse(check_flag("return_lse", return_lse), return_aux)
    key, value = _of_batch(query, key, "key"), _of_batch(query, value, "value")
    if query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}; pass enable_gqa=True if keys are to be shared"
        )
    block_mask = _ours(block_mask)
    options = {"softmax_scale": scale, "return_lse": True}
    if score_mod is None or 0 in (query.numel(), key.numel()):
        out, lse = attention(query, key, value, mask=block_mask, **options)
    else:
        out, lse = _modified(query, key, value, score_mod, block_mask, options)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse if return_aux.lse else None, max_scores=None)
    return (out, lse) if wants_lse else out


flex_attention = outside_of_graphs(flex_attention, "flex_attention reads its score_mod: call it outside of a graph")


def _modified(query, key, value, score_mod, block_mask, options):
    bind(query, key, value, mask=block_mask, **options)  # says what is wrong with them, and computes nothing
    dtype, scale = torch.promote_types(query.dtype, torch.float32), options["softmax_scale"]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    form, captured = read(score_mod, dtype, query.device)
    sizes = (*query.shape[:3], key.shape[2])
    if form is not None:
        block_size = 128 if block_mask is None else block_mask.BLOCK_SIZE
        terms = lowered(form, sizes, query.device, scale, block_size)
        if terms is not None:
            mask = combined([block_mask, *terms.pop("masks")])
            return attention(query, key, value, mask=mask, return_lse=True, **terms)
    attend = functools.partial(_rows, score_mod, block_mask, scale)
    rows = min(max(_SCORES // (sizes[0] * sizes[1] * sizes[3]), _ROWS[0]), _ROWS[1])
    blocks = [(start, min(start + rows, sizes[2])) for start in range(0, sizes[2], rows)]
    return _InRows.apply(attend, blocks, query, key, value, *captured)


class _InRows(torch.autograd.Function):
    """attend(rows of query, key, value, first row) -> (out, lse) over blocks of rows, which it computes again to
    differentiate; `captured` are the other tensors that it reads and that want gradients."""

    @staticmethod
    def forward(ctx, attend, blocks, query, key, value, *captured):
        ctx.attend, ctx.blocks = attend, blocks
        ctx.save_for_backward(query, key, value, *captured)
        out = query.new_empty(*query.shape[:3], value.shape[3])
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        with torch.autocast(query.device.type, enabled=False):
            for start, end in blocks:
                out[:, :, start:end], lse[:, :, start:end] = attend(query[:, :, start:end], key, value, start)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "flex_attention has first derivatives only for a score_mod that no kernel does (create_graph=True asks "
                "for more); say it in arguments of fastattn.attention, which has all"
            )
        query, key, value, *captured = ctx.saved_tensors
        dtype = dlse.dtype
        dquery, key, value = torch.empty_like(query), key.detach().to(dtype), value.detach().to(dtype)
        # Of 16-bit tensors sums are float32.
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (key, value, *captured)]
        for start, end in ctx.blocks:
            inputs = [x.detach().requires_grad_() for x in (query[:, :, start:end].to(dtype), key, value)]
            with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
                results = ctx.attend(*inputs, start)
            cotangents = dout[:, :, start:end].to(dtype), dlse[:, :, start:end]
            found = torch.autograd.grad(results, [*inputs, *captured], cotangents, allow_unused=True)
            dquery[:, :, start:end] = found[0]
            for total, grad in zip(sums, found[1:], strict=True):
                if grad is not None:
                    total += grad
        sums = [total.to(x.dtype) for total, x in zip(sums, ctx.saved_tensors[1:], strict=True)]
        return None, None, dquery, *sums


def _rows(score_mod, block_mask, scale, query, key, value, start):
    """(out, lse) of query rows from `start` on, in plain torch and at least float32."""
    dtype, device, rows = torch.promote_types(query.dtype, torch.float32), query.device, query.shape[2]
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ k.mT).unflatten(2, (-1, rows)).flatten(1, 2) * scale
    firsts, sizes = (0, 0, start, 0), scores.shape
    indices = [torch.arange(first, first + size, device=device) for first, size in zip(firsts, sizes, strict=True)]
    modify = score_mod
    for places in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        modify = torch.vmap(modify, in_dims=(0, *places))
    with LookUps():
        scores = modify(scores, *indices).to(dtype)
    seen = scores != -torch.inf
    if block_mask is not None:
        views = ((-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,))
        seen = seen & block_mask.mask_mod(*(x.view(view) for x, view in zip(indices, views, strict=True)))
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    blind = total == 0.0
    total = total.masked_fill(blind, 1.0)
    weights = (p / total).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    out = (weights @ v).unflatten(2, (-1, rows)).flatten(1, 2)
    return out, (top + total.log()).masked_fill(blind, -torch.inf)[..., 0]


def _wants_lse(return_lse: bool, return_aux) -> bool:
    if return_aux is None:
        return return_lse
    if return_lse:
        raise ValueError("return_lse=True and return_aux exclude each other: return_aux=AuxRequest(lse=True) is enough")
    if return_aux.max_scores:
        raise UnsupportedError("return_aux has max_scores=True, which is not supported: ask for lse")
    return return_aux.lse


def _of_batch(query: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    """Keys or values of one batch entry for all queries' entries, as a view."""
    if x.dim() == query.dim() == 4 and x.shape[0] == 1 != query.shape[0]:
        return x.expand(query.shape[0], -1, -1, -1)
    return x


def _ours(block_mask) -> BlockMask | None:
    if block_mask is None or isinstance(block_mask, BlockMask):
        return block_mask
    if not flex_masks.is_flex(block_mask):
        raise TypeError(f"block_mask={one_line(block_mask)} must be torch's BlockMask or fastattn's")
    return flex_masks.converted(block_mask, BlockMask.from_flex)
