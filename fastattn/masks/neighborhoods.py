"""Neighbourhoods along the axes of a line, an image or a video, for `fastattn.patterns.neighborhood`."""

import torch

from ..checks import check_int, one_line
from .block_checks import check_block_size
from .block_mask import BlockMask


def per_axis(name: str, value, axes: int) -> tuple:
    """`value` as one for each axis; ValueError if it has another number of them."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name}={one_line(value)} must be one value, or one for each of {axes} axes")
    return values


def neighbors(size: int, kernel_size: int, dilation: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last neighbour of each token on an axis."""
    check_int("kernel_size", kernel_size, 1)
    check_int("dilation", dilation, 1)
    if kernel_size * dilation > size:
        raise ValueError(
            f"kernel_size={kernel_size} times dilation={dilation} exceeds {size} tokens along its axis; reduce one"
        )
    token = torch.arange(size)
    group, place = token % dilation, token // dilation  # tokens that are a multiple of dilation apart form a group
    if causal:
        first, last = (place - kernel_size + 1).clamp(min=0), place
    else:
        length = (size - group + dilation - 1) // dilation
        first = torch.minimum((place - kernel_size // 2).clamp(min=0), length - kernel_size)
        last = first + kernel_size - 1
    return first * dilation + group, last * dilation + group


def visited_blocks(shape, axes, dilations, places, prefix: int, block_size) -> BlockMask:
    """Blocks, taken as full, that hold every neighbour: the runs of keys along the last axis."""
    start = torch.zeros(1, len(places[0]), dtype=torch.int64)  # [combinations of the other axes, tokens]
    for place, size, (first, last), step in list(zip(places, shape, axes, dilations, strict=True))[:-1]:
        steps = torch.arange(0, int((last - first).max()) + 1, step)[:, None]
        choices = torch.minimum(first[place] + steps, last[place])
        start = (start[:, None] * size + choices).flatten(0, 1)
    first, last = (bound[places[-1]] for bound in axes[-1])
    block_q, block_k = check_block_size(block_size)
    seqlen = prefix + len(first)
    start = start * shape[-1] + prefix
    first, last = ((start + bound)[..., None] // block_k for bound in (first, last))
    columns = torch.minimum(first + torch.arange(int((last - first).max()) + 1), last)
    rows = (torch.arange(prefix, seqlen) // block_q)[:, None]
    visited = (rows * seqlen + columns).unique()
    return BlockMask.from_coo(
        visited // seqlen, visited % seqlen, seqlen_q=seqlen, block_size=block_size, of_blocks=True
    )
