"""Sparse attention beside dense: `python bench/dense_vs_sparse.py`, or `make bench-sparse`.

Every pattern of sparsity.py as a BlockMask, forward and backward, on one thread: ours beside our own dense kernel, SDPA
with the dense mask (where memory allows it) and compiled FlexAttention with the same blocks (forward only, and where
its mask_mod is plain arithmetic it gets that). Then building a mask, select_blocks, skip_negligible, and attention_csr
beside a gather in eager torch. Every result is compared with float64 before it is timed; a wrong one is not timed, and
the status is 1. Contenders are measured in turn in one process. Masks are built outside of the clock. Writes
sparse.json, sparse.md and sparse.png.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

# last: an installed one wins
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests/support", "")]


import report
import run
import targets
from cases import Case
from fastattn.cli.timing import Peak
from peers import PEERS
from plots import draw_sparse
from rows import Row
from sparsity import PATTERNS
from suites import SPARSE, build_row, edges_row, select_row, skip_row, sparse_row
from work import Work

SWEEP, LONG = 8192, 16384
SHORT = (2048, 4096)
PEER_NAMES = ("sdpa", "flex")
QUICK = ("random128:12.5%", "random64:12.5%", "window", "longformer", "bigbird")
NEIGHBOURS = 32
METHODS = ("mean_pool", "antidiagonal", "vertical_slash")


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; 0, or 1 if a result of ours was wrong."""
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)
    console = run.console_of_tables()
    try:
        head, peak = run.begin(console, options.isa, argv, SPARSE)
    except RuntimeError:
        return 2
    plan = _plan(options, peak)
    if not plan:
        names = [name for name, _ in _plan(_options([]), peak)]
        console.print(f"nothing matches --only {options.only!r}; names look like {names[0]!r}, {names[-1]!r}")
        return 2
    rows = run.measured(console, plan, head, peak, options.passes)
    judged = targets.judge(rows, ["forward", "backward"], targets.SPARSE_TARGETS)
    made = report.sparse_tables(head, rows, judged, options.peers)
    for table in made:
        console.print(table)
    written = report.write(options.out, head, rows, judged, made, "sparse")
    title = f"fastattn, sparse against dense, one thread: {head['cpu']}, {head['isa']}, {head['date'][:10]}"
    if draw_sparse(options.out / "sparse.png", rows, title):
        written.append("sparse.png")
    console.print(f"written: {options.out}/{', '.join(written)}")
    return run.status(console, head, rows)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = run.parser_with(__doc__, "five patterns at S=2048, no FlexAttention, no memory, short budgets")
    add = parser.add_argument
    add("--peers", nargs="*", choices=PEER_NAMES, help="default all, with --quick sdpa; none with no name")
    add("--budget", type=float, metavar="SECONDS", help="of timing for each row, default 5, with --quick 0.3")
    options = parser.parse_args(argv)
    if options.budget is None:
        options.budget = 0.3 if options.quick else 5.0
    if options.peers is None:
        options.peers = [name for name in PEER_NAMES if not (options.quick and name == "flex")]
    return options


def _plan(options: argparse.Namespace, peak: Peak) -> list[tuple[str, Callable[[], Row]]]:
    """(name, function that measures it) for every row that the options ask for."""
    peers = {suite: tuple(known[name] for name in options.peers if name in known) for suite, known in PEERS.items()}
    plan = []
    for work in _works(options.quick, options.tiny):
        # Each of the memory's three processes computes once, so that the longest cases are enough.
        memory = work.case.seqlen_q == LONG
        plan.append((str(work), partial(sparse_row, work, peers[work.suite], options.budget, peak, memory)))
    if not options.quick:
        seqlen = 2048 if options.tiny else 131072
        plan.append((f"build causal + window + documents S{seqlen}", partial(build_row, seqlen, options.budget)))
        heads, seqlen = (2, 1024) if options.tiny else (8, LONG)
        work = Work(Case(num_heads=heads, seqlen_q=seqlen, head_dim=64, causal=True))
        plan += [
            (f"select {method} {work}", partial(select_row, work, method, options.budget, peak)) for method in METHODS
        ]
        plan += [(f"skip {work}", partial(skip_row, work, options.budget, peak)) for work in _skipping(options.tiny)]
        for passes in ("forward", "backward"):
            row = partial(edges_row, seqlen, NEIGHBOURS, passes, options.budget)
            plan.append((f"{passes} edges S{seqlen} to {NEIGHBOURS} keys each", row))
    return run.selected(plan, options.only)


def _works(quick: bool, tiny: bool) -> list[Work]:
    """Equal lengths stand together, so that the dense result is computed once for each."""
    named = [name for name in PATTERNS if not name.startswith("random")]
    eighths = [name for name in PATTERNS if name.endswith(":12.5%")]
    lengths = {seqlen: eighths for seqlen in SHORT} | {SWEEP: [*PATTERNS], LONG: eighths + named}
    if quick:
        lengths = {2048: QUICK}
    if tiny:
        lengths = {512: QUICK if quick else [*PATTERNS]}
    return [
        Work(Case(num_heads=2, seqlen_q=seqlen, head_dim=64), passes, pattern=name)
        for passes in ("forward", "backward")
        for seqlen, names in lengths.items()
        for name in names
    ]


def _skipping(tiny: bool) -> list[Work]:
    """Slopes of 1/2 to 1/256, where far keys weigh nothing, and no ALiBi, where nothing can be skipped."""
    alike = Case(num_heads=2 if tiny else 8, head_dim=64)
    return [
        Work(alike._replace(seqlen_q=seqlen, causal=causal, alibi=alibi), passes)
        for seqlen in ((640,) if tiny else (4096, LONG))
        for alibi in (True, False)
        for causal in ((True,) if seqlen == LONG else (False, True))
        for passes in ("forward", "backward")
    ]


if __name__ == "__main__":
    sys.exit(main())
