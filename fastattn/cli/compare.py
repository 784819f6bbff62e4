"""`python -m fastattn compare`: files of `bench --json` beside each other: two machines, two commits, two settings."""

import json
import statistics
from pathlib import Path

from .bench import SCHEMA
from .ratios import Ratio, geometric_mean, unpaired

CHANGING = ("load_average", "steal_ticks")
"""Facts that differ between any two runs."""


def add_arguments(parser) -> None:
    """See fastattn/cli/__init__.py."""
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="the first is what the others are compared with"
    )
    parser.add_argument(
        "--fail-if-slower", type=_percent, metavar="PERCENT",
        help="exit status 1 if a call, or the geometric mean, is slower by more than that at both ends of its interval",
    )  # fmt: skip


def run(options) -> int:
    """See fastattn/cli/__init__.py."""
    if len(options.files) < 2:
        raise ValueError("compare takes two files or more")
    base, *others = [read(path) for path in options.files]
    failed = False
    for path, other in zip(options.files[1:], others, strict=True):
        print(f"{path} against {options.files[0]}: times over times, below 1 is faster; 95 % intervals")
        ratios = joined(base, other)
        if not ratios:
            raise ValueError(f"{path} and {options.files[0]} have no call in common")
        for name, ratio in [*ratios.items(), ("geometric mean", geometric_mean(list(ratios.values())))]:
            limit = None if options.fail_if_slower is None else 1.0 + options.fail_if_slower
            too_slow = limit is not None and ratio.low > limit
            failed |= too_slow
            print(f"  {name:<30}{ratio!s:<22}{ratio.verdict}{'  TOO SLOW' if too_slow else ''}")
        for line in differences(base, other):
            print(f"  {line}")
    return int(failed)


def read(path: Path) -> dict:
    """A result of `bench`; ValueError for another file, or one of another version."""
    try:
        result = json.loads(path.read_text())
        schema = result["schema"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a result of `python -m fastattn bench --json`") from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}")
    return result


def joined(base: dict, other: dict) -> dict[str, Ratio]:
    """Name of a call -> time in `other` over time in `base`, for the calls that both have timed."""
    before = {_key(row): row for row in base["rows"] if row["ms"]}
    pairs = [(row, before[_key(row)]) for row in other["rows"] if row["ms"] and _key(row) in before]
    return {row["name"]: unpaired(row["ms"], old["ms"]) for row, old in pairs}


def differences(base: dict, other: dict) -> list[str]:
    """What is not the same about the two machines and runs, and who doubted itself."""
    a, b = base["machine"], other["machine"]
    names = [name for name in dict.fromkeys([*a, *b]) if name not in CHANGING and a.get(name) != b.get(name)]
    lines = [f"{name}: {a.get(name)} -> {b.get(name)}" for name in names]
    for which, result in (("first", base), ("second", other)):
        lines += [f"the {which} doubts itself: {doubt}" for doubt in result["doubts"]]
    peaks = [result["limits"]["fma"].get(f"float32 x {result['machine']['threads']}") for result in (base, other)]
    if all(peaks):
        lines.append(f"FMA peak: {peaks[0]:.0f} -> {peaks[1]:.0f} GFLOP/s ({peaks[1] / peaks[0]:.2f}x)")
    shares = [[row["share"] for row in result["rows"] if row["share"]] for result in (base, other)]
    if all(shares):
        lines.append(
            "share of the roof, median: {:.0f} % -> {:.0f} %".format(*(100 * statistics.median(x) for x in shares))
        )
    return lines


def _key(row: dict) -> str:
    return json.dumps([row["problem"], row["threads"]], sort_keys=True)


def _percent(text: str) -> float:
    return float(text.removesuffix("%")) / 100.0
