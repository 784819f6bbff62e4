"""What is measured: one function for each kind of row. All return a `Row`; none times a wrong result."""

import json
import os
import statistics
import subprocess
import sys
import timeit
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import fastattn
from cases import Case, inputs, visited_pairs
from oracle import above_ceiling, errors, truth, wrong
from rows import Result, Row
from timing import Contender, Peak, in_turn


class Comparison(NamedTuple):
    """Our time for one case and thread count against our own time for another, in turn."""

    kind: str
    case: Case
    threads: int
    base: Case
    base_threads: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.case}" + (f" x{self.threads}" if self.threads != self.base_threads else "")


def _comparisons() -> tuple[Comparison, ...]:
    cores = os.cpu_count() or 1
    long = [Case(num_heads=8, seqlen_q=s, head_dim=64) for s in (1024, 2048)]
    scaling = [*long, *(case._replace(causal=True) for case in long)]
    scaling += [Case(num_heads=4, seqlen_q=16, seqlen_k=4096, head_dim=64)]
    found = [Comparison("threads", case, n, case, 1) for case in scaling for n in sorted({2, cores}) if 1 < n <= cores]
    found += [Comparison("bias or mask", long[1]._replace(**extra), 1, long[1], 1) for extra in EXTRAS]
    found += [Comparison("16-bit", c._replace(dtype=t), 1, c, 1) for c in long for t in ("bfloat16", "float16")]
    whole = Case(num_heads=8, seqlen_q=4096, head_dim=64)
    return tuple(found) + (Comparison("window", whole._replace(window_size=(256, 0)), 1, whole, 1),)


EXTRAS = ({"bias": "shared"}, {"mask": "tensor"})
COMPARISONS = _comparisons()
TINY = Case(seqlen_q=1, head_dim=16)
LONG_MEMORY = Case(num_heads=4, seqlen_q=16384, head_dim=64, causal=True, bias="key")


def grid_row(case: Case, threads: int, peers: tuple, budget: float, peak: Peak) -> Row:
    """Ours beside `peers` on one case: all checked against float64 first, then timed in turn."""
    torch.set_num_threads(threads)
    row, ours, exact = _checked_row("grid", str(case), case, threads)
    if row.wrong:
        return row
    contenders = {"fastattn": Contender(ours, threads)}
    for peer in peers:
        row.results[peer.name], run = _prepare(peer, case, exact)
        if run is not None:
            contenders[peer.name] = Contender(run, threads)
    times = _in_turn_beside_peak(row, contenders, budget, peak, case.dtype)
    for name, seconds in times.items():
        _fill(row.results[name], seconds, row.flops, row.peak_gflops)
        row.results[name].ratio = row.results[name].ms / row.ours.ms
        if (row.results[name].share or 0.0) > 1.0:
            row.flags.append(f"{name} is above the measured peak: no share of this row counts")
        if name != "fastattn":
            row.metrics[f"vs {name}"] = row.results[name].ratio
            row.metrics[f"error vs {name}"] = max(
                getattr(row.ours, which) / max(getattr(row.results[name], which), 1e-300)
                for which in ("max_error", "rms_error")
            )
    if row.ours.share is not None and all((result.share or 0.0) <= 1.0 for result in row.results.values()):
        row.metrics["share"] = row.ours.share
    return row


def comparison_row(comparison: Comparison, budget: float, peak: Peak) -> Row:
    """Ours against ours: metrics "speed-up" (base time / time), "time" (its inverse), "rate" (per visited pair)."""
    kind, case, threads, base, base_threads = comparison
    torch.set_num_threads(threads)
    row, ours, _ = _checked_row(kind, comparison.name, case, threads)
    base_row, base_ours, _ = (
        (row, ours, None) if case == base else _checked_row(kind, comparison.name, base, base_threads)
    )
    row.wrong = row.wrong or base_row.wrong
    if row.wrong:
        return row
    row.results["base"] = Result()
    contenders = {"fastattn": Contender(ours, threads), "base": Contender(base_ours, base_threads)}
    peak.read(case.dtype, base_threads)
    times = _in_turn_beside_peak(row, contenders, budget, peak, case.dtype)
    base_peak, _ = peak.near(case.dtype, base_threads)
    _fill(row.ours, times["fastattn"], row.flops, row.peak_gflops)
    _fill(row.results["base"], times["base"], base_row.flops, base_peak and base_peak / 1e9)
    row.results["base"].ratio = row.results["base"].ms / row.ours.ms
    row.metrics["speed-up"] = row.results["base"].ratio
    row.metrics["time"] = 1.0 / row.results["base"].ratio
    row.metrics["rate"] = row.ours.gflops / row.results["base"].gflops
    if threads != base_threads and row.peak_gflops and base_peak:
        row.metrics["peak speed-up"] = (
            row.peak_gflops * 1e9 / base_peak
        )  # what the machine itself gains from the threads
    return row


