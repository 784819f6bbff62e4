"""Causal language models of transformers whose sequence lies on several ranks: what `apply` puts into them."""

import inspect
import itertools

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..dispatch import UnsupportedError
from ..integrations.transformers import IGNORED_KWARGS
from ..integrations.transformers_masks import IntervalMask, reach_of
from ..masks.intervals import Mask, Window
from .api import attention
from .running import groups_of, place_of
from .shards import Shards

_numbers = itertools.count()
_IGNORE = -100  # the label of no token, as everywhere in transformers
_REFUSED = ("past_key_values", "inputs_embeds", "cu_seq_lens_q", "shift_labels", "output_attentions", "encoder_outputs")


class Applied:
    """A model whose calls take whole sequences and compute this rank's rows; `remove()` undoes it."""

    def __init__(self, model: PreTrainedModel, place: dict, shards: str):
        if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
            raise UnsupportedError(f"{type(model).__name__} is no transformers model that takes an attention function")
        self.model, self.place, self.shards = model, place, shards
        self.groups = groups_of(place["mesh"], place["dim"], None)
        self.parameters = inspect.signature(model.forward).parameters
        if "position_ids" not in self.parameters:
            raise UnsupportedError(f"{type(model).__name__} takes no position_ids: it cannot be told where rows stand")
        self.name, self.before = f"fastattn_parallel_{next(_numbers)}", model.config._attn_implementation
        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, make_mask)
        model.set_attn_implementation(self.name)
        self.hook = model.register_forward_pre_hook(self.cut, with_kwargs=True, prepend=True)

    def remove(self) -> None:
        """The model as it was."""
        self.hook.remove()
        self.model.set_attn_implementation(self.before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self.name, None)

    def cut(self, model, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a call for this rank's rows. Labels are shifted before they are cut, and the loss is divided
        by the number of labels of all ranks."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        for name in _REFUSED:
            if given.get(name) is not None and given[name] is not False:
                raise UnsupportedError(f"{name} is not supported by a model that fastattn.parallel.apply has changed")
        if given.get("use_cache"):
            raise UnsupportedError("use_cache=True is not supported: decode with fastattn.parallel.decode")
        tokens = given["input_ids"]
        batch, seqlen = tokens.shape
        _check_padding(given.get("attention_mask"))
        ranks = 1
        for peers in self.groups:
            ranks *= peers.size
        make = Shards.zigzag if self.shards == "zigzag" else Shards.contiguous
        shards, rank = make(seqlen, ranks), place_of(self.groups)
        positions = given.get("position_ids")
        positions = torch.arange(seqlen, device=tokens.device)[None] if positions is None else positions
        given["input_ids"] = shards.take(tokens, rank, 1)
        given["position_ids"] = shards.take(positions, rank, 1).contiguous()
        # Of ones: without any, transformers takes a jump of positions for the begin of another sequence.
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["use_cache"] = False
        if (labels := given.get("labels")) is not None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORE)
            given["labels"] = given["shift_labels"] = shards.take(shifted, rank, 1).contiguous()
            given.setdefault("num_items_in_batch", (shifted != _IGNORE).sum())
        return (), given

    def attend(
        self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, softcap=None,
        s_aux=None, **kwargs,
    ):  # fmt: skip
        """The attention function of transformers' AttentionInterface, of local rows."""
        for name in kwargs.keys() - IGNORED_KWARGS - {"sliding_window", "shift_labels"}:
            if kwargs[name] is not None and kwargs[name] is not False:
                raise UnsupportedError(f"{name}={kwargs[name]!r:.60} is not supported by fastattn.parallel.apply")
        if not isinstance(attention_mask, IntervalMask) or not isinstance(attention_mask.value, Mask):
            raise UnsupportedError(
                f"{type(module).__name__} hands on a mask of its own; fastattn.parallel.apply takes causal attention, "
                "with a sliding window or without"
            )
        out = attention(
            query, key, value, **self.place, shards=self.shards, mask=attention_mask.value, softmax_scale=scaling,
            softcap=softcap or 0.0, sinks=s_aux, dropout_p=dropout,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None


def make_mask(batch_size, q_length, kv_length, *args, mask_function=None, device="cpu", **kwargs) -> IntervalMask:
    """The mask function of transformers' AttentionMaskInterface: causal, perhaps with a window, as positions alone."""
    reach = None if mask_function is None else reach_of(mask_function)
    if reach is None or reach.right != 0:
        raise UnsupportedError("fastattn.parallel.apply takes causal attention, with a sliding window or without")
    return IntervalMask(Mask((Window(reach.left, 0),)), (batch_size, 1, q_length, kv_length), device)


def _check_padding(attention_mask) -> None:
    """Tokens after which there is only padding see none of it."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise UnsupportedError("attention_mask must be [batch, seqlen], 1 = token")
    if not bool((attention_mask[:, 1:].bool() <= attention_mask[:, :-1].bool()).all()):
        raise UnsupportedError("attention_mask pads on the left or in between; pad on the right, with labels of -100")
