"""Rotary embedding as matrices on pairs of columns, and calls with `rotary=` beside it."""

import torch

import fastattn
from backward import INF


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def qkv(seqlen_q, seqlen_k, heads=4, heads_k=2, dim=10):
    return double(2, heads, seqlen_q, dim), double(2, heads_k, seqlen_k, dim), double(2, heads_k, seqlen_k, 3)


def angles(positions, pairs, *batch):
    """Tables that are no rotations: every element is read, and gradients turn by the transpose."""
    return double(*batch, positions, pairs), double(*batch, positions, pairs)


def turned(x, cos, sin, first, interleaved=False):
    """x with its pairs of columns multiplied by matrices."""
    matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # [..., pairs, 2, 2]
    matrices = matrices[..., first : first + x.shape[2], :, :, :]
    matrices = matrices[:, None] if cos.dim() == 3 else matrices
    pairs = cos.shape[-1]
    columns = x[..., : 2 * pairs].unflatten(-1, (pairs, 2) if interleaved else (2, pairs))
    found = (matrices @ (columns if interleaved else columns.mT)[..., None])[..., 0]
    return torch.cat([(found if interleaved else found.mT).flatten(-2), x[..., 2 * pairs :]], -1)


def assert_as_turned(q, k, v, cos, sin, interleaved=False, dtype=torch.float64, tolerance=1e-11, **options):
    """out, lse and the gradients are those of q and k turned before, without rotary=."""
    found = []
    for inside in (True, False):
        leaves = [x.to(dtype if inside else torch.float64).detach().requires_grad_() for x in (q, k, v)]
        a, b, c = leaves
        if inside:
            rotary = {"rotary": (cos, sin), "rotary_interleaved": interleaved, "backend": "cpu"}
        else:
            tables, rotary = (cos.double(), sin.double()), {"backend": "reference"}
            a, b = turned(a, *tables, k.shape[2] - q.shape[2], interleaved), turned(b, *tables, 0, interleaved)
        out, lse = fastattn.attention(a, b, c, return_lse=True, **rotary, **options)
        loss = out.double().square().sum() + lse.double().masked_fill(lse == -INF, 0.0).square().sum()
        found.append([x.double() for x in (out, lse, *torch.autograd.grad(loss, leaves))])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)
