"""Rows of compiled graphs: a transformer block with our attention beside one with SDPA; a call beside an eager one."""

import timeit
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import fastattn
from cases import Case
from fastattn.cli.timing import Contender, Peak
from rows import Result, Row
from suites import _fill, _in_turn_beside_peak, _repro
from work import Work

BLOCKS = tuple(
    Work(Case(num_heads=8, seqlen_q=seqlen, head_dim=64, causal=True), passes)
    for seqlen in (512, 2048)
    for passes in ("forward", "forward+backward")
)
GRAPH = "tiny call in a compiled graph"
CALLS = 9
"""Of the graph whose time, without that of a graph of one, tells what a call costs."""


class Block(torch.nn.Module):
    """Projection to q, k and v, rotary positions, causal attention, output, MLP; with residuals and norms."""

    def __init__(self, num_heads: int, head_dim: int, attend: Callable):
        super().__init__()
        width = num_heads * head_dim
        self.num_heads, self.head_dim, self.attend = num_heads, head_dim, attend
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(width) for _ in range(2)])
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x, cos, sin):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


ATTENTIONS = {
    "fastattn": partial(fastattn.attention, causal=True),
    "sdpa": partial(F.scaled_dot_product_attention, is_causal=True),
}


def name_of(work: Work) -> str:
    """Of the row of a block."""
    return f"compiled block {work.passes} B{work.case.batch} H{work.case.num_heads} S{work.case.seqlen_q}"


def block_row(work: Work, threads: int, budget: float, peak: Peak, backend: str = "inductor") -> Row:
    """The compiled block with each attention, in turn; metric "vs sdpa". Eager SDPA says what is right."""
    torch.set_num_threads(threads)
    case = work.case
    row = Row("compiled", name_of(work), threads, _repro(name_of(work), None), work.spec)
    runs, found = {}, {}
    for name in ("right", *ATTENTIONS):
        torch.manual_seed(0)
        block = Block(case.num_heads, case.head_dim, ATTENTIONS.get(name, ATTENTIONS["sdpa"]))
        x = torch.randn(case.batch, case.seqlen_q, case.num_heads * case.head_dim, requires_grad=work.trains)
        cos, sin = torch.randn(2, case.seqlen_q, case.head_dim)
        run = block if name == "right" else torch.compile(block, backend=backend, fullgraph=True)
        runs[name] = _pass(work, run, x, cos, sin)
        with fastattn.record() as calls:
            found[name] = runs[name]()
        if name == "fastattn":
            row.kernel, row.isa = " + ".join(dict.fromkeys(call.kernel for call in calls)), calls[-1].isa
    for name in ATTENTIONS:
        row.results[name] = Result()
        if not all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found[name], found["right"], strict=True)
        ):
            row.wrong = f"the block compiled with {name} is not the eager one"
    if row.wrong:
        return row
    contenders = {name: Contender(runs[name], threads) for name in ATTENTIONS}
    for name, seconds in _in_turn_beside_peak(row, contenders, budget, peak, case.dtype).items():
        _fill(row.results[name], seconds, None, None)
        row.results[name].ratio = row.results[name].ms / row.ours.ms
    row.metrics["vs sdpa"] = row.results["sdpa"].ratio
    return row


def _pass(work: Work, run: Callable, x, cos, sin) -> Callable:
    if not work.trains:
        return lambda: _without_grad(run, x, cos, sin)

    def step():
        out = run(x, cos, sin)
        return out.detach(), *torch.autograd.grad(out.square().mean(), x)

    return step


def _without_grad(run, *inputs):
    with torch.no_grad():
        return (run(*inputs),)


def graph_row(work: Work, repeats: int = 15, backend: str = "inductor") -> Row:
    """Microseconds of a tiny call in a compiled graph; metric "extra us": beyond an eager call."""
    torch.set_num_threads(1)
    row = Row("graph", GRAPH, 1, _repro(GRAPH, None), work.spec)
    case = work.case
    qkv = torch.randn(3, case.batch, case.num_heads, case.seqlen_q, case.head_dim).unbind()

    def chain(count):
        def calls(q, k, v):
            for _ in range(count):
                q = fastattn.attention(q, k, v)
            return q

        return torch.compile(calls, backend=backend, fullgraph=True)

    one, many = chain(1), chain(CALLS)
    with torch.no_grad():
        expected = qkv[0]
        for _ in range(CALLS):
            expected = fastattn.attention(expected, *qkv[1:])
        with fastattn.record() as calls:
            row.wrong = None if torch.equal(many(*qkv), expected) else "the graph computes something else"
        row.kernel, row.isa = calls[-1].kernel, calls[-1].isa
        runs = {"one": lambda: one(*qkv), "many": lambda: many(*qkv), "base": lambda: fastattn.attention(*qkv)}
        times = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(timeit.timeit(run, number=200) / 200)
    in_graph = [(b - a) / (CALLS - 1) for a, b in zip(times["one"], times["many"], strict=True)]
    for name, seconds in (("fastattn", in_graph), ("base", times["base"])):
        row.results[name] = Result()
        _fill(row.results[name], seconds, None, None)
        row.results[name].ratio = row.results[name].ms / row.ours.ms
    row.metrics["extra us"] = 1e3 * (row.ours.ms - row.results["base"].ms)
    return row
