"""What is right: float64 results to measure errors against, and when an error is too large to time anything."""

import math
import os
from functools import lru_cache
from typing import NamedTuple

import torch

from cases import Case, inputs
from fastattn import Mask, reference
from fastattn.masks import dense, diagonal_bounds

SCORES_AT_ONCE = 1 << 22
"""Scores that the reference holds at a time: 32 MiB in float64, whatever the sequence length."""

WORTH_THREADS = 1 << 22
"""Scores of a whole case from which on all cores compute its float64 result."""

FLOOR = {"float64": 1e-14, "float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}
"""Added to twice the error of plain torch; for 16-bit types the rounding of an output near 1."""

CEILING = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""No result that is off by more than this is timed, ours or a peer's."""


class Errors(NamedTuple):
    """Largest and root-mean-square difference from float64; inf where a result is not finite."""

    max: float
    rms: float


def errors(out: torch.Tensor, exact: torch.Tensor) -> Errors:
    """`Errors` of `out`, which must have the shape of `exact`."""
    if out.shape != exact.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; it must be {tuple(exact.shape)}")
    difference = out.double() - exact
    if not torch.isfinite(difference).all():
        return Errors(math.inf, math.inf)
    return Errors(float(difference.abs().max()), float(difference.square().mean().sqrt()))


def wrong(ours: Errors, plain: Errors, dtype: str) -> str | None:
    """Why `ours` must not be timed, given the errors of plain torch in the same dtype; None if it may."""
    limit = 2.0 * plain.max + FLOOR[dtype]
    if not ours.max <= limit:
        return f"max error {ours.max:.1e} exceeds twice that of plain torch ({plain.max:.1e}) + {FLOOR[dtype]:.0e}"
    return above_ceiling(ours, dtype)


def above_ceiling(result: Errors, dtype: str) -> str | None:
    """Why a result, ours or a peer's, is not a result of this case at all; None if it is."""
    return None if result.max <= CEILING[dtype] else f"max error {result.max:.1e} exceeds {CEILING[dtype]:.0e}"


def interval(case: Case, kwargs: dict) -> Mask:
    """The part of the mask that is an interval of keys for each query: everything but a bool tensor."""
    mask = kwargs.get("mask")
    both = mask if isinstance(mask, Mask) else Mask()
    both = both & Mask.causal() if case.causal else both
    return both if case.window_size is None else both & Mask.window(*case.window_size)


@lru_cache(maxsize=64)  # rows of several suites share cases; some 5 MiB each
def truth(case: Case) -> tuple[torch.Tensor, Errors]:
    """(float64 result, errors of plain torch in the case's dtype), head by head in bounded memory."""
    threads = torch.get_num_threads()
    if case.batch * case.num_heads * case.seqlen_q * (case.seqlen_k or case.seqlen_q) > WORTH_THREADS:
        torch.set_num_threads(os.cpu_count() or 1)  # nothing is timed here
    try:
        return _truth(case)
    finally:
        torch.set_num_threads(threads)


def _truth(case: Case) -> tuple[torch.Tensor, Errors]:
    (q, k, v), kwargs = inputs(case)
    batch, num_heads, seqlen_q = q.shape[:3]
    exact = torch.empty(batch, num_heads, seqlen_q, v.shape[3], dtype=torch.float64)
    plain = torch.empty_like(exact)
    rows = max(1, SCORES_AT_ONCE // max(1, k.shape[2]))
    for b in range(batch):
        for h in range(num_heads):
            h_k = h // (num_heads // k.shape[1])
            qkv = q[b : b + 1, h : h + 1], k[b : b + 1, h_k : h_k + 1], v[b : b + 1, h_k : h_k + 1]
            for i in range(0, seqlen_q, rows):
                j = min(i + rows, seqlen_q)
                chunk = (qkv[0][:, :, i:j], *qkv[1:])
                options = _scores_of(case, kwargs, b, h, i, j, q.shape, k.shape[2])
                exact[b, h, i:j] = reference.attention(*(x.double() for x in chunk), **options)[0][0, 0]
                plain[b, h, i:j] = reference.attention(*chunk, **options)[0][0, 0]
    return exact, errors(plain, exact)


def _scores_of(case, kwargs, b, h, i, j, q_shape, seqlen_k) -> dict:
    """Arguments of `reference.attention` for queries i ... j - 1 of one head."""
    batch, num_heads, seqlen_q, _ = q_shape

    def rows(x, width):
        return None if x is None else x.expand(batch, num_heads, seqlen_q, *width)[b : b + 1, h : h + 1, i:j]

    mask = interval(case, kwargs)
    lo, hi = diagonal_bounds(mask.windows, seqlen_q, seqlen_k)
    # the queries are counted from i here, so the diagonals shift by i
    visible = dense(lo + i, hi + i, rows(mask.k_start, ()), rows(mask.k_end, ()), j - i, seqlen_k, "cpu")
    if isinstance(kwargs.get("mask"), torch.Tensor):
        visible = visible & rows(kwargs["mask"], (seqlen_k,))
    visible = None if visible.all() else visible  # saves the reference two passes
    bias = rows(kwargs.get("bias"), (seqlen_k,))
    if case.alibi:
        slope = kwargs["alibi_slopes"].expand(batch, num_heads)[b, h].double()
        query = torch.arange(i, j)[:, None] + (seqlen_k - seqlen_q)
        alibi = -slope * (query - torch.arange(seqlen_k)).abs()
        bias = alibi if bias is None else bias.double() + alibi
    sinks = kwargs["sinks"][h : h + 1] if case.sinks else None
    options = dict(visible=visible, bias=bias, sinks=sinks)
    return options | dict(softcap=case.softcap, softmax_scale=case.softmax_scale)
