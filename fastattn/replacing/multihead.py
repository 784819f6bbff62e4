"""nn.MultiheadAttention on fastattn: the operator of its fast path, and its attention weights."""

import functools

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import linear

from ..api import attention
from ..compat.sdpa import mask_and_bias, scaled_dot_product_attention
from ..masks.intervals import Mask
from ..scores.dropout import dropout_mask
from ..seeing.weights import attention_weights
from ..torch_internals import num_dispatch_modes
from .routes import NativeCall, SdpaCall, here

_forward = nn.MultiheadAttention.forward


@functools.wraps(_forward)
def forward_with_weights(
    self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
    is_causal=False,
):  # fmt: skip
    """nn.MultiheadAttention.forward: where weights are asked for, torch's function runs as if they were not, and the
    kernel that answers its attention call leaves them in `here.weights`."""
    options = attn_mask, average_attn_weights, is_causal
    # A graph that is traced would hold the weights of this call as constants.
    is_traced = is_dynamo_compiling() or torch.jit.is_tracing() or num_dispatch_modes()
    scope = None if is_traced else here.scope
    if not need_weights or scope is None or scope.route is None or not scope.route.replaces:
        return _forward(self, query, key, value, key_padding_mask, need_weights, *options)
    # Asked for weights, torch follows the mask and not the hint, which says less where there are keys of add_bias_kv.
    is_hint = is_causal and attn_mask is None
    outside, here.weights = here.weights, []
    try:
        out, _ = _forward(self, query, key, value, key_padding_mask, False, attn_mask, average_attn_weights, is_hint)
        weights = here.weights
    finally:
        here.weights = outside
    if not weights:  # torch answered
        return _forward(self, query, key, value, key_padding_mask, True, *options)
    weights = weights[0].mean(1) if average_attn_weights else weights[0]
    return out, weights if query.dim() == 3 else weights[0]


def computed(call: SdpaCall | NativeCall):
    """What `call` returns, computed by fastattn, and what it adds to `here.weights` where a list waits there.

    Raises what `fastattn.attention` raises: UnsupportedError, TypeError, ValueError.
    """
    if isinstance(call, NativeCall):
        return _native(call)
    if here.weights is None:
        return scaled_dot_product_attention(*call)
    mask, bias = Mask.causal("top_left") if call.is_causal else None, None
    if call.attn_mask is not None:
        mask, bias = mask_and_bias(call.attn_mask, call.is_causal, (*call.query.shape[:3], call.key.shape[2]))
    out, weights = _with_weights(call.query, call.key, call.value, mask, bias, call.scale, call.dropout_p)
    here.weights.append(weights)
    return out


def _with_weights(q, k, v, mask, bias, scale, dropout_p) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, the weights that made it, after dropout), [batch, num_heads, seqlen_q, seqlen_k] as torch's are."""
    options = {"mask": mask, "bias": bias, "softmax_scale": scale}
    weights = attention_weights(q, k, **options).to(q.dtype)
    if dropout_p == 0.0:
        return attention(q, k, v, **options), weights
    seed = int(torch.randint(2**63 - 1, ()))
    kept = dropout_mask(*weights.shape, dropout_p, seed)
    return attention(q, k, v, **options, dropout_p=dropout_p, seed=seed), weights * kept / (1.0 - dropout_p)


def _native(call: NativeCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator of the fast path: projections of self-attention, attention, projection; [batch, seqlen, embed_dim].

    A nested tensor is padded for the time of the call: O(batch * longest) memory.
    """
    if not call.query.is_nested:
        return _projected(call, call[:3], *_mask_and_bias(call))
    lengths = call.query._nested_tensor_size()[:, 0]
    padded = call.query.to_padded_tensor(0.0)
    is_token = torch.arange(padded.shape[1]) < lengths[:, None]
    out, weights = _projected(call, (padded,) * 3, is_token[:, None, None], None)
    return torch._nested_tensor_from_mask(out, is_token, mask_check=False), weights


def _projected(call: NativeCall, inputs, mask, bias) -> tuple[torch.Tensor, torch.Tensor | None]:
    (batch, seqlen, _), head_dim = inputs[0].shape, call.embed_dim // call.num_heads
    if inputs[0] is inputs[1] is inputs[2]:
        qkv = linear(inputs[0], call.qkv_weight, call.qkv_bias).view(batch, seqlen, 3, call.num_heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    else:  # as under autocast, which makes a copy of each
        parts = zip(inputs, call.qkv_weight.chunk(3), call.qkv_bias.chunk(3), strict=True)
        q, k, v = (linear(*part).unflatten(2, (call.num_heads, head_dim)).transpose(1, 2) for part in parts)
    weights = None
    if call.need_weights or here.weights is not None:
        out, weights = _with_weights(q, k, v, mask, bias, None, 0.0)
        if here.weights is not None:
            here.weights.append(weights)
        weights = weights.mean(1) if call.average_attn_weights else weights
    else:
        out = attention(q, k, v, mask=mask, bias=bias)
    out = out.transpose(1, 2).reshape(batch, seqlen, call.embed_dim)
    return linear(out, call.proj_weight, call.proj_bias), weights if call.need_weights else None


def _mask_and_bias(call: NativeCall) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The operator's mask as (mask, bias) of `attention`: bool, True = masked, or float, added to the scores.

    torch's kernel takes every float but 0 as "masked", which is wrong for all but -inf; its slow path adds them too.
    """
    if call.mask is None:
        return None, None
    mask = call.mask
    for dim, stride in enumerate(mask.stride()):  # torch expands one mask over batch and heads
        mask = mask.narrow(dim, 0, 1) if stride == 0 and mask.shape[dim] else mask
    mask = mask[:, None, None] if call.mask_type == 1 else mask
    return (~mask, None) if mask.dtype == torch.bool else (None, mask)
