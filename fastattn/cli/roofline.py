"""Shares of the roof, and the roofline in text and as a picture.

A call can run at no more than the multiply-add peak, and at no more than its FLOPs a byte times the rate at which
memory is read: Williams, Waterman and Patterson, CACM 52 (2009), doi 10.1145/1498765.1498785. The bytes are those of
inputs and outputs, once; where they fit into a cache, the rate of that cache is what counts.
"""

import statistics
from pathlib import Path

from .timing import Peak, multiplies_pairs

WIDTH = 50


def shares(row: dict, limits: dict, peak: Peak, dtype: str) -> dict:
    """gflops, roof_gflops, share and bound ("compute" or the level of memory) of a measured row."""
    gflops = row["flops"] / min(row["ms"]) / 1e6
    found = {"gflops": row["flops"] / statistics.median(row["ms"]) / 1e6}
    rate, doubt = peak.near(dtype, row["threads"])
    level, bandwidth = _level(row["bytes"], limits, row["threads"])
    if rate is None or bandwidth is None or not row["flops"]:
        return found | {"notes": row["notes"] + ([doubt] if doubt else [])}
    by_memory = row["flops"] / row["bytes"] * bandwidth
    found |= {"roof_gflops": min(rate / 1e9, by_memory), "bound": level if by_memory < rate / 1e9 else "compute"}
    above = ["above its roof: the caches held more than assumed, or the machine moved"]
    if multiplies_pairs(row["isa"]):
        above = ["above float32's peak, as products of pairs of bfloat16 can be"]
    notes = row["notes"] + (above if gflops > 1.05 * found["roof_gflops"] else [])
    return found | {"share": found["gflops"] / found["roof_gflops"], "notes": notes}


def text(result: dict) -> str:
    """Each row's place under the roof, as bars of its share."""
    rows = [row for row in result["rows"] if row["share"] is not None]
    lines = ["", f"{'share of the roof':<28}0 %{'100 %':>{WIDTH - 3}}"] if rows else []
    for row in rows:
        bar = "#" * round(WIDTH * min(row["share"], 1.0))
        lines.append(f"{row['name']:<28}{bar:<{WIDTH}}  {row['flops'] / row['bytes']:.0f} FLOP/B, {row['bound']}")
    return "\n".join(lines)


def check() -> None:
    """ValueError where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--picture wants matplotlib, which is not installed: pip install matplotlib") from None


def draw(result: dict, path: Path) -> None:
    """The roofline as a picture: FLOPs a byte against GFLOP/s, roofs of this run, a point for each call."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["share"] is not None]
    threads = str(result["machine"]["threads"])
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    compute = result["limits"]["fma"].get(f"float32 x {threads}")
    intensities = [row["flops"] / row["bytes"] for row in rows] or [1.0]
    span = min(intensities) / 4, max(intensities) * 4
    for level, rate in (result["limits"]["read"].get(threads) or {}).items():
        xs = [span[0], min(max(compute / rate, span[0]), span[1])] if compute else list(span)
        axes.plot(xs, [x * rate for x in xs], lw=1.2, label=f"{level} {rate:.0f} GB/s")
    if compute:
        axes.plot(span, [compute] * 2, color="black", lw=1.2, label=f"FMA {compute:.0f} GFLOP/s")
    labels = []
    for kind, marker in (("float32", "o"), ("bfloat16", "s")):
        points = [
            (x, row["gflops"], row["name"]) for x, row in zip(intensities, rows, strict=False) if kind in row["name"]
        ]
        if points:
            axes.plot(*zip(*((x, y) for x, y, _ in points), strict=True), marker, ms=6, label=kind)
        labels += [(x, y, name.removesuffix(f" {kind}")) for x, y, name in points]
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s")
    axes.set_title(f"{result['machine']['cpu']}, {result['machine']['isa']}, {threads} threads", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3, which="both")
    figure.draw_without_rendering()  # only now it is known where on the page the points lie
    _annotate(axes, labels)
    figure.savefig(path)


def _annotate(axes, labels: list[tuple[float, float, str]]) -> None:
    """(x, y, name): names beside their points, lower where they would cover another."""
    size, taken = 7, []
    for x, y, name in sorted(labels, key=lambda label: -label[1]):
        left, middle = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        right, base = left + 0.6 * size * len(name), middle - 9
        for other_left, other_right, other_base in sorted(taken, key=lambda box: -box[2]):
            if left < other_right and other_left < right and abs(base - other_base) < size:
                base = other_base - size
        taken.append((left, right, base))
        axes.annotate(name, (x, y), xytext=(5, base - middle), textcoords="offset points", fontsize=size)


def _level(size: int, limits: dict, threads: int) -> tuple[str, float | None]:
    """The smallest level of memory that holds so many bytes, and its rate."""
    rates = limits["read"].get(str(threads)) or {}
    for name, capacity in limits.get("caches", {}).items():
        if name in rates and size <= capacity:
            return name, rates[name]
    return "memory", rates.get("memory")
