"""A Longformer of transformers with its attention replaced by fastattn: the same outputs, in less time and memory.

    python examples/longformer.py --out out            needs: pip install "fastattn[demo]"

transformers computes Longformer's sliding window in overlapping chunks, and keeps all scores. Here the same pattern is
a `BlockMask`, and one kernel does it. The weights are random and so are the tokens: time, memory and equality do
not depend on them. First the outputs and gradients of both are compared, with each other and with float64; then both
are timed in turn, and the memory of each is measured in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from in_turn import time_in_turn

import fastattn
from fastattn import BlockMask, patterns

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from memory import extra_mib

try:
    import matplotlib
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
    from transformers import LongformerConfig, LongformerModel, logging
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
except ImportError as error:
    raise SystemExit(f'{error}. The example needs more packages: pip install "fastattn[demo]"') from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a renderer that needs no screen)

OURS, THEIRS = "fastattn", "transformers"
GLOBAL_TOKENS = 16
"""The first tokens, where a question would stand."""

console = Console()


class Size(NamedTuple):
    """Of the model, and the numbers of tokens that are measured."""

    hidden_size: int = 512
    num_layers: int = 2
    num_heads: int = 8
    attention_window: int = 512  # keys to both sides together
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    training_lengths: tuple[int, ...] = (2048, 4096)
    checked: int = 4096  # tokens for the comparison with float64


QUICK = Size(hidden_size=256, num_heads=4, lengths=(1024, 2048, 4096), training_lengths=(1024, 2048), checked=1024)


# 1. The attention: transformers' module with the same parameters and another forward.


class FusedSelfAttention(LongformerSelfAttention):
    """Longformer's attention in two calls: a window and the global tokens as keys, and the global tokens as queries.

    Global tokens see everything, through projections of their own; their rows of the first call are replaced.
    """

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        is_index_masked=None,
        is_index_global_attn=None,
        is_global_attn=None,
        output_attentions=False,
    ):
        if output_attentions:
            raise NotImplementedError("output_attentions=True: the weights are never formed; use transformers' module")
        attend = partial(fastattn.attention, dropout_p=self.dropout if self.training else 0.0)
        q, k, v = (self.project(part, hidden_states) for part in (self.query, self.key, self.value))
        tokens = ~is_index_masked  # the others are padding
        mask = window_and_global(self.one_sided_attn_window_size, tokens, is_index_global_attn)
        out = attend(q, k, v, mask=mask).transpose(1, 2)
        if is_global_attn:
            out = out.clone()  # the backward pass wants what the call returned
            k, v = (self.project(part, hidden_states) for part in (self.key_global, self.value_global))
            for i, chosen in enumerate(is_index_global_attn):
                one = slice(i, i + 1)
                q = self.project(self.query_global, hidden_states[one, chosen])
                everything = None if tokens[i].all() else tokens[one, None, None]
                out[i, chosen] = attend(q, k[one], v[one], mask=everything)[0].transpose(0, 1)
        return (out.flatten(2),)

    def project(self, part, hidden_states):
        """[batch, num_heads, seqlen, head_dim], a view."""
        return part(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def window_and_global(window: int, tokens: torch.Tensor, chosen: torch.Tensor) -> BlockMask:
    """Each token sees `window` others to either side and the chosen ones. tokens, chosen: bool [batch, seqlen].

    `patterns.longformer` would have the rows of the chosen tokens as well, which are computed apart here.
    """

    def one(tokens, chosen):
        near = patterns.sliding_window(len(tokens), left=window, right=window)
        mask = near | BlockMask.from_tokens(torch.ones_like(chosen), chosen)
        return mask if tokens.all() else mask & BlockMask.from_tokens(tokens, tokens)

    return BlockMask.cat([one(*pair) for pair in zip(tokens, chosen, strict=True)], dim=0)


class FusedLongformer(LongformerModel):
    """With FusedSelfAttention, and without the tokens x tokens mask of transformers, of which it uses one row."""

    def __init__(self, config):
        super().__init__(config, add_pooling_layer=False)
        for i, layer in enumerate(self.encoder.layer):
            layer.attention.self = FusedSelfAttention(config, layer_id=i)

    def forward(self, input_ids, attention_mask=None, global_attention_mask=None, output_attentions=False):
        kinds = torch.zeros(input_ids.shape)  # what the encoder asks for: -1 is padding, 1 a global token
        if global_attention_mask is not None:
            kinds[global_attention_mask == 1] = 1.0
        if attention_mask is not None:
            kinds[attention_mask == 0] = -1.0
        return self.encoder(self.embeddings(input_ids), attention_mask=kinds, output_attentions=output_attentions)


def on_fastattn(model: LongformerModel) -> FusedLongformer:
    """The same weights."""
    ours = FusedLongformer(model.config)
    ours.load_state_dict(model.state_dict())
    return ours.train(model.training)


def both(size: Size) -> dict[str, LongformerModel]:
    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.hidden_size,
        attention_window=size.attention_window,
        max_position_embeddings=max(*size.lengths, size.checked) + 2,
    )
    model = LongformerModel(config, add_pooling_layer=False).eval()
    return {THEIRS: model, OURS: on_fastattn(model)}


def random_tokens(seqlen: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (1, seqlen), generator=torch.Generator().manual_seed(seqlen))
    return {"input_ids": ids, "global_attention_mask": (torch.arange(seqlen) < GLOBAL_TOKENS).long()[None]}


# 2. Are they the same?


def torch_softmax(scores, dim, dtype=None):
    """F.softmax in the dtype of the scores: transformers asks for float32, in float64 too."""
    return torch.softmax(scores, dim)


class Differences(NamedTuple):
    """Largest absolute differences of the outputs, and their size; of the gradients, over the largest gradient."""

    between: float
    size: float
    theirs: float  # from float64
    ours: float
    in_float64: float  # between both, computed in float64
    gradients: float

    @property
    def same(self) -> bool:
        """As near to float64 as transformers is (twice its error at most), and far nearer in float64."""
        return self.ours <= 2 * self.theirs and self.in_float64 < 1e-12 * self.size and self.gradients < 1e-4


def compare(models: dict[str, LongformerModel], seqlen: int) -> Differences:
    found, exact, gradients = {}, {}, {}
    inputs = random_tokens(seqlen, models[OURS].config.vocab_size)
    for name, model in models.items():
        states = model(**inputs).last_hidden_state
        found[name] = states.detach()
        # Weighted, because all elements of a layer norm's output have a constant sum.
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients[name] = torch.autograd.grad((states * weights).sum(), parameters)
        with torch.no_grad(), patch.object(F, "softmax", torch_softmax):
            exact[name] = deepcopy(model).double()(**inputs).last_hidden_state

    def apart(a, b):
        return float((a - b).abs().max())

    largest = max(float(x.abs().max()) for x in gradients[THEIRS])
    worst = max(apart(a, b) for a, b in zip(gradients[OURS], gradients[THEIRS], strict=True))
    return Differences(
        between=apart(found[OURS], found[THEIRS]),
        size=float(exact[THEIRS].abs().max()),
        theirs=apart(found[THEIRS], exact[THEIRS]),
        ours=apart(found[OURS], exact[THEIRS]),
        in_float64=apart(exact[OURS], exact[THEIRS]),
        gradients=worst / largest,
    )


# 3. Time and memory.


ATTENTION, FORWARD, TRAINING = "attention", "forward", "training"


def work(model: LongformerModel, what: str, seqlen: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What is measured: a layer's attention with its projections, or the whole model; all results are returned."""
    inputs = random_tokens(seqlen, model.config.vocab_size)
    if what == ATTENTION:
        states, chosen = torch.randn(1, seqlen, model.config.hidden_size), inputs["global_attention_mask"] == 1
        attend, padding = model.encoder.layer[0].attention.self, torch.zeros_like(chosen)
        return torch.no_grad()(lambda: attend(states, chosen * 10000.0, padding, chosen, True))
    if what == FORWARD:
        return torch.no_grad()(lambda: (model(**inputs).last_hidden_state,))

    def step():
        model.train()  # with dropout
        states = model(**inputs).last_hidden_state
        gradients = torch.autograd.grad(states.square().mean(), [*model.parameters()])
        model.eval()
        return states, *gradients

    return step


