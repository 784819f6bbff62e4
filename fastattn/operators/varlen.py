"""The operators of `attention_varlen`, on q, k and v as [1, heads, total, dim]."""

from ..calls import current_backend
from ..layouts.sequence_arguments import bind_packed
from ..layouts.sequences import PLACES, Sequences
from ..plans import Bound
from . import library

_LISTS = PLACES[: PLACES.index("block_table") + 1]
_LEARNED = ("alibi_slopes", "sinks", "softmax_scale")
_TENSORS = (*_LISTS, *_LEARNED, "rotary_cos", "rotary_sin", "seed")
_OPTIONS = [
    "bool causal=False", "float? scale=None", *(f"Tensor? {name}=None" for name in _TENSORS), "SymInt[]? window=None",
    "float softcap=0.0", "bool rotary_interleaved=False", "float dropout_p=0.0", "bool return_lse=False",
    "str? backend=None",
]  # fmt: skip
"""scale is the softmax_scale that is a number, window has left and right, -1 where open."""


def _bind(q, k, v, options: dict, needs_grad: bool) -> Bound:
    """The call of `attention_varlen` that these options are."""
    get = options.get
    window, seed = get("window"), get("seed")
    rotary = None if get("rotary_cos") is None else (get("rotary_cos"), get("rotary_sin"))
    return bind_packed(
        q, k, v, {name: get(name) for name in _LISTS}, causal=get("causal", False),
        window_size=None if window is None else tuple(None if side < 0 else side for side in window),
        softmax_scale=get("scale") if get("softmax_scale") is None else get("softmax_scale"),
        softcap=get("softcap", 0.0), alibi_slopes=get("alibi_slopes"), sinks=get("sinks"), rotary=rotary,
        rotary_interleaved=get("rotary_interleaved", False),
        dropout_p=get("dropout_p", 0.0), seed=None if seed is None else int(seed),
        return_lse=get("return_lse", False), backend=get("backend") or current_backend(), needs_grad=needs_grad,
    )  # fmt: skip


def _plain(q, k, v, options: dict):
    raise NotImplementedError(
        "attention_varlen inside torch.func inside torch.compile is not supported; call it outside of one of them"
    )


attention_varlen = library.define(
    library.Layout(
        names=("attention_varlen", "varlen_forward", "varlen_forward_train", "varlen_backward"),
        options=", ".join(_OPTIONS),
        tensors=_TENSORS,
        learned=_LEARNED,
        lists=(),
        bind=_bind,
        plain=_plain,
        terms=Sequences,
    )
)
