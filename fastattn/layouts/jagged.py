"""`attention()` of torch's jagged tensors: one call of `attention_varlen`, without padding, with gradients."""

import torch

from ..masks.intervals import Mask
from .varlen import attention_varlen

_KEPT = (
    "causal", "window_size", "softmax_scale", "softcap", "alibi_slopes", "sinks", "rotary", "rotary_interleaved",
    "dropout_p", "seed", "backend",
)  # fmt: skip
_REFUSED = ("mask", "bias", "skip_negligible")
"""What packed sequences do not take."""


def is_jagged(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_nested and x.layout == torch.jagged


def attend(q, k, v, options: dict):
    """What `attention(q, k, v, **options)` returns for jagged q, k, v [batch, heads, seqlen of each, head_dim]: out, or
    (out, lse), jagged as q. TypeError for tensors or arguments that do not fit."""
    places = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_jagged(x) or x.dim() != 4 or x._ragged_idx != 2:
            raise TypeError(
                f"{name} must be a jagged tensor [batch, heads, seqlen, head_dim] whose seqlen differs: make it as "
                "torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2), rows [seqlen, heads, head_dim]"
            )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    kept = {name: options[name] for name in _KEPT}
    if q.shape[1] == k.shape[1] and _is_torchs_causal(options["mask"]):  # of equal lengths, it is ours
        kept["causal"], options = True, options | {"mask": None}
    for name in _REFUSED:
        if options[name] is not None:
            raise TypeError(
                f"{name}= is not supported with jagged tensors: causal=, window_size= and alibi_slopes= are"
            )
    if k.shape[1] != v.shape[1]:
        raise ValueError(
            "k and v are jagged tensors of different lengths; make them with the same offsets, a value for each key"
        )
    for name, x in (("q", q), ("k", k)):
        places[f"cu_seqlens_{name}"], places[f"seqused_{name}"] = x.offsets(), x.lengths()
    found = attention_varlen(*(x.values() for x in (q, k, v)), **places, **kept, return_lse=options["return_lse"])
    if not options["return_lse"]:
        return _as(q, found).transpose(1, 2)
    out, lse = found
    return _as(q, out).transpose(1, 2), _as(q, lse.transpose(0, 1)).transpose(1, 2)


def _is_torchs_causal(mask) -> bool:
    causal = Mask.causal("top_left")
    return isinstance(mask, Mask) and mask.k_start is mask.k_end is None and mask.windows == causal.windows


def _as(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [total, ...], jagged as q."""
    return torch.nested.nested_tensor_from_jagged(rows, q.offsets(), q.lengths())
