"""The figures that fastattn means to reach, and whether a run reached them. The worst row that matches counts."""

from typing import NamedTuple

from rows import Row
from work import suite_of

LONG = range(1024, 1 << 20)
PLAIN = {"dtype": "float32", "causal": False, "window_size": None, "mask": None, "bias": None, "dropout_p": 0.0}
FORWARD, BACKWARD, STEP = ({"passes": passes} for passes in ("forward", "backward", "forward+backward"))
DENSE = PLAIN | {"batch": 1, "threads": 1, "seqlen_q": LONG}
D64, D128 = DENSE | {"head_dim": 64}, DENSE | {"head_dim": 128}
CAUSAL = PLAIN | {"batch": 1, "threads": 1, "head_dim": 64, "causal": True}
MINILM = PLAIN | {"threads": 1, "batch": 8, "num_heads": 12, "seqlen_q": 128, "head_dim": 32}
SWIN, LISTS, TEXTS, TOKENS = (
    {"batch": batch, "seqlen_q": s} for batch, s in ((256, 49), (256, 50), (32, 32), (32, 64))
)
HALF = DENSE | {"dtype": {"bfloat16", "float16"}}
IN_BFLOAT16 = {"dtype": "bfloat16"}
BFLOAT16 = D64 | IN_BFLOAT16
PAIRS, REALS = {"isa": {"avx512_bf16", "neon_bf16"}}, {"isa": {"avx512", "avx2", "neon", "scalar"}}
IN_REALS = "backward, D=64, bfloat16, S>=1024, in float32"
WINDOW = {"threads": 1, "seqlen_q": 4096, "window_size": {(256, 0)}}
DECODE = {"seqlen_q": 16, "seqlen_k": 4096}
ONE_HEAD = {"batch": 1, "num_heads": 1, "seqlen_q": 4096}
DROPOUT = D64 | STEP | {"seqlen_q": 2048, "dropout_p": 0.1}
DENSE_BIAS = D64 | BACKWARD | {"seqlen_q": 1024, "bias": "per_head"}
OWN_KEYS, GROUPED = ({"num_heads_k": heads_k, "seqlen_k": seqlen_k} for heads_k, seqlen_k in ((32, 2048), (8, 4096)))
OWN_SHARES = (("float32", 0.85), ("bfloat16", 0.84), ("float16", 0.82))
GROUPED_SHARES = (("float32", 0.71), ("bfloat16", 0.62), ("float16", 0.50))
THREADS_SHARES = (("float32", 0.90), ("bfloat16", 0.85), ("float16", 0.80))
VERY_LONG = {"seqlen_q": 16384}


class Target(NamedTuple):
    """`metric` of every row of `kind` that matches `where` is to be at least (or at most) `bound`.

    where    field of the work or of its case, "threads" or "isa" -> the value, or a container of values
    """

    what: str
    quantity: str
    bound: float
    kind: str
    where: dict
    metric: str
    at_most: bool = False
    percent: bool = False

    @property
    def suite(self) -> str:
        return suite_of(self.where["passes"])


def _share(what: str, bound: float, where: dict) -> Target:
    return Target(what, "share of the FMA peak", bound, "grid", where, "share", percent=True)


def _ratio(what: str, bound: float, where: dict, quantity: str = "x SDPA", metric: str = "vs sdpa") -> Target:
    return Target(what, quantity, bound, "grid", where, metric)


def _threads(what: str, bound: float, where: dict) -> Target:
    return Target(what, "x one thread", bound, "threads", where | {"threads": 2}, "speed-up")


def _rate(what: str, quantity: str, bound: float, kind: str, where: dict) -> Target:
    return Target(what, quantity, bound, kind, where, "rate", percent=True)


def _time(what: str, bound: float, kind: str, where: dict) -> Target:
    return Target(what, "x the time without", bound, kind, where, "time", at_most=True)


def _decode(what: str, bound: float, where: dict) -> Target:
    where = FORWARD | {"hot": False, "seqlen_q": 1, "threads": 1, "layout": "bhsd"} | where
    return Target(f"decode, {what}", "share of the read bandwidth", bound, "decode", where, "bandwidth", percent=True)


