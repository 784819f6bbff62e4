"""What the examples that train share: a small transformer, a training loop for a model and its twin, the report."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

try:
    import matplotlib
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f'{error}. The example needs more packages: pip install "fastattn[demo]"') from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a renderer that needs no screen)

console = Console()


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual (pre-norm, arXiv 2002.04745).

    attend  (q, k, v, **more) -> out, all [batch, num_heads, seqlen, head_dim]; a module if it learns something
    """

    def __init__(self, width: int, num_heads: int, attend: Callable):
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def projections(self, x) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v [batch, num_heads, seqlen, head_dim] of x [batch, seqlen, width]."""
        return self.qkv(self.norms[0](x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x, **more):
        q, k, v = self.projections(x)
        x = x + self.project(self.attend(q, k, v, **more).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """[batch, seqlen, outputs] for what `embed` turns into [batch, seqlen, width]; a block for each of `attends`.

    seqlen  of learned positions, which are added to the embeddings; None: there are none
    """

    def __init__(
        self, embed: nn.Module, width: int, num_heads: int, attends: Sequence[Callable], outputs: int,
        seqlen: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.embed = embed
        self.positions = None if seqlen is None else nn.Parameter(0.5 * torch.randn(seqlen, width))
        self.blocks = nn.ModuleList(Block(width, num_heads, attend) for attend in attends)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def embedded(self, x) -> torch.Tensor:
        x = self.embed(x)
        return x if self.positions is None else x + self.positions[: x.shape[1]]

    def forward(self, x, **more):
        x = self.embedded(x)
        for block in self.blocks:
            x = block(x, **more)
        return self.head(self.norm(x))


class Sinusoids(nn.Module):
    """Embeddings with fixed waves of the position added, which go on for ever (arXiv 1706.03762, section 3.5)."""

    def __init__(self, embed: nn.Module, width: int):
        super().__init__()
        self.embed, self.width = embed, width

    def forward(self, x):
        x = self.embed(x)
        frequencies = 10000.0 ** -torch.linspace(0.0, 1.0, self.width // 2)
        angles = torch.arange(x.shape[1])[:, None] * frequencies
        return x + torch.cat([angles.sin(), angles.cos()], dim=-1)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """2^(-8/n), 2^(-16/n), ... of the ALiBi paper (arXiv 2108.12409)."""
    return 2.0 ** (-8.0 / num_heads * torch.arange(1, num_heads + 1))


def train(
    models: dict[str, nn.Module], loss_of: Callable, batch_of: Callable, steps: int, *, learning_rate: float = 3e-3
) -> dict[str, list[float]]:
    """The losses of each model, step by step. All see the same batches, in turn.

    loss_of   (model, batch) -> a number with a gradient
    batch_of  (generator) -> the next batch
    """
    losses = {name: [] for name in models}
    generator = torch.Generator().manual_seed(0)
    parts = []
    for model in models.values():
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        # A warm-up over a tenth of the steps, then down to a hundredth.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
        parts.append((optimizer, schedule))
    for _ in (progress := tqdm(range(steps), desc="training", leave=False, disable=None)):
        batch = batch_of(generator)
        for (name, model), (optimizer, schedule) in zip(models.items(), parts, strict=True):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[name].append(loss.item())
        progress.set_postfix({name: f"{values[-1]:.3f}" for name, values in losses.items()})
    return losses


class Size(NamedTuple):
    """How much to train: the full form, which takes a minute or so of one core, and the quick one."""

    steps: int
    quick_steps: int


def arguments(description: str, size: Size, argv: list[str] | None) -> argparse.Namespace:
    """--out (made if absent), --quick, --steps."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default: out)")
    parser.add_argument("--steps", type=int, help=f"of training (default: {size.steps}, --quick {size.quick_steps})")
    parser.add_argument("--quick", action="store_true", help="a few seconds, too short to learn much")
    parsed = parser.parse_args(argv)
    if parsed.steps is None:
        parsed.steps = size.quick_steps if parsed.quick else size.steps
    if parsed.steps < 1:
        parser.error(f"--steps {parsed.steps}: must be at least 1")
    parsed.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return parsed


def tell(title: str, rows: dict[str, Sequence[str]], columns: Sequence[str]) -> None:
    """A table, a row a model."""
    table = Table("", *columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def figure_of(losses: dict[str, list[float]], width_ratios: Sequence[float], height: float = 3.6):
    """(figure, the panels that are still empty): the losses, smoothed, are in the first of 1 + len(width_ratios)."""
    figure, (panel, *others) = plt.subplots(
        1, 1 + len(width_ratios), figsize=(3.6 * (1 + sum(width_ratios)), height), layout="constrained",
        width_ratios=(1.0, *width_ratios),
    )  # fmt: skip
    for name, values in losses.items():
        window = max(1, len(values) // 20)
        panel.plot(torch.tensor(values).unfold(0, window, 1).mean(-1).numpy(), label=name)
    panel.set(xlabel="step", ylabel="training loss")
    panel.legend(fontsize=8)
    panel.grid(True, alpha=0.3)
    return figure, others


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    console.print(f"Picture: {path}", highlight=False)
