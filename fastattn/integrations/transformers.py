"""fastattn as an attention implementation of Hugging Face transformers (5.x; tested with 5.23).

    from fastattn.integrations import transformers as fastattn_transformers

    fastattn_transformers.register()
    model.set_attn_implementation("fastattn")

`register` names two functions: `attention_forward` computes attention, `make_mask` builds the mask for it. With the
first alone transformers passes no mask at all, and padded batches come out wrong without a word.
"""

import functools
import inspect
import sys
from typing import NamedTuple

import torch
import transformers
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.utils.import_utils import is_tracing

from .. import Mask, attention

if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
    raise ImportError(f"transformers {transformers.__version__} is too old: its masks have no q_offset; upgrade it")

IGNORED_KWARGS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "deterministic",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "image_grid_thw",
    "is_first_iteration",
    "labels",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "seq_idx",
    "token_type_ids",
    "use_cache",
    "video_grid_thw",
}
"""Keywords that models hand to the attention function and that do not change attention once q, k, v and the mask are
made. Add a name here if `attention_forward` refuses one that you know to be of this sort."""

_PAGED_KWARGS = {"read_index", "write_index"}  # consumed by PagedAttentionCache.update
_INSTEAD = {
    "output_attentions": "the weights are never formed; load the model with attn_implementation='eager'",
    "head_mask": "the weights are never formed; load the model with attn_implementation='eager'",
    "indices": "this model picks keys per query (sparse top-k); load it with attn_implementation='eager' or 'sdpa'",
    "block_indices": "this model picks blocks per query; load it with attn_implementation='eager' or 'sdpa'",
    "sinks": "sinks per query are not supported, only one a head (s_aux); load it with attn_implementation='eager'",
    "block_table": "a paged cache is read through its index, not its block table; use attn_implementation='sdpa'",
}


