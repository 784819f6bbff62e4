"""Kinds of attention beside plain attention of the same shape and beside eager torch, forward and with gradients.

    python bench/kinds.py [--seqlen 2048] [--threads 1] [--budget 20] [--only t5 swin] [--out out/kinds]

Float32, head size 64, 8 heads, but for windows and modules. Calls run in turn in one process; a ratio is the median of
those of all rounds, and a doubt says where rounds disagree. Each kind is compared with its eager formula in
float64 first, at a short length. Writes kinds.md and kinds.json. Exit status 1: a ratio misses what is asked of it.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

import fastattn
from fastattn import learned, relative
from fastattn.cli.timing import Contender, rounds

HEADS, DIM = 8, 64
DOUBT = 0.15
"""How far apart the middle half of the ratios of a figure may lie, as a share of their median."""
AS_PLAIN, FASTER = "x plain", "x faster than eager"


class Kind(NamedTuple):
    """Calls of no arguments that return an output.

    leaves   what ours differentiates by, and eager, but for of_eager; of_plain: the same of `plain`
    asked    (figure, passes) -> at most, of AS_PLAIN, or at least, of FASTER; a figure that is not asked for is shown
    """

    ours: Callable
    eager: Callable
    leaves: list
    plain: Callable | None = None
    of_plain: list | None = None
    asked: dict | None = None
    of_eager: list | None = None


class Sizes(NamedTuple):
    """Of a kind: small ones to compare, large ones to time."""

    seqlen: int
    batch: int  # of windows and modules
    dtype: torch.dtype


def tensors(sizes: Sizes, *shapes) -> list[torch.Tensor]:
    """Random leaves, alike for all dtypes."""
    generator = torch.Generator().manual_seed(0)
    found = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(sizes.dtype).requires_grad_() for x in found]


def asked(forward: float, both: float, faster: float | None = None, faster_both: float | None = None) -> dict:
    """What is asked of a kind, by figure and passes."""
    found = {(AS_PLAIN, "forward"): forward, (AS_PLAIN, "forward+backward"): both}
    found |= {(FASTER, "forward"): faster} if faster else {}
    return found | ({(FASTER, "forward+backward"): faster_both or faster} if faster_both or faster else {})


def biased(make_bias, eager_bias, sizes: Sizes, *shapes, scale: float | None = None, limits: dict) -> Kind:
    """Attention with a bias of `fastattn.relative` beside SDPA with the n x n bias."""
    q, k, v, *tables = tensors(sizes, *[(1, HEADS, sizes.seqlen, DIM)] * 3, *shapes)
    return Kind(
        lambda: fastattn.attention(q, k, v, bias=make_bias(*tables), softmax_scale=scale),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=eager_bias(q, k, *tables), scale=scale),
        [q, k, v, *tables], lambda: fastattn.attention(q, k, v, softmax_scale=scale), [q, k, v], limits,
    )  # fmt: skip


def distances(seqlen: int) -> torch.Tensor:
    return torch.arange(seqlen) - torch.arange(seqlen)[:, None]


def t5(sizes: Sizes) -> Kind:
    def eager(q, k, table):
        return table.t()[:, relative.t5(table).buckets(distances(sizes.seqlen))][None]

    return biased(relative.t5, eager, sizes, (32, HEADS), limits=asked(1.15, 1.3, faster_both=5.0))


def toeplitz(sizes: Sizes) -> Kind:
    def eager(q, k, vector):
        return vector[:, distances(sizes.seqlen) + sizes.seqlen - 1][None]

    limits = asked(1.15, 1.3, faster_both=5.0)
    return biased(relative.toeplitz, eager, sizes, (HEADS, 2 * sizes.seqlen - 1), limits=limits)


def shifted(products: torch.Tensor) -> torch.Tensor:
    """[..., n, 2 n - 1] by distance -> [..., n, n] by key: the models' relative shift, with its copies."""
    n = products.shape[-2]
    padded = F.pad(products, (0, 1)).flatten(-2)
    return F.pad(padded, (0, n - 1)).unflatten(-1, (n + 1, 2 * n - 1))[..., :n, n - 1 :]


