"""How a run is shown: the header, the tables (terminal and Markdown from the same rich tables), the files."""

import datetime
import io
import json
import os
import platform
import subprocess
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fastattn
import fastattn.backends.cpu
from fastattn.cli.machine import ENVIRONMENT, cpu_model, version_of
from fastattn.cli.timing import matmul_rate, peak_by_isa
from rows import Result, Row, to_json


def header(argv: list[str], script: str = "run.py") -> dict:
    """What a reader needs in order to judge or repeat the figures."""
    missing = fastattn.backends.cpu.unavailable()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"bench/{script}", *map(_without_home, argv)]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": None if missing else fastattn.backends.cpu.isa(),
        "fma_peak_by_isa": {isa: f"{rate:.1f}" for isa, rate in peak_by_isa().items()},
        "torch_matmul_gflops": {dtype: f"{matmul_rate(dtype, 1) / 1e9:.1f}" for dtype in ("float32", "bfloat16")},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels_missing": missing,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "fastattn": fastattn.__version__ + _git_revision(),
        "torch": torch.__version__,
        "onnxruntime": version_of("onnxruntime"),
        "environment": {name: value for name, value in sorted(os.environ.items()) if ENVIRONMENT.match(name)},
    }


def tables(head: dict, rows: list[Row], targets: list[dict], peers: dict[str, list[str]]) -> list[Table]:
    """Every table of the report, in reading order; those without rows are left out. Peers by suite."""
    forward, backward = ([row for row in rows if row.suite == suite] for suite in ("forward", "backward"))
    grids = [[row for row in suite if row.kind == "grid"] for suite in (forward, backward)]
    made = [
        _header_table(head),
        _speed_table("Forward", grids[0], peers["forward"]),
        _speed_table("Training (FLOPs of 5 products backward, of 7 with the forward)", grids[1], peers["backward"]),
        _comparison_table([row for row in rows if "base" in row.results]),
        _decode_table([row for row in rows if row.kind == "decode"]),
        _single_table([row for row in rows if row.kind in ("overhead", "memory")]),
        _compiled_table([row for row in rows if row.kind in ("compiled", "graph")]),
        _accuracy_table("Error against float64", forward, peers["forward"]),
        _accuracy_table(
            "Error of gradients against float64, over the largest entry of any", backward, peers["backward"]
        ),
        _refusal_table(rows),
        _target_table(targets, bool(head.get("doubts"))),
    ]
    return [table for table in made if table.row_count]


def sparse_tables(head: dict, rows: list[Row], targets: list[dict], peers: list[str]) -> list[Table]:
    """Those of dense_vs_sparse.py."""
    sparse = [row for row in rows if row.kind == "sparse"]
    made = [
        _header_table(head),
        *(
            _sparse_table(passes.capitalize(), [row for row in sparse if row.spec["passes"] == passes], peers)
            for passes in ("forward", "backward")
        ),
        _sparse_memory_table([row for row in sparse if any("MiB" in name for name in row.metrics)]),
        _build_table([row for row in rows if row.kind == "build"]),
        _select_table([row for row in rows if row.kind == "select"]),
        _skip_table([row for row in rows if row.kind == "skip"]),
        _edges_table([row for row in rows if row.kind == "edges"]),
        _accuracy_table("Error against float64 (of gradients: over the largest entry of any)", sparse, peers),
        _refusal_table(rows),
        _target_table(targets, bool(head.get("doubts"))),
    ]
    return [table for table in made if table.row_count]


def write(
    out: Path, head: dict, rows: list[Row], targets: list[dict], made: list[Table], name: str = "bench"
) -> list[str]:
    """bench.json and bench.md in `out`, or others of that `name`; the names of both files."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(to_json(head, rows, targets), indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(made))
    return [f"{name}.json", f"{name}.md"]


def markdown(made: list[Table]) -> str:
    """The tables as GitHub Markdown, each under its title."""
    parts = ["# fastattn benchmark\n"]
    for table in made:
        title, terminal_box = table.title, table.box
        table.title, table.box = None, box.MARKDOWN
        text = io.StringIO()
        Console(file=text, width=2000, markup=False, emoji=False, highlight=False).print(table)
        table.title, table.box = title, terminal_box
        parts.append(
            f"## {title}\n\n" + "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines()) + "\n"
        )
    return "\n".join(parts)


def _table(title: str, *columns: str, words: int = 1) -> Table:
    """A table whose first `words` columns are text and the others numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right", overflow="fold")
    return table


def _header_table(head: dict) -> Table:
    table = _table("Machine and versions", "what", "value", words=2)
    for name, value in head.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        if isinstance(value, list):
            value = "; ".join(value)
        if value not in (None, ""):
            table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    return table


