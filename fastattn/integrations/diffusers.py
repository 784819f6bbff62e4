"""fastattn as an attention backend of Hugging Face diffusers (tested with 0.42).

    from fastattn.integrations import diffusers as fastattn_diffusers

    fastattn_diffusers.register()
    model.set_attention_backend("fastattn")

diffusers keeps its backends in a closed enumeration; `register` adds a member to it. Import this module before a model
of diffusers where DIFFUSERS_ATTN_BACKEND=fastattn is set: diffusers reads that when its models are imported.
"""

import functools
import warnings

import torch
from diffusers.utils import constants

from .. import attention
from ..compat.sdpa import scaled_dot_product_attention

NAME = "fastattn"
_IS_DEFAULT = constants.DIFFUSERS_ATTN_BACKEND == NAME
if _IS_DEFAULT:  # diffusers knows the name from `register` on
    constants.DIFFUSERS_ATTN_BACKEND = "native"

from diffusers.models.attention import AttentionModuleMixin  # noqa: E402  (it reads the constant)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry  # noqa: E402
from diffusers.models.attention_processor import Attention, MochiAttention  # noqa: E402
from diffusers.models.modeling_utils import ModelMixin  # noqa: E402


def register() -> None:
    """Make "fastattn" a backend of `model.set_attention_backend`, of the context manager `attention_backend`, and of
    the environment variable DIFFUSERS_ATTN_BACKEND. Calling it again is harmless.

    `set_attention_backend("fastattn")` then sets that model alone (by itself, diffusers makes a backend that is set on
    one model the default of all), raises ValueError if none of its attention processors takes a backend (those of UNets
    and VAEs call torch's function themselves: `fastattn.apply` reaches them), and warns if some do not.
    """
    if NAME in AttentionBackendName.__members__.values():
        return
    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    AttentionBackendName._member_map_[member.name] = AttentionBackendName._value2member_map_[NAME] = member
    AttentionBackendName._member_names_.append(member.name)
    _AttentionBackendRegistry.register(member)(attention_of_backend)
    if _IS_DEFAULT:
        _AttentionBackendRegistry.set_active_backend(member)
    ModelMixin.set_attention_backend = _of_one_model(ModelMixin.set_attention_backend)


def attention_of_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config=None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What diffusers calls: queries, keys and values [batch, seqlen, num_heads, head_dim], otherwise as
    `fastattn.scaled_dot_product_attention`.

    attn_mask   bool, True = attend, or float, added to the scores: [batch, seqlen_k], or broadcastable to
                [batch, num_heads, seqlen_q, seqlen_k]

    Returns out [batch, seqlen_q, num_heads, head_dim_v], with return_lse=True also the log of the softmax denominator
    [batch, seqlen_q, num_heads]. NotImplementedError for context parallelism, and for return_lse with attn_mask or
    is_causal.
    """
    if _parallel_config is not None:
        raise NotImplementedError("_parallel_config: the backend 'fastattn' does not split sequences over processes")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if not return_lse:
        out = scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return out.transpose(1, 2)
    if attn_mask is not None or is_causal:
        raise NotImplementedError(
            "return_lse=True with attn_mask or is_causal: the backend 'fastattn' gives no lse then"
        )
    out, lse = attention(query, key, value, softmax_scale=scale, dropout_p=dropout_p, return_lse=True)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _of_one_model(set_attention_backend):
    """`ModelMixin.set_attention_backend` that keeps "fastattn" to the model it is called on."""

    @functools.wraps(set_attention_backend)
    def of_one_model(self, backend: str) -> None:
        if backend.lower() != NAME:
            return set_attention_backend(self, backend)
        kinds = (Attention, MochiAttention, AttentionModuleMixin)
        processors = [module.processor for module in self.modules() if isinstance(module, kinds)]
        deaf = {type(x).__name__ for x in processors if not hasattr(x, "_attention_backend")}
        instead = f"{', '.join(sorted(deaf))} call torch's attention themselves; fastattn.apply(model) reaches them"
        if not any(hasattr(x, "_attention_backend") for x in processors):
            raise ValueError(f"{type(self).__name__}: no attention processor takes a backend: {instead}")
        if deaf:
            warnings.warn(f"{type(self).__name__}: some attention processors take no backend: {instead}", stacklevel=2)
        active = _AttentionBackendRegistry._active_backend
        set_attention_backend(self, backend)
        _AttentionBackendRegistry.set_active_backend(active)

    return of_one_model
