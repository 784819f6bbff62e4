"""Benchmark of `fastattn.attention` beside its peers: `python bench/run.py`, or `make bench`.

Two suites: forward is inference, backward is training (the backward pass alone, or a forward and a backward pass).
Every result is compared with float64 before it is timed; a wrong one is not timed and the exit status is 1.
Contenders are measured in turn in one process. Only the ratios and shares within one run mean something.
Writes bench.json, bench.md, and a picture of each suite.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

# last: an installed one wins
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests/support", "")]

from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, TimeElapsedColumn

import report
import targets
from cases import Case
from compiled import BLOCKS, GRAPH, block_row, graph_row, name_of
from decoding import STEPS, decode_row
from fastattn.cli.bench import BUSY
from fastattn.cli.machine import Others
from fastattn.cli.timing import Peak
from peers import PEERS
from plots import draw
from rows import Row
from suites import COMPARISONS, GROWING, MEMORY, TINY, comparison_row, grid_row, growing_row, memory_row, overhead_row
from work import FORWARD, TRAINING, Work

STEADY = 0.9
"""Lowest reading of the FMA peak beside a row over the highest of the run, below which the machine was not steady."""

PICTURES = {"forward": "bench.png", "backward": "backward.png"}
"""By suite."""


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; 0, or 1 if a result of ours was wrong."""
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)
    console = console_of_tables()
    try:
        head, peak = begin(console, options.isa, argv)
    except RuntimeError:
        return 2
    plan = _plan(options, peak)
    if not plan:
        names = ", ".join(map(repr, (str(FORWARD[0]), str(TRAINING[0]), COMPARISONS[0].name)))
        console.print(f"nothing matches --only {options.only!r}; names look like {names}")
        return 2
    rows = measured(console, plan, head, peak, options.passes)
    judged = targets.judge(rows, options.suite)
    made = report.tables(head, rows, judged, options.peers)
    for table in made:
        console.print(table)
    written = report.write(options.out, head, rows, judged, made)
    for suite, picture in PICTURES.items():
        title = f"fastattn benchmark, {suite}: {head['cpu']}, {head['isa']}, {head['date'][:10]}"
        if draw(options.out / picture, [row for row in rows if row.suite == suite], options.peers[suite], title):
            written.append(picture)
    console.print(f"written: {options.out}/{', '.join(written)}")
    return status(console, head, rows)


def console_of_tables() -> Console:
    """One that is wide enough for the tables where nobody looks."""
    return Console(width=None if sys.stdout.isatty() else 190, markup=False, emoji=False, highlight=False)


def begin(console: Console, isa: str | None, argv: list[str], *suite: str) -> tuple[dict, Peak]:
    """(head of the report, first reading of the peak); RuntimeError, printed, for an ISA that is not there."""
    if isa:
        os.environ["FASTATTN_CPU_ISA"] = isa  # read at the extension's first use, which is below
    try:
        head, peak = report.header(argv, *suite), Peak()
    except RuntimeError as error:
        console.print(str(error), style="bold red")
        raise
    warn(console, doubts(head))
    return head, peak


def measured(
    console: Console, plan: list[tuple[str, Callable[[], Row]]], head: dict, peak: Peak, passes: int
) -> list[Row]:
    """The rows of `plan`, each printed as it comes; those so far if interrupted. `head` gets the peak and doubts.

    Rows beside which the FMA peak fell are measured once more when all others are done, in so many passes at most; the
    measurement in the steadiest moment counts.
    """
    rows, lowest, pending, others = {}, {}, dict(enumerate(plan)), Others()
    try:
        for number in range(passes):
            with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
                task = progress.add_task("measuring", total=len(pending))
                for index, (name, measure) in pending.items():
                    progress.update(task, description=name)
                    taken = peak.taken()
                    row = measure()
                    head["measured_again"] = head.get("measured_again", 0) + (number > 0)
                    found = peak.since(taken)
                    if index not in rows or peak.steadiness(found) > peak.steadiness(lowest[index]):
                        rows[index], lowest[index] = row, found
                    progress.console.print(_line(row))
                    progress.advance(task)
            pending = {index: plan[index] for index in rows if peak.steadiness(lowest[index]) < STEADY}
            if not pending:
                break
            console.print(f"the FMA peak fell beside {len(pending)} rows")
    except KeyboardInterrupt:
        head["interrupted"] = True
        console.print("interrupted: reporting what was measured")
    unsteady = [index for index in sorted(rows) if peak.steadiness(lowest[index]) < STEADY]
    for index in unsteady:
        rows[index].flags.append("the FMA peak beside it fell by more than a tenth")
    head["fma_peak_gflops"] = {key: f"{low:.1f}...{high:.1f}" for key, (low, high, _) in peak.spread().items()}
    head["others_cores"] = others.cores()
    head["doubts"] = doubts(head, [plan[index][0] for index in unsteady])
    return [rows[index] for index in sorted(rows)]


def status(console: Console, head: dict, rows: list[Row]) -> int:
    """Says what to distrust; 1 if a result was wrong, else 0."""
    warn(console, head["doubts"])
    wrong = [row.name for row in rows if row.wrong]
    if wrong:
        console.print(f"WRONG results, not timed: {', '.join(wrong)}", style="bold red")
    return 1 if wrong else 0


def parser_with(description: str, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; quick: what --quick does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help=quick)
    add("--only", nargs="+", metavar="TEXT", help="rows whose name contains a TEXT, or just the row whose name is TEXT")
    add("--isa", help="narrow the kernels to this instruction set (FASTATTN_CPU_ISA)")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="where the files go, default %(default)s")
    add(
        "--passes",
        type=int,
        default=4,
        metavar="N",
        help="measure a row anew until the machine was steady, N times at most",
    )
    add("--tiny", action="store_true", help="shrink every case: checks this program, says nothing about speed")
    return parser