def register(name: str = "fastattn") -> None:
    """Make `attn_implementation=name` known to transformers, attention and mask alike. Calling it again is harmless.

    Prefer `model.set_attn_implementation(name)`: it refuses models that compute attention themselves (bloom, mpt,
    mpnet, longformer, ...). `from_pretrained(..., attn_implementation=name)` does not; such a model then raises on its
    first forward pass, where transformers asks `make_mask` for a mask of its kind.

    Raises TypeError if name is not a string; ValueError if it contains "flash", "/" or "|" (transformers gives these a
    meaning: 2-D masks, Hub kernels, paged variants) or belongs to another implementation.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    for part, meaning in (
        ("flash", "flash-attn's masks and packing"),
        ("/", "a kernel from the Hub"),
        ("|", "a paged variant"),
    ):
        if part in name.lower():
            raise ValueError(f"name={name!r} must not contain {part!r}: transformers takes it for {meaning}")
    if not name:
        raise ValueError("name must not be empty")
    for interface, function in ((AttentionInterface, attention_forward), (AttentionMaskInterface, make_mask)):
        if interface._global_mapping.get(name, function) is not function:
            raise ValueError(f"name={name!r} already belongs to another implementation; choose another name")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "torch.Tensor | IntervalMask | Mask | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cache: PagedAttentionCache | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function of transformers' AttentionInterface.

    query           [batch, num_heads, seqlen_q, head_dim]
    key, value      [batch, num_heads_k, seqlen_k, head_dim | head_dim_v]: not repeated for grouped queries
    attention_mask  from `make_mask`, or 4-D: bool (True = attend) or float (added to the scores). Where there is one,
                    is_causal and sliding_window have no say: the mask holds both
    scaling         default head_dim ** -0.5
    is_causal       default: module.is_causal, or True. Without a mask, causal is bottom-right aligned: where a model
                    keeps only its last queries, they see all earlier keys. (`make_mask` states the prefill of a
                    static cache, which is top-left, explicitly.)
    position_bias   float [batch|1, num_heads, seqlen_q, seqlen_k], added to the scores
    sliding_window  keys that a query sees, itself included (a non-causal one: that many on either side)
    softcap, s_aux  score soft-cap; sink logits [num_heads]
    cache           a PagedAttentionCache is updated first
    cu_seq_lens_q/k among kwargs, int [sequences + 1]: without a mask, packed sequences in a batch of 1

    Returns (out [batch, seqlen_q, num_heads, head_dim_v] contiguous, None).

    Nothing is ignored silently. A keyword that is neither above nor in IGNORED_KWARGS raises NotImplementedError unless
    its value is None or False; so does output_attentions=True. The reason: models pass their sparse patterns, sinks
    and head masks this way, and losing one changes results; a name that turns out harmless is added to
    IGNORED_KWARGS in one line. ValueError or TypeError for masks of other kinds (2-D, 3-D, int, FlexAttention's).
    """
    paged = isinstance(cache, PagedAttentionCache)
    _refuse_unknown(kwargs, _PAGED_KWARGS if paged else ())
    if paged:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    elif cache is not None:
        raise NotImplementedError(f"cache is a {type(cache).__name__}; only a PagedAttentionCache is supported")
    if torch.is_autocast_enabled(query.device.type):  # as torch's own attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.shape[0] != key.shape[0]:  # learned queries shared by the batch, or a shared memory
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]

    mask, bias, causal, window = None, position_bias, False, None
    if attention_mask is None:
        causal = seqlen_q > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if kwargs.get("cu_seq_lens_q") is not None:
            mask = _packed(kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k"), query, key, causal, sliding_window)
            causal = False
        elif sliding_window is not None and sliding_window < seqlen_k:
            window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    elif isinstance(attention_mask, IntervalMask):
        mask = attention_mask.value
    elif isinstance(attention_mask, Mask):
        mask = attention_mask
    elif not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}; it must be a bool or float tensor")
    elif attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must have four dimensions, "
            "[batch, 1 or num_heads, seqlen_q, seqlen_k]"
        )
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        raise TypeError(f"attention_mask has dtype {attention_mask.dtype}; it must be bool (True = attend) or float")

    out = attention(
        query,
        key,
        value,
        mask=mask,
        causal=causal,
        window_size=window,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        bias=bias,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: "int | torch.Tensor" = 0,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> "IntervalMask | torch.Tensor | None":
    """The mask function of transformers' AttentionMaskInterface: what `sdpa_mask` returns, in less memory.

    attention_mask  bool [batch, tokens], True = token, or None
    q_offset, kv_offset   position of the first query and of the first key

    Returns None where `attention_forward` needs no mask (the skips allowed by the caller, and the pattern is plain
    causal or full); an `IntervalMask`, O(batch * seqlen) memory, where the pattern is causal, full or a sliding
    window and the tokens of every sequence are contiguous; and sdpa_mask's own bool tensor [batch, 1, q_length,
    kv_length] for everything else (packed sequences, chunks, images, gaps between tokens, user-made patterns, and
    while a graph is traced).

    ValueError if the model of `config` computes attention itself, and so would misread the mask.
    """
    if config is not None and _computes_its_own_attention(type(config)):
        raise ValueError(
            f"{type(config).__name__}: this model computes attention by itself and does not take another "
            "implementation; load it with attn_implementation='eager'"
        )
    traced = is_tracing(attention_mask) or (isinstance(q_offset, torch.Tensor) and is_tracing(q_offset))
    reach = None if traced else _reach(mask_function)
    padding = None if reach is None else _padding(attention_mask, batch_size, kv_length, kv_offset)
    if padding is not None:
        mask = _interval_mask(reach, padding, q_length, kv_length, int(q_offset) - int(kv_offset), device)
        is_causal = reach.right == 0
        if _is_plain(mask, is_causal, q_length, kv_length):
            if allow_is_causal_skip if is_causal else allow_is_bidirectional_skip:
                return None
        return IntervalMask(mask, (batch_size, 1, q_length, kv_length), device)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device,
        **kwargs,
    )