def _speed_table(title: str, rows: list[Row], peers: list[str]) -> Table:
    title += ": median ms, rate over the visited pairs, ratio = peer time / ours"
    peers = _timed(peers, rows)
    columns = ["case", "kernel", "threads", "ms", "GFLOP/s", "% of FMA peak"]
    table = _table(title, *columns, *(name for peer in peers for name in (f"{peer} ms", "ratio")), words=2)
    for row in rows:
        ours = ["WRONG", "", ""] if row.wrong else [_ms(row.ours), f"{row.ours.gflops:.1f}", _share(row.ours)]
        cells = [f"{row.name}{' (!)' if row.flags else ''}", _kernel(row), str(row.threads), *ours]
        table.add_row(*cells, *_peer_cells(row, peers))
    return table


def _peer_cells(row: Row, peers: list[str]) -> list[str]:
    results = [row.results.get(peer, Result()) for peer in peers]
    return [cell for r in results for cell in ("refused" if r.refused else _ms(r), _ratio(r.ratio))]


def _comparison_table(rows: list[Row]) -> Table:
    title = "Ours against ours, in turn (time: ours / base; rate: per visited pair; FMA: what the threads gain there)"
    table = _table(title, "row", "kernel", "ms", "base ms", "speed-up", "time", "rate", "FMA speed-up", words=2)
    for row in rows:
        metrics = [_ratio(row.metrics.get(name)) for name in ("speed-up", "time", "rate", "peak speed-up")]
        table.add_row(row.name, _kernel(row), _ms(row.ours), _ms(row.results["base"]), *metrics)
    return table


def _sparse_table(title: str, rows: list[Row], peers: list[str]) -> Table:
    title += ": median ms; speed-up over our dense kernel, at best 1 / density; ratio = peer time / ours"
    peers = _timed(peers, rows)
    columns = ["case", "kernel", "density", "ms", "dense ms", "speed-up", "at best", "of dense rate", "% of FMA peak"]
    table = _table(title, *columns, *(name for peer in peers for name in (f"{peer} ms", "ratio")), words=2)
    for row in rows:
        cells = [f"{_without_passes(row)}{' (!)' if row.flags else ''}", _kernel(row)]
        if row.wrong:
            table.add_row(*cells, "WRONG")
            continue
        metrics = row.metrics
        cells += [_percent(metrics["density"]), _ms(row.ours), _ms(row.results["dense"]), _ratio(metrics["speed-up"])]
        cells += [_ratio(1.0 / metrics["density"]), f"{100 * metrics['rate']:.0f} %", _share(row.ours)]
        table.add_row(*cells, *_peer_cells(row, peers))
    return table


def _sparse_memory_table(rows: list[Row]) -> Table:
    title = "Extra memory of a call, making its mask and the gradients' workspace included, in MiB"
    table = _table(title, "case", "ours", "our dense kernel", "sdpa, dense mask", words=1)
    for row in rows:
        values = (row.metrics.get(f"{name} MiB") for name in ("fastattn", "dense", "sdpa"))
        table.add_row(row.name, *("" if value is None else f"{value:.1f}" for value in values))
    return table


def _build_table(rows: list[Row]) -> Table:
    table = _table("Building a mask", "mask", "ms", "MiB while building", "MiB of the mask", words=1)
    for row in rows:
        values = (row.metrics.get(name) for name in ("ms", "MiB", "mask MiB"))
        cells = ["" if value is None else f"{value:.1f}" for value in values]
        table.add_row(row.name, *(["WRONG"] if row.wrong else cells))
    return table


def _select_table(rows: list[Row]) -> Table:
    title = "select_blocks, an eighth of the blocks (of dense: its time / that of the dense forward)"
    columns = ["selection", "ms", "dense ms", "of dense", "selection + attention ms", "speed-up", "density"]
    table = _table(title, *columns, words=1)
    for row in rows:
        if row.wrong:
            table.add_row(row.name, "WRONG")
            continue
        times = [_ms(row.results[name]) for name in ("fastattn", "dense", "both")]
        of_dense, speed_up, density = (row.metrics[name] for name in ("time", "whole speed-up", "density"))
        table.add_row(row.name, *times[:2], f"{100 * of_dense:.1f} %", times[2], _ratio(speed_up), _percent(density))
    return table


def _skip_table(rows: list[Row]) -> Table:
    title = "skip_negligible: keys whose weights are all 0 (random data without ALiBi: what the search costs)"
    table = _table(title, "case", "skipped", "ms", "ms without", "speed-up", words=1)
    for row in rows:
        times = [_ms(row.ours), _ms(row.results["without"]), _ratio(row.metrics["speed-up"])] if not row.wrong else []
        table.add_row(row.name, *([_percent(row.metrics["skipped"]), *times] if times else ["WRONG"]))
    return table


def _edges_table(rows: list[Row]) -> Table:
    table = _table("attention_csr; ratio = time of a gather in eager torch / ours", "edges", "ms", "gather ms", "ratio")
    for row in rows:
        ours = ["WRONG"] if row.wrong else [_ms(row.ours), _ms(row.results["gather"]), _ratio(row.metrics["vs gather"])]
        table.add_row(row.name, *ours)
    return table


