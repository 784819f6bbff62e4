"""Partial results and how they are added up, in one order, in place; nothing here has a gradient."""

import math
from typing import NamedTuple

import torch

LN2 = math.log(2.0)


class Partial(NamedTuple):
    """Attention over some of the keys, in the compute dtype.

    out           [batch, num_heads, seqlen_q, head_dim_v]
    top, log_sum  [batch, num_heads, seqlen_q]: lse is their sum, of two numbers since lse may be large; log_sum is +inf
                  in a row that has seen no key
    """

    out: torch.Tensor
    top: torch.Tensor
    log_sum: torch.Tensor

    @property
    def lse(self) -> torch.Tensor:
        """The log of the softmax denominator, -inf where no key was seen."""
        return (self.top + self.log_sum).masked_fill(self.log_sum == math.inf, -math.inf)


def of_lse(out: torch.Tensor, lse: torch.Tensor) -> Partial:
    """The Partial of a result of `attention`."""
    blind = lse == -math.inf
    zeros = torch.zeros_like(lse)
    return Partial(out, lse.masked_fill(blind, 0.0), zeros.masked_fill(blind, math.inf))


def of_kernel(out: torch.Tensor, lse_parts: torch.Tensor, backend: str) -> Partial:
    """The Partial of what a kernel of `backend` saves for its backward pass."""
    top, log_sum = lse_parts.unbind(-1)
    return Partial(out, *(_in_unit(top, log_sum, LN2) if backend == "triton" else (top, log_sum)))


def for_kernel(a: Partial, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel of `backend` would have saved over all keys: out and lse_parts, Triton's in units of log2."""
    top, log_sum = _in_unit(a.top, a.log_sum, 1.0 / LN2) if backend == "triton" else (a.top, a.log_sum)
    return a.out, torch.stack([top, log_sum], -1)


def _in_unit(top: torch.Tensor, log_sum: torch.Tensor, unit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both times `unit`, and what rounding takes from top in log_sum. A top that is a bias of -1e38 stays as it is: any
    rounding would be more than the sum."""
    exact = torch.where(top.abs() < 2.0**100, top.double() * unit, top.double())
    rounded = exact.to(top.dtype)
    return rounded, log_sum * unit + (exact - rounded.double()).to(top.dtype)


def empty(q: torch.Tensor, head_dim_v: int, dtype: torch.dtype) -> Partial:
    """Of queries that see no key."""
    rows = q.shape[:3]
    zeros = q.new_zeros(rows, dtype=dtype)
    return Partial(q.new_zeros((*rows, head_dim_v), dtype=dtype), zeros, torch.full_like(zeros, math.inf))


def added(a: Partial | None, b: Partial) -> Partial:
    """Over the keys of both, which must have none in common; `a.out` may be overwritten. None: nothing so far.

    The mean of both outs, weighted by their softmax denominators (FlashAttention-2, arXiv 2307.08691).
    """
    if a is None:
        return b
    weight_a, weight_b, top, log_sum = _weights(a, b)
    out = a.out.mul_(weight_a[..., None]).addcmul_(b.out, weight_b[..., None])
    return Partial(out, top, log_sum)


def with_sinks(a: Partial, sinks: torch.Tensor) -> Partial:
    """With one more logit a head in the denominator."""
    logits = sinks.to(a.top.dtype).view(1, -1, 1).expand(a.top.shape)
    weight, _, top, log_sum = _weights(a, Partial(None, logits, torch.zeros_like(a.top)))
    return Partial(a.out.mul_(weight[..., None]), top, log_sum)


def _weights(a: Partial, b: Partial) -> tuple[torch.Tensor, ...]:
    """Shares of both in the sum, and its top and log_sum."""
    blind_a, blind_b = a.log_sum == math.inf, b.log_sum == math.inf
    size_a = (a.top + a.log_sum).masked_fill(blind_a, -math.inf)
    size_b = (b.top + b.log_sum).masked_fill(blind_b, -math.inf)
    top = torch.where(size_a >= size_b, a.top, b.top)
    # Of equal tops (-inf beside -inf among them) the difference is 0.
    log_a, log_b = (
        (x.log_sum + torch.where(x.top == top, 0.0, x.top - top)).masked_fill(blind, -math.inf)
        for x, blind in ((a, blind_a), (b, blind_b))
    )
    most = torch.maximum(log_a, log_b)
    blind = most == -math.inf
    most = most.masked_fill(blind, 0.0)
    part_a, part_b = torch.exp(log_a - most), torch.exp(log_b - most)
    total = (part_a + part_b).masked_fill(blind, 1.0)
    log_sum = (most + torch.log(total)).masked_fill(blind, math.inf)
    return part_a / total, part_b / total, top.masked_fill(blind, 0.0), log_sum
