"""Packed sequences, caches and pages, and what `attention` gives for each sequence alone."""

import torch

import fastattn
from fastattn.torch_internals import numbers_of

LENGTHS = ((5, 9), (0, 4), (33, 33), (1, 300), (7, 0), (150, 170), (0, 0), (3, 2100), (129, 40))
"""(queries, keys) of sequences: empty ones, decoding steps, split keys, more queries than keys."""


def starts(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed(lengths=LENGTHS, num_heads=4, num_heads_k=2, head_dim=24, head_dim_v=40, dtype=torch.float32, seed=0):
    """q, k, v, cu_seqlens_q, cu_seqlens_k"""
    generator = torch.Generator().manual_seed(seed)
    total_q, total_k = (sum(x) for x in zip(*lengths, strict=True))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = normal(total_q, num_heads, head_dim), normal(total_k, num_heads_k, head_dim)
    return q, k, normal(total_k, num_heads_k, head_dim_v), *map(starts, zip(*lengths, strict=True))


def one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, *, alibi_slopes=None, seed=None, **options):
    """(out, lse) of `attention` for each sequence alone, put together."""
    outs, lses = [], []
    bounds_q, bounds_k = map(numbers_of, (cu_seqlens_q, cu_seqlens_k))
    for i in range(len(bounds_q) - 1):
        queries, keys = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        if alibi_slopes is not None:
            options["alibi_slopes"] = alibi_slopes[i] if alibi_slopes.dim() == 2 else alibi_slopes
        if seed is not None:
            options["seed"] = seed + i
        one = [x[rows].transpose(0, 1)[None] for x, rows in ((q, queries), (k, keys), (v, keys))]
        out, lse = fastattn.attention(*one, **options, return_lse=True)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def into_pages(x: torch.Tensor, page_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """([num_pages, heads, page_size, dim], block_table) that hold x [batch, heads, rows, dim], in random pages."""
    batch, heads, rows, dim = x.shape
    entries = -(-rows // page_size)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.full((batch * entries + 3, heads, page_size, dim), 7, dtype=x.dtype)
    table = torch.randperm(len(pages), generator=generator)[: batch * entries].view(batch, entries).int()
    for i in range(batch):
        for j in range(entries):
            part = x[i, :, j * page_size : (j + 1) * page_size]
            pages[table[i, j], :, : part.shape[1]] = part
    return pages, table
