"""The next click of a session: SASRec on packed sessions with recency, beside padded sessions with learned positions.

    python examples/recommendation.py --out out            needs: pip install "fastattn[demo]"

The sessions are generated: a visitor follows two interests by turns at random, an item of an interest leads to its
successor (9 times in 10, else to any item), and most sessions are short and a few long (log-normal, 3 to 120 clicks).
Two models of SASRec's kind (arXiv 1808.09781) learn to tell the next click. One pads the sessions of a batch to the
longest and adds learned positions. Its twin lays them end to end: `mask=Mask.documents(...)` keeps them apart, and
`alibi_slopes=` lets near clicks count more, whatever their number in the session. The twin computes a fraction of the
tokens, and is right more often, most of all late in sessions, at positions that few sessions reach.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from training import Size, Transformer, alibi_slopes, arguments, figure_of, save, tell, train

import fastattn

PLAIN, OURS = "padded, positions", "packed, ALiBi"
ITEMS, LONGEST, NO_ITEM = 200, 120, -100
WIDTH, HEADS, LAYERS = 64, 4, 2
SIZE = Size(steps=400, quick_steps=12)


def session(successor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """int64 [clicks]."""
    clicks = int(torch.empty(()).log_normal_(2.3, 0.8, generator=generator).clamp(3, LONGEST))
    either = torch.randint(2, (clicks,), generator=generator).tolist()
    strays = torch.rand(clicks, generator=generator).tolist()
    others = torch.randint(ITEMS, (clicks + 2,), generator=generator).tolist()
    at, found = others[clicks:], []
    for interest, stray, other in zip(either, strays, others, strict=False):
        at[interest] = other if stray < 0.1 else successor[at[interest]].item()
        found.append(at[interest])
    return torch.tensor(found)


class Batch(NamedTuple):
    """Sessions, and what follows each click, or NO_ITEM.

    padded, padded_next       int64 [sessions, longest]
    packed, packed_next, ids  int64 [1, clicks], ids: which session
    """

    padded: torch.Tensor
    padded_next: torch.Tensor
    packed: torch.Tensor
    packed_next: torch.Tensor
    ids: torch.Tensor


def batch_of(successor: torch.Tensor, count: int, generator: torch.Generator) -> Batch:
    sessions = [session(successor, generator) for _ in range(count)]
    given, following = [x[:-1] for x in sessions], [x[1:] for x in sessions]
    ids = torch.repeat_interleave(torch.arange(count), torch.tensor([len(x) for x in given]))
    return Batch(
        pad_sequence(given, batch_first=True), pad_sequence(following, batch_first=True, padding_value=NO_ITEM),
        torch.cat(given)[None], torch.cat(following)[None], ids[None],
    )  # fmt: skip


def models() -> dict[str, Transformer]:
    made = {}
    for name in (PLAIN, OURS):
        torch.manual_seed(0)
        attend = partial(fastattn.attention, causal=True)
        if name == OURS:
            attend = partial(attend, alibi_slopes=alibi_slopes(HEADS))
        seqlen = LONGEST if name == PLAIN else None
        made[name] = Transformer(nn.Embedding(ITEMS, WIDTH), WIDTH, HEADS, [attend] * LAYERS, ITEMS, seqlen)
    return made


def guesses(name: str, model: Transformer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [clicks, ITEMS], what followed [clicks]), session after session."""
    if name == OURS:
        return model(batch.packed, mask=fastattn.Mask.documents(batch.ids))[0], batch.packed_next[0]
    real = batch.padded_next != NO_ITEM
    return model(batch.padded)[real], batch.padded_next[real]


class Outcome(NamedTuple):
    """hits: share of clicks among the model's first two, after up to 20 clicks and later; tokens: computed a batch."""

    losses: dict[str, list[float]]
    hits: dict[str, tuple[float, float]]
    tokens: dict[str, float]


def main(argv: list[str] | None = None) -> Outcome:
    options = arguments(__doc__, SIZE, argv)
    successor = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(0))
    both, tokens = models(), {PLAIN: 0, OURS: 0}
    names = {model: name for name, model in both.items()}

    def loss_of(model, batch):
        tokens[names[model]] += batch.packed.numel() if names[model] == OURS else batch.padded.numel()
        return F.cross_entropy(*guesses(names[model], model, batch))

    losses = train(both, loss_of, partial(batch_of, successor, 32), options.steps)
    tested = batch_of(successor, 40 if options.quick else 1000, torch.Generator().manual_seed(1))
    position = torch.cat([torch.arange(n) for n in tested.ids[0].bincount().tolist()])
    hits, right = {}, {}
    for name, model in both.items():
        with torch.no_grad():
            logits, following = guesses(name, model, tested)
        right[name] = (logits.topk(2).indices == following[:, None]).any(-1).float()
        hits[name] = (right[name][position < 20].mean().item(), right[name][position >= 20].mean().item())
    outcome = Outcome(losses, hits, {name: count / options.steps for name, count in tokens.items()})
    tell(
        f"Click sessions, {options.steps} steps of 32 sessions; next click among the first two",
        {name: (*(f"{x:.1%}" for x in hits[name]), f"{outcome.tokens[name]:.0f}") for name in both},
        ("clicks 1 to 20", "later clicks", "tokens a batch"),
    )

    figure, (panel, bars) = figure_of(losses, (1.2, 0.7))
    edges = [0, 2, 5, 10, 20, 40, LONGEST]
    for name, found in right.items():
        groups = [found[(position >= low) & (position < high)] for low, high in zip(edges[:-1], edges[1:], strict=True)]
        panel.plot(range(len(groups)), [100 * group.mean().item() for group in groups], marker="o", label=name)
    panel.set_xticks(
        range(len(edges) - 1), [f"{low + 1}-{high}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    )
    panel.set(xlabel="clicks so far", ylabel="% of next clicks among the first two")
    panel.grid(True, alpha=0.3)
    panel.legend(fontsize=8)
    bars.bar([*outcome.tokens], [*outcome.tokens.values()], color=["tab:blue", "tab:orange"])
    bars.set_ylabel("tokens computed for 32 sessions")
    bars.tick_params(axis="x", labelsize=8)
    save(figure, options.out / "recommendation.png")
    return outcome


if __name__ == "__main__":
    main()
