"""fastattn as an attention implementation of Hugging Face transformers (5.x; tested with 5.23).

    from fastattn.integrations import transformers as fastattn_transformers

    fastattn_transformers.register()
    model.set_attn_implementation("fastattn")

`register` names two functions: `attention_forward` computes attention, `make_mask` builds the mask for it. With the
first alone transformers passes no mask at all, and padded batches come out wrong without a word.
"""

import sys

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.utils.import_utils import is_tracing

from .. import Mask, attention, attention_weights
from ..torch_internals import is_any_autocast_enabled
from . import transformers_masks as recognition
from . import transformers_models as models
from .transformers_masks import IntervalMask
from .transformers_rows import compact_mask

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError as error:
    raise ImportError(f"transformers {transformers.__version__} is too old; fastattn needs 5.23 or newer") from error

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

_READ_KWARGS = {"head_mask", "output_attentions"}  # by `attention_forward`
_PAGED_KWARGS = {"logits_indices", "logits_processor_args", "read_index", "write_index"}  # of continuous batching
_KNOWN_KWARGS = IGNORED_KWARGS | _READ_KWARGS
_INSTEAD = {
    "indices": "this model picks keys per query (sparse top-k); load it with attn_implementation='eager' or 'sdpa'",
    "block_indices": "this model picks blocks per query; load it with attn_implementation='eager' or 'sdpa'",
    "sinks": "sinks per query are not supported, only one a head (s_aux); load it with attn_implementation='eager'",
    "block_table": "a paged cache is read through its index, not its block table; use attn_implementation='sdpa'",
}


def register(name: str = "fastattn") -> None:
    """Make `attn_implementation=name` known to transformers, attention and mask alike. Calling it again is harmless.

    `model.set_attn_implementation(name)` and `from_pretrained(..., attn_implementation=name)` then raise ValueError for
    models that compute attention themselves (bloom, mpt, mpnet, longformer, ...), and continuous batching
    (`model.generate_batch`) takes the name, also as "paged|<name>". For these two, `register` puts a check in front of
    three methods of transformers (`transformers_models`), which does nothing where another implementation is in use.

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
    for each in (name, f"paged|{name}"):
        AttentionInterface.register(each, attention_forward)
        AttentionMaskInterface.register(each, make_mask)
    models.admit(_is_ours)


def _is_ours(name) -> bool:
    return isinstance(name, str) and AttentionInterface._global_mapping.get(name) is attention_forward


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    Among kwargs: cu_seq_lens_q/k, int [sequences + 1], without a mask: packed sequences in a batch of 1; head_mask,
    factor of each head's weights: [num_heads], or four dimensions of which the last two are 1; output_attentions.

    Returns (out [batch, seqlen_q, num_heads, head_dim_v] contiguous, None), or (out, weights [batch, num_heads,
    seqlen_q, seqlen_k]) if the model was called with output_attentions=True, whichever way it passes that on. These are
    computed by a second pass over queries and keys, and are the probabilities before dropout.

    Nothing is ignored silently. A keyword that is neither above nor in IGNORED_KWARGS raises NotImplementedError unless
    its value is None or False. The reason: models pass their sparse patterns and sinks this way, and losing one changes
    results; a name that turns out harmless is added to IGNORED_KWARGS in one line. ValueError or TypeError for masks of
    other kinds (2-D, 3-D, int, FlexAttention's).
    """
    paged = cache is not None
    if not _KNOWN_KWARGS.issuperset(kwargs):
        _refuse_unknown(kwargs, _PAGED_KWARGS if paged else ())
    if paged:
        if not isinstance(cache, PagedAttentionCache):
            raise NotImplementedError(f"cache is a {type(cache).__name__}; only a PagedAttentionCache is supported")
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        attention_mask = None  # the mask of this step's tokens alone; cu_seq_lens_q/k state that of the cache
    dtype_of_weights = query.dtype if _wants_weights(kwargs) else None
    if is_any_autocast_enabled() and torch.is_autocast_enabled(query.device.type):  # as torch's own attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.shape[0] != key.shape[0]:  # learned queries shared by the batch, or a shared memory
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))

    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux, "bias": position_bias}
    if attention_mask is not None:
        _add_mask(options, attention_mask)
    else:
        causal = query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if kwargs.get("cu_seq_lens_q") is not None:
            lengths = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
            options["mask"] = _packed(*lengths, query, key, causal, sliding_window)
        else:
            options["causal"] = causal
            if sliding_window is not None and sliding_window < key.shape[2]:
                options["window_size"] = (sliding_window - 1, 0 if causal else sliding_window - 1)

    if dtype_of_weights is None and "head_mask" not in kwargs:
        return attention(query, key, value, dropout_p=dropout, **options).transpose(1, 2).contiguous(), None
    out, lse = attention(query, key, value, dropout_p=dropout, return_lse=True, **options)
    weights = None if dtype_of_weights is None else attention_weights(query, key, lse, **options).to(dtype_of_weights)
    if (head_mask := kwargs.get("head_mask")) is not None:  # a factor of all weights of a head is one of its output
        head_mask = _of_heads(head_mask)
        out, weights = out * head_mask, weights if weights is None else weights * head_mask
    return out.transpose(1, 2).contiguous(), weights


