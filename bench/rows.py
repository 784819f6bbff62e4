"""What one run of the benchmark records: `Row` and `Result`, and their JSON, versioned by SCHEMA."""

import math
from dataclasses import asdict, dataclass, field

from work import suite_of

SCHEMA = "fastattn-bench/2"


@dataclass
class Result:
    """One contender in one row: either why it was refused, or its numbers.

    ms, p10, p90, calls  median and spread over single calls
    gflops, share        rate over the visited pairs, and its share of the FMA peak
    ratio                its median time / ours
    max_error, rms_error against float64; those of gradients over the largest entry of any; the worst of all
    """

    refused: str | None = None
    ms: float | None = None
    p10: float | None = None
    p90: float | None = None
    calls: int = 0
    gflops: float | None = None
    share: float | None = None
    ratio: float | None = None
    max_error: float | None = None
    rms_error: float | None = None


@dataclass
class Row:
    """One case of one suite.

    kind         "grid" | a kind of comparison (suites.COMPARISONS) | "overhead" | "memory"
    name         what --only selects by; repro is the command that measures this row again
    spec         fields of the Case and of the Work: passes, pattern
    kernel, isa  what ran for ours (fastattn.record)
    wrong        why our result is wrong; nothing was timed then
    flags        what to distrust: "above the measured peak", ...
    flops        of the products over exactly the (query, key) pairs that the masks leave: 2 * (head_dim + head_dim_v) a
                 pair in the forward pass, 2 * (3 * head_dim + 2 * head_dim_v) in the backward
    peak_gflops  FMA loop on the same number of threads, beside the case; None: not available
    results      by contender, ours is "fastattn"
    metrics      what targets.py reads
    """

    kind: str
    name: str
    threads: int
    repro: str
    spec: dict
    kernel: str | None = None
    isa: str | None = None
    wrong: str | None = None
    flags: list[str] = field(default_factory=list)
    pairs: int | None = None
    flops: int | None = None
    peak_gflops: float | None = None
    results: dict[str, Result] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def suite(self) -> str:
        return suite_of(self.spec["passes"])

    @property
    def ours(self) -> Result:
        return self.results.get("fastattn", Result())


def to_json(header: dict, rows: list[Row], targets: list[dict]) -> dict:
    """The whole run as plain JSON values; a number that is not finite becomes None."""
    return _finite({"schema": SCHEMA, "header": header, "rows": [asdict(row) for row in rows], "targets": targets})


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