def _decode_table(rows: list[Row]) -> Table:
    title = "Decoding against a long cache (bandwidth: of the rate of plain loads in address order, caches in turn)"
    table = _table(title, "step", "kernel", "ms", "% of bandwidth", "sdpa ms", "ratio", words=2)
    for row in rows:
        share, sdpa = row.metrics.get("bandwidth"), row.results.get("sdpa", Result())
        ours = ["WRONG", ""] if row.wrong else [_ms(row.ours), "" if share is None else f"{100 * share:.0f}"]
        table.add_row(row.name, _kernel(row), *ours, _ms(sdpa), _ratio(sdpa.ratio))
    return table


def _without_passes(row: Row) -> str:
    return row.name.removeprefix(row.spec["passes"] + " ")


def _single_table(rows: list[Row]) -> Table:
    table = _table("Overhead and memory", "row", "kernel", "ours", "sdpa (ratio)", words=2)
    for row in rows:
        if row.kind == "memory":
            ours = f"{row.metrics['extra MiB']:.1f} MiB" if row.metrics else "refused"
        else:
            ours = "WRONG" if row.wrong else _microseconds(row.ours)
        table.add_row(row.name, _kernel(row), ours, _microseconds(row.results.get("sdpa", Result())))
    return table


def _compiled_table(rows: list[Row]) -> Table:
    table = _table("Compiled", "row", "kernel", "ours", "sdpa, or an eager call (ratio)", words=2)
    for row in rows:
        other = row.results.get("sdpa" if row.kind == "compiled" else "base", Result())
        table.add_row(row.name, _kernel(row), "WRONG" if row.wrong else _microseconds(row.ours), _microseconds(other))
    return table


def _accuracy_table(title: str, rows: list[Row], peers: list[str]) -> Table:
    names = ["fastattn", "plain torch", *_timed(peers, rows)]
    table = _table(f"{title}: max / RMS", "case", *names)
    for row in rows:
        if "plain torch" not in row.results or ("base" in row.results and not row.wrong):
            continue  # the grid has its case
        cells = [row.results.get(name, Result()) for name in names]
        texts = ["" if r.max_error is None else f"{r.max_error:.1e} / {r.rms_error:.1e}" for r in cells]
        table.add_row(row.name + (f"  WRONG: {row.wrong}" if row.wrong else ""), *texts)
    return table


def _refusal_table(rows: list[Row]) -> Table:
    table = _table("Refused, wrong or to be distrusted", "who", "why", "rows", words=2)
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        found = [(name, r.refused) for name, r in row.results.items() if r.refused and name != "plain torch"]
        found += [("fastattn", f"WRONG, not timed: {row.wrong}")] if row.wrong else []
        for reason in found + [(row.name, flag) for flag in row.flags]:
            counts[reason] = counts.get(reason, 0) + 1
    for (name, reason), count in counts.items():
        table.add_row(name, reason.replace("|", "/"), str(count))
    return table


def _target_table(targets: list[dict], doubtful: bool) -> Table:
    title = "Targets (the worst row of each counts)" + (": DOUBTFUL, see doubts above" if doubtful else "")
    table = _table(title, "case", "quantity", "target", "measured", "", "rows", words=2)
    for target in targets:
        sign, met = "<=" if target["at_most"] else ">=", {True: "met", False: "NOT MET", None: "not measured"}
        show = (lambda x: f"{100 * x:.0f} %") if target["percent"] else (lambda x: f"{x:.4g}")
        measured = "" if target["value"] is None else show(target["value"])
        words = target["what"], target["quantity"], f"{sign} {show(target['bound'])}"
        table.add_row(*words, measured, met[target["met"]], f"{target['rows']} of {target['of']}")
    return table


def _timed(peers: list[str], rows: list[Row]) -> list[str]:
    """Those that ran at all; why the others did not stands in a table of its own."""
    return [peer for peer in peers if any(row.results.get(peer, Result()).ms is not None for row in rows)]


def _ms(result: Result) -> str:
    return "" if result.ms is None else f"{result.ms:.3g}" if result.ms < 100 else f"{result.ms:.0f}"


def _microseconds(result: Result) -> str:
    if result.ms is None:
        return "refused" if result.refused else ""
    return f"{1e3 * result.ms:.1f} us" + (f" ({result.ratio:.2f})" if result.ratio != 1.0 else "")


def _share(result: Result) -> str:
    return "" if result.share is None else f"{100 * result.share:.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _kernel(row: Row) -> str:
    return f"{row.kernel}{f' ({row.isa})' if row.isa else ''}"


def _without_home(argument: str) -> str:
    """A report is published: an absolute path becomes its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return "+g" + subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return ""