class Row(NamedTuple):
    """Seconds and MiB by name; no MiB where they could not be measured."""

    what: str
    seqlen: int
    seconds: dict[str, float]
    mib: dict[str, float]


def cells(size: Size) -> list[tuple[str, int]]:
    """(what, number of tokens) of all that is measured."""
    return [(what, n) for what in (ATTENTION, FORWARD) for n in size.lengths] + [
        (TRAINING, n) for n in size.training_lengths
    ]


def measure(models: dict[str, LongformerModel], size: Size, budget: float) -> list[Row]:
    rows = []
    with tqdm(total=len(cells(size)) + len(models), leave=False, disable=None) as progress:
        memory = {}
        for name in models:
            progress.set_description(f"memory of {name}")
            memory[name] = memory_in_child(name, size)
            progress.update()
        for i, (what, seqlen) in enumerate(cells(size)):
            progress.set_description(f"time, {what}, {seqlen} tokens")
            runs = {name: work(model, what, seqlen) for name, model in models.items()}
            seconds = time_in_turn(runs, budget, at_least=2 if what == TRAINING else 3)
            rows.append(Row(what, seqlen, seconds, {name: mib[i] for name, mib in memory.items() if mib}))
            progress.update()
    return rows


def memory_in_child(name: str, size: Size) -> list[float]:
    """MiB of each of `cells` beyond the weights and the results, from a process of its own; empty off Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return []
    command = [sys.executable, __file__, "--child", name, json.dumps(size)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back, and is not there before
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def child(name: str, size: Size) -> None:
    """Prints what `memory_in_child` returns."""
    model, found = both(size)[name], []
    for what, seqlen in cells(size):
        run = work(model, what, seqlen)
        work(model, what, size.attention_window)()  # starts the threads
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest resident size starts anew
        found.append(extra_mib(run))
    print(json.dumps(found))


# 4. The report.


def print_differences(found: Differences, seqlen: int) -> None:
    table = Table("largest difference", "", title=f"Outputs at {seqlen} tokens, the largest being {found.size:.2f}")
    for what, value in (
        (f"{OURS} from {THEIRS}", found.between),
        (f"{OURS} from float64", found.ours),
        (f"{THEIRS} from float64", found.theirs),
        (f"{OURS} from {THEIRS}, both in float64", found.in_float64),
        ("gradients of all weights, over the largest gradient", found.gradients),
    ):
        table.add_row(what, f"{value:.1e}")
    console.print(table)
    console.print("The same, within rounding." if found.same else "[bold red]NOT the same.")


def print_rows(rows: list[Row]) -> None:
    for title, unit, field in (("time", "s", "seconds"), ("memory", "MiB", "mib")):
        if not getattr(rows[0], field):
            continue
        table = Table(title, "tokens", THEIRS, OURS, f"{THEIRS} / {OURS}")
        for column in table.columns[1:]:
            column.justify = "right"
        for i, row in enumerate(rows):
            theirs, ours = (getattr(row, field)[name] for name in (THEIRS, OURS))
            last = i + 1 == len(rows) or rows[i + 1].what != row.what
            figures = [f"{x:#.3g} {unit}" if x < 100 else f"{x:.0f} {unit}" for x in (theirs, ours)]
            ratio = f"{theirs / ours:.2f}" if min(theirs, ours) > 0 else ""  # memory that was there already
            table.add_row(row.what, str(row.seqlen), *figures, ratio, end_section=last)
        console.print(table)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Time and memory against the number of tokens."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for what, line in ((FORWARD, "-"), (TRAINING, "--"), (ATTENTION, ":")):
        chosen = [row for row in rows if row.what == what]
        for name, color, marker in ((THEIRS, "tab:gray", "s"), (OURS, "tab:blue", "o")):
            style = {"color": color, "marker": marker, "linestyle": line, "label": f"{name}, {what}"}
            panels[0].plot([row.seqlen for row in chosen], [row.seconds[name] for row in chosen], **style)
            if all(row.mib for row in chosen):
                panels[1].plot([row.seqlen for row in chosen], [row.mib[name] for row in chosen], **style)
    lengths = sorted({row.seqlen for row in rows})
    for panel, label in zip(panels, ("seconds", "MiB beyond weights and results"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(lengths, [str(n) for n in lengths])
        panel.set(xlabel="tokens", ylabel=label)
        panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        panel.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        panel.grid(True, alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


class Outcome(NamedTuple):
    """What was found."""

    differences: Differences
    rows: list[Row]


def main(argv: list[str] | None = None) -> Outcome | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for longformer.png (default: out)")
    parser.add_argument("--quick", action="store_true", help="a smaller model, up to 4096 tokens")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # name and size: see memory_in_child
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", fastattn.FallbackWarning)  # said once below, in the example's own words
    logging.set_verbosity_error()
    missing = fastattn.backends.cpu.unavailable()
    quick = arguments.quick or missing is not None
    size = QUICK if quick else Size()
    if arguments.child:
        return child(arguments.child[0], Size(*json.loads(arguments.child[1])))

    console.print(f"[bold]fastattn {fastattn.__version__}[/bold], torch {torch.__version__}, "
                  f"{torch.get_num_threads()} threads", highlight=False)  # fmt: skip
    if missing:
        console.print(f"Only the slow reference runs here, so sizes are small: {missing}", markup=False)
    models = both(size)
    millions = sum(p.numel() for p in models[OURS].parameters()) / 1e6
    what = (f"Longformer, {size.num_layers} layers, {size.num_heads} heads of {size.hidden_size // size.num_heads}, "
            f"window {size.attention_window // 2} to either side, {GLOBAL_TOKENS} global tokens")  # fmt: skip
    console.print(f"{what}; {millions:.1f} million random weights, random tokens.", highlight=False)
    differences = compare(models, size.checked)
    print_differences(differences, size.checked)
    rows = measure(models, size, budget=1.0 if quick else 8.0)
    print_rows(rows)
    console.print(NOTES, highlight=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "longformer.png"
    plot(rows, f"{what}\n(both axes logarithmic, lower is better)", path)
    console.print(f"Plot: {path}", highlight=False)
    return Outcome(differences, rows)


NOTES = (
    "Batch 1, float32. attention: that of one layer, with its linear layers. forward, training: the whole model; "
    "training is a forward and a backward pass with dropout. The linear layers are torch's on either side. The model "
    f"of {THEIRS} also forms a mask of tokens x tokens, of which it uses one row; {OURS}'s does not. "
    f"{OURS} builds its mask anew in every layer; that is in its times. Times are medians, in turn. Memory is the "
    "highest resident size beyond weights and results, each side in a process of its own."
)


if __name__ == "__main__":
    main()
