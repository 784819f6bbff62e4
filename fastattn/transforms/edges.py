"""The tangents of a block of query rows of a call along edges, in plain torch that has derivatives again: the formulas
of `dense`, with sums over the edges of a query."""

import torch

from .blocks import Block
from .slots import Call


def tangent(call: Call, block: Block, x: dict) -> dict:
    """Tangents "out", "lse" of the results, given tangents "t.q", ... of inputs. O(edges * D) memory."""
    (start, end), scale = block.ranges["seqlen_q"], call.fixed.softmax_scale
    counts = x["indptr"][start : end + 1].diff()
    rows = torch.arange(end - start, device=counts.device).repeat_interleave(counts, output_size=len(x["indices"]))
    at_edges = {name: _per_edge(x[name], x) for name in ("k", "v", "t.k", "t.v") if name in x}
    q, masked = x["q"][:, :, rows], x["bias"] == -torch.inf if "bias" in x else None
    if masked is not None:
        at_edges = {name: y.masked_fill(masked[..., None], 0.0) for name, y in at_edges.items()}
    s = scale * (q * at_edges["k"]).sum(-1)
    ts = torch.zeros_like(s)
    if "t.q" in x:
        ts = ts + scale * (x["t.q"][:, :, rows] * at_edges["k"]).sum(-1)
    if "t.k" in x:
        ts = ts + scale * (q * at_edges["t.k"]).sum(-1)
    if "t.bias" in x:
        ts = ts + x["t.bias"]
    if masked is not None:
        s, ts = (s + x["bias"]).masked_fill(masked, -torch.inf), ts.masked_fill(masked, 0.0)
    p = _softmax(s, rows, x["q"])
    zeros = x["q"].new_zeros(x["q"].shape[:3])
    mu = zeros.index_add(2, rows, p * ts)
    parts = (p * (ts - mu[:, :, rows]))[..., None] * at_edges["v"]
    if "t.v" in x:
        parts = parts + p[..., None] * at_edges["t.v"]
    return {"out": x["q"].new_zeros(*zeros.shape, parts.shape[-1]).index_add(2, rows, parts), "lse": mu}


def _per_edge(k: torch.Tensor, x: dict) -> torch.Tensor:
    """[b, H, edges, D]: the key of each edge, for each query head."""
    found = k[:, :, x["indices"]]
    return found if k.shape[1] == x["q"].shape[1] else found.repeat_interleave(x["q"].shape[1] // k.shape[1], dim=1)


def _softmax(s: torch.Tensor, rows: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    zeros = q.new_zeros(q.shape[:3])
    top = (zeros - torch.inf).scatter_reduce(2, rows.expand_as(s), s.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(s - top[:, :, rows]).masked_fill(s == -torch.inf, 0.0)
    total = zeros.index_add(2, rows, p)
    return p / total.masked_fill(total == 0.0, 1.0)[:, :, rows]