def _memory(what: str, bound: float, where: dict) -> Target:
    return Target(what, "MiB of extra memory", bound, "memory", where, "extra MiB", at_most=True)


def _in_pairs(what: str, rate: float, eager: float, where: dict) -> tuple[Target, Target]:
    """Of products of pairs of bfloat16, against ours in float32 and eager torch in bfloat16."""
    what, where = f"{what}, in pairs", where | IN_BFLOAT16 | PAIRS
    ours = _rate(what, "of our own float32 rate", rate, "16-bit", where)
    return ours, _ratio(what, eager, where, "x eager", "vs eager")


TARGETS = (
    _share("D=64, S>=1024, dense", 0.82, FORWARD | D64),
    _ratio("D=64, S>=1024, dense", 1.4, FORWARD | D64),
    _ratio("D=64, S>=1024, dense", 1.15, FORWARD | D64, "x onnxruntime", "vs onnxruntime"),
    _share("D=128, S>=1024, dense", 0.86, FORWARD | D128),
    _ratio("D=128, S>=1024, dense", 1.3, FORWARD | D128),
    _ratio("D=64, causal, S=512", 2.5, FORWARD | CAUSAL | {"seqlen_q": 512}),
    _ratio("D=64, causal, S=1024", 2.0, FORWARD | CAUSAL | {"seqlen_q": 1024}),
    _ratio("D=64, causal, S=2048", 1.7, FORWARD | CAUSAL | {"seqlen_q": 2048}),
    _ratio("B8 H12 S128 D32 dense", 1.6, FORWARD | MINILM),
    _share("windows of S=49 with a bias", 0.55, FORWARD | SWIN),
    _ratio("windows of S=49 with a bias", 2.0, FORWARD | SWIN),
    _share("S=50 causal", 0.45, FORWARD | LISTS),
    _ratio("S=50 causal", 2.5, FORWARD | LISTS),
    _share("B32 H12 S32 D64", 0.65, FORWARD | TEXTS),
    _share("B32 H12 S64 D32", 0.70, FORWARD | TOKENS),
    _share("B8 H12 S128 D32 dense", 0.80, FORWARD | MINILM),
    _share("B8 H12 S128 D32 causal", 0.70, FORWARD | MINILM | {"causal": True}),
    _threads("two threads, S>=1024", 1.9, FORWARD | {"seqlen_q": LONG}),
    _share("D=64, causal, S=512", 0.85, FORWARD | CAUSAL | {"seqlen_q": 512}),
    _rate("16-bit, S>=1024, in float32", "of our own float32 rate", 0.9, "16-bit", FORWARD | HALF | REALS),
    *(
        _rate(f"bfloat16, D={head_dim}, S>=1024, in pairs", "of our own float32 rate", bound, "16-bit", where | PAIRS)
        for head_dim, bound, where in ((64, 1.65, FORWARD | BFLOAT16), (128, 1.75, FORWARD | D128 | IN_BFLOAT16))
    ),
    _ratio("bfloat16, S>=1024, in pairs", 1.9, FORWARD | DENSE | IN_BFLOAT16 | PAIRS),
    Target("16-bit, S>=1024", "x the error of SDPA", 1.0, "grid", FORWARD | HALF, "error vs sdpa", at_most=True),
    _rate("window 256 of S=4096", "of our dense rate per pair", 0.88, "window", FORWARD | WINDOW),
    _ratio("window 256 of S=4096", 3.5, FORWARD | WINDOW, "x FlexAttention", "vs flex"),
    _ratio("window 256 of S=4096", 18.0, FORWARD | WINDOW, "x SDPA with the mask"),
    _time("bool mask [1,1,S,S], S=2048", 1.10, "bias or mask", FORWARD | {"mask": "tensor"}),
    _time("bias [1,1,S,S], S=2048", 1.12, "bias or mask", FORWARD | {"bias": "shared"}),
    _time("bias [1,H,S,S], S=2048", 1.15, "bias or mask", FORWARD | {"bias": "per_head"}),
    _threads("Sq=16, Sk=4096, B1 H4, two threads", 1.7, FORWARD | DECODE),
    Target("tiny call (1,1,1,16)", "x the speed of SDPA's call", 1.0, "overhead", FORWARD, "vs sdpa"),
    _memory("S=16384 H4 D64, causal + bias row", 64.0, FORWARD | VERY_LONG),
    _share("backward, D=64, S>=1024, dense", 0.82, BACKWARD | D64),
    _ratio("backward, D=64, S>=1024, dense", 1.5, BACKWARD | D64),
    _share("backward, D=128, S>=1024, dense", 0.80, BACKWARD | D128),
    _ratio("backward, D=128, S>=1024, dense", 1.3, BACKWARD | D128),
    _ratio("backward, D=64, causal, S=1024", 1.9, BACKWARD | CAUSAL | {"seqlen_q": 1024}),
    _share("backward, D=64, causal, S=512", 0.80, BACKWARD | CAUSAL | {"seqlen_q": 512}),
    _ratio(IN_REALS, 7.0, BACKWARD | BFLOAT16 | REALS),
    _rate(IN_REALS, "of our own float32 rate", 0.85, "16-bit", BACKWARD | BFLOAT16 | REALS),
    *_in_pairs("backward, D=64, bfloat16, S=1024", 1.8, 1.1, BACKWARD | D64 | {"seqlen_q": 1024}),
    *_in_pairs("backward, D=128, bfloat16, S=1024", 1.8, 1.0, BACKWARD | D128 | {"seqlen_q": 1024}),
    _ratio("backward, bfloat16, S=1024, in pairs", 1.9, BACKWARD | DENSE | IN_BFLOAT16 | PAIRS | {"seqlen_q": 1024}),
    *_in_pairs("forward + backward, S=512 causal", 1.5, 1.0, STEP | CAUSAL | {"seqlen_q": 512}),
    *_in_pairs("forward + backward, B8 H12 S128 D64", 1.3, 1.0, STEP | MINILM | {"head_dim": 64}),
    *_in_pairs("forward + backward, B32 H12 S64 D32", 1.2, 1.0, STEP | PLAIN | {"threads": 1} | TOKENS),
    _ratio("forward + backward, dropout 0.1, S=2048", 4.0, DROPOUT, "x SDPA with dropout"),
    _time("a step with a growing cache, over a repeated one", 1.02, "growing", FORWARD),
    _time("forward + backward, dropout 0.1, S=2048", 1.3, "dropout", DROPOUT),
    _ratio("backward, bias [1,H,S,S] with a gradient, S=1024", 3.0, DENSE_BIAS, "x SDPA with that attn_mask"),
    _threads("backward, B1 H1 S4096, two threads", 1.7, BACKWARD | ONE_HEAD),
    _ratio("backward, B8 H12 S128 D32 dense", 1.6, BACKWARD | MINILM),
    _share("backward, B32 H12 S32 D64", 0.60, BACKWARD | TEXTS),
    _share("backward, B32 H12 S64 D32", 0.60, BACKWARD | TOKENS),
    _share("backward, B8 H12 S128 D32 dense", 0.70, BACKWARD | MINILM),
    _share("backward, B8 H12 S128 D32 causal", 0.60, BACKWARD | MINILM | {"causal": True}),
    Target("tiny forward + backward", "x the speed of SDPA's", 1.0, "overhead", STEP, "vs sdpa"),
    *(_decode(f"32/32 x 2048 x 128, {dtype}", bound, OWN_KEYS | {"dtype": dtype}) for dtype, bound in OWN_SHARES),
    *(_decode(f"32/8 x 4096 x 128, {dtype}", bound, GROUPED | {"dtype": dtype}) for dtype, bound in GROUPED_SHARES),
    *(
        _decode(f"32/8 x 4096 x 128, {dtype}, two threads", bound, GROUPED | {"dtype": dtype, "threads": 2})
        for dtype, bound in THREADS_SHARES
    ),
    *(
        _decode(f"{heads}, cache [B, S, Hk, D]", 0.6, where | {"dtype": "float32", "layout": "bshd"})
        for heads, where in (("32/32", OWN_KEYS), ("32/8", GROUPED))
    ),
    Target("decode, 12/12 x 1024 x 64, in cache", "x SDPA", 1.5, "decode", FORWARD | {"hot": True}, "vs sdpa"),
    _memory("forward + backward, S=16384 H4 D64, causal + bias row", 200.0, STEP | VERY_LONG),
    Target("block, compiled", "x the same with SDPA, compiled", 1.0, "compiled", FORWARD, "vs sdpa"),
    Target("block, compiled, forward + backward", "x the same with SDPA, compiled", 1.0, "compiled", STEP, "vs sdpa"),
    Target("tiny call in a compiled graph", "us over an eager call", 4.0, "graph", FORWARD, "extra us", at_most=True),
)