def transformer_xl(sizes: Sizes) -> Kind:
    def eager(q, k, r, u, w):
        content = (u[:, None] @ k.mT).expand(-1, -1, sizes.seqlen, -1)
        return DIM**-0.5 * (content + shifted((q + w[:, None]) @ r.mT))

    shapes = (HEADS, 2 * sizes.seqlen - 1, DIM), (HEADS, DIM), (HEADS, DIM)
    return biased(relative.transformer_xl, eager, sizes, *shapes, limits=asked(1.7, 2.2, faster=4.0))


def shaw_keys(sizes: Sizes) -> Kind:
    def eager(q, k, keys):
        places = distances(sizes.seqlen).clamp(-64, 64) + 64
        return DIM**-0.5 * (q @ keys.mT).gather(-1, places.expand(1, HEADS, -1, -1))

    return biased(relative.shaw, eager, sizes, (129, DIM), limits=asked(1.7, 2.2, faster=4.0))


def shaw_keys_and_values(sizes: Sizes) -> Kind:
    q, k, v, keys, values = tensors(sizes, *[(1, HEADS, sizes.seqlen, DIM)] * 3, (129, DIM), (129, DIM))

    def eager():
        places = (distances(sizes.seqlen).clamp(-64, 64) + 64).expand(1, HEADS, -1, -1)
        p = torch.softmax(DIM**-0.5 * (q @ k.mT + (q @ keys.mT).gather(-1, places)), -1)
        return p @ v + p.new_zeros(*p.shape[:3], 129).scatter_add(-1, places, p) @ values

    return Kind(
        lambda: fastattn.attention(q, k, v, bias=relative.shaw(keys, values)), eager, [q, k, v, keys, values],
        lambda: fastattn.attention(q, k, v), [q, k, v],
    )  # fmt: skip


def deberta(sizes: Sizes) -> Kind:
    """DeBERTa-v3's 256 buckets, up to a distance of 512."""

    def make(pos_key, pos_query):
        return relative.deberta(pos_key, pos_query, 256, 512)

    def eager(q, k, pos_key, pos_query):
        between = make(pos_key, pos_query).bucket(-distances(sizes.seqlen)) + 256
        places = between.clamp(0, 511).expand(1, HEADS, -1, -1)
        by_query, by_key = (q @ pos_key.mT).gather(-1, places), (k @ pos_query.mT).gather(-1, places.mT).mT
        return (3 * DIM) ** -0.5 * (by_query + by_key)

    shapes, scale = [(HEADS, 512, DIM)] * 2, (3 * DIM) ** -0.5
    return biased(make, eager, sizes, *shapes, scale=scale, limits=asked(1.7, 2.2, faster=4.0))


def swin(sizes: Sizes) -> Kind:
    """Windows of 7 x 7 tokens, 4 heads of 32."""
    q, k, v, table = tensors(sizes, *[(sizes.batch, 4, 49, 32)] * 3, (169, 4))
    index = relative.swin(table, 7).index()
    return Kind(
        lambda: fastattn.attention(q, k, v, bias=relative.swin(table, 7)),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=table.t()[:, index][None]), [q, k, v, table],
        lambda: fastattn.attention(q, k, v), [q, k, v], asked(1.25, 1.4),
    )  # fmt: skip


def cosine(sizes: Sizes) -> Kind:
    q, k, v, temperature = tensors(sizes, *[(1, HEADS, sizes.seqlen, DIM)] * 3, (HEADS, 1, 1))

    def eager():
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * temperature.clamp(max=4.6052).exp()
        return torch.softmax(scores, -1) @ v

    return Kind(
        lambda: learned.cosine_attention(q, k, v, temperature), eager, [q, k, v, temperature],
        lambda: fastattn.attention(q, k, v), [q, k, v], asked(1.06, 1.15),
    )  # fmt: skip


