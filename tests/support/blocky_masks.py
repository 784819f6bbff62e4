"""Random block masks."""

import torch

from fastattn import BlockMask


def random_dense(*shape, seed=0, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def blocky_dense(seed, shape=(2, 3, 77, 130), unit=16):
    """Random rectangles: full, empty and partial blocks all occur."""
    coarse = random_dense(*shape[:2], -(-shape[2] // unit), -(-shape[3] // unit), seed=seed, share=0.6)
    dense = coarse.repeat_interleave(unit, 2).repeat_interleave(unit, 3)[:, :, : shape[2], : shape[3]]
    return dense & random_dense(*shape[:2], shape[2], 1, seed=seed + 1, share=0.97)


SIZE = (32, 16)


def of(dense):
    return BlockMask.from_dense(dense, block_size=SIZE)
