"""What is measured: one function for each kind of row. All return a `Row`; none times a wrong result."""

import json
import os
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import fastattn
from cases import LONG, WIDE, Case
from fastattn import BlockMask, Mask
from fastattn.cli.timing import Contender, Peak, in_turn, multiplies_pairs
from oracle import Results, above_ceiling, errors, results, truth, worst, wrong
from peers import SEED, dropout_of_peers
from rows import Result, Row
from work import STEPS, Work, tensors

SPARSE = "dense_vs_sparse.py"


class Comparison(NamedTuple):
    """Our time for some work and thread count against our own time for another, in turn."""

    kind: str
    work: Work
    threads: int
    base: Work
    base_threads: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.work}" + (f" x{self.threads}" if self.threads != self.base_threads else "")


def _comparisons() -> tuple[Comparison, ...]:
    cores = os.cpu_count() or 1
    long, backward = [Work(case) for case in LONG], [Work(case, "backward") for case in LONG]
    scaling = [*long, *(Work(case._replace(causal=True)) for case in LONG)]
    scaling += [Work(Case(num_heads=4, seqlen_q=16, seqlen_k=4096, head_dim=64))]
    scaling += [*backward, Work(Case(seqlen_q=4096, head_dim=64), "backward")]
    found = [Comparison("threads", work, n, work, 1) for work in scaling for n in sorted({2, cores}) if 1 < n <= cores]
    found += [Comparison("bias or mask", Work(LONG[1]._replace(**extra)), 1, long[1], 1) for extra in EXTRAS]
    steps = [Work(case, "forward+backward") for case in STEPS]
    in_bfloat16 = [*map(Work, WIDE), *backward, Work(WIDE[0], "backward"), *steps]
    for base, dtypes in ((long, ("bfloat16", "float16")), (in_bfloat16, ("bfloat16",))):
        found += [
            Comparison("16-bit", work._replace(case=work.case._replace(dtype=dtype)), 1, work, 1)
            for work in base
            for dtype in dtypes
        ]
    step, whole = Work(LONG[1], "forward+backward"), Case(num_heads=8, seqlen_q=4096, head_dim=64)
    found += [Comparison("dropout", step._replace(case=LONG[1]._replace(dropout_p=0.1)), 1, step, 1)]
    return (*found, Comparison("window", Work(whole._replace(window_size=(256, 0))), 1, Work(whole), 1))


EXTRAS = ({"bias": "shared"}, {"bias": "per_head"}, {"mask": "tensor"})
COMPARISONS = _comparisons()
TINY = tuple(Work(Case(seqlen_q=1, head_dim=16), passes) for passes in ("forward", "forward+backward"))
MEMORY = tuple(
    Work(Case(num_heads=4, seqlen_q=16384, head_dim=64, causal=True, bias="key"), passes)
    for passes in ("forward", "forward+backward")
)


def grid_row(work: Work, threads: int, peers: tuple, budget: float, peak: Peak) -> Row:
    """Ours beside `peers` on some work: all checked against float64 first, then timed in turn."""
    torch.set_num_threads(threads)
    row, ours = _checked_row("grid", str(work), work, threads)
    if row.wrong:
        return row
    contenders = {"fastattn": Contender(ours, threads)} | {
        name: Contender(run, threads) for name, run in _prepared(row, peers, work).items()
    }
    times = _in_turn_beside_peak(row, contenders, budget, peak, work.case.dtype)
    for name, seconds in times.items():
        _fill(row.results[name], seconds, row.flops, row.peak_gflops)
        row.results[name].ratio = row.results[name].ms / row.ours.ms
        if name != "fastattn":
            row.metrics[f"vs {name}"] = row.results[name].ratio
            row.metrics[f"error vs {name}"] = max(
                getattr(row.ours, which) / max(getattr(row.results[name], which), 1e-300)
                for which in ("max_error", "rms_error")
            )
    _judge_shares(row, work.case.dtype)
    return row


def _judge_shares(row: Row, dtype: str) -> None:
    """Our share becomes a metric, unless somebody above the peak shows that it is none."""
    above = [name for name, result in row.results.items() if (result.share or 0.0) > 1.0]
    if "16" in dtype:  # of 16-bit dot products, which no loop of float32 multiply-adds is a bound for
        if multiplies_pairs(row.isa):
            above = [name for name in above if name != "fastattn"]
        row.flags += [f"{name} is above the float32 FMA peak, as 16-bit dot products can be" for name in above]
        above = [name for name in above if name == "fastattn"]
    row.flags += [f"{name} is above the measured peak: no share of this row counts" for name in above]
    if row.ours.share is not None and not above:
        row.metrics["share"] = row.ours.share


