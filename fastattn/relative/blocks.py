"""Attention whose bias is made of products with q and k: in blocks of query rows, each with a dense bias of its own.

It is dropped after use, and made again for gradients, which want out and lse of the forward pass and nothing else of
it: O(rows of a block * seqlen_k) memory.
"""

import torch

from .. import dispatch
from ..calls import note
from ..checks import dtype_name
from ..masks.intervals import UNBOUNDED
from ..outputs import empty_out
from ..plans import Bound, after_failure, derivative_of
from ..scores.relative import Rewriting
from ..terms import Terms
from ..torch_internals import outside_of_graphs
from .arguments import compute_dtype
from .products import Buffers
from .scores import At, Scores, Tables

_SCORES = 1 << 20  # of a block, which then stays in a cache
_ROWS = range(64, 257)  # of a block, whatever the number of scores
_NUMBERS = ("sinks", "softmax_scale")  # terms that may be learned


class InBlocks(Rewriting):
    """Scores of positions, scale * (q_i . R[distance] + k_j . S[distance]), one of them or both."""

    def tables(self, q, k, options: dict) -> Tables:
        """Checked."""
        raise NotImplementedError

    def attend(self, attention, bind, q, k, v, options):
        return _attend(self, attention, bind, q, k, v, options)


def _attend(bias: InBlocks, attention, bind, q, k, v, options: dict):
    bound = bind(q, k, v, **options | {"bias": None})
    check(bias, bound)
    tables = bias.tables(q, k, options)
    if 0 in (*q.shape[:3], k.shape[2]):
        return attention(q, k, v, **options | {"bias": None})
    tensors = {"q": q, "k": k, "v": v, **tables.tensors}
    for name in _NUMBERS:
        if isinstance(getattr(bound.terms, name), torch.Tensor):
            tensors[name] = getattr(bound.terms, name)
    scores = Scores(tables, bound.terms.softmax_scale, q.shape[2], k.shape[2], q)
    call = BlockCall(bias, bound, scores, tuple(tensors))
    out, lse = Rows.apply(call, *tensors.values())
    return (out, lse) if options["return_lse"] else out


_attend = outside_of_graphs(
    _attend, "a bias that follows from q and k runs in blocks, outside of graphs: call it outside of torch.compile"
)


def check(bias: Rewriting, bound: Bound) -> None:
    """Refuse what does not go with a bias of products."""
    terms = bound.terms
    if bound.problem.transformed:
        raise NotImplementedError(f"bias={bias!r} takes no torch.func transform and no forward-mode derivative")
    for name in ("block_mask", "alibi_slopes"):
        if getattr(terms, name) is not None:
            named = "mask, a BlockMask," if name == "block_mask" else name
            raise ValueError(f"{named} does not go with bias={bias!r}; give a Mask or a bool tensor, and no ALiBi")
    if terms.softcap:
        raise ValueError(f"softcap={terms.softcap!r} does not go with bias={bias!r}, whose scores it would cap, too")


class Rows(torch.autograd.Function):
    """(out, lse) of a `BlockCall`, as apply(call, *tensors)."""

    @staticmethod
    def forward(ctx, call, *tensors):
        ctx.call = call
        ctx.set_materialize_grads(False)
        out, lse, saved = call.run(tensors, any(ctx.needs_input_grad))
        ctx.save_for_backward(*saved, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"bias={ctx.call.bias!r} has no gradients of gradients: call without create_graph"
            )
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        exact, parts, *tensors = ctx.saved_tensors
        dout = exact.new_zeros((), dtype=tensors[0].dtype).expand(exact.shape) if dout is None else dout
        return None, *ctx.call.gradients(tensors, (exact, parts), dout, dlse, ctx.needs_input_grad[1:])