def _sparse(what: str, bound: float, where: dict, quantity: str = "x our dense kernel", metric: str = "speed-up"):
    return Target(what, quantity, bound, "sparse", where, metric, percent=metric == "rate")


BLOCK128, BLOCK64 = ({"seqlen_q": 8192, "pattern": f"random{block_size}:12.5%"} for block_size in (128, 64))
LONG_WINDOW = FORWARD | VERY_LONG | {"pattern": "window"}
GATHER, EDGES = "x gather + softmax + sum", {"seqlen_q": 16384, "neighbours": 32}
BUILD = FORWARD | {"seqlen_q": 131072}

SPARSE_TARGETS = (
    _sparse("blocks of 128, 12.5 % dense, S=8192", 6.5, FORWARD | BLOCK128),
    _sparse("blocks of 64, 12.5 % dense, S=8192", 6.0, FORWARD | BLOCK64),
    _sparse("backward, blocks of 128, 12.5 % dense, S=8192", 5.5, BACKWARD | BLOCK128),
    _sparse("backward, blocks of 64, 12.5 % dense, S=8192", 5.5, BACKWARD | BLOCK64),
    _sparse("causal window of 512, S=16384", 0.85, LONG_WINDOW, "of our dense rate per pair", "rate"),
    _sparse("causal window of 512, S=16384", 3.5, LONG_WINDOW, "x FlexAttention", "vs flex"),
    _sparse("causal window of 512, S=16384", 20.0, LONG_WINDOW, "x SDPA with the mask", "vs sdpa"),
    Target("causal + window + documents, S=131072", "ms to build", 100.0, "build", BUILD, "ms", at_most=True),
    Target("causal + window + documents, S=131072", "MiB to build", 16.0, "build", BUILD, "MiB", at_most=True),
    Target(
        "select_blocks, S=16384 H8", "of the dense forward", 0.08, "select", FORWARD | VERY_LONG, "time",
        at_most=True, percent=True,
    ),
    Target("attention_csr, 32 keys each, S=16384 D=64", GATHER, 5.0, "edges", FORWARD | EDGES, "vs gather"),
    Target("backward, attention_csr, 32 keys each, S=16384 D=64", GATHER, 5.0, "edges", BACKWARD | EDGES, "vs gather"),
)  # fmt: skip
"""Of dense_vs_sparse.py."""


def judge(rows: list[Row], suites: list[str], targets: tuple[Target, ...] = TARGETS) -> list[dict]:
    """One dict for each target of `suites`: its words, bound, worst measured value (None: not measured), met or not."""
    return [_judge_one(target, rows) for target in targets if target.suite in suites]


def _judge_one(target: Target, rows: list[Row]) -> dict:
    found = [row for row in rows if row.kind == target.kind and _matches(row, target.where)]
    values = [(row.metrics[target.metric], row.name) for row in found if target.metric in row.metrics]
    value, name = (max if target.at_most else min)(values, default=(None, None))
    met = None if value is None else value <= target.bound if target.at_most else value >= target.bound
    if any(row.wrong for row in found):
        met = False
    shown = {key: getattr(target, key) for key in ("what", "quantity", "bound", "at_most", "percent")}
    return shown | {"value": value, "row": name, "rows": len(values), "of": len(found), "met": met}


def _matches(row: Row, where: dict) -> bool:
    facts = row.spec | {"threads": row.threads, "isa": row.isa}
    return all(
        facts[key] in wanted if isinstance(wanted, (set, range)) else facts[key] == wanted
        for key, wanted in where.items()
    )
