"""What is right: float64 results to measure errors against, and when an error is too large to time anything."""

import math
import os
from functools import lru_cache
from typing import NamedTuple

import torch

import fastattn
from cases import Case, inputs
from fastattn import BlockMask, Mask, reference
from fastattn.masks import dense, diagonal_bounds
from work import Work, tensors

SCORES_AT_ONCE = 1 << 22
"""Scores that the reference holds at a time: 32 MiB in float64, whatever the sequence length."""

WORTH_THREADS = 1 << 22
"""Scores of a whole case from which on all cores compute its float64 result."""

FLOOR = {"float64": 1e-14, "float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}
"""Added to twice the error of plain torch; for 16-bit types the rounding of a number near 1."""

CEILING = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""No result that is off by more than this is timed, ours or a peer's."""

Results = dict[str, torch.Tensor]
"""By name: "out", and the gradients of "q", "k", "v", ... of work that trains."""


class Errors(NamedTuple):
    """Largest and root-mean-square difference from float64; inf where a result is not finite.

    Those of gradients are fractions of the largest entry of any gradient.
    """

    max: float
    rms: float


def errors(results: Results, exact: Results) -> dict[str, Errors]:
    """`Errors` of each result, which must have the names and shapes of `exact`."""
    if results.keys() != exact.keys():
        raise ValueError(f"results are named {', '.join(results)}; they must be {', '.join(exact)}")
    # not over its own largest entry: that is 0 for a bias that shifts whole rows, or with one key
    unit = max([float(x.abs().max()) for name, x in exact.items() if name != "out" and x.numel()], default=0.0) or 1.0
    return {name: _errors(name, results[name], x, 1.0 if name == "out" else unit) for name, x in exact.items()}


def _errors(name: str, result: torch.Tensor, exact: torch.Tensor, unit: float) -> Errors:
    if result.shape != exact.shape:
        raise ValueError(f"{name} has shape {tuple(result.shape)}; it must be {tuple(exact.shape)}")
    difference = result.detach().double() - exact
    if not torch.isfinite(difference).all():
        return Errors(math.inf, math.inf)
    return Errors(float(difference.abs().max()) / unit, float(difference.square().mean().sqrt()) / unit)


def worst(found: dict[str, Errors]) -> Errors:
    """The largest of each error."""
    return Errors(max(e.max for e in found.values()), max(e.rms for e in found.values()))


def wrong(ours: dict[str, Errors], plain: dict[str, Errors], dtype: str) -> str | None:
    """Why `ours` must not be timed, given the errors of plain torch in the same dtype; None if it may."""
    for name, error in ours.items():
        if not error.max <= 2.0 * plain[name].max + FLOOR[dtype]:
            return (
                f"max error {error.max:.1e} of {_title(name)} exceeds twice that of plain torch "
                f"({plain[name].max:.1e}) + {FLOOR[dtype]:.0e}"
            )
    return above_ceiling(ours, dtype)


def above_ceiling(found: dict[str, Errors], dtype: str) -> str | None:
    """Why results, ours or a peer's, are not results of this work at all; None if they are."""
    for name, error in found.items():
        if not error.max <= CEILING[dtype]:
            return f"max error {error.max:.1e} of {_title(name)} exceeds {CEILING[dtype]:.0e}"
    return None


def _title(name: str) -> str:
    return name if name == "out" else f"d{name}"


def interval(case: Case, kwargs: dict) -> Mask:
    """The part of the mask that is an interval of keys for each query: everything but a bool tensor."""
    mask = kwargs.get("mask")
    both = mask if isinstance(mask, Mask) else Mask()
    both = both & Mask.causal() if case.causal else both
    return both if case.window_size is None else both & Mask.window(*case.window_size)


@lru_cache(maxsize=16)  # rows of several kinds share their work; up to 100 MiB each
def truth(work: Work) -> tuple[Results, dict[str, Errors]]:
    """(float64 results, errors of plain torch in the case's dtype)"""
    kept = None
    case = work.case
    if case.dropout_p:
        shape = case.batch, case.num_heads, case.seqlen_q, case.seqlen_k or case.seqlen_q
        kept = fastattn.dropout_mask(*shape, case.dropout_p, inputs(case)[1]["seed"])
    exact, dtype = results(work, torch.float64, kept), getattr(torch, work.case.dtype)
    plain = results(work, reference.compute_dtype(dtype), kept)
    return exact, errors({name: x.to(dtype) for name, x in plain.items()}, exact)


def results(work: Work, dtype: torch.dtype, kept: torch.Tensor | None = None) -> Results:
    """By the reference in `dtype`, some rows of a head at a time, on all cores: nothing is timed here.

    kept   bool [batch, num_heads, seqlen_q, seqlen_k], the weights that dropout keeps; the one thing that is n x n
    """
    threads, case = torch.get_num_threads(), work.case
    if case.batch * case.num_heads * case.seqlen_q * (case.seqlen_k or case.seqlen_q) > WORTH_THREADS:
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        return _results(work, dtype, kept)
    finally:
        torch.set_num_threads(threads)


def _results(work, dtype, kept) -> Results:
    leaves, kwargs, dout = tensors(work, dtype)
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    batch, num_heads, seqlen_q = q.shape[:3]
    out = torch.empty(batch, num_heads, seqlen_q, v.shape[3], dtype=dtype)
    rows = max(1, SCORES_AT_ONCE // max(1, k.shape[2]))
    rows = min(rows, work.block_mask.BLOCK_SIZE[0]) if work.pattern else rows
    for b in range(batch):
        for h in range(num_heads):
            h_k = h // (num_heads // k.shape[1])
            for i in range(0, seqlen_q, rows):
                j = min(i + rows, seqlen_q)
                qkv = q[b : b + 1, h : h + 1, i:j], k[b : b + 1, h_k : h_k + 1], v[b : b + 1, h_k : h_k + 1]
                options = _options_of(work.case, leaves, kwargs, b, h, i, j)
                if work.pattern:
                    qkv, options = _seen(*qkv, options)
                chunk = _attention(*qkv, options, work.case.dropout_p, None if kept is None else kept[b, h, i:j])
                out[b, h, i:j] = chunk.detach()[0, 0]
                if work.trains:
                    chunk[0, 0].backward(dout[b, h, i:j])
    found = {"out": out} if work.passes != "backward" else {}
    return found | ({name: x.grad for name, x in leaves.items()} if work.trains else {})


def _attention(q, k, v, options, dropout_p, kept) -> torch.Tensor:
    """`reference.attention`, with the dropout mask given: a chunk's bits are not those of a call of its size."""
    if kept is None:
        return reference.attention(q, k, v, **options)[0]
    modifications = {name: x for name, x in options.items() if name not in ("visible", "sinks")}
    scores, visible, _ = reference._scores(q, k, options.get("visible"), None, modifications)
    p, _ = reference._softmax(scores, options["sinks"])
    return reference._weighted_sum(p * kept / (1.0 - dropout_p), v, visible)


def _seen(q, k, v, options) -> tuple[tuple, dict]:
    """The same without the keys that none of the queries sees: most of them, under a sparse mask."""
    visible = options["visible"]
    if visible is None:
        return (q, k, v), options
    seen = visible[0, 0].any(0)
    return (q, k[:, :, seen], v[:, :, seen]), options | {"visible": visible[..., seen]}


def _options_of(case, leaves, kwargs, b, h, i, j) -> dict:
    """Arguments of `reference.attention` for queries i ... j - 1 of one head."""
    batch, num_heads, seqlen_q, _ = leaves["q"].shape
    seqlen_k = leaves["k"].shape[2]

    def rows(x, width):
        return None if x is None else x.expand(batch, num_heads, seqlen_q, *width)[b : b + 1, h : h + 1, i:j]

    mask = interval(case, kwargs)
    lo, hi = diagonal_bounds(mask.windows, seqlen_q, seqlen_k)
    # the queries are counted from i here, so the diagonals shift by i
    visible = dense(lo + i, hi + i, rows(mask.k_start, ()), rows(mask.k_end, ()), j - i, seqlen_k, "cpu")
    if isinstance(kwargs.get("mask"), torch.Tensor):
        visible = visible & rows(kwargs["mask"], (seqlen_k,))
    if isinstance(kwargs.get("mask"), BlockMask):
        visible = visible & kwargs["mask"].mask_mod(b, h, torch.arange(i, j)[:, None], torch.arange(seqlen_k))
    visible = None if visible.all() else visible  # saves the reference two passes
    bias = rows(leaves.get("bias"), (seqlen_k,))
    if case.alibi:
        slope = leaves["alibi_slopes"].expand(batch, num_heads)[b, h].double()
        query = torch.arange(i, j)[:, None] + (seqlen_k - seqlen_q)
        alibi = -slope * (query - torch.arange(seqlen_k)).abs()
        bias = alibi if bias is None else bias.double() + alibi
    sinks = leaves["sinks"][h : h + 1] if case.sinks else None
    scale = leaves.get("softmax_scale", case.softmax_scale)
    scale = scale[h : h + 1] if case.learned_scale == "per_head" else scale
    return dict(visible=visible, bias=bias, sinks=sinks, softcap=case.softcap, softmax_scale=scale)
