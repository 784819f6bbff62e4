"""A text longer than any seen in training: ALiBi, beside positions that are added to the embeddings.

    python examples/language.py --out out            needs: pip install "fastattn[demo]"

Two small language models learn the reference manual of Python, character by character, in pieces of 128 characters,
and then read pieces of 1024. One has sinusoidal positions, which it has never seen beyond 128; its twin's scores fall
with the distance instead (`alibi_slopes=`; ALiBi, arXiv 2108.12409), and it reads on as well as before, or better.
examples/train_char_lm.py trains a larger one, and compares times.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from train_char_lm import Corpus, load_corpus
from training import Sinusoids, Size, Transformer, alibi_slopes, arguments, figure_of, save, tell, train

import fastattn

PLAIN, OURS = "sinusoids", "ALiBi"
WIDTH, HEADS, LAYERS, TRAINED, LENGTHS = 64, 4, 2, 128, (128, 256, 512, 1024)
SIZE = Size(steps=300, quick_steps=12)


class Outcome(NamedTuple):
    """held_back: nats a character of text held back, in pieces of each length, by model."""

    losses: dict[str, list[float]]
    held_back: dict[str, dict[int, float]]


def models(vocabulary: int) -> dict[str, Transformer]:
    made = {}
    for name in (PLAIN, OURS):
        torch.manual_seed(0)
        embed, attend = nn.Embedding(vocabulary, WIDTH), partial(fastattn.attention, causal=True)
        if name == PLAIN:
            embed = Sinusoids(embed, WIDTH)
        else:
            attend = partial(attend, alibi_slopes=alibi_slopes(HEADS))
        made[name] = Transformer(embed, WIDTH, HEADS, [attend] * LAYERS, vocabulary)
    return made


def losses_of(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Nats, [batch, seqlen], of each character of ids [batch, seqlen + 1] given those before it."""
    return F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")


def pieces(ids: torch.Tensor, length: int, count: int) -> torch.Tensor:
    return ids[: count * length + 1].unfold(0, length + 1, length)


@torch.no_grad()
def held_back(model: Transformer, corpus: Corpus, count: int) -> dict[int, float]:
    """By length, the mean over the same `count` characters."""
    return {
        length: losses_of(model, pieces(corpus.held_back, length, count // length)).mean().item() for length in LENGTHS
    }


def main(argv: list[str] | None = None) -> Outcome:
    options = arguments(__doc__, SIZE, argv)
    corpus = load_corpus()
    both = models(len(corpus.characters))

    def batch_of(generator):
        starts = torch.randint(len(corpus.train) - TRAINED, (16, 1), generator=generator)
        return corpus.train[starts + torch.arange(TRAINED + 1)]

    losses = train(both, lambda model, ids: losses_of(model, ids).mean(), batch_of, options.steps)
    count = LENGTHS[-1] * (2 if options.quick else 16)
    outcome = Outcome(losses, {name: held_back(model, corpus, count) for name, model in both.items()})
    tell(
        f"Trained on pieces of {TRAINED} characters, {options.steps} steps; nats a character of text held back",
        {name: [f"{loss:.3f}" for loss in found.values()] for name, found in outcome.held_back.items()},
        [f"pieces of {length}" for length in LENGTHS],
    )

    figure, (panel,) = figure_of(losses, (1.4,))
    for name, model in both.items():
        with torch.no_grad():
            by_position = losses_of(model, pieces(corpus.held_back, LENGTHS[-1], count // LENGTHS[-1])).mean(0)
        panel.plot(by_position.unfold(0, 32, 32).mean(-1).repeat_interleave(32).numpy(), label=name)
    panel.axvline(TRAINED, color="black", linestyle="--", linewidth=1, label="as far as it was trained")
    panel.set(xlabel="position in the text", ylabel="nats a character, held back")
    panel.grid(True, alpha=0.3)
    panel.legend(fontsize=8)
    save(figure, options.out / "language.png")
    return outcome


if __name__ == "__main__":
    main()
