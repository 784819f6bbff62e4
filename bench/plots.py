"""The picture of a run: share of the FMA peak, and speed against SDPA, by case."""

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