def selected(plan: list[tuple[str, Callable]], only: list[str] | None) -> list[tuple[str, Callable]]:
    """The rows that --only asks for, in the order of the plan."""
    if only is None:
        return plan
    names = {name for name, _ in plan}
    return [item for item in plan if any(item[0] == text or (text not in names and text in item[0]) for text in only)]


def _options(argv: list[str]) -> argparse.Namespace:
    parser = parser_with(__doc__, "a subset, short budgets, no FlexAttention: about three minutes")
    add = parser.add_argument
    add("--suite", nargs="+", choices=[*PICTURES], default=[*PICTURES], help="default both")
    add("--threads", type=int, nargs="+", default=[1], help="of the grid, default 1 (thread scaling has its own rows)")
    add(
        "--peers",
        nargs="*",
        choices=dict.fromkeys(name for peers in PEERS.values() for name in peers),
        help="default all; none with no name",
    )
    add("--budget", type=float, metavar="SECONDS", help="of timing for each row, default 3, with --quick 0.6")
    options = parser.parse_args(argv)
    if options.budget is None:
        options.budget = 0.6 if options.quick else 3.0
    options.peers = {
        suite: [
            name
            for name in peers
            if (name in options.peers if options.peers is not None else not (options.quick and name == "flex"))
        ]
        for suite, peers in PEERS.items()
    }
    return options


def _plan(options: argparse.Namespace, peak: Peak) -> list[tuple[str, Callable[[], Row]]]:
    """(name, function that measures it) for every row that the options ask for."""
    shrink = _tiny if options.tiny else (lambda work: work)
    peers = {suite: tuple(PEERS[suite][name] for name in names) for suite, names in options.peers.items()}
    plan = []
    for work in dict.fromkeys(shrink(w) for w in FORWARD + TRAINING if not options.quick or _is_quick(w.case)):
        for n in options.threads:
            measure = partial(grid_row, work, n, peers[work.suite], options.budget, peak)
            plan.append((str(work), work, measure))
    comparisons = [c for c in COMPARISONS if not options.quick or c.work.case.seqlen_q <= 1024]
    for comparison in dict.fromkeys(c._replace(work=shrink(c.work), base=shrink(c.base)) for c in comparisons):
        measure = partial(comparison_row, comparison, options.budget, peak)
        plan.append((comparison.name, comparison.work, measure))
    for work in TINY:
        sdpa = tuple(peer for peer in peers[work.suite] if peer.name == "sdpa")
        plan.append((f"overhead {work}", work, partial(overhead_row, work, sdpa)))
    plan.append((f"growing {shrink(GROWING)}", GROWING, partial(growing_row, shrink(GROWING))))
    backend = "aot_eager" if options.tiny else "inductor"
    for work in dict.fromkeys(map(shrink, BLOCKS)):
        plan.append((name_of(work), work, partial(block_row, work, 1, options.budget, peak, backend)))
    plan.append((GRAPH, TINY[0], partial(graph_row, TINY[0], backend=backend)))
    for step in dict.fromkeys(step._replace(work=shrink(step.work)) for step in STEPS if not options.quick or step.hot):
        sdpa = tuple(peer for peer in peers["forward"] if peer.name == "sdpa")
        plan.append((step.name, step.work, partial(decode_row, step, sdpa, options.budget, peak)))
    plan += [(f"memory {work}", work, partial(memory_row, work)) for work in map(shrink, MEMORY)]
    return selected([(name, measure) for name, work, measure in plan if work.suite in options.suite], options.only)


def _is_quick(case: Case) -> bool:
    short = case.seqlen_q <= 1024 and case.head_dim <= 64 and case.dtype in ("float32", "bfloat16")
    return short or case.window_size is not None


def _tiny(work: Work) -> Work:
    case = work.case
    keys = None if case.seqlen_k is None else min(case.seqlen_k, 128)
    window = case.window_size and (8, 0)
    heads = min(case.num_heads, 2)
    return work._replace(
        case=case._replace(
            batch=min(case.batch, 2),
            num_heads=heads,
            num_heads_k=case.num_heads_k and min(case.num_heads_k, heads),
            seqlen_q=min(case.seqlen_q, 64),
            seqlen_k=keys,
            window_size=window,
        )
    )


def _line(row: Row) -> str:
    """What is said of a row as soon as it is measured."""
    if row.wrong:
        return f"{row.name}: WRONG, {row.wrong}"
    said = [f"{name} {value:.3g}" for name, value in row.metrics.items() if not name.startswith("error")]
    said += [f"{name} refused ({r.refused})" for name, r in row.results.items() if r.refused and name != "plain torch"]
    return f"{row.name}: " + ", ".join(said + row.flags)


def doubts(head: dict, unsteady: Sequence[str] = ()) -> list[str]:
    """Why not to trust the figures, from what is known so far; unsteady: names of rows."""
    found = []
    if (head.get("others_cores") or 0.0) > BUSY:
        found.append(f"other processes kept {head['others_cores']:.2f} cores busy while this ran")
    if head["kernels_missing"]:
        found.append(f"{head['kernels_missing']}: all of it ran on the slow reference, and there is no FMA peak")
    if unsteady:
        found.append(f"the FMA peak fell by more than a tenth in every pass beside {', '.join(unsteady)}")
    return found


def warn(console: Console, reasons: list[str]) -> None:
    """A red panel, if there are any."""
    if reasons:
        console.print(Panel("\n".join(reasons), title="WARNING: do not trust these figures"), style="bold red")


if __name__ == "__main__":
    sys.exit(main())