class BlockCall:
    """A call of `attention` with a bias of positions. (Not a tuple, in which autograd would look for tensors.)"""

    def __init__(self, bias: InBlocks, bound: Bound, scores: Scores, names: tuple[str, ...]):
        self.bias, self.scores, self.names, self.backend = bias, scores, names, bound.backend
        # Tensors of the call are given when it runs: autograd looks after them.
        self.problem, self.terms = bound.problem, bound.terms._replace(**dict.fromkeys(set(_NUMBERS) & set(names)))
        self.seed = bound.terms.seed
        if self.problem.dropout and self.seed is None:
            self.seed = int(torch.randint(2**63 - 1, ()))

    def run(self, tensors, needs_grad: bool) -> tuple:
        """(out, lse, what `gradients` wants of them)"""
        q = tensors[0]
        out, real = empty_out(self.problem, q), compute_dtype(q)
        lse = q.new_empty(out.shape[:3], dtype=real)
        exact = out if out.dtype == real else q.new_empty(out.shape, dtype=real)
        parts, buffers = q.new_empty((*lse.shape, 2), dtype=real), Buffers(q, real)
        for at in self.blocks():
            x = self.cut(tensors, at)
            problem, terms = self.block(x, at, self.scores.of(x, at, buffers), needs_grad)
            here = slice(*at.batch), slice(*at.heads), slice(*at.rows)
            bound = Bound(dispatch.select(problem, self.backend), problem, terms, self.backend)
            out[here], lse[here], saved = _run(bound, _forward, _shifted(x), x["k"], x["v"])
            if saved:
                exact[here], parts[here] = saved
        return out, lse, (exact, parts)

    def gradients(self, tensors, saved, dout, dlse, wanted) -> list[torch.Tensor | None]:
        """Of the tensors that are wanted."""
        real, sums = compute_dtype(tensors[0]), {}
        for name, x, want in zip(self.names, tensors, wanted, strict=True):
            if want:
                sums[name] = x.new_zeros(x.shape, dtype=torch.float64 if name in _NUMBERS else real)
        buffers = Buffers(tensors[0], real)
        for at in self.blocks():
            x, here = self.cut(tensors, at), (slice(*at.batch), slice(*at.heads), slice(*at.rows))
            problem, terms = self.block(x, at, self.scores.of(x, at, buffers), True)
            backend = dispatch.select(problem, self.backend).row.backend
            bound = derivative_of(problem, "backward", backend, dlse is not None)
            bound = bound._replace(problem=bound.problem._replace(lse=True), terms=terms, backend=self.backend)
            wants = Terms._make(name == "bias" or name in _NUMBERS and name in sums for name in Terms._fields)
            dq, dk, dv, of_terms = _run(
                bound, _backward, _shifted(x), x["k"], x["v"], tuple(y[here] for y in saved), dout[here],
                None if dlse is None else dlse[here], ("q" in sums or "u" in sums, "k" in sums, "v" in sums, wants),
            )  # fmt: skip
            of_terms = Terms._make(of_terms)
            found = {"q": dq, "u": dq, "k": dk, "v": dv, **{name: getattr(of_terms, name) for name in _NUMBERS}}
            into = self.cut([sums.get(name) for name in self.names], at)
            for name, grad in found.items():
                if name in into:
                    into[name] += grad.sum((0, 2)).sum_to_size(into[name].shape) if name == "u" else grad
            self.scores.add_gradients(x, at, of_terms.bias, into, buffers)
        return [sums[n].to(x.dtype) if n in sums else None for n, x in zip(self.names, tensors, strict=True)]

    def blocks(self):
        """All of them; rows do not depend on the batch."""
        problem, lo, hi = self.problem, self.terms.diagonal_lo, self.terms.diagonal_hi
        group, seqlen_q, seqlen_k = problem.group_size, problem.seqlen_q, problem.seqlen_k
        rows = min(max(_SCORES // (seqlen_k * group), _ROWS.start), _ROWS.stop - 1)
        heads = min(max(_SCORES // (rows * seqlen_k * group), 1), problem.num_heads_k)
        entries = max(_SCORES // (rows * seqlen_k * problem.num_heads), 1)
        for start, end in _ranges(seqlen_q, rows):
            keys = max(0, start + lo), min(seqlen_k, end + hi)
            keys = keys if keys[0] < keys[1] else (0, 1)  # nothing is seen: one hidden key
            for batch in _ranges(problem.batch, entries):
                for heads_k in _ranges(problem.num_heads_k, heads):
                    yield At(batch, heads_k, (heads_k[0] * group, heads_k[1] * group), (start, end), keys)

    def cut(self, tensors, at: At) -> dict[str, torch.Tensor]:
        """What of the tensors belongs to a block, by name: views."""
        ranges_of = {"q": (at.batch, at.heads, at.rows, None), "r": (at.heads, None, None), "u": (at.heads, None)}
        ranges_of |= {"k": (at.batch, at.heads_k, at.keys, None), "sinks": (at.heads,), "softmax_scale": (at.heads,)}
        ranges_of |= {"v": ranges_of["k"], "s": ranges_of["r"], "w": ranges_of["u"]}
        pairs = zip(self.names, tensors, strict=True)
        return {name: _part(x, *ranges_of[name]) for name, x in pairs if x is not None}

    def block(self, x: dict, at: At, bias: torch.Tensor, needs_grad: bool) -> tuple:
        """(problem, terms) of a block."""
        terms, (first, last), (key, end) = self.terms, at.rows, at.keys
        seed = None
        if self.seed is not None:
            places = first + 1, at.batch[0] * self.problem.num_heads + at.heads[0]
            seed = (self.seed + 0x9E3779B97F4A7C15 * places[0] + 0x2545F4914F6CDD1D * places[1]) % 2**63
        intervals = {
            name: (_part(own, at.batch, at.heads, at.rows) - key).clamp(min=0)
            for name in ("k_start", "k_end") if (own := getattr(terms, name)) is not None
        }  # fmt: skip
        mask = None if terms.mask is None else _part(terms.mask, at.batch, at.heads, at.rows, at.keys)
        terms = terms._replace(
            diagonal_lo=terms.diagonal_lo + first - key if terms.diagonal_lo > -UNBOUNDED else -UNBOUNDED,
            diagonal_hi=terms.diagonal_hi + first - key if terms.diagonal_hi < UNBOUNDED else UNBOUNDED,
            query_start=terms.query_start + first - key, bias=bias, mask=mask, seed=seed, **intervals,
            sinks=x.get("sinks"), softmax_scale=x.get("softmax_scale", terms.softmax_scale),
        )  # fmt: skip
        problem = self.problem._replace(
            num_heads=at.heads[1] - at.heads[0], num_heads_k=at.heads_k[1] - at.heads_k[0], lse=True,
            needs_grad=needs_grad, bias=dtype_name(bias.dtype),
        )  # fmt: skip
        return problem.with_lengths((at.batch[1] - at.batch[0], last - first, end - key)), terms


def _run(bound: Bound, compute, *arguments):
    """compute(bound, ...), on the next kernel where one cannot be prepared."""
    while True:
        try:
            return compute(bound, *arguments)
        except dispatch.KernelError as error:
            bound = after_failure(bound, error)


def _forward(bound: Bound, q, k, v) -> tuple:
    """(out, lse, what the backward row wants of them, if anything)"""
    note(bound, q, k)
    choice, problem, terms, _ = bound
    if choice.train is None:
        return *choice.forward(problem, q, k, v, terms), ()
    return choice.train(problem, q, k, v, terms)


def _backward(bound: Bound, q, k, v, saved, dout, dlse, wanted) -> tuple:
    note(bound)
    return bound.choice.forward(bound.problem, q, k, v, bound.terms, saved, dout, dlse, wanted)


def _shifted(x: dict) -> torch.Tensor:
    """q as it meets k."""
    return x["q"] + x["u"][:, None].to(x["q"].dtype) if "u" in x else x["q"]


def _ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _part(x: torch.Tensor, *ranges) -> torch.Tensor:
    """x cut along its last dimensions, but for those that broadcast; None: not cut."""
    for dim, part in enumerate(reversed(ranges), 1):
        if part is not None and dim <= x.dim() and x.shape[-dim] != 1:
            x = x.narrow(-dim, part[0], part[1] - part[0])
    return x
