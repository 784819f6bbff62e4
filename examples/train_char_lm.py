"""Train a small language model on fastattn and on PyTorch's attention, side by side, in a few minutes on a CPU.

    python examples/train_char_lm.py --out out            needs: pip install "fastattn[demo]"

Two models that start from the same weights see the same batches, step by step in turn: one calls fastattn, its twin
what torch offers. The losses have to agree, the times need not. Two rounds:

    causal   rotary positions and a causal mask; the twin calls scaled_dot_product_attention
    alibi    ALiBi, a learned sink for each head, dropout of the attention weights; torch fuses none of it in training
             on a CPU, so the twin spells it out in plain torch

The text is the reference manual of Python as pydoc carries it, character by character. Nothing is downloaded.
"""

import argparse
import time
import warnings
from collections import Counter
from functools import cache, partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from in_turn import time_in_turn
from torch import nn

import fastattn

try:
    import matplotlib
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f'{error}. The example needs more packages: pip install "fastattn[demo]"') from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a renderer that needs no screen)

OURS, SDPA, EAGER = "fastattn", "torch sdpa", "plain torch"
DROPOUT, LEARNING_RATE = 0.1, 3e-3

console = Console()


class Size(NamedTuple):
    """Of the model (some 1.3 million parameters by default) and of a batch."""

    num_layers: int = 6
    width: int = 128
    num_heads: int = 4
    seqlen: int = 512
    batch: int = 4


QUICK = Size(num_layers=2, width=64, num_heads=2, seqlen=128)


# 1. The attention: four functions, two a round, with the same arguments and the same meaning.
# q, k, v are [batch, num_heads, seqlen, head_dim].


def fastattn_causal(q, k, v):
    return fastattn.attention(q, k, v, causal=True)


def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fastattn_alibi(q, k, v, alibi_slopes, sinks, dropout_p):
    return fastattn.attention(q, k, v, causal=True, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p)


