"""Absolute positions, added to the embeddings of tokens."""

import torch
from torch import nn

from ..checks import one_line


class SinusoidalPositions(nn.Module):
    """x + sines and cosines of the positions, of wavelengths from 2 pi to base * 2 pi (Vaswani et al., 1706.03762).

    dim   width of x, even: column 2i is a sine and column 2i + 1 the cosine of the same angle
    base  10000 in the paper

    Called with x [..., seqlen, dim] and, optionally, positions: an int or float tensor broadcastable to [..., seqlen]
    (default 0 ... seqlen - 1). Any length: nothing is stored. Returns x's shape and dtype.
    """

    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim={dim} must be even: sines and cosines come in pairs")
        self.dim, self.base = dim, base

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x={one_line(x)} must be [..., seqlen, {self.dim}], dim as this module was made with")
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        rates = self.base ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32) / self.dim)
        angles = positions.to(torch.float32)[..., None] * rates
        return x + torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}"


class LearnedPositions(nn.Embedding):
    """x + a learned vector for each position (as in BERT and GPT-2).

    max_seqlen  positions 0 ... max_seqlen - 1 have a vector; an IndexError of the embedding beyond
    dim         width of x

    Called as `SinusoidalPositions`, with integer positions.
    """

    def __init__(self, max_seqlen: int, dim: int, device=None, dtype=None):
        super().__init__(max_seqlen, dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        if positions is None:
            seqlen = x.shape[-2]
            if seqlen > self.num_embeddings:
                raise ValueError(f"x={one_line(x)} has more than max_seqlen={self.num_embeddings} positions")
            return x + self.weight[:seqlen].to(x.dtype)
        return x + super().forward(positions).to(x.dtype)
