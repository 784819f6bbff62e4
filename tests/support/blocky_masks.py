"""Random block masks, and what must hold of every one."""

import itertools

import pytest
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


def assert_same_tensors(a: BlockMask, b: BlockMask):
    assert (a.BLOCK_SIZE, a.seq_lengths) == (b.BLOCK_SIZE, b.seq_lengths)
    for (name, mine), other in zip(a.tensors().items(), b.tensors().values(), strict=True):
        assert torch.equal(mine, other), name


def check(mask: BlockMask, dense: torch.Tensor):
    """`mask` is `dense`, in its one form, and consistent with itself."""
    assert torch.equal(mask.to_dense(), dense)
    assert mask.shape == tuple(dense.shape)
    assert mask.visited_pairs == int(dense.sum())
    assert mask.density == pytest.approx(float(dense.sum()) / max(dense.numel(), 1))
    for row, columns in _blocks_of(dense, mask.BLOCK_SIZE).items():
        for kind, counts, indices in (
            ("partial", mask.kv_num_blocks, mask.kv_indices),
            ("full", mask.full_kv_num_blocks, mask.full_kv_indices),
        ):
            expected = [column for column, what in columns.items() if what == kind]
            assert int(counts[row]) == len(expected)
            assert indices[row][: len(expected)].tolist() == expected
    assert len(mask.bitmaps) == len(mask.bitmaps.unique(dim=0))


def _blocks_of(dense, block_size):
    """{(b, h, row): {column: "full" | "partial"}}, from the dense mask, block after block."""
    (batch, num_heads, seqlen_q, seqlen_k), (bq, bk) = dense.shape, block_size
    found = {}
    for b, h, row in itertools.product(range(batch), range(num_heads), range(-(-seqlen_q // bq))):
        found[b, h, row] = {}
        for column in range(-(-seqlen_k // bk)):
            block = dense[b, h, row * bq : (row + 1) * bq, column * bk : (column + 1) * bk]
            if block.any():
                found[b, h, row][column] = "full" if block.all() else "partial"
    return found
