"""transformers' masks in which each query sees one run of keys: chunks, packed documents, prefixes, image tokens.

A run takes two numbers a query. What `transformers_masks.reach_of` recognises takes two numbers in all.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import masking_utils

from ..masks.block_mask import BlockMask
from ..masks.intervals import UNBOUNDED, Mask
from .transformers_masks import Padding, Reach, captured, code_of, interval_mask, padding_of, reach_of


class Rows(NamedTuple):
    """Query i of entry b sees the keys start[b, i] ... end[b, i] - 1: int64, broadcastable to [batch, q_length]."""

    start: torch.Tensor
    end: torch.Tensor


def rows_of(mask_function: Callable, query: torch.Tensor) -> Rows | None:
    """The rows of one of transformers' own mask functions, or of those combined; None if it is not certain that each
    sees one run of keys.

    query   positions, int64 [1 or batch, q_length]
    """
    reach = reach_of(mask_function)
    if reach is not None:
        left, right = (UNBOUNDED if bound is None else bound for bound in reach)
        return Rows(query - left, query + right + 1)
    rule = _RULES.get(code_of(mask_function))
    return None if rule is None else rule(query, **captured(mask_function))


def _chunks(query, chunk_size, left_padding) -> Rows | None:
    start = query - (query - left_padding[:, None]) % chunk_size
    return Rows(start, start + chunk_size)


def _documents(query, packed_sequence_mask) -> Rows | None:
    return _of_one_number(packed_sequence_mask, query) if (packed_sequence_mask >= 0).all() else None


def _images(query, block_sequence_ids) -> Rows | None:
    return _of_one_number(block_sequence_ids, query)


def _of_one_number(ids: torch.Tensor, query: torch.Tensor) -> Rows | None:
    """Each query sees the keys with its own number in `ids` [batch, tokens], none where that is negative; None unless
    the tokens of a number are neighbours and numbers ascend."""
    length = ids.shape[1]
    if query.min() < 0 or query.max() >= length:
        return None
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    highest = torch.cummax(ids.clamp(min=-1), 1).values
    before = torch.full_like(ids, -1)
    before[:, 1:] = highest[:, :-1]
    if (is_first & (ids >= 0) & (ids <= before)).any():
        return None
    place = torch.arange(length, device=ids.device).expand(ids.shape)
    start = torch.cummax(torch.where(is_first, place, 0), 1).values
    end = torch.full_like(start, length)
    end[:, :-1] = torch.where(is_first, place, length)[:, 1:].flip(1).cummin(1).values.flip(1)
    query = query.expand(len(ids), -1)
    start, end, is_seen = (x.gather(1, query) for x in (start, end, ids >= 0))
    return Rows(torch.where(is_seen, start, query), torch.where(is_seen, end, query))


def _all_of(query, mask_functions) -> Rows | None:
    rows = Rows(query - UNBOUNDED, query + UNBOUNDED)
    for function in mask_functions:
        if code_of(function) is _REMAPPED:
            more = _remapped(query, mask_functions, **captured(function))
        else:
            more = rows_of(function, query)
        if more is None:
            return None
        rows = Rows(torch.maximum(rows.start, more.start), torch.minimum(rows.end, more.end))
    return rows


def _remapped(query, neighbours, mask_function, position_ids) -> Rows | None:
    """`mask_function` of positions that start anew in each document, if a neighbour keeps documents apart."""
    documents = [captured(x)["packed_sequence_mask"] for x in neighbours if code_of(x) is _PACKED]
    if not documents or documents[0].shape != position_ids.shape or query.max() >= position_ids.shape[1]:
        return None
    if not ((position_ids.diff() == 1) | (documents[0].diff() != 0)).all():
        return None
    own = position_ids.gather(1, query.expand(len(position_ids), -1))
    rows = rows_of(mask_function, own)
    return rows and Rows(rows.start + query - own, rows.end + query - own)


def _any_of(query, mask_functions) -> Rows | None:
    rows = Rows(query, query)  # none
    for function in mask_functions:
        more = rows_of(function, query)
        rows = None if more is None else _joined(rows, more)
        if rows is None:
            return None
    return rows


def _joined(a: Rows, b: Rows) -> Rows | None:
    """The union, if there is no gap in it."""
    a_is_empty, b_is_empty = a.start >= a.end, b.start >= b.end
    gap = torch.maximum(a.start, b.start) > torch.minimum(a.end, b.end)
    if (gap & ~a_is_empty & ~b_is_empty).any():
        return None
    start = torch.where(a_is_empty, b.start, torch.where(b_is_empty, a.start, torch.minimum(a.start, b.start)))
    end = torch.where(a_is_empty, b.end, torch.where(b_is_empty, a.end, torch.maximum(a.end, b.end)))
    return Rows(start, end)


def _paddings(attention_mask, batch_size: int, kv_length: int, kv_offset: int) -> list[Padding | None]:
    """The tokens among the keys, an item for each of their runs, none if there are many; what is missing is padding."""
    if attention_mask is None:
        return [None]
    tokens = attention_mask if attention_mask.dtype == torch.bool else attention_mask.bool()
    if kv_offset or tokens.shape[-1] > kv_length:
        tokens = tokens[:, kv_offset : kv_offset + kv_length]
    if tokens.dim() != 2 or len(tokens) != batch_size:
        return []
    padding = padding_of(tokens)
    if padding is not None:
        return [padding]
    is_first = tokens.clone()
    is_first[:, 1:] &= ~tokens[:, :-1]
    number = is_first.cumsum(1)
    count = int(number[:, -1].max())
    return [] if count > _FEW else [padding_of(tokens & (number == i)) for i in range(1, count + 1)]


def compact_mask(
    mask_function: Callable,
    attention_mask: torch.Tensor | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    device: torch.device | str,
) -> tuple[Mask | BlockMask | None, bool]:
    """(The mask that `sdpa_mask` makes of these, in O(batch_size * q_length) memory, whether it is causal).

    A `Mask` where each query sees one run of keys; a `BlockMask` where gaps in the padding make few of it; (None,
    False) for functions that are not recognised, for many gaps, and for small masks with gaps, as well off as tensors.
    """
    paddings = _paddings(attention_mask, batch_size, kv_length, kv_offset)
    if not paddings:
        return None, False
    bounds, reach = None, reach_of(mask_function)
    if reach is None:
        query = torch.arange(q_length, device=device)[None] + q_offset
        rows = rows_of(mask_function, query)
        if rows is None:
            return None, False
        is_causal = bool((rows.end == query + 1).all())
        reach = Reach(None, 0 if is_causal else None)
        k_start = (rows.start - kv_offset)[:, None] if (rows.start > kv_offset).any() else None
        bounds = Mask(k_start=k_start, k_end=None if is_causal else (rows.end - kv_offset)[:, None])
    shift = int(q_offset) - int(kv_offset)
    masks = [interval_mask(reach, padding, q_length, kv_length, shift, device, bounds) for padding in paddings]
    if len(masks) == 1:
        return masks[0], reach.right == 0
    if batch_size * q_length * kv_length < _LARGE:
        return None, False
    as_blocks = (BlockMask.from_mask(mask, seqlen_q=q_length, seqlen_k=kv_length) for mask in masks)
    return functools.reduce(operator.or_, as_blocks), False


_FEW = 4
_LARGE = 1 << 22  # (query, key) pairs from which on blocks are worth their time
_RULES: dict = {}  # code object of a pattern of transformers' -> its rule


def _try_out() -> None:
    """Fill _RULES with those that agree with transformers, as `transformers_masks` does."""
    padding, documents = torch.tensor([0, 2]), torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 3, 3]])
    images = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 2], [0, 0, -1, -1, -1, 3, 3, 3, 3]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 3, 4, 5, 6], [5, 0, 1, 2, 3, 4, 5, 0, 1]])
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(3)
    image = masking_utils.blockwise_overlay(images)
    for rule, example in (
        (_chunks, masking_utils.chunked_overlay(4, padding)),
        (_documents, masking_utils.packed_sequence_mask_function(documents)),
        (_images, image),
        (_any_of, masking_utils.or_masks(causal, image)),
        (_all_of, masking_utils.packed_sequence_compatibility_function(window, positions, documents)),
    ):
        if _agrees(rule, example):
            _RULES[code_of(example)] = rule


def _agrees(rule: Callable, mask_function: Callable, batch: int = 2, size: int = 9) -> bool:
    """Whether `rule` gives what `mask_function` says, on batch x size x size pairs."""
    place, entry = torch.arange(size), torch.arange(batch)[:, None, None]
    rows = rule(place[None], **captured(mask_function))
    visible = mask_function(entry, 0, place[:, None], place).expand(batch, size, size)
    return torch.equal(visible, (rows.start[..., None] <= place) & (place < rows.end[..., None]))


_PACKED = code_of(masking_utils.packed_sequence_mask_function(None))
_REMAPPED = code_of(masking_utils.remap_positions_for_packed_sequence(None, None))
_try_out()
