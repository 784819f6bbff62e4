"""A block mask as a picture."""

from typing import TYPE_CHECKING

import torch

from . import blocks
from .blocks import FULL

if TYPE_CHECKING:
    from .block_mask import BlockMask


def plot(mask: "BlockMask", ax, batch: int, head: int, pixels: int):
    """Draw one head of `mask` into matplotlib Axes, new ones for None; returns them."""
    import matplotlib.pyplot as plt

    one = _head(mask, batch, head)
    picture = one.to_dense()[0, 0] if max(one.seq_lengths) <= pixels else _shares(one, pixels)
    ax = plt.figure().add_subplot() if ax is None else ax
    ax.imshow(
        picture.cpu().float().numpy(), cmap="Greys", vmin=0.0, vmax=1.0, interpolation="none", aspect="auto",
        extent=(0, one.seq_lengths[1], one.seq_lengths[0], 0),
    )  # fmt: skip
    ax.set(xlabel="key", ylabel="query", title=f"density {100 * one.density:.3g} %")
    return ax


def _head(mask: "BlockMask", batch: int, head: int) -> "BlockMask":
    for name, index, size in (("batch", batch, mask.shape[0]), ("head", head, mask.shape[1])):
        if not 0 <= index < size:
            raise ValueError(f"{name}={index} must be in 0 ... {size - 1}")
    one = {
        name: tensor if name == "bitmaps" else tensor[batch : batch + 1, head : head + 1]
        for name, tensor in mask.tensors().items()
    }
    return type(mask)(**one, BLOCK_SIZE=mask.BLOCK_SIZE, seq_lengths=mask.seq_lengths)


def _shares(mask: "BlockMask", pixels: int) -> torch.Tensor:
    """The share of pairs that is seen, [<= pixels, <= pixels], a pixel being some blocks of one head."""
    grid, (keys, ids, bitmaps) = mask._grid, mask._blocks()
    height, width = min(grid.rows, pixels), min(grid.columns, pixels)
    seen = grid.area(keys)
    seen[ids != FULL] = blocks.popcount(bitmaps)[ids[ids != FULL]]
    pixel = grid.row(keys) * height // grid.rows * width + grid.column(keys) * width // grid.columns
    total = torch.zeros(height * width, dtype=torch.int64, device=mask.device).index_add(0, pixel, seen)
    tokens = [
        torch.bincount(torch.arange(n, device=mask.device) // block * size // count, minlength=size)
        for n, block, size, count in (
            (grid.seqlen_q, grid.block_q, height, grid.rows),
            (grid.seqlen_k, grid.block_k, width, grid.columns),
        )
    ]
    return total.view(height, width) / (tokens[0][:, None] * tokens[1])
