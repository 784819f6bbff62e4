"""Weights, tangents and second derivatives of a block of query rows of a dense call, in plain torch, so that they have
derivatives again.

With S the scores, P their softmax, t. a tangent, d. a cotangent and * the product of elements:

    mu = sum_j P * t.S        t.P = P * (t.S - mu)        t.out = t.P V + P t.V        t.lse = mu

A sink is one more key whose value is 0. Dropout multiplies P and t.P on their way to V.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..masks.block_mask import BlockMask
from ..masks.intervals import NO_BOUNDS, dense
from ..outputs import is_rough
from ..scores import Place
from ..scores.dropout import dropout_mask_at
from ..scores.relative import spread
from ..terms import SCORE_TERMS
from ..torch_internals import is_traced
from .blocks import Block, gradients, source
from .slots import Call, base


def weights(call: Call, block: Block, x: dict) -> dict:
    """Probabilities "weights", [b, H, rows, keys]. With "lse" they are exp(S - lse): the softmax's denominator comes
    from there, and counts keys that are not among these; derivatives are those of the softmax all the same."""
    x, visible = _without_nan(x, _visible(call, block, x), block)
    s, _, _ = _modified(call, block, x, _product(x["q"] * factor(call), x["k"]), None, False)
    if "lse" not in x:
        return {"weights": _softmax(block, x, s, visible)[0]}
    return {"weights": _given_lse(block, x, s, visible)}


def scores(
    call: Call, block: Block, x: dict, plus: torch.Tensor | None = None
) -> tuple[dict, torch.Tensor, torch.Tensor | None]:
    """(the tensors without what nobody sees, scores [b, H, rows, keys] after all modifications, True where a key is
    seen or None: everywhere), for whoever turns scores into weights in another way. plus: what is added to q k^T."""
    x, visible = _without_nan(x, _visible(call, block, x), block)
    s, _, _ = _modified(call, block, x, _product(x["q"] * factor(call), x["k"], plus), None, False)
    return x, s, visible


def hidden(block: Block, s: torch.Tensor, visible: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scores that are -inf where hidden, 0 for rows that see nothing, whose scores are 0, and 1 for others; None: all
    see something)"""
    return (s, None) if visible is None else _masked(block, s, visible, None)


def softmax_and_lse(block: Block, x: dict, s: torch.Tensor, visible: torch.Tensor | None) -> tuple:
    """(weights of scores, the log of their denominator)"""
    logits, sighted = _logits(block, x, s, visible)
    p, lse = torch.softmax(logits, -1)[..., : s.shape[-1]], torch.logsumexp(logits, -1)
    return (p, lse) if sighted is None else (p * sighted, lse.masked_fill(sighted[..., 0] == 0.0, -torch.inf))


def kept(call: Call, block: Block, x: dict, p: torch.Tensor) -> torch.Tensor:
    """Weights p [b, H, rows, keys], some of them dropped."""
    return _times(p, _keep(call, block, x))


def weighted(call: Call, block: Block, x: dict, p: torch.Tensor) -> torch.Tensor:
    """The values times weights p [b, H, rows, keys], some of them dropped."""
    return by_keys(kept(call, block, x, p), x["v"])


