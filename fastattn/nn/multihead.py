"""`MultiHeadAttention`: torch's module of that name on fastattn, with what newer models add."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..api import attention
from ..checks import one_line
from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask
from ..seeing.weights import attention_weights
from .rotary import Rotary

QK_NORMS = (None, "l2", "rms", "layer")
MAX_LOG_SCALE = math.log(100.0)  # where Swin v2 stops its temperature


class MultiHeadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` (constructor, state_dict, call, results) on fastattn; isinstance of it, too.

    Arguments up to dtype are torch's. Beyond them, by name:

    num_heads_k    heads of k and v, a divisor of num_heads (grouped queries, arXiv 2305.13245); default num_heads
    head_dim       of q and k, default embed_dim // num_heads; head_dim_v: of v, default head_dim
    qk_norm        "l2": cosine similarity (Swin v2, arXiv 2111.09883), "rms" or "layer": a learned norm of each head's
                   q and k (arXiv 2302.05442)
    learned_scale  the factor of the scores is a parameter of each head, log_scale, kept below 100; with "l2" it is by
                   default, and begins at 10; else at head_dim ** -0.5
    rotary         a `Rotary` of head_dim, which turns q and k
    causal         query i sees the keys up to its own position, bottom-right aligned; window_size as in `attention`
    alibi          linear biases with the slopes of the paper (arXiv 2108.12409)
    sinks          one learned logit a head in the softmax denominator (gpt-oss)
    gate           the heads' output times sigmoid(query W_g), before out_proj (arXiv 2505.06708)
    backend        as in `attention`

    Parameters have torch's names and, without these options, torch's shapes: state_dicts go both ways.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
        add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
        device=None, dtype=None, *, num_heads_k: int | None = None, head_dim: int | None = None,
        head_dim_v: int | None = None, qk_norm: str | None = None, learned_scale: bool | None = None,
        rotary: Rotary | None = None, causal: bool = False,
        window_size: tuple[int | None, int | None] | None = None, alibi: bool = False, sinks: bool = False,
        gate: bool = False, backend: str | None = None,
    ):  # fmt: skip
        nn.Module.__init__(self)  # and not torch's, whose parameters have one shape
        factory = {"device": device, "dtype": dtype}
        if embed_dim <= 0 or num_heads <= 0 or (head_dim is None and embed_dim % num_heads):
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}, or head_dim be given")
        num_heads_k = num_heads if num_heads_k is None else num_heads_k
        if num_heads_k <= 0 or num_heads % num_heads_k:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_heads_k={num_heads_k}")
        if qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm={one_line(qk_norm)} must be one of {QK_NORMS}")
        self.embed_dim, self.num_heads, self.num_heads_k = embed_dim, num_heads, num_heads_k
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.head_dim_v = self.head_dim if head_dim_v is None else head_dim_v
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise ValueError(f"rotary has head_dim={rotary.head_dim}, and this module {self.head_dim}")
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.causal, self.window_size, self.backend = causal, window_size, backend
        self._qkv_same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim
        self.widths = num_heads * self.head_dim, num_heads_k * self.head_dim, num_heads_k * self.head_dim_v

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, **factory))

        names, inputs = ("q_proj_weight", "k_proj_weight", "v_proj_weight"), (embed_dim, self.kdim, self.vdim)
        for name, width, size in zip(names, self.widths, inputs, strict=True):
            self.register_parameter(name, None if self._qkv_same_embed_dim else parameter(width, size))
        self.in_proj_weight = parameter(sum(self.widths), embed_dim) if self._qkv_same_embed_dim else None
        self.in_proj_bias = parameter(sum(self.widths)) if bias else None
        self.out_proj = nn.Linear(num_heads * self.head_dim_v, embed_dim, bias=bias, **factory)
        self.bias_k = parameter(1, 1, self.widths[1]) if add_bias_kv else None
        self.bias_v = parameter(1, 1, self.widths[2]) if add_bias_kv else None
        self._reset_parameters()

        self.qk_norm, self.rotary = qk_norm, rotary
        norms = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
        self.q_norm, self.k_norm = (
            norms[qk_norm](self.head_dim, **factory) if qk_norm in norms else None for _ in "qk"
        )
        learned_scale = qk_norm == "l2" if learned_scale is None else learned_scale
        scale = 10.0 if qk_norm == "l2" else self.head_dim**-0.5
        self.softmax_scale = scale
        self.log_scale = nn.Parameter(torch.full((num_heads,), scale, **factory).log()) if learned_scale else None
        self.sinks = nn.Parameter(torch.zeros(num_heads, **factory)) if sinks else None
        self.gate = nn.Linear(embed_dim, num_heads * self.head_dim_v, **factory) if gate else None
        self.register_buffer("alibi_slopes", _slopes(num_heads, device) if alibi else None, persistent=False)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,
        attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
        mask: Mask | BlockMask | None = None, positions: torch.Tensor | None = None,
        positions_k: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """torch's call: (output, weights or None), in torch's shapes; True in a bool mask hides, as there.

        need_weights   costs O(seqlen_q * seqlen_k) memory for what it returns, and a second pass; they are the
                       probabilities before dropout (torch: after it)
        is_causal      query i sees keys 0 ... i. As a hint beside attn_mask it is believed, and attn_mask not read,
                       which saves the tensor of seqlen_q * seqlen_k; torch's says that a wrong hint is an error
        mask           a `Mask` or `BlockMask`, True = attend, instead of attn_mask
        positions      of the queries, and positions_k of the keys, for `rotary`; default 0, 1, 2, ...

        A query that sees no key gives 0 before out_proj (torch: NaN). Padding that is one run of tokens is two numbers
        a sequence; beside a bool attn_mask, every mask becomes a bool tensor of its size.

        Raises ValueError for a mask of another shape, for masks that do not combine, and for positions without rotary.
        """
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value)
        seen = self._masks(mask, attn_mask, key_padding_mask, is_causal, (len(q), q.shape[2], k.shape[2]))
        q, k, rotary = self._prepared(q, k, positions, positions_k)
        k, v, seen = self._extended(k, v, seen, q.shape[2])
        options = {
            **seen, **rotary, "causal": self.causal, "window_size": self.window_size, "softmax_scale": self._scale(),
            "alibi_slopes": self.alibi_slopes, "sinks": self.sinks, "backend": self.backend,
        }  # fmt: skip
        dropout_p = self.dropout if self.training else 0.0
        heads = attention(q, k, v, **options, dropout_p=dropout_p, return_lse=need_weights)
        weights = None
        if need_weights:
            heads, lse = heads
            del options["backend"]
            weights = attention_weights(q, k, lse, **options).to(q.dtype)
            weights = weights.mean(1) if average_attn_weights else weights
        out = heads.transpose(1, 2).flatten(2)
        if self.gate is not None:
            out = out * self.gate(query).sigmoid()
        out = self.out_proj(out)
        if not is_batched:
            return out[0], weights if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query, key, value) -> list[torch.Tensor]:
        """q, k, v [batch, heads, seqlen, head_dim], before norms and rotary."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(self.widths)
        if self._qkv_same_embed_dim:
            if query is key is value:  # one product instead of three
                found = F.linear(query, self.in_proj_weight, self.in_proj_bias).split(self.widths, -1)
                return [self._split(x, i) for i, x in enumerate(found)]
            weights = self.in_proj_weight.split(self.widths)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        inputs = zip((query, key, value), weights, biases, strict=True)
        return [self._split(F.linear(*arguments), i) for i, arguments in enumerate(inputs)]

    def _split(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """[batch, seqlen, width] as [batch, heads, seqlen, head_dim]; which: 0 for q, 1 for k, 2 for v."""
        heads = (self.num_heads, self.num_heads_k, self.num_heads_k)[which]
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _prepared(self, q, k, positions, positions_k) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """q and k after norms, and rotary= of `attention`; after rotary, too, where they have positions of their own or
        keys without one follow."""
        if self.qk_norm == "l2":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        elif self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is None:
            if positions is not None or positions_k is not None:
                raise ValueError("positions are for rotary=, which this module was made without")
            return q, k, {}
        if positions_k is not None or q.shape[2] != k.shape[2] or self.bias_k is not None or self.add_zero_attn:
            return *self.rotary(q, k, positions, positions_k), {}
        if positions is None:
            positions = torch.arange(q.shape[2], device=q.device)
        return q, k, {"rotary": self.rotary.tables(positions), "rotary_interleaved": self.rotary.interleaved}

    def _scale(self) -> float | torch.Tensor:
        return self.softmax_scale if self.log_scale is None else self.log_scale.clamp(max=MAX_LOG_SCALE).exp()

    def _masks(self, mask, attn_mask, key_padding_mask, is_causal: bool, sizes: tuple[int, int, int]) -> dict:
        """mask= and bias= of `attention` for torch's masks."""
        batch, seqlen_q, seqlen_k = sizes
        parts, bias = [] if mask is None else [mask], None
        if is_causal:
            parts.append(Mask.causal("top_left"))
        elif attn_mask is not None:
            shapes = ((seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k))
            if tuple(attn_mask.shape) not in shapes:
                raise ValueError(f"attn_mask={one_line(attn_mask)} must be of shape {shapes[0]} or {shapes[1]}")
            x = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, self.num_heads))
            if x.is_floating_point():
                bias = x
            else:
                parts.append(~x.bool())
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, seqlen_k):
                raise ValueError(f"key_padding_mask={one_line(key_padding_mask)} must be of shape {(batch, seqlen_k)}")
            if key_padding_mask.is_floating_point():
                added = key_padding_mask[:, None, None]
                bias = added if bias is None else bias + added
            else:
                parts.append(_of_padding(~key_padding_mask.bool()))
        return {"mask": _combined(parts, seqlen_q, seqlen_k), "bias": bias}

    def _extended(self, k, v, seen: dict, seqlen_q: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """With the learned key and the key of zeros that torch's module may add, which every query sees."""
        more_k, more_v = [], []
        if self.bias_k is not None:
            more_k.append(self._split(self.bias_k, 1).expand(len(k), -1, -1, -1))
            more_v.append(self._split(self.bias_v, 2).expand(len(k), -1, -1, -1))
        if self.add_zero_attn:
            more_k.append(k.new_zeros(*k.shape[:2], 1, k.shape[3]))
            more_v.append(v.new_zeros(*v.shape[:2], 1, v.shape[3]))
        if not more_k:
            return k, v, seen
        if self.causal or self.window_size is not None or self.alibi_slopes is not None:
            raise ValueError(
                "add_bias_kv and add_zero_attn add keys without a position: not with causal, window_size, alibi"
            )
        mask, bias, count = seen["mask"], seen["bias"], len(more_k)
        if isinstance(mask, BlockMask):
            raise ValueError("add_bias_kv and add_zero_attn do not go with a BlockMask: its keys are k's")
        if isinstance(mask, Mask):
            mask = mask.to_dense(seqlen_q if mask.windows else 1, k.shape[2], k.device)
        return torch.cat([k, *more_k], 2), torch.cat([v, *more_v], 2), {
            "mask": None if mask is None else F.pad(mask, (0, count), value=True),
            "bias": None if bias is None else F.pad(bias.expand(*bias.shape[:-1], k.shape[2]), (0, count)),
        }  # fmt: skip


def _of_padding(keep: torch.Tensor) -> Mask | torch.Tensor:
    """The keys that are kept [batch, seqlen_k]: two numbers a sequence, or a row of bools where there are gaps."""
    try:
        return Mask.padding(keep)
    except ValueError:
        return keep[:, None, None]


def _combined(parts: list, seqlen_q: int, seqlen_k: int) -> Mask | BlockMask | torch.Tensor | None:
    """The keys that all parts allow: a `Mask` where all are, else a bool tensor of their common shape."""
    if len(parts) < 2:
        return parts[0] if parts else None
    if any(isinstance(part, BlockMask) for part in parts):
        raise ValueError(
            "a BlockMask does not combine with other masks: build it of all of them (`BlockMask.from_mask`)"
        )
    masks, tensors = [x for x in parts if isinstance(x, Mask)], [x for x in parts if isinstance(x, torch.Tensor)]
    found = masks[0] if masks else None
    for other in masks[1:]:
        found = found & other
    if tensors and found is not None:
        tensors.append(found.to_dense(seqlen_q, seqlen_k, tensors[0].device))
    for i, other in enumerate(tensors):
        found = other if i == 0 else found & other
    return found


def _slopes(num_heads: int, device) -> torch.Tensor:
    """ALiBi's slopes: 2^(-8/n), 2^(-16/n), ...; where n is no power of two, those of the next smaller one, and between
    them every second of the next larger one."""
    whole = 1 << (num_heads.bit_length() - 1)
    powers = torch.arange(1, whole + 1, device=device) * (8 / whole)
    between = (2 * torch.arange(num_heads - whole, device=device) + 1) * (4 / whole)
    return torch.exp2(-torch.cat((powers, between)).float())
