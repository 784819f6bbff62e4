"""The figures that fastattn means to reach, and whether a run reached them. The worst row that matches counts."""

from typing import NamedTuple

from rows import Row

LONG = range(1024, 1 << 20)
PLAIN = {"dtype": "float32", "causal": False, "window_size": None, "mask": None, "bias": None}
DENSE = PLAIN | {"batch": 1, "threads": 1, "seqlen_q": LONG}
CAUSAL = PLAIN | {"batch": 1, "threads": 1, "head_dim": 64, "causal": True}
MINILM = PLAIN | {"threads": 1, "batch": 8, "num_heads": 12, "seqlen_q": 128, "head_dim": 32}
HALF = DENSE | {"dtype": {"bfloat16", "float16"}}
WINDOW = {"threads": 1, "seqlen_q": 4096, "window_size": {(256, 0)}}
DECODE = {"threads": 2, "seqlen_q": 16, "seqlen_k": 4096}


class Target(NamedTuple):
    """`metric` of every row of `suite` that matches `where` is to be at least (or at most) `bound`.

    where    field of the case, or "threads" -> the value, or a container of values
    """

    what: str
    quantity: str
    bound: float
    suite: str
    where: dict
    metric: str
    at_most: bool = False
    percent: bool = False


TARGETS = (
    Target(
        "D=64, S>=1024, dense", "share of the FMA peak", 0.82, "grid", DENSE | {"head_dim": 64}, "share", percent=True
    ),
    Target("D=64, S>=1024, dense", "x SDPA", 1.4, "grid", DENSE | {"head_dim": 64}, "vs sdpa"),
    Target("D=64, S>=1024, dense", "x onnxruntime", 1.15, "grid", DENSE | {"head_dim": 64}, "vs onnxruntime"),
    Target(
        "D=128, S>=1024, dense", "share of the FMA peak", 0.86, "grid", DENSE | {"head_dim": 128}, "share", percent=True
    ),
    Target("D=128, S>=1024, dense", "x SDPA", 1.3, "grid", DENSE | {"head_dim": 128}, "vs sdpa"),
    Target("D=64, causal, S=512", "x SDPA", 2.5, "grid", CAUSAL | {"seqlen_q": 512}, "vs sdpa"),
    Target("D=64, causal, S=1024", "x SDPA", 2.0, "grid", CAUSAL | {"seqlen_q": 1024}, "vs sdpa"),
    Target("D=64, causal, S=2048", "x SDPA", 1.7, "grid", CAUSAL | {"seqlen_q": 2048}, "vs sdpa"),
    Target("B8 H12 S128 D32 dense", "x SDPA", 1.6, "grid", MINILM, "vs sdpa"),
    Target("two threads, S>=1024", "x one thread", 1.9, "threads", {"threads": 2, "seqlen_q": LONG}, "speed-up"),
    Target("16-bit, S>=1024", "of our own float32 rate", 0.9, "16-bit", HALF, "rate", percent=True),
    Target("16-bit, S>=1024", "x the error of SDPA", 1.0, "grid", HALF, "error vs sdpa", at_most=True),
    Target("window 256 of S=4096", "of our dense rate per pair", 0.8, "window", WINDOW, "rate", percent=True),
    Target("window 256 of S=4096", "x FlexAttention", 3.5, "grid", WINDOW, "vs flex"),
    Target("window 256 of S=4096", "x SDPA with the mask", 18.0, "grid", WINDOW, "vs sdpa"),
    Target(
        "bias or bool mask [1,1,S,S], S=2048", "x the time without", 1.25, "bias or mask", {"threads": 1}, "time", True
    ),
    Target("Sq=16, Sk=4096, B1 H4, two threads", "x one thread", 1.7, "threads", DECODE, "speed-up"),
    Target("tiny call (1,1,1,16)", "x the speed of SDPA's call", 1.0, "overhead", {}, "vs sdpa"),
    Target(
        "S=16384 H4 D64, causal + bias row",
        "MiB of extra memory",
        64.0,
        "memory",
        {"seqlen_q": 16384},
        "extra MiB",
        True,
    ),
)


def judge(rows: list[Row]) -> list[dict]:
    """One dict for each target: its words, its bound, the worst measured value (None: not measured), met or not."""
    return [_judge_one(target, rows) for target in TARGETS]


def _judge_one(target: Target, rows: list[Row]) -> dict:
    found = [row for row in rows if row.suite == target.suite and _matches(row, target.where)]
    values = [(row.metrics[target.metric], row.name) for row in found if target.metric in row.metrics]
    value, name = (max if target.at_most else min)(values, default=(None, None))
    met = None if value is None else value <= target.bound if target.at_most else value >= target.bound
    if any(row.wrong for row in found):
        met = False
    shown = {key: getattr(target, key) for key in ("what", "quantity", "bound", "at_most", "percent")}
    return shown | {"value": value, "row": name, "rows": len(values), "of": len(found), "met": met}


def _matches(row: Row, where: dict) -> bool:
    facts = row.spec | {"threads": row.threads}
    return all(
        facts[key] in wanted if isinstance(wanted, (set, range)) else facts[key] == wanted
        for key, wanted in where.items()
    )