def overhead_row(case: Case, peers: tuple, repeats: int = 15) -> Row:
    """Microseconds of a tiny eager call without gradients, where the work itself is nothing."""
    torch.set_num_threads(1)
    row, ours, exact = _checked_row("overhead", f"overhead {case}", case, 1)
    if row.wrong:
        return row
    runs = {"fastattn": ours}
    for peer in peers:
        row.results[peer.name], run = _prepare(peer, case, exact)
        if run is not None:
            runs[peer.name] = run
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timeit.timeit(run, number=500) / 500)
    for name, seconds in times.items():
        _fill(row.results[name], seconds, None, None)
        row.results[name].ratio = row.results[name].ms / row.ours.ms
        if name != "fastattn":
            row.metrics[f"vs {name}"] = row.results[name].ratio
    return row


def memory_row(case: Case) -> Row:
    """Extra resident memory of one long call, in a process of its own; refused off Linux or without the kernels."""
    threads = os.cpu_count() or 1
    row = Row("memory", f"memory {case}", threads, _repro(f"memory {case}", None), case._asdict())
    command = [sys.executable, str(Path(__file__).with_name("memory.py"))]
    command += map(str, (case.seqlen_q, case.num_heads, case.head_dim))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        row.results["fastattn"] = Result(refused=(child.stderr.strip().splitlines() or ["it crashed"])[-1])
        return row
    answer = json.loads(child.stdout)
    row.kernel, row.isa, row.metrics["extra MiB"] = answer["kernel"], answer["isa"], answer["extra_mib"]
    return row


def _checked_row(suite: str, name: str, case: Case, threads: int):
    """(row with our errors, kernel and verdict, our call, float64 result)"""
    (q, k, v), kwargs = inputs(case)
    ours = partial(fastattn.attention, q, k, v, **kwargs)
    exact, plain = truth(case)
    error = errors(ours(), exact)
    call, pairs = fastattn.last_call(), visited_pairs(case)
    row = Row(
        suite, name, threads, _repro(name, threads if suite == "grid" else None), case._asdict(),
        kernel=call.kernel, isa=call.isa, wrong=wrong(error, plain, case.dtype), pairs=pairs,
        flops=2 * pairs * (q.shape[3] + v.shape[3]),
    )  # fmt: skip
    row.results["fastattn"] = Result(max_error=error.max, rms_error=error.rms)
    row.results["plain torch"] = Result(refused="not timed", max_error=plain.max, rms_error=plain.rms)
    return row, ours, exact


def _prepare(peer, case: Case, exact: torch.Tensor):
    """(Result with the peer's errors or its refusal, its call or None)"""
    if reason := peer.refuse(case):
        return Result(refused=reason), None
    (q, k, v), kwargs = inputs(case)
    try:
        run = peer.prepare(case, q, k, v, kwargs)
        error = errors(run(), exact)
    except Exception as failure:  # whatever a peer raises is its refusal
        return Result(refused=f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"), None
    result = Result(refused=above_ceiling(error, case.dtype), max_error=error.max, rms_error=error.rms)
    return result, None if result.refused else run


def _in_turn_beside_peak(row: Row, contenders: dict, budget: float, peak: Peak, dtype: str) -> dict[str, list[float]]:
    """Times of `contenders`; the peak, or why there is none, goes into `row`."""
    peak.read(dtype, row.threads)
    times = in_turn(contenders, budget)
    peak.read(dtype, row.threads)
    rate, doubt = peak.near(dtype, row.threads)
    row.peak_gflops = rate and rate / 1e9
    row.flags += [doubt] if doubt else []
    return times


def _fill(result: Result, seconds: list[float], flops: int | None, peak_gflops: float | None) -> None:
    low, *_, high = statistics.quantiles(seconds, n=10)
    result.ms, result.p10, result.p90 = (1e3 * x for x in (statistics.median(seconds), low, high))
    result.calls = len(seconds)
    if flops is not None:
        result.gflops = flops / result.ms / 1e6
        result.share = result.gflops / peak_gflops if peak_gflops else None


def _repro(name: str, threads: int | None) -> str:
    isa = os.environ.get("FASTATTN_CPU_ISA")
    return (
        f'python bench/run.py --only "{name}"'
        + (f" --threads {threads}" if threads else "")
        + (f" --isa {isa}" if isa else "")
    )
