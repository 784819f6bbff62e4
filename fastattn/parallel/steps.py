"""A schedule, run: keys and values come and go while blocks are computed; gradients go home."""

import math
from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..checks import dtype_name
from ..outputs import compute_dtype
from ..terms import TERMS
from . import blocks, merge
from .blocks import LEARNED, SCORES, Whole
from .merge import Partial
from .peers import Peers
from .plan import Slot

_PLACES = {term.name: place for place, term in enumerate(TERMS)}


class Job(NamedTuple):
    """A call of this rank.

    whole   without the tensors that have gradients; seen: `whole.seen()`
    own     the numbers of this rank's runs of keys
    known   the result of the forward pass, where only its backward pass is asked for; empty: it goes in there
    """

    whole: Whole
    seen: tuple[tuple[int, ...], ...]
    slots: tuple[Slot, ...]
    peers: Peers
    own: tuple[int, ...]
    known: list[Partial] | None = None


class Steps(torch.autograd.Function):
    """(out, lse) of the local queries, as apply(job, q, k, v, *tensors of blocks.LEARNED or None).

    Saves its inputs, out (in float32 where it has 16 bits) and two numbers a row. The backward pass needs the keys and
    values of other ranks again, and sends their gradients home: every rank has to run it.
    """

    @staticmethod
    def forward(ctx, job, q, k, v, *learned):
        whole, sinks = _with(job.whole, learned)
        if job.known:
            (found,) = job.known
        else:
            with _leaving_word(job.peers):
                found = _forward(job._replace(whole=whole), q, k, v)
            if sinks is not None:
                found = merge.with_sinks(found, sinks)
            if job.known is not None:
                job.known.append(found)
        ctx.job, ctx.present = job, [x is not None for x in learned]
        ctx.versions = _versions(job.whole)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *found, *[x for x in learned if x is not None])
        return found.out.to(q.dtype), found.lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, top, log_sum, *given = ctx.saved_tensors
        given = iter(given)
        learned = [next(given) if is_given else None for is_given in ctx.present]
        whole, sinks = _with(ctx.job.whole, learned)
        found = Partial(out, top, log_sum)
        dout = torch.zeros_like(out, dtype=q.dtype) if dout is None else dout
        if _versions(ctx.job.whole) != ctx.versions:
            raise RuntimeError("mask was changed in place after the forward pass that needs it")
        wants = dict(zip(LEARNED, ctx.needs_input_grad[4:], strict=True))
        job, wanted = ctx.job._replace(whole=whole), ctx.needs_input_grad[1:4]
        with _leaving_word(job.peers):
            dq, dk, dv, sums = _backward(job, (q, k, v), found, dout, dlse, wanted, wants)
        if (of_queries := wants["bias"] and _is_of_queries(whole.terms.bias)) or wants["sinks"]:
            delta = (dout.to(out.dtype) * out).sum(-1) - (0.0 if dlse is None else dlse)
            of_sink = torch.zeros_like(delta)
            if sinks is not None:
                logits = sinks.to(top.dtype).view(1, -1, 1)
                of_sink = torch.exp((logits - top) - log_sum) * delta
            if wants["sinks"]:
                sums["sinks"] = -of_sink.sum((0, 2))
            if of_queries:  # all gradients of a row's scores have this sum, and kernels take it for that of a block
                rows = (of_sink if dlse is None else of_sink + dlse).masked_fill(log_sum == math.inf, 0.0)
                sums["bias"] = rows[..., None].sum_to_size(_four(whole.terms.bias).shape).view(whole.terms.bias.shape)
        grads = [sums[name].to(x.dtype) if wants[name] else None for name, x in zip(LEARNED, learned, strict=True)]
        return None, dq, dk, dv, *grads


@contextmanager
def _leaving_word(peers: Peers):
    try:
        yield
    except BaseException as error:  # an interrupt among them
        peers.note(error)
        raise


def _versions(whole: Whole) -> list[int]:
    """How often each tensor of the masks has been changed in place."""
    terms = whole.terms
    tensors = [x for x in (terms.mask, terms.k_start, terms.k_end) if x is not None]
    return [x._version for x in tensors if not x.is_inference()]


def _is_of_queries(bias: torch.Tensor) -> bool:
    """Whether a bias is the same for all keys."""
    return _four(bias).shape[3] == 1


