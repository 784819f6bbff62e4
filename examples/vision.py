"""Handwritten digits from few examples: pixels that see their neighbourhood, beside pixels that see all pixels.

    python examples/vision.py --out out            needs: pip install "fastattn[demo]" scikit-learn

Each of the 8 x 8 pixels is a token. Two small transformers with the same weights at the start learn from 400 of
scikit-learn's 1797 digits: in one, every pixel attends to every pixel; in the other, layers before the last see the
3 x 3 neighbourhood alone (`fastattn.patterns.neighborhood`; NATTEN, arXiv 2204.07143), which is what a picture is like.
With so few examples that is worth several points of accuracy on the digits held back, for a third of the pairs.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from training import Size, Transformer, arguments, figure_of, save, tell, train

import fastattn

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit(f"{error}. The example needs one more package: pip install scikit-learn") from error

PLAIN, OURS = "all pixels", "neighbourhood"
SIDE, WIDTH, HEADS, LAYERS, TRAINED = 8, 32, 2, 3, 400
SIZE = Size(steps=300, quick_steps=12)


class Outcome(NamedTuple):
    """accuracy: on digits held back, by model; pairs: share of the pairs of pixels that the model's layers see."""

    losses: dict[str, list[float]]
    accuracy: dict[str, float]
    pairs: dict[str, float]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [1797, 64, 1] from 0 to 1, in an order of their own, and which digit each is."""
    pixels, digit = (torch.tensor(x) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(digit), generator=torch.Generator().manual_seed(0))
    return (pixels[order] / 16.0).float()[..., None], digit[order]


def models() -> dict[str, Transformer]:
    near = fastattn.patterns.neighborhood((SIDE, SIDE), kernel_size=3, block_size=16)
    seen = {PLAIN: [None] * LAYERS, OURS: [near] * (LAYERS - 1) + [None]}
    made = {}
    for name, masks in seen.items():
        torch.manual_seed(0)
        attends = [partial(fastattn.attention, mask=mask) for mask in masks]
        made[name] = Transformer(nn.Linear(1, WIDTH), WIDTH, HEADS, attends, 10, seqlen=SIDE * SIDE)
    return made


def pairs(model: Transformer) -> float:
    masks = [block.attend.keywords["mask"] for block in model.blocks]
    return sum(1.0 if mask is None else mask.density for mask in masks) / len(masks)


def logits(model: Transformer, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixels).mean(1)


def main(argv: list[str] | None = None) -> Outcome:
    options = arguments(__doc__, SIZE, argv)
    pixels, digit = digits()

    def batch_of(generator):
        chosen = torch.randint(TRAINED, (64,), generator=generator)
        return pixels[chosen], digit[chosen]

    both = models()
    losses = train(
        both, lambda model, batch: F.cross_entropy(logits(model, batch[0]), batch[1]), batch_of, options.steps
    )
    with torch.no_grad():
        guesses = {name: logits(model, pixels[TRAINED:]).argmax(-1) for name, model in both.items()}
    accuracy = {name: (guess == digit[TRAINED:]).float().mean().item() for name, guess in guesses.items()}
    outcome = Outcome(losses, accuracy, {name: pairs(model) for name, model in both.items()})
    tell(
        f"Digits, {options.steps} steps on {TRAINED} of them",
        {name: (f"{accuracy[name]:.1%}", f"{outcome.pairs[name]:.0%}") for name in both},
        ("accuracy on digits held back", "pairs of pixels"),
    )

    figure, (panel, shown) = figure_of(losses, (0.8, 1.4))
    panel.bar([*accuracy], [100 * x for x in accuracy.values()], color=["tab:blue", "tab:orange"])
    panel.set(ylabel="% right, digits held back", ylim=(100 * min(accuracy.values()) - 5, 100))
    wrong = (guesses[PLAIN] != digit[TRAINED:]) & (guesses[OURS] == digit[TRAINED:])
    several = wrong.nonzero().flatten()[:10].tolist()
    tiles = [pixels[TRAINED + i].view(SIDE, SIDE) for i in several] + [torch.zeros(SIDE, SIDE)] * (10 - len(several))
    rows = [torch.cat([F.pad(tile, (1, 1, 1, 1), value=0.5) for tile in tiles[i : i + 5]], dim=1) for i in (0, 5)]
    shown.imshow(torch.cat(rows).numpy(), cmap="gray_r")
    shown.set_title(f"read rightly by the {OURS} alone", fontsize=9)
    shown.set_axis_off()
    save(figure, options.out / "vision.png")
    return outcome


if __name__ == "__main__":
    main()
