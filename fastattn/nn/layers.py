"""torch's transformer layers with `MultiHeadAttention` in them."""

import torch

from .multihead import MultiHeadAttention


class _Layer:
    """What both layers change of torch's: the modules of attention, with the same names in state_dict."""

    def _replace_attention(self, *names: str, **options) -> None:
        self.activation_relu_or_gelu = 0  # torch's fused layer would be called instead of our attention
        for name in names:
            old = getattr(self, name)
            new = MultiHeadAttention(
                old.embed_dim, old.num_heads, old.dropout, old.in_proj_bias is not None, batch_first=old.batch_first,
                device=old.in_proj_weight.device, dtype=old.in_proj_weight.dtype, **options,
            )  # fmt: skip
            if new.in_proj_weight.shape == old.in_proj_weight.shape:
                new.load_state_dict(old.state_dict(), strict=False)  # the same numbers for the same seed
            setattr(self, name, new)


class TransformerEncoderLayer(_Layer, torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`, argument by argument, on fastattn.

    Other keyword arguments (num_heads_k, rotary, window_size, qk_norm, ...) go to its `MultiHeadAttention`. In a
    torch.nn.TransformerEncoder pass enable_nested_tensor=False, or torch warns that it does not use nested tensors.
    """

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
        activation=torch.nn.functional.relu, layer_norm_eps: float = 1e-5, batch_first: bool = False,
        norm_first: bool = False, bias: bool = True, device=None, dtype=None, **options,
    ):  # fmt: skip
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        self._replace_attention("self_attn", **options)


class TransformerDecoderLayer(_Layer, torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`, argument by argument, on fastattn.

    Other keyword arguments go to the `MultiHeadAttention` over the layer's own sequence; the one over the memory is
    plain.
    """

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
        activation=torch.nn.functional.relu, layer_norm_eps: float = 1e-5, batch_first: bool = False,
        norm_first: bool = False, bias: bool = True, device=None, dtype=None, **options,
    ):  # fmt: skip
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        self._replace_attention("self_attn", **options)
        self._replace_attention("multihead_attn")
