"""`python -m fastattn bench`: this machine's limits, and how close attention comes to them, beside torch."""

import datetime
import json
from pathlib import Path

import torch

from ..calls import last_call
from . import limits, machine, regimes, report, roofline, trace
from .ratios import paired, unsteady
from .timing import Contender, Peak, rounds

SCHEMA = "fastattn-machine/1"
"""Version of the JSON: docs/cli.md describes it. A change that `compare` cannot read raises the number."""

STEADY = 0.9
"""Lowest reading of the FMA peak over the highest, below which the machine was not steady."""

BUSY = 0.1
"""Cores that other processes keep busy, above which somebody else is computing."""


def add_arguments(parser) -> None:
    """See fastattn/cli/__init__.py."""
    parser.add_argument("--quick", action="store_true", help="under a minute on a quiet machine; default about three")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="regimes whose name contains a TEXT")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="the calls that fastattn.record(FILE) has written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the roofline (.svg, .png, .pdf; matplotlib)")


def run(options) -> int:
    """1 if a result of ours was wrong. See fastattn/cli/__init__.py."""
    if options.picture:
        roofline.check()
    calls = trace.read(options.trace) if options.trace else _selected(options.only)
    others = machine.Others()
    peak, steal, start = Peak(), machine.steal_ticks(), datetime.datetime.now(datetime.timezone.utc)
    result = {"schema": SCHEMA, "date": start.isoformat(timespec="seconds"), "machine": machine.facts()}
    result["limits"] = limits.measure(peak)
    print(report.head(result))
    result["rows"], budget = [], 0.7 if options.quick else 5.0
    for call in calls:
        result["rows"].append(_row(call, result["limits"], budget, peak))
        print(report.line(result["rows"][-1]))
    result["seconds"] = (datetime.datetime.now(datetime.timezone.utc) - start).total_seconds()
    result["others_cores"] = others.cores()
    result["doubts"] = _doubts(result, peak, steal)
    print(report.tail(result) + (f"\n{roofline.text(result)}" if result["rows"] else ""))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        roofline.draw(result, options.picture)
    return int(any(row["wrong"] for row in result["rows"]))


def _selected(only: list[str] | None) -> list:
    chosen = [x for x in regimes.REGIMES if only is None or any(text in str(x) for text in only)]
    if not chosen:
        raise ValueError(f"--only {' '.join(only)} is in no name; names are {', '.join(map(str, regimes.REGIMES))}")
    return [regimes.Call(regime) for regime in chosen]


def _row(call, found: dict, budget: float, peak: Peak) -> dict:
    """One call measured; nothing is timed where its result is wrong."""
    threads, dtype = torch.get_num_threads(), call.regime.dtype
    error, ceiling = call.error(call.ours), regimes.CEILING[dtype]
    row = {
        "name": str(call),
        "count": call.count,
        "threads": threads,
        "kernel": last_call().kernel,
        "isa": last_call().isa,
    }
    row |= {"problem": call.spec, "flops": call.flops, "bytes": call.bytes, "error": error, "wrong": None, "notes": []}
    row |= dict.fromkeys(("ms", "torch_ms", "ratio", "verdict", "gflops", "roof_gflops", "share", "bound"))
    if not error <= ceiling:
        return row | {"wrong": f"largest error {error:.1e}, allowed {ceiling:.0e}"}
    contenders = {"fastattn": call.ours, "torch": call.torchs}
    if call.torchs is None or not call.error(call.torchs) <= ceiling:
        del contenders["torch"]
        row["notes"].append("torch's SDPA is not timed: " + ("none takes this" if call.torchs is None else "wrong"))
    peak.read(dtype, threads)
    timed = {name: Contender(call.timed(forward), threads) for name, forward in contenders.items()}
    times = {name: [min(burst) for burst in bursts] for name, bursts in rounds(timed, budget).items()}
    peak.read(dtype, threads)
    row["ms"] = [1e3 * x for x in times["fastattn"]]
    row["notes"] += unsteady(times["fastattn"])
    if "torch" in times:
        ratio = paired(times["torch"], times["fastattn"])
        row |= {"torch_ms": [1e3 * x for x in times["torch"]], "ratio": list(ratio)}
        row["verdict"] = {"slower": "faster", "faster": "slower"}.get(ratio.verdict, ratio.verdict)  # of ours
    return row | roofline.shares(row, found, peak, dtype)


def _doubts(result: dict, peak: Peak, steal: int | None) -> list[str]:
    """Why not to trust the figures."""
    found, facts = [], result["machine"]
    if (result["others_cores"] or 0.0) > BUSY:
        found.append(f"other processes kept {result['others_cores']:.2f} cores busy while this ran")
    for key, (low, high, count) in peak.spread().items():
        if low < STEADY * high:
            found.append(
                f"the FMA peak ({key} threads) moved between {low:.0f} and {high:.0f} GFLOP/s, {count} readings"
            )
    if steal is not None and (ticks := (machine.steal_ticks() or 0) - steal) > 0.01 * 100 * result["seconds"]:
        found.append(f"the hypervisor took {ticks} ticks away while this ran")
    if facts["governor"] not in (None, "performance"):
        found.append(f"the frequency governor is {facts['governor']}")
    if facts["isa"] is None:
        found.append("the compiled kernels are missing: all of it ran on the slow reference")
    return found