class IntervalMask(torch.Tensor):
    """A bool mask [batch, 1, seqlen_q, seqlen_k] that stores only the `Mask` it stands for.

    A tensor, because models slice masks, join them, test them with isinstance and move them. The first operation on
    it, in-place or not, forms the full tensor, which from then on is the value: nothing that a model does to its mask
    gets lost. value is the `Mask`, or that tensor. Only `attention_forward` may take it to `fastattn.attention`.
    """

    value: Mask | torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, mask: Mask, shape: tuple[int, ...], device: torch.device | str):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.value = mask
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls._form, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _form(self) -> torch.Tensor:
        if isinstance(self.value, Mask):
            _, _, seqlen_q, seqlen_k = self.shape
            self.value = self.value.to_dense(seqlen_q, seqlen_k, self.device).expand(self.shape).contiguous()
        return self.value

    def __repr__(self) -> str:
        return f"IntervalMask({self.value!r}, shape={tuple(self.shape)})"


class _Reach(NamedTuple):
    """The query at position p sees keys at p - left ... p + right, both inclusive; None is unbounded."""

    left: int | None
    right: int | None


def _reach(mask_function) -> _Reach | None:
    """The reach of one of transformers' own mask functions; None if it is not certain to be nothing but that."""
    rule = _RULES.get(getattr(mask_function, "__code__", None))
    return None if rule is None else rule(*[cell.cell_contents for cell in mask_function.__closure__ or ()])


def _causal_window(window) -> _Reach | None:
    return _Reach(window - 1, None) if type(window) is int and window > 0 else None


def _two_sided_window(window) -> _Reach | None:
    return _Reach(window, window) if type(window) is int and window > 0 else None


def _intersection(mask_functions) -> _Reach | None:
    reaches = [_reach(function) for function in mask_functions]
    if any(reach is None for reach in reaches):
        return None
    lefts = [reach.left for reach in reaches if reach.left is not None]
    rights = [reach.right for reach in reaches if reach.right is not None]
    return _Reach(min(lefts, default=None), min(rights, default=None))


def _agrees(mask_function, reach: _Reach, size: int = 9) -> bool:
    """Whether `mask_function` really has that reach, on a size x size grid."""
    zero, position = torch.zeros(1, 1, dtype=torch.int64, device="cpu"), torch.arange(size, device="cpu")
    visible = mask_function(zero, zero, position[:, None], position[None, :]).expand(size, size)
    distance = position[None, :] - position[:, None]
    left, right = (size if bound is None else bound for bound in reach)
    return torch.equal(visible, (distance >= -left) & (distance <= right))


def _recognised() -> dict:
    """Code object of transformers' own patterns -> function from the values that the pattern closes over to its reach.

    Only that one line of transformers has that code object. Each pattern is tried out first: if a release changes what
    it means, it is no longer recognised, and its masks become bool tensors.
    """
    causal, full = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    window, two_sided = masking_utils.sliding_window_overlay, masking_utils.sliding_window_bidirectional_overlay
    rules = {}
    for rule, examples in (
        (lambda: _Reach(None, 0), {causal: _Reach(None, 0)}),
        (lambda: _Reach(None, None), {full: _Reach(None, None)}),
        (_causal_window, {window(size): _Reach(size - 1, None) for size in (1, 2, 5)}),
        (_two_sided_window, {two_sided(size): _Reach(size, size) for size in (1, 2, 5)}),
        (_intersection, {masking_utils.and_masks(window(3), causal): _Reach(2, 0)}),
    ):
        if all(_agrees(function, reach) for function, reach in examples.items()):
            rules |= {function.__code__: rule for function in examples}
    return rules


_RULES = _recognised()


def _padding(attention_mask: torch.Tensor | None, batch_size: int, kv_length: int, kv_offset: int) -> Mask | None:
    """The tokens among the keys as a `Mask` [batch, 1, 1]; None if they are not one run in every sequence."""
    if attention_mask is None:
        return Mask()
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
        return None
    try:
        return Mask.padding(attention_mask[:, kv_offset : kv_offset + kv_length])  # what is missing counts as padding
    except ValueError:
        return None


