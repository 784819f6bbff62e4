"""Attention of a run of queries over a run of keys, wherever in the sequence they are, on the row that takes it.

Positions are data: the diagonal bounds, the start of ALiBi's distances and the intervals of a block are those of the
whole sequence, shifted. The gradient of a block comes from the lse and out of all keys: no part of it has to be merged.
"""

import math
from typing import NamedTuple

import torch

from .. import dispatch
from ..calls import note
from ..masks.intervals import UNBOUNDED
from ..plans import Bound, derivative_of
from ..problem import Problem
from ..terms import TERMS, Terms
from .block_masks import cut
from .merge import Partial, for_kernel, of_kernel, of_lse
from .pairs import sees
from .shards import Run

ROWS = ("k_start", "k_end")
_CHUNK = 1 << 22  # comparisons of rows and runs at a time
SCORES = ("mask", "bias")
_BIAS = [term.name for term in TERMS].index("bias")
LEARNED = tuple(term.name for term in TERMS if term.gradient)


class Whole(NamedTuple):
    """One rank's part of a call, whole keys: what all of its blocks have in common.

    problem  of the local queries against all keys, with needs_grad
    terms    numbers and tensors; diagonal_lo, _hi and query_start count from position 0 of queries and of keys, and
             dropout_start holds the first head that is here
    q_runs   of the rank's own rows, in order; k_runs: of all ranks, by their numbers
    """

    problem: Problem
    terms: Terms
    backend: str | None
    q_runs: tuple[Run, ...]
    k_runs: tuple[Run, ...]

    def rows(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Local [batch, heads, seqlen_q, ...] by run."""
        return list(x.split([stop - start for start, stop in self.q_runs], 2)) if self.q_runs else []

    def seen(self) -> tuple[tuple[int, ...], ...]:
        """For each run of keys, the runs of queries that see a key of it; one that is not here sees none."""
        found: list[list[int]] = [[] for _ in self.k_runs]
        for i, queries in enumerate(self.q_runs):
            terms = self.terms
            near = [run for run, keys in enumerate(self.k_runs) if sees(queries, keys, *self.bounds)]
            if terms.block_mask is not None:
                near = [run for run in near if self._cut(i, run) is not None]
            elif terms.mask is not None:
                near = [run for run in near if bool(self.part_of(terms.mask, i, run).any())]
            elif terms.k_start is not None or terms.k_end is not None:
                near = self._seen_in_intervals(i, near)
            for run in near:
                found[run].append(i)
        return tuple(map(tuple, found))

    @property
    def bounds(self) -> tuple[int, int]:
        """lo and hi of key - query."""
        return self.terms.diagonal_lo, self.terms.diagonal_hi

    def _seen_in_intervals(self, i: int, runs: list[int]) -> list[int]:
        """Those of `runs` of which a query of run i sees a key."""
        start, end = (_rows_of(x, self._local(i)) for x in (self.terms.k_start, self.terms.k_end))
        query = torch.arange(*self.q_runs[i], device=(end if start is None else start).device)
        first, stop = query + self.bounds[0], query + (self.bounds[1] + 1)
        first, stop = first if start is None else start.maximum(first), stop if end is None else end.minimum(stop)
        first, stop = (x.reshape(-1) for x in torch.broadcast_tensors(first, stop))
        kept, keys = [], torch.tensor([self.k_runs[run] for run in runs], device=query.device).view(-1, 2)
        for part in keys.split(max(_CHUNK // max(len(first), 1), 1)):
            kept.append((first.maximum(part[:, :1]) < stop.minimum(part[:, 1:])).any(1))
        return [run for run, keep in zip(runs, torch.cat(kept).tolist(), strict=True) if keep]

    def block(self, i: int, run: int) -> tuple[Problem, Terms]:
        """The call of query run i over key run `run`."""
        (q_start, q_stop), (k_start, k_stop) = self.q_runs[i], self.k_runs[run]
        shift, terms, local = q_start - k_start, self.terms, self._local(i)
        changed = {
            "diagonal_lo": terms.diagonal_lo + shift if terms.diagonal_lo > -UNBOUNDED else -UNBOUNDED,
            "diagonal_hi": terms.diagonal_hi + shift if terms.diagonal_hi < UNBOUNDED else UNBOUNDED,
            "query_start": terms.query_start + shift,
        }
        for name in ROWS:
            if (x := getattr(terms, name)) is not None:
                changed[name] = (_rows_of(x, local) - k_start).clamp(min=0)
        for name in SCORES:
            if (x := getattr(terms, name)) is not None:
                changed[name] = _scores_of(x, local, (k_start, k_stop))
        if terms.block_mask is not None:
            changed["block_mask"] = self._cut(i, run)
        if terms.dropout_start is not None:
            changed["dropout_start"] = terms.dropout_start._replace(query=q_start, key=k_start)
        problem = self.problem.with_lengths((self.problem.batch, q_stop - q_start, k_stop - k_start))
        return problem, terms._replace(**changed)

    def part_of(self, x: torch.Tensor, i: int, run: int) -> torch.Tensor:
        """The part of a tensor like a bias, [batch|1, heads|1, seqlen_q|1, all keys|1], that a block has; a view."""
        return _scores_of(x, self._local(i), self.k_runs[run])

    def _local(self, i: int) -> Run:
        before = sum(stop - start for start, stop in self.q_runs[:i])
        return before, before + self.q_runs[i][1] - self.q_runs[i][0]

    def _cut(self, i: int, run: int):
        return cut(self.terms.block_mask, self._local(i), self.k_runs[run])


def forward(whole: Whole, i: int, run: int, q, k, v) -> Partial:
    """Of query run i, q, over key run `run`, k and v. No gradient is recorded."""
    problem, terms = whole.block(i, run)
    choice = dispatch.select(problem, whole.backend)
    if choice.train is None:  # the reference, or nobody will ask for a gradient
        problem = problem._replace(lse=True, needs_grad=False)
        note(Bound(choice, problem, terms, whole.backend), q, k)
        out, lse = choice.forward(problem, q, k, v, terms)
        return of_lse(out.to(lse.dtype), lse)
    note(Bound(choice, problem, terms, whole.backend), q, k)
    _, _, (out, parts) = choice.train(problem, q, k, v, terms)
    return of_kernel(out.to(parts.dtype), parts, choice.row.backend)


def backward(whole: Whole, i: int, run: int, qkv, of_all: Partial, dout, dlse, wanted) -> tuple:
    """(dq, dk, dv, gradients of terms or None by their places) of a block. of_all: the result over all keys."""
    problem, terms = whole.block(i, run)
    choice = dispatch.select(problem, whole.backend)
    # For kernels, a bias of one key is one that all keys share, whose gradient they know without these keys.
    is_one_key = wanted[3][_BIAS] and problem.seqlen_k == 1
    backend = "reference" if is_one_key else choice.row.backend
    bound = derivative_of(problem, "backward", backend, dlse is not None)._replace(terms=terms)
    if bound.choice.row.backend == "reference":
        part = forward(whole, i, run, *qkv)
        saved, (dout, dlse) = (), _of_part(part, of_all, dout, dlse)
        bound = bound._replace(problem=bound.problem._replace(lse=True))
    else:
        saved = for_kernel(of_all, bound.choice.row.backend)
    note(bound)
    return bound.choice.forward(bound.problem, *qkv, terms, saved, dout, dlse, wanted)


def _of_part(part: Partial, of_all: Partial, dout, dlse) -> tuple[torch.Tensor, torch.Tensor]:
    """Cotangents of one part's out and lse from those of the merged ones."""
    weight = torch.exp((part.top - of_all.top) + (part.log_sum - of_all.log_sum))
    weight = weight.masked_fill(part.log_sum == math.inf, 0.0)
    exact = dout.to(part.out.dtype)
    dpart = (exact * (part.out - of_all.out)).sum(-1)
    return (exact * weight[..., None]).to(dout.dtype), weight * (dpart if dlse is None else dpart + dlse)


def _rows_of(x, local: Run):
    """Rows of bounds [batch|1, heads|1, seqlen_q|1]."""
    return x if x is None or x.shape[2] == 1 else x[:, :, slice(*local)]


def _scores_of(x: torch.Tensor, local: Run, keys: Run) -> torch.Tensor:
    """The part of a tensor that broadcasts to [batch, heads, seqlen_q, seqlen_k]."""
    x = x[(None,) * (4 - x.dim())]
    x = x if x.shape[2] == 1 else x[:, :, slice(*local)]
    return x if x.shape[3] == 1 else x[..., slice(*keys)]
