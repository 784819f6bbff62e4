"""The pictures of a run: share of the FMA peak and speed against SDPA by case; speed-up against sparsity."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from rows import Row


def draw(path: Path, rows: list[Row], peers: list[str], title: str) -> bool:
    """Write the picture of the grid rows to `path`; False if there is nothing to draw."""
    rows = [row for row in rows if row.kind == "grid" and not row.wrong]
    if not rows:
        return False
    labels = [row.name + (f"  x{row.threads}" if row.threads > 1 else "") for row in rows]
    has_peak = any(row.peak_gflops for row in rows)
    left = "share of the FMA peak, %" if has_peak else "GFLOP/s (no FMA peak: compiled kernels missing)"
    figure, axes = plt.subplots(1, 2, figsize=(15, 2.2 + 0.55 * len(rows)), sharey=True, layout="constrained")
    timed = [peer for peer in peers if any(peer in row.results and row.results[peer].ms for row in rows)]
    names = ["fastattn", *timed]

    def rate(result):
        return (100 * result.share if result.share is not None else None) if has_peak else result.gflops

    def against_sdpa(row, name):
        sdpa, result = row.results.get("sdpa"), row.results.get(name)
        return sdpa.ms / result.ms if sdpa and result and sdpa.ms and result.ms else None

    _bars(
        axes[0], names, [[rate(row.results[n]) if n in row.results else None for n in names] for row in rows], "{:.0f}"
    )
    _bars(axes[1], names, [[against_sdpa(row, n) for n in names] for row in rows], "{:.2f}", start=1.0)
    axes[0].set(yticks=range(len(rows)), yticklabels=labels, xlabel=left)
    axes[0].invert_yaxis()
    axes[1].set(xlabel="speed against SDPA, log scale (1 = as fast)", xscale="log")
    axes[1].axvline(1.0, color="black", linewidth=0.8)
    axes[1].margins(x=0.12)
    axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].xaxis.set_minor_locator(NullLocator())
    axes[1].xaxis.set_major_formatter("{x:g}")
    if has_peak:
        axes[0].set_xlim(0, 5 + max(100.0, *(rate(result) or 0.0 for row in rows for result in row.results.values())))
        axes[0].axvline(100.0, color="black", linewidth=0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


MARKERS = "osD^vPX*p<>"


def draw_sparse(path: Path, rows: list[Row], title: str) -> bool:
    """Write the picture of dense_vs_sparse.py's rows to `path`; False if there is nothing to draw.

    Speed-up over our dense kernel against 1 / density, one panel for each direction: a line for each block size of the
    random blocks, a point for each other pattern, and the line that all of them would be on if masks cost nothing.
    """
    rows = [row for row in rows if row.kind == "sparse" and not row.wrong]
    passes = list(dict.fromkeys(row.spec["passes"] for row in rows))
    if not rows:
        return False
    figure, axes = plt.subplots(1, len(passes), figsize=(7.2 * len(passes), 7.2), squeeze=False, layout="constrained")
    families = list(dict.fromkeys((_family(row), row.spec["seqlen_q"]) for row in rows))
    styles = {family: MARKERS[i % len(MARKERS)] for i, family in enumerate(dict.fromkeys(name for name, _ in families))}
    colors = {seqlen: f"C{i}" for i, seqlen in enumerate(sorted({seqlen for _, seqlen in families}))}
    for axis, direction in zip(axes[0], passes, strict=True):
        mine = [row for row in rows if row.spec["passes"] == direction]
        for family, seqlen in families:
            points = [row for row in mine if (_family(row), row.spec["seqlen_q"]) == (family, seqlen)]
            points = sorted((1.0 / row.metrics["density"], row.metrics["speed-up"]) for row in points)
            axis.plot(
                *zip(*points, strict=True), styles[family] + "-", color=colors[seqlen], label=f"{family}, S={seqlen}"
            )
        flex = [(1.0 / row.metrics["density"], row.metrics["speed-up"] / row.metrics["vs flex"])
                for row in mine if "vs flex" in row.metrics]  # fmt: skip
        if flex:
            axis.plot(*zip(*flex, strict=True), "x", color="gray", label="compiled FlexAttention, same masks")
        reach = [1.0, 1.2 * max(1.0 / row.metrics["density"] for row in mine)]
        axis.plot(reach, reach, color="black", linewidth=0.8, label="ideal: 1 / density")
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="our dense kernel")
        axis.set(
            xscale="log", yscale="log", xlabel="1 / density", ylabel="speed-up over our dense kernel", title=direction
        )
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ticks.set_minor_locator(NullLocator())
            ticks.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def draw_gpu(path: Path, found: dict) -> bool:
    """Write the picture of gpu.py's report to `path`; False if nothing was timed.

    A panel for each direction and one for decoding: the share of the matrix product, or of the copy, of each contender,
    and a line at the static bound of our code.
    """
    panels: dict[str, dict[str, dict]] = {}
    for row in found["rows"]:
        panel = "decoding" if row["suite"] == "decode" else row["passes"]
        panels.setdefault(panel, {}).setdefault(_gpu_label(row), {})[row["contender"]] = row
    names = list(dict.fromkeys(row["contender"] for row in found["rows"] if "ms" in row))
    if not names:
        return False
    heights = [len(shapes) + 0.8 for shapes in panels.values()]
    figure, axes = plt.subplots(
        len(panels), figsize=(10, 1.6 + 0.9 * sum(heights)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (panel, shapes) in zip(axes[:, 0], panels.items(), strict=True):
        share, of = ("share_of_copy", "copy") if panel == "decoding" else ("share_of_matmul", "matrix product")
        values = [[100 * row[n][share] if "ms" in row.get(n, {}) else None for n in names] for row in shapes.values()]
        _bars(axis, names, values, "{:.0f}")
        bounds, height = [row.get("fastattn", {}).get("static_bound") for row in shapes.values()], 0.8 / len(names)
        for y, bound in enumerate(bounds):
            if bound is not None and "fastattn" in names:
                own = y + (names.index("fastattn") - (len(names) - 1) / 2) * height
                axis.vlines(100 * bound, own - height, own + height, color="black", linestyle="--", linewidth=1.2)
        axis.set(yticks=range(len(shapes)), yticklabels=shapes, title=panel, xlabel=f"% of the {of} of this run")
        axis.set_xlim(0, 1.08 * max(100.0, *(x or 0.0 for row in values for x in row)))
        axis.axvline(100.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
    right, parity = sum(row["right"] for row in found["parity"]), len(found["parity"])
    rates = f"{found['matmul_tflops']:.0f} TFLOP/s, {found['copy_gbps']:.0f} GB/s; {right} of {parity} results right"
    figure.suptitle(f"{found['device']}: {rates}\ndashed: what our code allows, by its instructions alone")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _gpu_label(row: dict) -> str:
    mask = "" if not row["causal"] else " causal" if row["window"] is None else f" window {row['window']}"
    lengths = f"S{row['seqlen_q']}" if row["seqlen_q"] == row["seqlen_k"] else f"S{row['seqlen_q']}x{row['seqlen_k']}"
    heads = f"H{row['num_heads']}" + (f"/{row['num_heads_k']}" if row["num_heads_k"] != row["num_heads"] else "")
    dtype = "" if row["dtype"] == "bfloat16" else f" {row['dtype']}"
    return f"B{row['batch']} {heads} {lengths} D{row['head_dim']}{dtype}{mask}"


def _family(row: Row) -> str:
    """Patterns of one family make a line."""
    name = row.spec["pattern"].partition(":")[0]
    return name.replace("random", "random blocks of ")


def _bars(axis, names: list[str], values: list[list[float | None]], label: str, start: float = 0.0) -> None:
    """Grouped horizontal bars from `start`: one group a row of `values`, one bar a name; None leaves a gap."""
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        found = [
            (y + (i - (len(names) - 1) / 2) * height, row[i]) for y, row in enumerate(values) if row[i] is not None
        ]
        heights, widths = [y for y, _ in found], [x - start for _, x in found]
        bars = axis.barh(heights, widths, height, left=start, color=f"C{i}", label=name)
        axis.bar_label(bars, labels=[label.format(x) for _, x in found], padding=2, fontsize=7)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
