"""flash-attn's `layers.rotary`: rotary position embedding (Su et al., arXiv 2104.09864) in plain torch."""

import torch

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func", "apply_rotary_emb_torch"]


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """x with the first rotary_dim columns of each head turned by its position's angles; differentiable.

    x               [batch, seqlen, num_heads, head_dim], or with cu_seqlens [total, num_heads, head_dim]
    cos, sin        [positions, rotary_dim / 2], rotary_dim <= head_dim
    interleaved     columns 2i and 2i + 1 are turned together (GPT-J); otherwise i and i + rotary_dim / 2 (GPT-NeoX)
    inplace         write into x, and return it
    seqlen_offsets  position of each sequence's first token: int or int tensor [batch]
    cu_seqlens      int32 [batch + 1]: where the sequences of x start and end
    max_seqlen      not needed here

    Raises ValueError if a position lies outside cos and sin.
    """
    if cu_seqlens is None:
        offsets = torch.as_tensor(seqlen_offsets, device=x.device)
        positions = torch.arange(x.shape[1], device=x.device) + offsets.reshape(-1, 1)
    else:
        starts = cu_seqlens.long()
        row = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(starts, row, right=True) - 1
        offsets = torch.as_tensor(seqlen_offsets, device=x.device).expand(len(starts) - 1)
        positions = row - starts[sequence] + offsets[sequence]
    if positions.numel() and not (int(positions.min()) >= 0 and int(positions.max()) < len(cos)):
        raise ValueError(
            f"positions {int(positions.min())} ... {int(positions.max())} are needed, and cos has {len(cos)}; give "
            "more rows of cos and sin, or a smaller seqlen_offsets"
        )
    turned = apply_rotary_emb_torch(x, cos[positions], sin[positions], interleaved)
    return x.copy_(turned) if inplace else turned


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x, cos, sin, interleaved: bool = False) -> torch.Tensor:
    """`apply_rotary_emb` with the angles of each token: cos, sin [..., seqlen, rotary_dim / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"cos has rotary_dim / 2 = {cos.shape[-1]} columns, x head_dim={x.shape[-1]}: at most half")
    turning, still = x[..., :rotary_dim], x[..., rotary_dim:]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    pair = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, still], dim=-1)
