"""flash-attn's `layers.rotary`: rotary position embedding (Su et al., arXiv 2104.09864) in plain torch."""

import torch

from ...layouts.rotary import rotated

__all__ = ["apply_rotary_emb", "apply_rotary_emb_func"]


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
    if cos.dim() != 2 or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}; it must be [positions, rotary_dim / 2], rotary_dim <= head_dim, here "
            f"{x.shape[-1]}"
        )
    rows = positions if cu_seqlens is not None else positions[:, None]  # [..., num_heads, rows, head_dim] below
    turned = rotated(x.transpose(-3, -2), rows, cos, sin, interleaved).transpose(-3, -2)
    return x.copy_(turned) if inplace else turned


apply_rotary_emb_func = apply_rotary_emb
