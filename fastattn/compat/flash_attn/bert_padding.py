"""flash-attn's `bert_padding`: tokens of padded batches, packed and put back. All are differentiable."""

import torch
from torch.nn.functional import pad

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def unpad_input(hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None):
    """The tokens of a padded batch, one after the other.

    hidden_states   [batch, seqlen, ...]
    attention_mask  [batch, seqlen], bool or int: 1 is a token
    unused_mask     [batch, seqlen], bool or int: 1 is a place that is kept in the result, but is no token

    Returns (hidden_states [total, ...], indices [total] int64 into the flattened batch, cu_seqlens [batch + 1] int32,
    max_seqlen int, seqused [batch] int32: tokens of each sequence without the unused ones).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    _check_shape("attention_mask", kept, hidden_states)
    packed = _packed(hidden_states, kept.bool(), kept.sum(1, dtype=torch.int32))
    return *packed, attention_mask.sum(1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor):
    """`unpad_input` where each row of the batch holds several sequences, one after the other.

    attention_mask_in_length  [batch, seqlen] int: each row lists the lengths of its sequences; 0 stands for none

    Returns (hidden_states [total, ...], indices [total], cu_seqlens [sequences + 1] int32, max_seqlen int).
    """
    _check_shape("attention_mask_in_length", attention_mask_in_length, hidden_states)
    places = torch.arange(hidden_states.shape[1], device=attention_mask_in_length.device)
    tokens = places < attention_mask_in_length.sum(1, keepdim=True)
    return _packed(hidden_states, tokens, attention_mask_in_length[attention_mask_in_length > 0])


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """[batch, seqlen, ...] from the tokens [total, ...] of `unpad_input` and its indices; 0 elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x[indices] along dimension 0."""
    return x.index_select(0, indices.long())


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """Zeros [first_axis_dim, ...] in which row indices[i] is values[i]."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices.long(), values)


def _packed(hidden_states, tokens, lengths):
    """(packed tokens, indices, cu_seqlens, max_seqlen) for tokens, bool [batch, seqlen], in sequences of `lengths`."""
    indices = tokens.flatten().nonzero().flatten()
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def _check_shape(name: str, mask: torch.Tensor, hidden_states: torch.Tensor) -> None:
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; with hidden_states of shape {tuple(hidden_states.shape)} it must "
            f"be [batch, seqlen], here {tuple(hidden_states.shape[:2])}"
        )