def eager_alibi(q, k, v, alibi_slopes, sinks, dropout_p):
    """The same in plain torch, which keeps seqlen x seqlen weights of each head for the backward pass."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + causal_alibi(tuple(alibi_slopes.tolist()), q.shape[2])
    # A sink is one more column, which takes its share of the softmax and has no value.
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return F.dropout(weights, dropout_p) @ v


@cache
def causal_alibi(slopes: tuple[float, ...], seqlen: int) -> torch.Tensor:
    """What is added to the scores, [num_heads, seqlen, seqlen]; made once."""
    distance = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
    bias = -torch.tensor(slopes)[:, None, None] * distance
    return bias.masked_fill(distance < 0, -torch.inf)


class Round(NamedTuple):
    """fastattn and its twin on one kind of attention."""

    name: str
    title: str
    twin: str
    attend: dict


ROUNDS = (
    Round("causal", "causal attention", SDPA, {OURS: fastattn_causal, SDPA: sdpa_causal}),
    Round(
        "alibi",
        f"ALiBi, learned sinks, dropout {DROPOUT}",
        EAGER,
        {OURS: fastattn_alibi, EAGER: eager_alibi},
    ),
)


# 2. The model: an ordinary decoder, in which one line calls `attend`.


class SelfAttention(nn.Module):
    def __init__(self, size: Size, attend, alibi: bool):
        super().__init__()
        self.attend, self.num_heads, self.alibi = attend, size.num_heads, alibi
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.project = nn.Linear(size.width, size.width, bias=False)
        if alibi:
            self.sinks = nn.Parameter(torch.zeros(size.num_heads))
            # The geometric slopes of the ALiBi paper (arXiv 2108.12409): 2^(-8/n), 2^(-16/n), ...
            slopes = 2.0 ** (-8.0 / size.num_heads * torch.arange(1, size.num_heads + 1))
            self.register_buffer("alibi_slopes", slopes)

    def forward(self, x):
        # No copies: q, k and v are strided views of one tensor, and the result comes in the memory order of q.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        more = {}
        if not self.alibi:
            q, k = rotate(q), rotate(k)
        else:
            dropout_p = DROPOUT if self.training else 0.0
            more = {"alibi_slopes": self.alibi_slopes, "sinks": self.sinks, "dropout_p": dropout_p}
        return self.project(self.attend(q, k, v, **more).transpose(1, 2).flatten(2))


def rotate(x):
    """Rotary positions (RoFormer, arXiv 2104.09864): turns pairs of columns by angles that grow with the position."""
    turn = rotations(x.shape[2], x.shape[3])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


@cache
def rotations(seqlen: int, head_dim: int) -> torch.Tensor:
    frequencies = 10000.0 ** -torch.linspace(0.0, 1.0, head_dim // 2)
    return torch.polar(torch.ones(()), torch.arange(seqlen)[:, None] * frequencies)


class Block(nn.Module):
    def __init__(self, size: Size, attend, alibi: bool):
        super().__init__()
        self.attention = SelfAttention(size, attend, alibi)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class CharLM(nn.Module):
    """Logits of the next character, [batch, seqlen, vocabulary], for characters [batch, seqlen]."""

    def __init__(self, size: Size, vocabulary: int, attend, alibi: bool):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size.width)
        self.blocks = nn.Sequential(*(Block(size, attend, alibi) for _ in range(size.num_layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, vocabulary)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embedding(ids))))

    def loss(self, ids):
        """Mean cross-entropy, in nats, of each character of ids [batch, seqlen + 1] given those before it."""
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def twins(this: Round, size: Size, vocabulary: int) -> dict[str, CharLM]:
    """fastattn's model and its twin's, with the same weights."""
    models = {}
    for name, attend in this.attend.items():
        torch.manual_seed(0)
        models[name] = CharLM(size, vocabulary, attend, alibi=this.name == "alibi")
    return models


# 3. The text.


class Corpus(NamedTuple):
    """Characters as numbers: those to learn from, those held back, and which character each number is."""

    train: torch.Tensor
    held_back: torch.Tensor
    characters: str


def load_corpus() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SystemExit(
            f"{error}. The example learns from pydoc_data.topics of the standard library, which this Python was "
            "packaged without; on Debian and Ubuntu it is in the package libpython3-stdlib."
        ) from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([number[character] for character in text])
    return Corpus(*ids.split([len(ids) * 9 // 10, len(ids) - len(ids) * 9 // 10]), characters)


def random_batch(ids: torch.Tensor, size: Size, generator: torch.Generator) -> torch.Tensor:
    """[batch, seqlen + 1] characters from random places."""
    starts = torch.randint(len(ids) - size.seqlen, (size.batch, 1), generator=generator)
    return ids[starts + torch.arange(size.seqlen + 1)]


# 4. Training, in turn: what slows the machine down for a while slows both down.


class Curves(NamedTuple):
    """What `train` saw of each model, by name, at every step."""

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]


def train(models: dict[str, CharLM], corpus: Corpus, size: Size, steps: int, title: str) -> Curves:
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE) for name, model in models.items()}
    generator = torch.Generator().manual_seed(1)
    curves = Curves({name: [] for name in models}, {name: [] for name in models})
    progress = tqdm(range(steps), desc=f"training, {title}", leave=False, disable=None)
    for step in progress:
        ids = random_batch(corpus.train, size, generator)
        for name, model in models.items():
            optimizer = optimizers[name]
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20)  # warm-up
            torch.manual_seed(step)
            start = time.perf_counter()
            loss = model.loss(ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves.seconds[name].append(time.perf_counter() - start)
            curves.losses[name].append(loss.item())
        progress.set_postfix({name: f"{values[-1]:.3f}" for name, values in curves.losses.items()})
    return curves


@torch.no_grad()
def held_back_loss(model: CharLM, corpus: Corpus, size: Size) -> float:
    """Mean loss over the text that was never trained on."""
    model.eval()
    windows = corpus.held_back.unfold(0, size.seqlen + 1, size.seqlen)
    loss = mean(model.loss(ids).item() for ids in windows.split(size.batch))
    model.train()
    return loss


@torch.no_grad()
def write_on(model: CharLM, corpus: Corpus, size: Size, prompt: str, count: int) -> str:
    """`count` more characters, each drawn from the model's distribution (sharpened a little)."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[corpus.characters.index(character) for character in prompt]])
    for _ in range(count):
        logits = model(ids[:, -size.seqlen :])[:, -1] / 0.7
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return "".join(corpus.characters[i] for i in ids[0])


