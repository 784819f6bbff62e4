"""`Problem`: what a kernel needs to know about one attention call, as plain hashable values.

The same value is the dispatch key, the tuning key, the id of a test, the row of a benchmark and the first line of
an error. If a kernel needs a fact to decide, that fact is a field here; tensors never are: those beside q, k and v are
in `fastattn.terms.Terms`, whose table adds the fields that tell which score modifications are on.
"""

from collections import namedtuple

from .scores import FLOATS
from .terms import FACTS

__all__ = ["BY_LENGTHS", "FLOATS", "LENGTHS", "MASK_KINDS", "Problem"]

MASK_KINDS = ("none", "causal", "window", "interval", "tensor", "block")
"""From special to general; a call's `mask` field is the most general kind that it contains.

none      every query sees every key
causal    one diagonal bound: query i sees keys up to i + offset
window    two diagonal bounds, or one that is not causal
interval  per-row key intervals (padding, documents, prefix-LM), with diagonal bounds or without
tensor    a bool tensor, with any of the above or without
block     a BlockMask, with diagonal bounds or without
"""

LENGTHS = ("batch", "seqlen_q", "seqlen_k")
"""The fields that change between calls of one model: plans and selections go by all others, `Problem.kind`."""

BY_LENGTHS = (*LENGTHS, "rows_per_key_head")
"""Those, and the properties that follow from them: what is not decided by `Problem.kind` alone."""

_SIZES = ("num_heads", "num_heads_k", "head_dim", "head_dim_v")
_DEFAULTS = {
    "layout": "dense", "mask": "none", **FACTS, "lse": False, "direction": "forward", "needs_grad": False,
    "transformed": False, "device_index": 0,
}  # fmt: skip
_FIELDS = ("device", "dtype", *LENGTHS, *_SIZES, *_DEFAULTS)
_FIRST = _FIELDS.index(LENGTHS[0])
_LAST = _FIRST + len(LENGTHS)
_SEQLEN_Q, _HEAD_DIM = _FIELDS.index("seqlen_q"), _FIELDS.index("head_dim")


class Problem(namedtuple("Problem", _FIELDS, defaults=_DEFAULTS.values())):
    """One attention call without its tensors.

    device, dtype        "cpu" | "cuda" | ..., "float32" | "bfloat16" | "float16" | "float64" (of q, k and v)
    batch ... head_dim_v sizes: q [batch, num_heads, seqlen_q, head_dim], k [batch, num_heads_k, seqlen_k, head_dim],
                         v [batch, num_heads_k, seqlen_k, head_dim_v]
    layout               "dense"; "csr": the keys of each query are listed (`attention_csr`); "varlen": sequences lie
                         one after the other, batch is 1, lengths are totals (`attention_varlen`); "cache": seqlen_k is
                         the rows of an entry or a page (`attention_with_kvcache`)
    mask                 one of MASK_KINDS
    bias                 dtype of the additive bias, or "none"
    alibi softcap sinks  whether that score modification is on; relative: a bias of each distance
    learned_scale        softmax_scale is a tensor
    rotary               q and k are turned by the positions of their rows
    dropout lse          whether dropout is on, whether lse is returned
    direction            "forward" | "backward" | "tangent" (of the forward pass) | "second" (derivatives of either) |
                         "statistics" (of the weights, without values)
    needs_grad           a gradient will be asked of the result
    transformed          the call is inside forward-mode differentiation or a torch.func transform (grad, vmap, jvp):
                         `fastattn.transforms` calls the kernel with plain tensors, and batch is that of one sample
    device_index         which of the devices of its kind holds q, k and v
    """

    __slots__ = ()

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_heads_k if self.num_heads_k else 1

    @property
    def rows_per_key_head(self) -> int:
        """Query rows that read the same keys."""
        seqlen_q, _, num_heads, num_heads_k = self[_SEQLEN_Q:_HEAD_DIM]
        return seqlen_q * num_heads // num_heads_k if num_heads_k else seqlen_q

    @property
    def num_diagonals(self) -> int:
        """How many distances there are between a query and a key."""
        return max(self.seqlen_q + self.seqlen_k - 1, 0)

    @property
    def kind(self) -> tuple:
        """Everything but the LENGTHS."""
        return self[:_FIRST] + self[_LAST:]

    def with_lengths(self, lengths: tuple[int, int, int]) -> "Problem":
        """The same kind of call with these (batch, seqlen_q, seqlen_k)."""
        return tuple.__new__(Problem, self[:_FIRST] + lengths + self[_LAST:])

    def __str__(self) -> str:
        heads = f"H{self.num_heads}" + (f"/{self.num_heads_k}" if self.num_heads_k != self.num_heads else "")
        dims = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        seqs = f"S{self.seqlen_q}" + (f"x{self.seqlen_k}" if self.seqlen_k != self.seqlen_q else "")
        parts = [self.device, self.dtype, f"B{self.batch}", heads, seqs, dims]
        for field, default in _DEFAULTS.items():
            if (value := getattr(self, field)) != default:
                plain = field in ("layout", "mask", "direction")
                parts.append(field if value is True else value if plain else f"{field}:{value}")
        # The direction comes last, behind the flags.
        return " ".join(sorted(parts, key=lambda part: part == self.direction))
