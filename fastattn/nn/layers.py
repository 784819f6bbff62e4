"""torch's transformer layers with `MultiHeadAttention` in them."""

import inspect

import torch

from .multihead import MultiHeadAttention

_PARAMETERS = inspect.signature(MultiHeadAttention).parameters.values()
_OPTIONS = {x.name for x in _PARAMETERS if x.kind is x.KEYWORD_ONLY}
"""What torch's module of attention has not."""


class _OnFastattn:
    """A layer of torch's, argument by argument, whose modules of attention are ours, under the same names."""

    def __init__(self, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in _OPTIONS & kwargs.keys()}
        super().__init__(*args, **kwargs)
        self.activation_relu_or_gelu = 0  # torch's fused layer would be called instead of our attention
        for name, old in list(self.named_children()):
            if isinstance(old, torch.nn.MultiheadAttention):
                setattr(self, name, _in_place_of(old, options if name == "self_attn" else {}))


def _in_place_of(old: torch.nn.MultiheadAttention, options: dict) -> MultiHeadAttention:
    """With the parameters of `old` where they have the same shapes: the same numbers for the same seed."""
    new = MultiHeadAttention(
        old.embed_dim, old.num_heads, old.dropout, old.in_proj_bias is not None, batch_first=old.batch_first,
        device=old.in_proj_weight.device, dtype=old.in_proj_weight.dtype, **options,
    )  # fmt: skip
    if new.in_proj_weight.shape == old.in_proj_weight.shape:
        new.load_state_dict(old.state_dict(), strict=False)
    return new


class TransformerEncoderLayer(_OnFastattn, torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`, argument by argument, on fastattn.

    The keyword arguments that only `MultiHeadAttention` has (num_heads_k, rotary, window_size, qk_norm, ...) go to its
    self_attn. In a torch.nn.TransformerEncoder pass enable_nested_tensor=False, or torch warns that it does not use
    nested tensors. Shapes, dtypes and errors are torch's and those of `MultiHeadAttention`.
    """


class TransformerDecoderLayer(_OnFastattn, torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`, argument by argument, on fastattn.

    The keyword arguments that only `MultiHeadAttention` has go to self_attn, over the layer's own sequence; the one
    over the memory, multihead_attn, is plain. Shapes, dtypes and errors are torch's and those of `MultiHeadAttention`.
    """
