"""What `bench` prints: plain text, from the values of its JSON."""

import statistics


def head(result: dict) -> str:
    """The machine and its limits."""
    facts, found = result["machine"], result["limits"]
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in (facts["caches"] or {}).items())
    lines = [
        f"{facts['cpu']}, {facts['usable_cores']}/{facts['cores']} cores, {facts['threads']} threads, {facts['isa']}",
        f"caches     {caches or 'unknown'}",
        "FMA peak   " + _list(found["fma"], "GFLOP/s", " threads"),
        "by ISA     " + _list(found["fma_by_isa"], "GFLOP/s", ""),
        "matmul     " + _list(found["matmul"], "GFLOP/s", ""),
        *(f"read x {threads}   " + _list(rates or {}, "GB/s", "") for threads, rates in found["read"].items()),
    ]
    return "\n".join(lines) + f"\n\n{'call':<28}{'ms':>9}{'GFLOP/s':>9}{'of roof':>8}  {'torch / ours':<20}"


def line(row: dict) -> str:
    """One call as soon as it is measured."""
    if row["wrong"]:
        return f"{row['name']:<28}WRONG: {row['wrong']}"
    share = "" if row["share"] is None else f"{100 * row['share']:.0f} %"
    ratio = "" if row["ratio"] is None else "{:.2f} ({:.2f}...{:.2f})".format(*row["ratio"])
    gflops = "" if row["gflops"] is None else f"{row['gflops']:.1f}"
    said = "; ".join([row["bound"] or "", *row["notes"]])
    return f"{row['name']:<28}{statistics.median(row['ms']):>9.3f}{gflops:>9}{share:>8}  {ratio:<20}  {said}".rstrip()


def tail(result: dict) -> str:
    """Where a trace's time goes, and what to distrust."""
    rows, lines = [row for row in result["rows"] if row["ms"]], []
    total = sum(statistics.median(row["ms"]) * row["count"] for row in rows)
    if any(row["count"] > 1 for row in rows):
        lines += ["", f"time in attention: {total:.1f} ms, of which"]
        for row in sorted(rows, key=lambda row: -statistics.median(row["ms"]) * row["count"]):
            share = statistics.median(row["ms"]) * row["count"] / total
            lines.append(f"  {100 * share:5.1f} %  {row['count']:>6} x {row['name']}")
    if result["doubts"]:
        lines += ["", "DO NOT TRUST these figures:", *(f"  {doubt}" for doubt in result["doubts"])]
    return "\n".join(lines)


def _list(values: dict, unit: str, suffix: str) -> str:
    return ", ".join(f"{name}{suffix} {value:.1f}" for name, value in values.items()) + (
        f" {unit}" if values else "none"
    )
