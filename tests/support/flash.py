"""What flash-attn computes, as plain formulas in float64 and in its own layout."""

import math

import torch


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def attend(q, k, v, *, causal=False, window=(None, None), softcap=0.0, slopes=None, scale=None, sink=None, chunk=0):
    """(out [batch, seqlen_q, num_heads, head_dim_v], lse [batch, num_heads, seqlen_q]), one step after the other.

    q [batch, seqlen_q, num_heads, head_dim]; k, v [batch, seqlen_k, num_heads_k, head_dim | head_dim_v]
    """
    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)[None, :]
    if slopes is not None:
        slopes = slopes.expand(q.shape[0], -1)[:, :, None, None]
        scores = scores - slopes * (position - key).abs()
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    left, right = window
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    if causal:
        seen &= key <= position
    if chunk:
        seen &= key // chunk == torch.div(position, chunk, rounding_mode="floor")
    scores = scores.masked_fill(~seen, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])[..., :seqlen_k]
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def check(found, expected, leaves, atol=1e-12):
    """The same values, and the same gradients."""
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    dout = randn(*found.shape)
    ours, theirs = (torch.autograd.grad(out, leaves, dout, retain_graph=True) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def angles(positions, columns):
    """Tables (cos, sin) [positions, columns] of rotary embedding."""
    frequency = 10000.0 ** -(torch.arange(columns, dtype=torch.float64) / columns)
    angle = torch.arange(positions)[:, None] * frequency
    return angle.cos(), angle.sin()


def turned(x, position, interleaved, columns=3, positions=40):
    """x [..., head_dim], its first 2 * columns columns as complex numbers, times exp(i * angle of the position)."""
    cos, sin = (table[position] for table in angles(positions, columns))
    first, rest = x[..., : 2 * columns], x[..., 2 * columns :]
    a, b = (first[..., ::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    product = torch.complex(a, b) * torch.complex(cos, sin)
    pair = product.real, product.imag
    first = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([first, rest], -1)