def _four(x: torch.Tensor) -> torch.Tensor:
    return x[(None,) * (4 - x.dim())]


def _with(whole: Whole, learned: Iterable) -> tuple[Whole, torch.Tensor | None]:
    """`whole` with the tensors that have gradients, and the sinks, which belong to no block."""
    values = {name: x for name, x in zip(LEARNED, learned, strict=True) if x is not None}
    sinks = values.pop("sinks", None)
    return whole._replace(terms=whole.terms._replace(**values)), sinks


class _Keys:
    """Keys and values, or their gradients, of runs: the own ones, and of others those of this slot."""

    def __init__(self, job: Job, k: torch.Tensor, v: torch.Tensor):
        self.runs, self.like, self.dims = job.whole.k_runs, k, (k.shape[3], v.shape[3])
        sizes = [self.length(run) for run in job.own]
        self.own = dict(zip(job.own, zip(k.split(sizes, 2), v.split(sizes, 2), strict=True), strict=True))
        self.packed: dict[int, torch.Tensor] = {}
        self.visiting: dict[int, torch.Tensor] = {}

    def length(self, run: int) -> int:
        return self.runs[run][1] - self.runs[run][0]

    def message(self, run: int) -> torch.Tensor:
        """k and v of a run that is here, as one tensor without dimensions."""
        if run in self.visiting:
            return self.visiting[run]
        if run not in self.packed:
            self.packed[run] = torch.cat([x.reshape(-1) for x in self.own[run]])
        return self.packed[run]

    def room(self, run: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for k and v of a run, or for their gradients."""
        batch, num_heads_k = self.like.shape[:2]
        return self.like.new_empty(batch * num_heads_k * self.length(run) * sum(self.dims), dtype=dtype)

    def views(self, flat: torch.Tensor, run: int) -> list[torch.Tensor]:
        """k and v, or their gradients, in one tensor."""
        shape = *self.like.shape[:2], self.length(run)
        sizes = [shape[0] * shape[1] * shape[2] * dim for dim in self.dims]
        return [x.view(*shape, dim) for x, dim in zip(flat.split(sizes), self.dims, strict=True)]

    def pair(self, run: int) -> list[torch.Tensor]:
        """k and v of a run that is here."""
        return self.views(self.visiting[run], run) if run in self.visiting else list(self.own[run])

    def post(self, peers: Peers, slot: Slot, t: int):
        """Start what slot t needs; returns what to wait for, and what will be here then."""
        coming = {run: self.room(run) for _, run in slot.receive}
        sends = [(peer, self.message(run)) for peer, run in slot.send]
        receives = [(peer, coming[run]) for peer, run in slot.receive]
        return peers.post(sends, receives, f"keys and values of step {t}"), coming


def _forward(job: Job, q, k, v) -> Partial:
    whole, keys = job.whole, _Keys(job, k, v)
    queries = whole.rows(q)
    found: list[Partial | None] = [None] * len(queries)
    for t, slot in enumerate(job.slots):
        pending, coming = keys.post(job.peers, _next(job, t), t + 1)
        for run in slot.compute:
            for i in job.seen[run]:
                found[i] = merge.added(found[i], blocks.forward(whole, i, run, queries[i], *keys.pair(run)))
        pending.wait()
        keys.visiting = coming
    dtype, head_dim_v = compute_dtype(whole.problem), v.shape[3]
    results = [merge.empty(x, head_dim_v, dtype) if y is None else y for x, y in zip(queries, found, strict=True)]
    if len(results) == 1:
        return results[0]
    none = merge.empty(q[:, :, :0], head_dim_v, dtype)
    return Partial(*(torch.cat(parts, 2) for parts in zip(none, *results, strict=True)))


def _next(job: Job, t: int) -> Slot:
    return job.slots[t + 1] if t + 1 < len(job.slots) else Slot()


def _backward(job: Job, qkv, found: Partial, dout, dlse, wanted, wants) -> tuple:
    """(dq, dk, dv, sums of the gradients of terms by name). wanted: of q, k, v; wants: of terms, by name."""
    whole, q, keys = job.whole, qkv[0], _Keys(job, *qkv[1:])
    dtype = compute_dtype(whole.problem)
    # A block's gradients would be rounded to q's dtype, and then added up; CPU kernels compute in this one anyway.
    inside = dtype if q.device.type == "cpu" else q.dtype
    if inside != q.dtype:
        names = [name for name in LEARNED if isinstance(getattr(whole.terms, name), torch.Tensor)]
        terms = whole.terms._replace(**{name: getattr(whole.terms, name).to(inside) for name in names})
        bias = dtype_name(inside) if "bias" in names else "none"
        whole = whole._replace(problem=whole.problem._replace(dtype=dtype_name(inside), bias=bias), terms=terms)
    of_keys = wanted[1] or wanted[2]
    queries, douts = whole.rows(q.to(inside)), whole.rows(dout.to(inside))
    dlses = None if dlse is None else whole.rows(dlse)
    results = [Partial(*parts) for parts in zip(*[whole.rows(x) for x in found], strict=True)]
    sums = _Sums(whole, queries, wants, dtype)
    asked = wanted[0], of_keys, of_keys, sums.asked
    home = {run: keys.room(run, dtype).zero_() for run in job.own} if of_keys else {}
    done: dict[int, torch.Tensor] = {}
    for t, slot in enumerate(job.slots):
        pending, coming = keys.post(job.peers, _next(job, t), t + 1)
        arriving = [(run, keys.room(run, dtype)) for _, run in slot.grads_in] if of_keys else []
        leaving = [(peer, done[run]) for peer, run in slot.grads_out] if of_keys else []
        receives = [(peer, x) for (peer, _), (_, x) in zip(slot.grads_in, arriving, strict=False)]
        returning = job.peers.post(leaving, receives, f"gradients of step {t}")
        here = {run: home[run] if run in home else keys.room(run, dtype).zero_() for run in slot.compute if of_keys}
        for run in slot.compute:
            pair = [x.to(inside) for x in keys.pair(run)]
            for i in job.seen[run]:
                of_rows = results[i], douts[i], None if dlses is None else dlses[i]
                dq, dk, dv, grads = blocks.backward(whole, i, run, (queries[i], *pair), *of_rows, asked)
                sums.add(i, run, dq, grads)
                if of_keys:
                    for x, y in zip(keys.views(here[run], run), (dk, dv), strict=True):
                        x += y
        returning.wait()
        for run, x in arriving:
            (home[run] if run in home else here[run]).add_(x)
        done = {run: x for run, x in here.items() if run not in home}
        pending.wait()
        keys.visiting = coming
    dk, dv = _joined(keys, home, qkv) if of_keys else (None, None)
    return sums.of_queries(q, wanted[0]), dk if wanted[1] else None, dv if wanted[2] else None, sums.of_terms


class _Sums:
    """The gradients of the rank's own rows and of terms, added up over blocks in the compute dtype."""

    def __init__(self, whole: Whole, queries: list[torch.Tensor], wants: dict[str, bool], dtype: torch.dtype):
        self.whole, self.rows = whole, [torch.zeros_like(x, dtype=dtype) for x in queries]
        names = [name for name, want in wants.items() if want and name != "sinks"]
        names = [name for name in names if name != "bias" or not _is_of_queries(whole.terms.bias)]
        self.of_terms = {}
        for name in names:
            x = getattr(whole.terms, name)
            sums = dtype if name in SCORES else torch.float64
            self.of_terms[name] = torch.zeros(x.shape, dtype=sums, device=x.device)
        self.asked = type(whole.terms)._make(term.name in names for term in TERMS)

    def add(self, i: int, run: int, dq, grads) -> None:
        if dq is not None:
            self.rows[i] += dq
        for name, total in self.of_terms.items():
            part = self.whole.part_of(total, i, run) if name in SCORES else total
            part += grads[_PLACES[name]].view(part.shape)

    def of_queries(self, q: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        return torch.cat([q[:, :, :0], *[x.to(q.dtype) for x in self.rows]], 2) if wanted else None


def _joined(keys: _Keys, home: dict[int, torch.Tensor], qkv) -> list[torch.Tensor]:
    """dk and dv of the rank's own rows."""
    pairs = [keys.views(x, run) for run, x in home.items()]
    return [torch.cat([x[:, :, :0], *[pair[n].to(x.dtype) for pair in pairs]], 2) for n, x in enumerate(qkv[1:])]