def _add_mask(options: dict, attention_mask) -> None:
    """Put the mask of a model into the options of `attention`."""
    if isinstance(attention_mask, IntervalMask):
        options["mask"] = attention_mask.value
    elif isinstance(attention_mask, Mask):
        options["mask"] = attention_mask
    elif not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}; it must be a bool or float tensor")
    elif attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must have four dimensions, "
            "[batch, 1 or num_heads, seqlen_q, seqlen_k]"
        )
    elif attention_mask.dtype == torch.bool:
        options["mask"] = attention_mask
    elif attention_mask.is_floating_point():
        bias = options["bias"]
        options["bias"] = attention_mask if bias is None else bias + attention_mask
    else:
        raise TypeError(f"attention_mask has dtype {attention_mask.dtype}; it must be bool (True = attend) or float")


def _wants_weights(kwargs: dict) -> bool:
    """Whether the model was asked for attention weights: by the keyword, or by what transformers collects from the
    outputs of its modules."""
    if kwargs.get("output_attentions"):
        return True
    collected = _active_collector.global_var if torch.compiler.is_dynamo_compiling() else _active_collector.get()
    return collected is not None and any(["attentions" in name for name in collected])


def _of_heads(head_mask: torch.Tensor) -> torch.Tensor:
    if head_mask.dim() == 1:
        return head_mask[:, None, None]
    if head_mask.dim() == 4 and head_mask.shape[2:] == (1, 1):
        return head_mask
    raise NotImplementedError(
        f"head_mask has shape {tuple(head_mask.shape)}; it must be [num_heads] or [batch or 1, num_heads, 1, 1] "
        "(other masks of weights: attn_implementation='eager')"
    )


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
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> "IntervalMask | torch.Tensor | None":
    """The mask function of transformers' AttentionMaskInterface: what `sdpa_mask` returns, in less memory.

    attention_mask  bool [batch, tokens], True = token, or None
    q_offset, kv_offset   position of the first query and of the first key

    Returns None where `attention_forward` needs no mask (the skips allowed by the caller, and the pattern is plain
    causal or full); an `IntervalMask`, O(batch * seqlen) memory, where each query sees one run of keys (causal, full,
    sliding windows, chunks, packed documents, prefixes, images whose tokens see each other, padding, and what
    transformers combines of these), or few runs in a large mask (gaps in the padding); and sdpa_mask's own bool tensor
    [batch, 1, q_length, kv_length] for what is left (users' own patterns, many gaps, and while a graph is traced).

    ValueError if the model of `config` computes attention itself, and so would misread the mask.
    """
    if config is not None and (owner := _own_attention(type(config))):  # the configuration got around `models.admit`
        raise models.refusal(owner, config._attn_implementation)
    traced = torch.compiler.is_dynamo_compiling() or is_tracing(attention_mask)
    traced = traced or (isinstance(q_offset, torch.Tensor) and is_tracing(q_offset))
    if traced and attention_mask is None and not isinstance(q_offset, torch.Tensor):
        # In a graph patterns are recognised by identity alone, and where `attention_forward` needs no mask.
        whole = q_length == 1 or q_length == kv_length
        if mask_function is masking_utils.causal_mask_function:
            if allow_is_causal_skip and whole and q_offset - kv_offset == kv_length - q_length:
                return None
        elif mask_function is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip:
            return None
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    if not traced:
        mask, is_causal = compact_mask(mask_function, attention_mask, *sizes, device)
        if mask is not None:
            skip = allow_is_causal_skip if is_causal else allow_is_bidirectional_skip
            if skip and recognition.is_plain(mask, is_causal, q_length, kv_length):
                return None
            return IntervalMask(mask, (batch_size, 1, q_length, kv_length), device)
    return masking_utils.sdpa_mask(
        *sizes,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _packed(cu_seqlens_q, cu_seqlens_k, query, key, causal: bool, sliding_window: int | None) -> Mask:
    """Each query sees the keys of its own sequence only; causal and window are bottom-right in each sequence."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if query.shape[0] == 1 and torch.compiler.is_dynamo_compiling():  # no value is known yet
        ends = (cu_seqlens_q[-1] == seqlen_q) & (cu_seqlens_k[-1] == seqlen_k)
        torch._assert_async(ends, "cu_seq_lens_q and cu_seq_lens_k must end at seqlen_q and seqlen_k")
    elif query.shape[0] != 1 or int(cu_seqlens_q[-1]) != seqlen_q or int(cu_seqlens_k[-1]) != seqlen_k:
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
    for name in kwargs.keys() - IGNORED_KWARGS - _READ_KWARGS:
        if name in also_known or kwargs[name] is None or kwargs[name] is False:
            continue
        instead = _INSTEAD.get(name) or (
            "load the model with attn_implementation='eager' or 'sdpa'; or, if it cannot change attention, add the "
            "name to fastattn.integrations.transformers.IGNORED_KWARGS"
        )
        raise NotImplementedError(f"{name}={kwargs[name]!r:.60} is not supported by fastattn: {instead}")


def _own_attention(config_class: type) -> str | None:
    """The name of a class of models of this configuration, if they compute attention themselves."""
    if config_class not in _owners:
        _owners[config_class] = _find_owner(config_class)
    return _owners[config_class]


_owners: dict[type, str | None] = {}
_own_attention._dynamo_marked_constant = True  # Dynamo calls it while it traces


def _find_owner(config_class: type) -> str | None:
    modeling = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
    for value in vars(modeling).values() if modeling is not None else ():
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == modeling.__name__:
            return None if value._can_set_attn_implementation() else value.__name__
    return None
