"""Rotary position embedding (RoFormer, arXiv 2104.09864), in plain torch."""

import torch


def rotated(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool):
    """x [..., rows, head_dim], its rows turned by the angles of `positions` [rows], or of one for all of them.

    cos, sin      [positions, rotary_dim / 2]; columns past rotary_dim stay
    interleaved   whether columns 2 i and 2 i + 1 are a pair, or columns i and i + rotary_dim / 2
    Computed in float32 (float64 for float64), in x's dtype.
    """
    return turned(x, cos[positions], sin[positions], interleaved)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """As `rotated`, where cos and sin [..., rows, rotary_dim / 2] are those of the rows, broadcastable to them."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    pairs = cos.shape[-1]
    c, s = cos.to(dtype), sin.to(dtype)
    turning, rest = x[..., : 2 * pairs].to(dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        found = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)
    else:
        a, b = turning[..., :pairs], turning[..., pairs:]
        found = torch.cat([a * c - b * s, a * s + b * c], -1)
    return torch.cat([found.to(x.dtype), rest], -1)