# 5. Are they the same?


def difference_at_the_start(models: dict[str, CharLM], ids: torch.Tensor) -> float:
    """Largest difference of a gradient on one batch, over the largest gradient. Without dropout, which is random."""
    gradients = []
    for model in models.values():
        model.eval()
        parameters = list(model.parameters())
        gradients.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(model.loss(ids), parameters)]))
        model.train()
    ours, theirs = gradients
    return float((ours - theirs).abs().max() / theirs.abs().max())


WINDOW = 8
"""Steps over which curves are averaged before they are compared: dropout is another draw in each."""


class Agreement(NamedTuple):
    """Largest difference of two curves, and the noise that they have anyway: the scatter from batch to batch."""

    difference: float
    noise: float

    @property
    def same(self) -> bool:
        return self.difference < self.noise


def agreement(ours: list[float], theirs: list[float]) -> Agreement:
    difference = max(differences(ours, theirs))
    jumps = [b - a for a, b in zip(theirs[len(theirs) // 2 :], theirs[len(theirs) // 2 + 1 :], strict=False)]
    return Agreement(difference, stdev(jumps) / 2**0.5)


def differences(ours: list[float], theirs: list[float]) -> list[float]:
    """Of the means over each WINDOW neighbouring steps."""
    ours, theirs = (torch.tensor(x, dtype=torch.float64).unfold(0, WINDOW, 1).mean(-1) for x in (ours, theirs))
    return (ours - theirs).abs().tolist()


# 6. The report.


def kernels(calls) -> str:
    counts = Counter(call.kernel + (f" ({call.isa})" if call.isa else "") for call in calls)
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def time_attention(this: Round, size: Size, budget: float) -> dict[str, float]:
    """Median seconds of the attention of one layer, forward and backward, in turn."""
    head_dim = size.width // size.num_heads
    q, k, v, dout = (torch.randn(size.batch, size.num_heads, size.seqlen, head_dim) for _ in range(4))
    leaves, more = [q, k, v], {}
    if this.name == "alibi":
        sinks = torch.zeros(size.num_heads)
        more = {"alibi_slopes": 0.5 ** torch.arange(1, size.num_heads + 1), "sinks": sinks, "dropout_p": DROPOUT}
        leaves.append(sinks)
    for leaf in leaves:
        leaf.requires_grad_()

    def step(attend):
        torch.autograd.grad(attend(q, k, v, **more), leaves, dout)

    return time_in_turn({name: partial(step, attend) for name, attend in this.attend.items()}, budget)


def plot(this: Round, curves: Curves, found: Agreement, subtitle: str, path: Path) -> None:
    """The losses over each other, and their difference beside the noise."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    ours, theirs = curves.losses[OURS], curves.losses[this.twin]
    left.plot(theirs, color="tab:gray", linewidth=3, alpha=0.6, label=this.twin)
    left.plot(ours, color="tab:blue", linewidth=1, label=OURS)
    left.set(xlabel="step", ylabel="training loss, nats a character")
    left.legend()
    found_differences = [max(x, 1e-8) for x in differences(ours, theirs)]  # a logarithmic axis has no 0
    label = f"difference of the curves (means over {WINDOW} steps)"
    right.plot(range(WINDOW - 1, len(ours)), found_differences, color="tab:blue", linewidth=1, label=label)
    right.axhline(found.noise, color="black", linewidth=1, linestyle="--", label="scatter from batch to batch")
    right.set(xlabel="step", ylabel="nats a character", yscale="log", ylim=(1e-8, 1.0))
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for panel in (left, right):
        panel.grid(True, which="major", alpha=0.3)
    figure.suptitle(f"{this.title}: {subtitle}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


class Outcome(NamedTuple):
    """Of a round: what was trained, what came of it."""

    curves: Curves
    gradient_difference: float
    agreement: Agreement
    kernels: str


def compete(this: Round, corpus: Corpus, size: Size, steps: int, budget: float, out: Path) -> Outcome:
    """Train both, say what happened, draw it."""
    console.rule(this.title)
    models = twins(this, size, len(corpus.characters))
    ids = random_batch(corpus.train, size, torch.Generator().manual_seed(2))
    with fastattn.record() as calls:
        models[OURS].loss(ids).backward()
    models[OURS].zero_grad()
    ran = kernels(calls)
    console.print(f"A training step of the {size.num_layers} layers runs {ran}.", highlight=False)
    for reason in dict.fromkeys(call.reason for call in calls if call.kernel.startswith("reference")):
        console.print(f"The reference is slow; it runs because {reason or 'it was asked for'}", markup=False)
    at_start = difference_at_the_start(models, ids)

    curves = train(models, corpus, size, steps, this.name)
    found = agreement(curves.losses[OURS], curves.losses[this.twin])
    whole = {name: median(values) for name, values in curves.seconds.items()}
    alone = time_attention(this, size, budget)
    ratio = f"{this.twin} / {OURS}"
    table = Table("", OURS, this.twin, ratio)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in (("training step", whole), ("attention of a layer, forward + backward", alone)):
        cells = [f"{1e3 * seconds[which]:.1f} ms" for which in (OURS, this.twin)]
        table.add_row(name, *cells, f"{seconds[this.twin] / seconds[OURS]:.2f}")
    losses = {name: held_back_loss(model, corpus, size) for name, model in models.items()}
    table.add_row("loss on text held back", *(f"{losses[name]:.3f}" for name in (OURS, this.twin)), "")
    console.print(table)
    console.print("The rest of a step is linear layers, norms and the optimizer, which are torch's in both columns.")
    console.print(
        f"Gradients of the first batch, relative: differ by {at_start:.0e}. "
        f"Loss curves: differ by {found.difference:.1e} at most, and scatter by {found.noise:.1e} from batch to batch: "
        + ("the same within noise." if found.same else "[bold red]NOT the same."),
        highlight=False,
    )
    path = out / f"train_char_lm_{this.name}.png"
    subtitle = f"a step of {this.twin} takes {whole[this.twin] / whole[OURS]:.2f} x as long"
    plot(this, curves, found, subtitle, path)
    console.print(f"Plot: {path}", highlight=False)
    if this.name == "causal":
        console.print(Panel(Text(write_on(models[OURS], corpus, size, "The ", 200)), title="what the model writes"))
    return Outcome(curves, at_start, found, ran)


def main(argv: list[str] | None = None) -> dict[str, Outcome]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    parser.add_argument("--steps", type=int, help="training steps of each round (default: 150, with --quick 40)")
    parser.add_argument("--quick", action="store_true", help="a much smaller model")
    arguments = parser.parse_args(argv)
    size = QUICK if arguments.quick else Size()
    steps = arguments.steps or (40 if arguments.quick else 150)
    if steps < WINDOW:
        parser.error(f"--steps {steps}: the curves are compared over {WINDOW} steps at least")
    warnings.simplefilter("ignore", fastattn.FallbackWarning)  # said once below, in the example's own words

    corpus = load_corpus()
    parameters = sum(p.numel() for p in twins(ROUNDS[0], size, len(corpus.characters))[OURS].parameters())
    console.print(f"[bold]fastattn {fastattn.__version__}[/bold], torch {torch.__version__}, "
                  f"{torch.get_num_threads()} threads. {parameters / 1e6:.2f} million parameters, {len(corpus.train)} "
                  f"characters, {steps} steps of {size.batch} x {size.seqlen}.", highlight=False)  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    return {
        this.name: compete(this, corpus, size, steps, 0.3 if arguments.quick else 2.0, arguments.out) for this in ROUNDS
    }


if __name__ == "__main__":
    main()
