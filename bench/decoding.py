"""Decoding steps against a long cache, beside the rate at which this machine reads memory."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

import fastattn
from cases import Case
from fastattn.cli.timing import Contender, Peak
from rows import Row
from suites import _checked_row, _fill, _in_turn_beside_peak, _prepared
from work import Work, tensors

try:
    from fastattn._C import read_rate
except ImportError:
    read_rate = None  # no compiled kernels, hence no rate: shares are left empty

ROTATED = 256 << 20
"""Bytes of caches that are read in turn: no cache of a CPU holds them."""


class Step(NamedTuple):
    """A decoding step, its threads, and whether its one cache is read again and again (what fits stays in the L2)."""

    work: Work
    threads: int = 1
    hot: bool = False

    @property
    def name(self) -> str:
        return f"decode {self.work}" + (f" x{self.threads}" if self.threads > 1 else "") + (" hot" if self.hot else "")

    @property
    def bytes(self) -> int:
        """Of K and V, which a step reads once."""
        case = self.work.case
        size = torch.finfo(getattr(torch, case.dtype)).bits // 8
        heads = case.num_heads_k or case.num_heads
        return case.batch * heads * case.seqlen_k * (case.head_dim + (case.head_dim_v or case.head_dim)) * size


def _steps() -> tuple[Step, ...]:
    def step(heads, heads_k, seqlen_k, head_dim, dtype="float32", seqlen_q=1, layout="bhsd") -> Work:
        return Work(Case(1, heads, seqlen_q, seqlen_k, head_dim, None, heads_k, dtype, layout=layout))

    dtypes = ("float32", "bfloat16", "float16")
    found = [Step(step(32, 32, 2048, 128, dtype)) for dtype in dtypes]
    found += [Step(step(12, 12, 16384, 64, dtype)) for dtype in dtypes]
    found += [Step(step(32, 8, 4096, 128, dtype), threads) for threads in (1, 2) for dtype in dtypes]
    found += [Step(step(8, 1, 32768, 128, dtype), 2) for dtype in dtypes[:2]]
    found += [Step(step(32, 8, 4096, 128, layout="bshd")), Step(step(32, 32, 2048, 128, layout="bshd"))]
    found += [Step(step(32, 8, 8192, 128, seqlen_q=seqlen_q)) for seqlen_q in (1, 4)]
    return (*found, Step(step(12, 12, 1024, 64), hot=True))


STEPS = _steps()


def decode_row(step: Step, peers: tuple, budget: float, peak: Peak) -> Row:
    """Ours and `peers` in turn. Metrics: "bandwidth" (share of the read rate, unless hot), "vs sdpa", "ms a query"."""
    work, threads, _ = step
    torch.set_num_threads(threads)
    row, _ = _checked_row("decode", step.name, work, threads)
    row.spec |= {"hot": step.hot}
    if row.wrong:
        return row
    leaves, _, _ = tensors(work)
    copies = 1 if step.hot else -(-ROTATED // step.bytes)
    caches = [(leaves["k"], leaves["v"])] + [(leaves["k"].clone(), leaves["v"].clone()) for _ in range(copies - 1)]
    runs = {"fastattn": _rotating(leaves["q"], caches, fastattn.attention)}
    right = _prepared(row, peers, work)
    for peer in peers:
        if peer.name in right:
            calls = [peer.prepare(work, leaves["q"], k, v, {}) for k, v in caches]
            runs[peer.name] = _in_rotation(calls)
    contenders = {name: Contender(run, threads) for name, run in runs.items()}
    rate = _rate(threads)
    times = _in_turn_beside_peak(row, contenders, budget, peak, work.case.dtype)
    rate = rate and max(rate, _rate(threads))
    for name, seconds in times.items():
        _fill(row.results[name], seconds, row.flops, None)
        row.results[name].ratio = row.results[name].ms / row.ours.ms
        if name != "fastattn":
            row.metrics[f"vs {name}"] = row.results[name].ratio
    row.metrics["ms a query"] = row.ours.ms / work.case.seqlen_q
    if rate and not step.hot:
        row.metrics["bandwidth"] = step.bytes / (row.ours.ms / 1e3) / rate
    return row


def _rate(threads: int) -> float | None:
    return read_rate and read_rate(ROTATED, 5, threads)


def _rotating(q: torch.Tensor, caches: list, function: Callable) -> Callable:
    turn = itertools.cycle(caches)
    return lambda: function(q, *next(turn))


def _in_rotation(calls: list[Callable]) -> Callable:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()