def _interval_mask(reach: _Reach, padding: Mask, q_length: int, kv_length: int, shift: int, device) -> Mask:
    """`reach` and `padding` as a `Mask` without bounds that bind nothing; query i stands at key i + shift."""
    lo = None if reach.left is None or shift - reach.left <= 1 - q_length else shift - reach.left
    hi = None if reach.right is None or shift + reach.right >= kv_length - 1 else shift + reach.right
    if lo is None and hi is None:
        diagonal = Mask()
    elif shift == kv_length - q_length:
        diagonal = Mask.window(None if lo is None else reach.left, None if hi is None else reach.right)
    elif (lo is None or lo <= 0) and (hi is None or hi >= 0):
        diagonal = Mask.window(None if lo is None else -lo, hi, "top_left")
    else:
        row = torch.arange(q_length, device=device)[None, None]
        diagonal = Mask.intervals(None if lo is None else row + lo, None if hi is None else row + hi + 1)
    k_start, k_end = padding.k_start, padding.k_end
    if k_start is not None and not k_start.any():
        k_start = None
    if k_end is not None and (k_end >= (kv_length if hi is None else q_length + hi)).all():
        k_end = None
    return diagonal & Mask(k_start=k_start, k_end=k_end)


def _is_plain(mask: Mask, is_causal: bool, q_length: int, kv_length: int) -> bool:
    """Whether `attention_forward` does the same without `mask`."""
    if mask.k_start is not None or mask.k_end is not None:
        return False
    if is_causal and q_length > 1:
        return q_length == kv_length and mask.windows == Mask.causal().windows
    return not mask.windows


def _packed(cu_seqlens_q, cu_seqlens_k, query, key, causal: bool, sliding_window: int | None) -> Mask:
    """Each query sees the keys of its own sequence only; causal and window are bottom-right in each sequence."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if query.shape[0] != 1 or int(cu_seqlens_q[-1]) != seqlen_q or int(cu_seqlens_k[-1]) != seqlen_k:
        raise ValueError(
            f"cu_seq_lens_q ends at {int(cu_seqlens_q[-1])}, cu_seq_lens_k at {int(cu_seqlens_k[-1])}; they must end "
            f"at seqlen_q={seqlen_q} and seqlen_k={seqlen_k}, in a batch of 1 (query has shape {tuple(query.shape)})"
        )
    row = torch.arange(seqlen_q, device=query.device)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    sequence = torch.searchsorted(cu_seqlens_q, row, right=True)
    start, end = cu_seqlens_k[sequence - 1], cu_seqlens_k[sequence]
    own = row - cu_seqlens_q[sequence] + end
    if sliding_window is not None:
        start = torch.maximum(start, own - sliding_window + 1)
        end = torch.minimum(end, own + sliding_window)
    if causal:
        end = torch.minimum(end, own + 1)
    return Mask.intervals(start[None, None], end[None, None])


def _refuse_unknown(kwargs: dict, also_known=()) -> None:
    for name in kwargs.keys() - IGNORED_KWARGS:
        if name in also_known or kwargs[name] is None or kwargs[name] is False:
            continue
        instead = _INSTEAD.get(name) or (
            "load the model with attn_implementation='eager' or 'sdpa'; or, if it cannot change attention, add the "
            "name to fastattn.integrations.transformers.IGNORED_KWARGS"
        )
        raise NotImplementedError(f"{name}={kwargs[name]!r:.60} is not supported by fastattn: {instead}")


@functools.cache
def _computes_its_own_attention(config_class: type) -> bool:
    """transformers' own test, which `set_attn_implementation` applies and `from_pretrained` does not."""
    modeling = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
    for value in vars(modeling).values() if modeling is not None else ():
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == modeling.__name__:
            return not value._can_set_attn_implementation()
    return False