def rotary(sizes: Sizes) -> Kind:
    """Half-split pairs of all columns."""
    q, k, v = tensors(sizes, *[(1, HEADS, sizes.seqlen, DIM)] * 3)
    angles = torch.arange(sizes.seqlen)[:, None] * 1e4 ** (-torch.arange(DIM // 2) / (DIM // 2))
    cos, sin = angles.cos().to(sizes.dtype), angles.sin().to(sizes.dtype)

    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return Kind(
        lambda: fastattn.attention(q, k, v, rotary=(cos, sin)),
        lambda: F.scaled_dot_product_attention(turned(q), turned(k), v), [q, k, v],
        lambda: fastattn.attention(q, k, v), [q, k, v], asked(1.06, 1.1),
    )  # fmt: skip


def differential(sizes: Sizes) -> Kind:
    """8 heads of two softmaxes over values of 128 columns; plain: one of the softmaxes."""
    shapes = [(1, 2 * HEADS, sizes.seqlen, DIM)] * 2 + [(1, HEADS, sizes.seqlen, 2 * DIM), (HEADS,)]
    q, k, v, weight = tensors(sizes, *shapes)
    first = [x[:, :HEADS].detach().requires_grad_() for x in (q, k)]

    def eager():
        p, less = torch.softmax(DIM**-0.5 * (q @ k.mT), -1).chunk(2, 1)
        return (p - weight.view(-1, 1, 1) * less) @ v

    return Kind(
        lambda: learned.differential_attention(q, k, v, weight), eager, [q, k, v, weight],
        lambda: fastattn.attention(*first, v), [*first, v], asked(1.6, 1.6),
    )  # fmt: skip


def normalized(weigh, limit: float, sizes: Sizes, **options) -> Kind:
    q, k, v = tensors(sizes, *[(1, HEADS, sizes.seqlen, DIM)] * 3)
    return Kind(
        lambda: learned.attention(q, k, v, **options), lambda: weigh(DIM**-0.5 * (q @ k.mT)) @ v, [q, k, v],
        lambda: fastattn.attention(q, k, v), [q, k, v], asked(limit, limit),
    )  # fmt: skip


def sigmoid(sizes: Sizes) -> Kind:
    return normalized(torch.sigmoid, 1.1, sizes, normalizer="sigmoid")


def top_k(sizes: Sizes) -> Kind:
    def weigh(s):
        return torch.softmax(s.masked_fill(s < s.topk(64, -1).values[..., -1:], -torch.inf), -1)

    return normalized(weigh, 2.0, sizes, top_k=64)


def entmax15(sizes: Sizes) -> Kind:
    """The eager formula sorts, as the paper's package does."""

    def weigh(s):
        s = (s - s.amax(-1, keepdim=True)) / 2
        x = s.sort(-1, descending=True).values
        count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
        mean, squares = x.cumsum(-1) / count, x.square().cumsum(-1) / count
        tau = mean - torch.clamp((1 - count * (squares - mean.square())) / count, min=1e-30).sqrt()
        support = (tau <= x).sum(-1, keepdim=True)
        return torch.relu(s - tau.gather(-1, support - 1)).square()

    return normalized(weigh, 3.0, sizes, normalizer="entmax15")


def module(sizes: Sizes, trains: bool) -> Kind:
    """The module beside torch's: batch 32, 256 tokens, 512 columns."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(512, HEADS, batch_first=True).train(trains)
    ours = fastattn.nn.MultiHeadAttention(512, HEADS, batch_first=True).train(trains)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(sizes.dtype), theirs.to(sizes.dtype)
    (x,) = tensors(sizes, (sizes.batch // 8, 256, 512))
    return Kind(
        lambda: ours(x, x, x, need_weights=False)[0], lambda: theirs(x, x, x, need_weights=False)[0],
        [x, *ours.parameters()], of_eager=[x, *theirs.parameters()],
        asked={(FASTER, "forward+backward" if trains else "forward"): 1.0},
    )  # fmt: skip


def module_eval(sizes: Sizes) -> Kind:
    return module(sizes, False)


def module_train(sizes: Sizes) -> Kind:
    return module(sizes, True)


def module_attention(sizes: Sizes) -> Kind:
    """The attention of the module alone, beside SDPA."""
    q, k, v = tensors(sizes, *[(sizes.batch // 8, HEADS, 256, DIM)] * 3)
    return Kind(
        lambda: fastattn.attention(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v],
        asked={(FASTER, "forward"): 1.3, (FASTER, "forward+backward"): 1.3},
    )  # fmt: skip


KINDS = {
    make.__name__: make
    for make in (
        t5, toeplitz, swin, rotary, cosine, transformer_xl, shaw_keys, deberta, shaw_keys_and_values, differential,
        sigmoid, top_k, entmax15, module_eval, module_train, module_attention,
    )
}  # fmt: skip
"""One more kind is one more function here."""


def compare(make: Callable) -> None:
    """AssertionError where a kind is not its eager formula."""
    ours, exact = make(Sizes(160, 16, torch.float32)), make(Sizes(160, 16, torch.float64))
    out, expected = ours.ours(), exact.eager()
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
    of_exact = exact.leaves if exact.of_eager is None else exact.of_eager
    found = torch.autograd.grad(out.square().sum(), ours.leaves)
    for x, y in zip(found, torch.autograd.grad(expected.square().sum(), of_exact), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


def passes_of(kind: Kind) -> dict[str, dict[str, Callable]]:
    """Calls by passes and by name."""
    calls = {"ours": (kind.ours, kind.leaves), "eager": (kind.eager, kind.of_eager or kind.leaves)}
    calls |= {"plain": (kind.plain, kind.of_plain)} if kind.plain else {}
    dout = torch.ones_like(kind.ours())

    def forward(run):
        with torch.no_grad():
            return run()

    return {
        "forward": {name: lambda run=run: forward(run) for name, (run, _) in calls.items()},
        "forward+backward": {
            name: lambda run=run, leaves=leaves: torch.autograd.grad(run(), leaves, dout)
            for name, (run, leaves) in calls.items()
        },
    }


def measure(name: str, make: Callable, options) -> list[dict]:
    """The rows of a kind."""
    compare(make)
    kind, rows = make(Sizes(options.seqlen, 256, torch.float32)), []
    for passes, calls in passes_of(kind).items():
        times = rounds({one: Contender(call, options.threads) for one, call in calls.items()}, options.budget)
        medians = {one: [statistics.median(burst) for burst in bursts] for one, bursts in times.items()}
        row = {"kind": name, "passes": passes, "ms": {x: 1e3 * statistics.median(y) for x, y in medians.items()}}
        row |= {"figures": {}, "asked": {}, "missed": [], "doubts": []}
        for figure, over, under in ((AS_PLAIN, "ours", "plain"), (FASTER, "eager", "ours")):
            if {over, under} <= medians.keys():
                ratios = [x / y for x, y in zip(medians[over], medians[under], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                row["figures"][figure], bound = middle, (kind.asked or {}).get((figure, passes))
                row["asked"][figure] = bound
                if bound is not None and (middle > bound if figure == AS_PLAIN else middle < bound):
                    row["missed"].append(figure)
                if high - low > DOUBT * middle:
                    row["doubts"].append(f"{figure}: half of the rounds between {low:.2f} and {high:.2f}")
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    """A row of the table, Markdown."""
    cells = [row["kind"], row["passes"], *(f"{row['ms'][x]:.1f}" if x in row["ms"] else "" for x in NAMES)]
    for figure in (AS_PLAIN, FASTER):
        value, bound = row["figures"].get(figure), row["asked"].get(figure)
        text = "" if value is None else f"{value:.2f}"
        if bound is not None:
            text += (
                f" (at {'most' if figure == AS_PLAIN else 'least'} {bound:g}{', missed' * (figure in row['missed'])})"
            )
        cells.append(text)
    return "| " + " | ".join([*cells, "; ".join(row["doubts"])]) + " |"


NAMES = ("ours", "plain", "eager")


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each row")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, help="folder for kinds.md and kinds.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    title = f"float32, S{options.seqlen}, {options.threads} thread(s), load {os.getloadavg()[0]:.1f}; milliseconds"
    heads = ["kind", "passes", *NAMES, AS_PLAIN, FASTER, "doubts"]
    lines = [title, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    print("\n".join(lines), flush=True)
    rows = [row for name in options.only for row in measure(name, KINDS[name], options)]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kinds.md").write_text("\n".join([*lines, *map(line, rows), ""]))
        (options.out / "kinds.json").write_text(json.dumps({"title": title, "rows": rows}, indent=1))
    return int(any(row["missed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
