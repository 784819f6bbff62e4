"""The calls of a real model, as `fastattn.record(file)` writes them: what `bench --trace` replays, each kind once."""

import json
from collections import Counter
from pathlib import Path

from ..calls import TRACE_SCHEMA
from .regimes import Call, Regime

SIZES = ("batch", "num_heads", "num_heads_k", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "dtype")
FLAGS = ("alibi", "softcap", "sinks", "dropout")


def read(path: Path) -> list[Call]:
    """The distinct forward calls of a trace, those that come most often first. What cannot be replayed is printed:
    what a BlockMask or lists of edges hold is not in a trace. ValueError for another file."""
    lines = path.read_text().splitlines()
    try:
        head, *calls = [json.loads(line) for line in lines]
        schema = head["schema"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a file that fastattn.record() has written") from None
    if schema != TRACE_SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}; this version reads {TRACE_SCHEMA!r}")
    counts = Counter(json.dumps(call, sort_keys=True) for call in calls if call["problem"]["direction"] == "forward")
    found, left_out = [], Counter()
    for text, count in counts.most_common():
        call = json.loads(text)
        if reason := _obstacle(call):
            left_out[reason] += count
        else:
            found.append(Call(_regime(call), count))
    for reason, count in left_out.items():
        print(f"not replayed: {count} calls with {reason}")
    if not found:
        raise ValueError(f"{path} holds no call that can be replayed")
    return found


def _obstacle(call: dict) -> str | None:
    problem = call["problem"]
    if problem["layout"] != "dense" or problem["mask"] == "block":
        return f"layout={problem['layout']} mask={problem['mask']}"
    if problem.get("relative"):
        return "a bias of distances, which is not in a trace"
    return f"device={problem['device']}" if problem["device"] != "cpu" else None


def _regime(call: dict) -> Regime:
    p = call["problem"]
    lo, hi = call["diagonal"] or (None, None)
    offset = p["seqlen_k"] - p["seqlen_q"]
    window = None if lo is None else max(offset - lo, 0), None if hi is None else max(hi - offset, 0)
    heads = f"H{p['num_heads']}" + (f"/{p['num_heads_k']}" if p["num_heads_k"] != p["num_heads"] else "")
    extras = "".join(f" {name}" for name in FLAGS if p[name]) + (" bias" if p["bias"] != "none" else "")
    name = f"B{p['batch']} {heads} S{p['seqlen_q']}x{p['seqlen_k']} D{p['head_dim']}"
    name += (f" {p['mask']}" if p["mask"] != "none" else "") + extras + (" training" if p["needs_grad"] else "")
    return Regime(
        name, **{field: p[field] for field in SIZES}, window=window, training=p["needs_grad"], bias=p["bias"] != "none",
        mask=p["mask"] if p["mask"] in ("interval", "tensor") else "none", **{field: bool(p[field]) for field in FLAGS},
    )  # fmt: skip