def comparison_row(comparison: Comparison, budget: float, peak: Peak) -> Row:
    """Ours against ours: metrics "speed-up" (base time / time), "time" (its inverse), "rate" (per visited pair)."""
    kind, work, threads, base, base_threads = comparison
    torch.set_num_threads(threads)
    row, ours = _checked_row(kind, comparison.name, work, threads)
    base_row, base_ours = (row, ours) if work == base else _checked_row(kind, comparison.name, base, base_threads)
    row.wrong = row.wrong or base_row.wrong
    if row.wrong:
        return row
    row.results["base"] = Result()
    contenders = {"fastattn": Contender(ours, threads), "base": Contender(base_ours, base_threads)}
    peak.read(work.case.dtype, base_threads)
    times = _in_turn_beside_peak(row, contenders, budget, peak, work.case.dtype)
    base_peak, _ = peak.near(work.case.dtype, base_threads)
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


def overhead_row(work: Work, peers: tuple, repeats: int = 15) -> Row:
    """Microseconds of a tiny eager call, where the work itself is nothing."""
    torch.set_num_threads(1)
    row, ours = _checked_row("overhead", f"overhead {work}", work, 1)
    if row.wrong:
        return row
    runs = {"fastattn": ours} | _prepared(row, peers, work)
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


GROWING = Work(Case(num_heads=8, seqlen_q=1, seqlen_k=1024, head_dim=64, causal=True))


