"""Small models in plain torch whose attention goes to torch's functions in every way that there is."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as imported
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, LENGTH = 32, 4, 9


class Block(nn.Module):
    """Attention with a residual; how the function is found is the one difference between blocks."""

    def __init__(self, is_imported: bool = False, dropout_p: float = 0.0, causal: bool = False):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.is_imported, self.dropout_p, self.causal = is_imported, dropout_p, causal

    def forward(self, x):
        """[batch, seqlen, WIDTH] -> the same."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind()
        function = imported if self.is_imported else functional.scaled_dot_product_attention
        out = function(q, k, v, dropout_p=self.dropout_p if self.training else 0.0, is_causal=self.causal)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Blocks, an encoder layer and attention with weights, behind each other."""

    def __init__(self, checkpointed: bool | None = None):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(is_imported=True), Block(causal=True)])
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
        self.pool = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.checkpointed = checkpointed

    def forward(self, x):
        """[batch, seqlen, WIDTH] -> the same."""
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        x = self.layer(x)
        out, weights = self.pool(x, x, x)
        return out + weights.sum(1)[..., None]


CALLS = 5
"""Attention calls of a Net's forward."""


def net(**options) -> Net:
    """A Net with weights from seed 0, in eval mode."""
    torch.manual_seed(0)
    return Net(**options).eval()


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Inputs [batch, length, WIDTH] from a seed of their own."""
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))