def _given_lse(block: Block, x: dict, s: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    lse, sighted = x["lse"][..., None], None
    rough = is_rough(lse)  # such rows find their own denominator
    own = _softmax(block, x, s.clone(), visible)[0] if is_traced() or rough.any() else None
    lse = lse.masked_fill(rough | (lse == -torch.inf), torch.inf)
    if visible is not None:
        s, sighted = _masked(block, s, visible, x.get("sinks"))
    p = torch.exp(s - lse)
    p = p if sighted is None else p * sighted
    total = p.sum(-1, keepdim=True)
    if "sinks" in x:
        total = total + torch.exp(x["sinks"].view(1, -1, 1, 1) - lse)
    p = p / (total + (1.0 - total).detach())
    return p if own is None else torch.where(rough, own, p)


def statistics(call: Call, block: Block, x: dict) -> dict:
    """What the weights amount to: "key_mass" of each key, "entropy", "distance" and "max" of each row."""
    p, place = weights(call, block, x)["weights"], _place(call, block)
    query = torch.arange(place.seqlen_q, device=p.device, dtype=p.dtype)[:, None] + place.query_start
    distance = (query - torch.arange(place.seqlen_k, device=p.device, dtype=p.dtype)).abs_()
    logs = torch.log(p.masked_fill(p == 0.0, 1.0))  # whose derivative there is 0 as well
    largest = p.amax(-1) if p.shape[-1] else p.sum(-1)
    return {
        "key_mass": p.sum(2), "entropy": -(p * logs).sum(-1), "distance": (p * distance).sum(-1), "max": largest
    }  # fmt: skip


def top_weights(call: Call, block: Block, x: dict) -> dict:
    """The largest weights of each row, descending, and their keys: -1 where the weight is 0."""
    p = weights(call, block, x)["weights"]
    p = torch.nn.functional.pad(p, (0, max(call.top_k - p.shape[-1], 0)))
    largest, keys = p.topk(call.top_k, -1)
    keys = torch.where(largest > 0.0, keys + block.ranges["seqlen_k"][0], -1)
    return {"top_weights": largest, "top_keys": keys.to(p.dtype)}


def tangent(call: Call, block: Block, x: dict) -> dict:
    """Tangents "out", "lse" of the results, given tangents "t.q", ... of inputs."""
    x, visible = _without_nan(x, _visible(call, block, x), block)
    w = _weights(call, block, x, visible, False)
    return {"out": _pushed_out(w, x), "lse": w.mu[..., 0]}


def second(call: Call, block: Block, x: dict) -> dict:
    """Gradients of <d.out, t.out> + <d.lse, t.lse> by the inputs and by "d.out" and "d.lse"."""
    x, visible = _without_nan(x, _visible(call, block, x), block)
    w = _weights(call, block, x, visible, True)
    found = {"d.lse": w.mu[..., 0]}
    dlse = x["d.lse"][..., None] if "d.lse" in x else 0.0
    if "d.out" in x:
        found["d.out"] = _pushed_out(w, x)
        found["v"] = _by_rows(_times(w.tp, w.keep), x["d.out"], x["v"])
        dp = _times(_product(x["d.out"], x["v"]), w.keep)
        dts = w.p * dp
        delta = dts.sum(-1, keepdim=True) - dlse
        dts, ds = _minus(dts, w.p, delta), w.tp * (dp - delta)
        if "t.v" in x:
            ds = torch.addcmul(ds, w.p, _times(_product(x["d.out"], x["t.v"]), w.keep))
    else:
        delta, dts, ds = -dlse, w.p * dlse, w.tp * dlse
    total = ds.sum(-1, keepdim=True)
    if w.sink is not None:
        dsink = w.sink * (w.mu - w.tsink) * delta
        total = total + dsink
        found["sinks"] = (dsink - w.sink * total).sum((0, 2, 3))
    ds, dts, of_terms = w.undo(_minus(ds, w.p, total), dts)
    dq, dk = by_keys(ds, x["k"]), _by_rows(ds, w.q, x["k"])
    if "t.k" in x:
        dq = by_keys(dts, x["t.k"], dq)
    if w.tq is not None:
        dk = _by_rows(dts, w.tq, x["k"], dk)
    return found | of_terms | {"q": dq * factor(call), "k": dk}


class _Weights(NamedTuple):
    """Softmax of a block and its tangent.

    p, tp        [b, H, rows, keys]
    mu           mean of the tangents of the scores, [b, H, rows, 1]
    sink, tsink  weights of the sinks, and tangents of their logits; None without sinks
    q, tq        scaled by what is no tensor; tq is None where q has no tangent
    undo         (cotangents of the scores, of their tangents) -> (those of the products, gradients of terms by name);
                 of use only where it was asked for
    keep         the factor of dropout, or None
    """

    p: torch.Tensor
    tp: torch.Tensor
    mu: torch.Tensor
    sink: torch.Tensor | None
    tsink: torch.Tensor | None
    q: torch.Tensor
    tq: torch.Tensor | None
    undo: Callable
    keep: torch.Tensor | None


def _weights(call: Call, block: Block, x: dict, visible: torch.Tensor | None, undoes: bool) -> _Weights:
    q, tq = x["q"] * factor(call), x["t.q"] * factor(call) if "t.q" in x else None
    s, ts = _product(q, x["k"]), None if tq is None else _product(tq, x["k"])
    if "t.k" in x:
        ts = _product(q, x["t.k"], ts)
    s, ts, undo = _modified(call, block, x, s, torch.zeros_like(s) if ts is None else ts, undoes)
    p, sink = _softmax(block, x, s, visible)
    tsink = None
    if sink is not None:
        tsink = x["t.sinks"].view(1, -1, 1, 1) if "t.sinks" in x else torch.zeros_like(sink)
    tp = p * ts
    mu = tp.sum(-1, keepdim=True)
    if sink is not None:
        mu = mu + sink * tsink
    tp = _minus(tp, p, mu)
    return _Weights(p, tp, mu, sink, tsink, q, tq, undo, _keep(call, block, x))


def _softmax(block: Block, x: dict, s: torch.Tensor, visible: torch.Tensor | None) -> tuple:
    """(weights, those of the sinks or None)"""
    keys, sink = s.shape[-1], None
    s, sighted = _logits(block, x, s, visible)
    p = torch.softmax(s, -1)
    if "sinks" in x:
        p, sink = p.split([keys, 1], -1)
    if sighted is not None:
        p, sink = p * sighted, None if sink is None else sink * sighted
    return p, sink


def _logits(block: Block, x: dict, s: torch.Tensor, visible: torch.Tensor | None) -> tuple:
    """(scores, -inf where hidden, with a column for sinks; 0 for rows that see nothing and 1 for others, or None)"""
    sighted = None
    if visible is not None:
        s, sighted = _masked(block, s, visible, x.get("sinks"))
    if "sinks" in x:
        s = torch.cat([s, x["sinks"].view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return s, sighted


def _masked(block: Block, s: torch.Tensor, visible: torch.Tensor, sinks: torch.Tensor | None) -> tuple:
    """(scores without what is hidden, 0 for rows that see nothing and 1 for others; None: all see something)

    A sum, which is several times as fast as masked_fill; rows that see nothing have scores of 0 until their weights
    are 0, so that nothing becomes NaN.
    """
    if block.of_rows.get("visible") is visible and "hiding" in block.of_rows:
        return _plus(s, block.of_rows["hiding"]), None
    sighted = visible.any(-1, keepdim=True)
    if sinks is not None:
        sighted = sighted | (sinks > -torch.inf).view(-1, 1, 1)
    is_sighted = not is_traced() and bool(sighted.all())
    if not is_sighted:
        s, visible = s.masked_fill(~sighted, 0.0), visible | ~sighted
    hiding = s.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
    if is_sighted and sinks is None and block.of_rows.get("visible") is visible:
        block.of_rows["hiding"] = hiding
    return _plus(s, hiding), None if is_sighted else sighted.to(s.dtype)


def _plus(s: torch.Tensor, hiding: torch.Tensor) -> torch.Tensor:
    """s + hiding, in the memory of s where nobody will differentiate it."""
    return s + hiding if s.requires_grad or torch.is_grad_enabled() or is_traced() else s.add_(hiding)


def _without_nan(x: dict, visible: torch.Tensor | None, block: Block) -> tuple[dict, torch.Tensor | None]:
    """(the tensors, `visible`), where keys and values that no query of the block sees are 0: 0 * NaN would show."""
    if visible is None or block.is_finite:
        return x, visible
    batch, heads, keys, _ = x["k"].shape
    seen = _grouped(visible.expand(batch, *x["q"].shape[1:3], keys), x["k"]).any(1).view(batch, heads, keys, 1)
    return x | {slot: y.where(seen, 0.0) for slot, y in x.items() if base(slot) in ("k", "v")}, visible


def _modified(call: Call, block: Block, x: dict, s, ts, undoes: bool) -> tuple:
    """(scores and their tangents, if there are, after all modifications, `undo` of `_Weights`)"""
    steps = [(term, value) for term in SCORE_TERMS if (value := _value(call, x, term)) is not None]
    values = {term.name: value for term, value in steps if isinstance(value, torch.Tensor)}
    create_graph, sources = torch.is_grad_enabled(), (s, ts)
    with torch.set_grad_enabled(create_graph or undoes):
        if undoes and steps:
            sources, values = (source(s), source(ts)), {name: source(value) for name, value in values.items()}
        s, ts = sources
        for term, value in steps:
            place, value = _place(call, block), values.get(term.name, value)
            ts = ts if ts is None else term.push(ts, s, value, x.get(f"t.{term.name}"), place)
            s = term.modify(s, value, place)

    def undo(ds, dts):
        if not steps:
            return ds, dts, {}
        ds, dts, *grads = gradients((s, ts), (*sources, *values.values()), (ds, dts), create_graph)
        return ds, dts, dict(zip(values, grads, strict=True))

    return s, ts, undo


def _place(call: Call, block: Block) -> Place:
    (start, end), (first, last) = block.ranges["seqlen_q"], block.ranges["seqlen_k"]
    return Place(call.fixed.query_start + start - first, end - start, last - first)


def _value(call: Call, x: dict, term):
    """The value of a score modification; None where it is off, or a number that is a factor of q already."""
    value = x.get(term.name, getattr(call.fixed, term.name))
    if isinstance(value, torch.Tensor):
        return value
    return None if value == term.neutral or term.name == "softmax_scale" else value


def factor(call: Call) -> float:
    return 1.0 if call.fixed.softmax_scale is None else call.fixed.softmax_scale


def _visible(call: Call, block: Block, x: dict) -> torch.Tensor | None:
    """True where a key is seen; None where all are."""
    seen = [] if (diagonal := _seen_by_diagonals(call, block, x["q"].device)) is None else [diagonal]
    if "mask" in x:
        seen.append(x["mask"])
    if "k_start" in x or "k_end" in x:
        (start, end), (first, last) = block.ranges["seqlen_q"], block.ranges["seqlen_k"]
        bounds = (x[name] - first if name in x else None for name in ("k_start", "k_end"))
        seen.append(dense(*NO_BOUNDS, *bounds, end - start, last - first, x["q"].device))
    if (block_mask := call.block_mask(block.batch)) is not None:
        seen.append(seen_blocks(block_mask, block))
    for bias in (x.get("bias"), x.get("relative")):
        if bias is not None:
            masks = bias == -torch.inf
            if is_traced() or masks.any():
                seen.append(~(masks if bias is x.get("bias") else spread(masks, _place(call, block))))
    visible = None
    for part in seen:
        visible = part if visible is None else visible & part
    return visible


def _seen_by_diagonals(call: Call, block: Block, device) -> torch.Tensor | None:
    if "visible" not in block.of_rows:
        (start, end), (first, last) = block.ranges["seqlen_q"], block.ranges["seqlen_k"]
        lo, hi, move = call.fixed.diagonal_lo, call.fixed.diagonal_hi, start - first
        hides = first - (end - 1) < lo or (last - 1) - start > hi
        bounds = lo + move, hi + move, None, None, end - start, last - first, device
        block.of_rows["visible"] = dense(*bounds) if hides else None
    return block.of_rows["visible"]


def seen_blocks(mask: BlockMask, block: Block) -> torch.Tensor:
    """The part of a block mask as a bool tensor."""
    (start, end), (first, last), size = block.ranges["seqlen_q"], block.ranges["seqlen_k"], mask.BLOCK_SIZE[0]
    rows = start // size, -(-end // size)
    dims = "batch", "num_heads", "blocks"
    part = block._replace(ranges={**block.ranges, "blocks": rows})
    lists = {name: part.cut(x, dims[: x.dim()]) for name, x in mask.tensors().items() if name != "bitmaps"}
    lengths = min(rows[1] * size, mask.seq_lengths[0]) - rows[0] * size, mask.seq_lengths[1]
    seen = BlockMask(**lists, bitmaps=mask.bitmaps, BLOCK_SIZE=mask.BLOCK_SIZE, seq_lengths=lengths).to_dense()
    return seen[:, :, start - rows[0] * size : end - rows[0] * size, first:last]


def _keep(call: Call, block: Block, x: dict) -> torch.Tensor | None:
    p = call.fixed.dropout_p
    if p == 0.0:
        return None
    ranges = [block.ranges[name] for name in ("batch", "num_heads", "seqlen_q", "seqlen_k")]
    seed = int(x.get("seed", call.fixed.seed))
    keep = dropout_mask_at(ranges, p, seed, x["q"].device, call.fixed.dropout_start)
    return keep.to(x["q"].dtype) / (1.0 - p)


def _minus(x: torch.Tensor, p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """x - p * mean, in the memory of x where nobody will differentiate it."""
    if torch.is_grad_enabled() or is_traced():
        return torch.addcmul(x, p, mean, value=-1.0)
    return x.addcmul_(p, mean, value=-1.0)


def _times(p: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return p if keep is None else p * keep


def _pushed_out(w: _Weights, x: dict) -> torch.Tensor:
    out = by_keys(_times(w.tp, w.keep), x["v"])
    return by_keys(_times(w.p, w.keep), x["t.v"], out) if "t.v" in x else out


def _grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[b * Hk, rows of all query heads that share a key head, ...] of [b, H, rows, ...]."""
    batch, heads = k.shape[:2]
    return x.reshape(batch * heads, x.shape[1] // heads * x.shape[2], x.shape[-1])


def _product(x: torch.Tensor, k: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
    """x k^T (+ plus), [b, H, rows, keys], where heads share keys."""
    rows, keys = _grouped(x, k), k.flatten(0, 1).transpose(1, 2)
    found = rows @ keys if plus is None else torch.baddbmm(_grouped(plus, k), rows, keys)
    return found.view(*x.shape[:3], k.shape[2])


def by_keys(p: torch.Tensor, v: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
    """p v (+ plus), [b, H, rows, D]."""
    rows, values = _grouped(p, v), v.flatten(0, 1)
    found = rows @ values if plus is None else torch.baddbmm(_grouped(plus, v), rows, values)
    return found.view(*p.shape[:3], v.shape[3])


def _by_rows(p: torch.Tensor, x: torch.Tensor, k: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
    """p^T x (+ plus), summed over the heads that share keys: [b, Hk, keys, D]."""
    keys, rows = _grouped(p, k).transpose(1, 2), _grouped(x, k)
    found = keys @ rows if plus is None else torch.baddbmm(plus.flatten(0, 1), keys, rows)
    return found.view(*k.shape[:3], x.shape[3])
