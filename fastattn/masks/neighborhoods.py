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


def neighbors(
    size: int, kernel_size: int, dilation: int, causal: bool, stride: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last neighbour of each token on an axis."""
    check_int("kernel_size", kernel_size, 1)
    check_int("dilation", dilation, 1)
    check_int("stride", stride, 1)
    if kernel_size * dilation > size:
        raise ValueError(
            f"kernel_size={kernel_size} times dilation={dilation} exceeds {size} tokens along its axis; reduce one"
        )
    if stride > kernel_size:
        raise ValueError(f"stride={stride} exceeds kernel_size={kernel_size}: keys would be left out; reduce it")
    token = torch.arange(size)
    group, place = token % dilation, token // dilation  # tokens that are a multiple of dilation apart form a group
    length = (size - group + dilation - 1) // dilation
    # `stride` tokens of a group, one after the other, share the window of one of them.
    leader = place // stride * stride + (stride - 1 if causal else stride // 2)
    leader = torch.minimum(leader, length - 1)
    if causal:
        first, last = (leader - kernel_size + 1).clamp(min=0), place
    else:
        first = torch.minimum((leader - kernel_size // 2).clamp(min=0), length - kernel_size)
        last = first + kernel_size - 1
    return first * dilation + group, last * dilation + group


def relative_lists(shape, axes, kernel_sizes, dilations) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, places in a table [2 * kernel_size - 1, ...] of relative positions), both int64 [tokens, neighbours], of
    neighbourhoods without causality and stride, in which every token has kernel_size neighbours along each axis."""
    keys = table = torch.zeros(1, 1, dtype=torch.int64)
    for size, (first, _), kernel_size, step in zip(shape, axes, kernel_sizes, dilations, strict=True):
        of_axis = first[:, None] + step * torch.arange(kernel_size)  # [size, kernel_size]
        apart = (of_axis - torch.arange(size)[:, None]) // step + kernel_size - 1
        keys = _product(keys * size, of_axis)
        table = _product(table * (2 * kernel_size - 1), apart)
    return keys, table


def _product(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Sums of each entry of [a, b] with each of [c, d], as [a * c, b * d]."""
    return (outer[:, None, :, None] + inner[None, :, None]).flatten(2).flatten(0, 1)


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