def growing_row(work: Work, steps: int = 256, repeats: int = 15) -> Row:
    """A decoding step whose cache grows by one key a step, against the same steps at the length in the middle."""
    torch.set_num_threads(1)
    row, _ = _checked_row("growing", f"growing {work}", work, 1)
    if row.wrong:
        return row
    case, longest = work.case, work.case.seqlen_k + steps // 2
    q = torch.randn(case.batch, case.num_heads, 1, case.head_dim)
    k, v = torch.randn(2, case.batch, case.num_heads, longest, case.head_dim)
    grown = [(k[:, :, :length], v[:, :, :length]) for length in range(longest - steps, longest)]
    contenders = {"fastattn": grown, "base": [grown[steps // 2]] * steps}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, caches in contenders.items():
                start = time.perf_counter()
                for keys, values in caches:
                    fastattn.attention(q, keys, values, causal=True)
                times[name].append((time.perf_counter() - start) / steps)
    row.results["base"] = Result()
    for name, seconds in times.items():
        _fill(row.results[name], seconds, None, None)
    row.results["base"].ratio = row.results["base"].ms / row.ours.ms
    row.metrics["time"] = 1.0 / row.results["base"].ratio
    return row


def memory_row(work: Work) -> Row:
    """Extra resident memory of one long call, in a process of its own; refused off Linux or without the kernels."""
    threads = os.cpu_count() or 1
    row = Row("memory", f"memory {work}", threads, _repro(f"memory {work}", None), work.spec)
    answer = _measured_memory(*_sizes(work))
    if isinstance(answer, str):
        row.results["fastattn"] = Result(refused=answer)
        return row
    row.kernel, row.isa, row.metrics["extra MiB"] = answer["kernel"], answer["isa"], answer["extra_mib"]
    return row


def sparse_row(work: Work, peers: tuple, budget: float, peak: Peak, memory: bool = False) -> Row:
    """Ours with a sparse mask beside our own dense kernel without one and `peers` with the same mask, in turn.

    Metrics: "density", "block density" (of the blocks that are visited), "speed-up" (dense time / time), "rate" (per
    visited pair, ours / dense), "vs sdpa", "vs flex"; with `memory`, "fastattn MiB", "dense MiB", "sdpa MiB".
    """
    torch.set_num_threads(1)
    dense = work._replace(pattern=None)
    row, ours = _checked_row("sparse", str(work), work, 1, SPARSE)
    dense_row, run_dense = _checked_row("sparse", str(dense), dense, 1, SPARSE)
    row.wrong = row.wrong or (dense_row.wrong and f"without a mask: {dense_row.wrong}")
    if row.wrong:
        return row
    row.results["dense"] = dense_row.ours
    runs = {"fastattn": ours, "dense": run_dense} | _prepared(row, peers, work)
    times = _in_turn_beside_peak(
        row, {name: Contender(run, 1) for name, run in runs.items()}, budget, peak, work.case.dtype
    )
    for name, seconds in times.items():
        result = row.results[name]
        _fill(result, seconds, dense_row.flops if name == "dense" else row.flops, row.peak_gflops)
        result.ratio = result.ms / row.ours.ms
        row.metrics["speed-up" if name == "dense" else f"vs {name}"] = result.ratio
    row.metrics["density"], row.metrics["block density"] = work.block_mask.density, work.block_mask.block_density
    row.metrics["rate"] = row.ours.gflops / row.results["dense"].gflops
    _judge_shares(row, work.case.dtype)
    for name in runs if memory else ():
        if name != "flex":  # its compiler's memory would count as its own
            answer = _measured_memory(*_sizes(work), work.pattern, name)
            if isinstance(answer, str):
                row.flags.append(f"memory of {name} not measured: {answer}")
            else:
                row.metrics[f"{name} MiB"] = answer["extra_mib"]
    return row


WINDOW_BUILT, DOCUMENT = 4096, 3000
"""Of `built_mask`: keys that a query sees at most, and the mean length of a document."""


def built_mask(seqlen: int) -> BlockMask:
    """A causal window inside packed documents of random lengths."""
    document = _document_ids(seqlen)[None]
    mask = Mask.causal() & Mask.window(WINDOW_BUILT - 1, None) & Mask.documents(document)
    return BlockMask.from_mask(mask, seqlen_q=seqlen)


def _document_ids(seqlen: int) -> torch.Tensor:
    starts = torch.rand(seqlen, generator=torch.Generator().manual_seed(0)) < 1.0 / DOCUMENT
    return starts.cumsum(0)


def build_row(seqlen: int, budget: float) -> Row:
    """Time and memory of building `built_mask`, in metrics "ms" and "MiB" (its own tensors not counted: "mask MiB")."""
    torch.set_num_threads(1)
    name = f"build causal + window + documents S{seqlen}"
    row = Row("build", name, 1, _repro(name, None, SPARSE), {"passes": "forward", "seqlen_q": seqlen})
    mask, ids = built_mask(seqlen), _document_ids(seqlen)
    query, key = torch.randint(seqlen, (64, 1), generator=torch.Generator().manual_seed(1)), torch.arange(seqlen)
    expected = (key <= query) & (key > query - WINDOW_BUILT) & (ids[query] == ids)
    if not torch.equal(mask.mask_mod(0, 0, query, key), expected):
        row.wrong = "the mask is not that of its predicate"
        return row
    seconds = in_turn({"fastattn": Contender(partial(built_mask, seqlen), 1)}, budget)["fastattn"]
    row.results["fastattn"] = Result()
    _fill(row.ours, seconds, None, None)
    row.metrics |= {"ms": row.ours.ms, "mask MiB": mask.nbytes / 2**20}
    answer = _measured_memory("build", seqlen)
    if isinstance(answer, str):
        row.flags.append(f"memory not measured: {answer}")
    else:
        row.metrics["MiB"] = answer["extra_mib"]
    return row


def select_row(work: Work, method: str, budget: float, peak: Peak) -> Row:
    """`select_blocks` of an eighth of the blocks, and attention on what it selects, beside the dense forward pass.

    Metrics: "time" (selection / dense), "whole speed-up" (dense / selection and attention), "density".
    """
    torch.set_num_threads(1)
    case = work.case
    leaves, kwargs, _ = tensors(work)
    q, k, v = leaves.values()
    top_k = max(case.seqlen_k or case.seqlen_q, 1024) // 1024
    select = partial(fastattn.select_blocks, q, k, method=method, top_k=top_k, causal=case.causal)
    name = f"select {method} {work}"
    row, dense = _checked_row("select", name, work, 1, SPARSE)
    row.spec |= {"method": method}
    mask, rows = select(), torch.arange(-(-case.seqlen_q // 128))
    expected = (rows + 1).clamp(max=top_k) if case.causal else torch.full_like(rows, top_k)
    if not torch.equal((mask.kv_num_blocks + mask.full_kv_num_blocks).long(), expected.expand(*mask.shape[:2], -1)):
        row.wrong = row.wrong or f"a block of queries does not visit top_k={top_k} blocks"
    if row.wrong:
        return row
    row.results["dense"] = row.results.pop("fastattn")
    row.results |= {"fastattn": Result(), "both": Result()}
    contenders = {
        "fastattn": Contender(select, 1),
        "both": Contender(lambda: fastattn.attention(q, k, v, mask=select()), 1),
        "dense": Contender(dense, 1),
    }
    for name, seconds in _in_turn_beside_peak(row, contenders, budget, peak, case.dtype).items():
        _fill(row.results[name], seconds, None, None)
        row.results[name].ratio = row.results[name].ms / row.ours.ms
    row.metrics["time"] = row.ours.ms / row.results["dense"].ms
    row.metrics["whole speed-up"] = row.results["dense"].ms / row.results["both"].ms
    row.metrics["density"] = mask.density
    return row


def skip_row(work: Work, budget: float, peak: Peak) -> Row:
    """Ours with and without skip_negligible, in turn; results that are not equal are wrong.

    Metrics: "speed-up" (time without / with), "skipped" (share of the visited pairs).
    """
    torch.set_num_threads(1)
    row, _ = _checked_row("skip", f"skip {work}", work, 1, SPARSE)
    leaves, kwargs, dout = tensors(work)
    qkv, others = list(leaves.values())[:3], dict(list(leaves.items())[3:])

    def prepared(skip: bool) -> Callable:
        return _call(work, partial(fastattn.attention, *qkv, **others, **kwargs, skip_negligible=skip), leaves, dout)

    runs = {"fastattn": prepared(True), "without": prepared(False)}
    before = fastattn.backends.cpu.skipped_pairs()
    found = _named(work, leaves, runs["fastattn"]())
    row.metrics["skipped"] = (fastattn.backends.cpu.skipped_pairs() - before) / work.pairs
    if not all(torch.equal(found[name], x) for name, x in _named(work, leaves, runs["without"]()).items()):
        row.wrong = row.wrong or "skipping changed the result"
    if row.wrong:
        return row
    row.results["without"] = Result()
    contenders = {name: Contender(run, 1) for name, run in runs.items()}
    for name, seconds in _in_turn_beside_peak(row, contenders, budget, peak, work.case.dtype).items():
        _fill(row.results[name], seconds, None, None)
        row.results[name].ratio = row.results[name].ms / row.ours.ms
    row.metrics["speed-up"] = row.results["without"].ratio
    return row


def edges_row(seqlen: int, neighbours: int, passes: str, budget: float) -> Row:
    """`attention_csr` along edges to random keys, the same number for each query, beside a gather in eager torch."""
    torch.set_num_threads(1)
    work = Work(Case(seqlen_q=seqlen, head_dim=64), passes)
    leaves, _, dout = tensors(work)
    keys = torch.randint(seqlen, (seqlen, neighbours), generator=torch.Generator().manual_seed(0))
    indptr = torch.arange(0, keys.numel() + 1, neighbours)
    name = f"{passes} edges S{seqlen} to {neighbours} keys each"
    spec = work.spec | {"neighbours": neighbours}
    row = Row("edges", name, 1, _repro(name, None, SPARSE), spec, flops=keys.numel() * work.flops_per_pair)
    wide, _, wide_dout = tensors(work, torch.float64)
    exact = _named(work, wide, _call(work, partial(_gathered, **wide, keys=keys), wide, wide_dout)())
    exact = {name: x.detach() for name, x in exact.items()}
    runs = {
        "fastattn": _call(
            work, partial(fastattn.attention_csr, **leaves, indptr=indptr, indices=keys.flatten()), leaves, dout
        ),
        "gather": _call(work, partial(_gathered, **leaves, keys=keys), leaves, dout),
    }
    with fastattn.record() as calls:
        found = {peer: errors(_named(work, leaves, run()), exact) for peer, run in runs.items()}
    row.kernel, row.isa = " + ".join(dict.fromkeys(call.kernel for call in calls)), calls[-1].isa
    row.results = {peer: Result(max_error=worst(x).max, rms_error=worst(x).rms) for peer, x in found.items()}
    row.wrong = wrong(found["fastattn"], found["gather"], work.case.dtype)
    if row.wrong:
        return row
    times = in_turn({peer: Contender(run, 1) for peer, run in runs.items()}, budget)
    for peer, seconds in times.items():
        _fill(row.results[peer], seconds, row.flops, None)
        row.results[peer].ratio = row.results[peer].ms / row.ours.ms
    row.metrics["vs gather"] = row.results["gather"].ratio
    return row


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention to keys [seqlen_q, neighbours] in eager torch; as batched products, which are faster than sums."""
    scores = (k[..., keys, :] @ q.unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1).unsqueeze(-2) @ v[..., keys, :]).squeeze(-2)


def _sizes(work: Work) -> tuple:
    return work.case.seqlen_q, work.case.num_heads, work.case.head_dim, work.passes


def _measured_memory(*arguments) -> dict | str:
    """What memory.py prints, from a process of its own; or why it prints nothing."""
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        return (child.stderr.strip().splitlines() or ["it crashed"])[-1]
    return json.loads(child.stdout)


def _checked_row(kind: str, name: str, work: Work, threads: int, script: str = "run.py") -> tuple[Row, Callable]:
    """(row with our errors, kernels and verdict, our call)"""
    leaves, kwargs, dout = tensors(work)
    qkv, others = list(leaves.values())[:3], dict(list(leaves.items())[3:])
    ours = _call(work, partial(fastattn.attention, *qkv, **others, **kwargs), leaves, dout)
    exact, plain = truth(work)
    with fastattn.record() as calls:
        found = errors(_named(work, leaves, ours()), exact)
    row = Row(
        kind, name, threads, _repro(name, threads if kind == "grid" else None, script), work.spec,
        kernel=" + ".join(dict.fromkeys(call.kernel for call in calls)), isa=calls[-1].isa,
        wrong=wrong(found, plain, work.case.dtype), pairs=work.pairs, flops=work.flops,
    )  # fmt: skip
    row.results["fastattn"] = Result(max_error=worst(found).max, rms_error=worst(found).rms)
    row.results["plain torch"] = Result(refused="not timed", max_error=worst(plain).max, rms_error=worst(plain).rms)
    return row, ours


def _prepared(row: Row, peers: tuple, work: Work) -> dict[str, Callable]:
    """The calls of those peers that do the work, and do it right; `row` gets the errors or refusals of all."""
    exact, runs = truth(work)[0], {}
    if (kept := dropout_of_peers(work)) is not None:
        exact = results(work, torch.float64, kept)
    for peer in peers:
        row.results[peer.name], run = _prepare(peer, work, exact)
        if run is not None:
            runs[peer.name] = run
    return runs


def _prepare(peer, work: Work, exact: Results) -> tuple[Result, Callable | None]:
    """(Result with the peer's errors or its refusal, its call or None)"""
    if reason := peer.refuse(work):
        return Result(refused=reason), None
    leaves, kwargs, dout = tensors(work)
    try:
        torch.manual_seed(SEED)  # for a graph that is made in `_call`
        run = _call(work, peer.prepare(work, leaves["q"], leaves["k"], leaves["v"], leaves | kwargs), leaves, dout)
        torch.manual_seed(SEED)  # for one that is made by `run`
        found = errors(_named(work, leaves, run()), exact)
    except Exception as failure:  # whatever a peer raises is its refusal
        return Result(refused=f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"), None
    result = Result(
        refused=above_ceiling(found, work.case.dtype), max_error=worst(found).max, rms_error=worst(found).rms
    )
    return result, None if result.refused else run


def _call(work: Work, forward: Callable, leaves: dict, dout: torch.Tensor | None) -> Callable:
    """What is timed: `forward`, the backward pass of a graph that is made here, or both."""
    if not work.trains:
        return forward
    inputs = tuple(leaves.values())
    if work.passes == "backward":
        return partial(torch.autograd.grad, forward(), inputs, dout, retain_graph=True)

    def step():
        out = forward()
        return out, *torch.autograd.grad(out, inputs, dout)

    return step


def _named(work: Work, leaves: dict, found) -> Results:
    """What a call of `_call` returned, by the names of the oracle."""
    names = {"forward": ["out"], "backward": [*leaves], "forward+backward": ["out", *leaves]}[work.passes]
    return dict(zip(names, found if work.trains else (found,), strict=True))


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


def _repro(name: str, threads: int | None, script: str = "run.py") -> str:
    isa = os.environ.get("FASTATTN_CPU_ISA")
    return (
        f'python bench/{script} --only "{name}"'
        + (f" --threads {threads}" if threads else "")
        + (f" --isa {isa}" if isa else "")
    )
