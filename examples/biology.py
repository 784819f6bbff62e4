"""A masked protein model that finds which residues touch: attention with a learned pair bias, beside plain attention.

    python examples/biology.py --out out            needs: pip install "fastattn[demo]"

The sequences are generated as those of one protein family are thought of in coevolution analysis (direct coupling,
arXiv 1211.1281): of 64 columns, 48 form 24 contacts far apart, and the residues of a contact fit each other (one of
20 amino acids calls for its partner) in 9 of 10 sequences; the rest is free. A masked residue can be told only by
looking at the other end of its contact. One transformer has learned positions alone. Its twin's scores have a bias
for each pair of columns besides, as AlphaFold's have (`bias=`; Jumper et al. 2021): it learns in a fraction of the
steps, and its bias is the contact map.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from training import Size, Transformer, arguments, figure_of, save, tell, train

import fastattn

PLAIN, OURS = "positions alone", "pair bias"
COLUMNS, CONTACTS, AMINO, MASK = 64, 24, 20, 20
WIDTH, HEADS = 64, 2
SIZE = Size(steps=250, quick_steps=12)


class PairBias(nn.Module):
    """Attention with a learned number for each head and pair of columns, added to the scores."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, HEADS, COLUMNS, COLUMNS))

    def scaled(self) -> torch.Tensor:
        return 10.0 * self.bias  # Adam moves each number by as much as one of a large matrix: too slowly alone

    def forward(self, q, k, v):
        return fastattn.attention(q, k, v, bias=self.scaled())


class Family(NamedTuple):
    """contacts: int64 [24, 2], columns that touch; partner: int64 [20], the amino acid that each calls for."""

    contacts: torch.Tensor
    partner: torch.Tensor

    def sequences(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """int64 [count, COLUMNS] of amino acids."""
        residues = torch.randint(AMINO, (count, COLUMNS), generator=generator)
        left, right = self.contacts.T
        fits = torch.rand(count, CONTACTS, generator=generator) < 0.9
        residues[:, right] = torch.where(fits, self.partner[residues[:, left]], residues[:, right])
        return residues


def family() -> Family:
    generator = torch.Generator().manual_seed(0)
    contacts = torch.randperm(COLUMNS, generator=generator)[: 2 * CONTACTS].view(CONTACTS, 2).sort(-1).values
    # Amino acids call for each other in pairs, as charges do.
    order = torch.randperm(AMINO, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.view(-1, 2).flip(-1).flatten()
    return Family(contacts, partner)


def models() -> dict[str, Transformer]:
    made = {}
    for name, attend in ((PLAIN, fastattn.attention), (OURS, PairBias())):
        torch.manual_seed(0)
        made[name] = Transformer(nn.Embedding(AMINO + 1, WIDTH), WIDTH, HEADS, [attend], AMINO, seqlen=COLUMNS)
    return made


def masked(residues: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(residues of which one in seven is hidden, which are)."""
    hidden = torch.rand(residues.shape, generator=generator) < 1 / 7
    return residues.masked_fill(hidden, MASK), hidden


@torch.no_grad()
def accuracy(model: Transformer, this: Family, count: int) -> float:
    """Of residues in contacts, hidden one column at a time; 0.9 + 0.1 / 20 is the most that can be known."""
    residues = this.sequences(count, torch.Generator().manual_seed(1))
    right = []
    for column in this.contacts.flatten().tolist():
        given = residues.clone()
        given[:, column] = MASK
        right.append((model(given)[:, column].argmax(-1) == residues[:, column]).float().mean())
    return torch.stack(right).mean().item()


@torch.no_grad()
def contact_scores(model: Transformer, this: Family) -> torch.Tensor:
    """[COLUMNS, COLUMNS]: the mean attention between two columns, of all heads and both directions."""
    residues, _ = masked(this.sequences(64, torch.Generator().manual_seed(2)), torch.Generator().manual_seed(3))
    (block,) = model.blocks
    q, k, _ = block.projections(model.embedded(residues))
    bias = block.attend.scaled() if isinstance(block.attend, PairBias) else None
    weights = fastattn.attention_weights(q, k, bias=bias).mean((0, 1))
    return (weights + weights.T) / 2


def precision(scores: torch.Tensor, this: Family) -> float:
    """Share of true contacts among as many pairs of columns with the highest scores."""
    i, j = pairs = torch.triu_indices(COLUMNS, COLUMNS, 1)
    best = pairs[:, scores[i, j].topk(CONTACTS).indices].T.tolist()
    true = this.contacts.tolist()
    return sum(pair in true for pair in best) / CONTACTS


class Outcome(NamedTuple):
    """accuracy: of hidden residues in contacts; precision: of the contacts read from the attention; by model."""

    losses: dict[str, list[float]]
    accuracy: dict[str, float]
    precision: dict[str, float]


def main(argv: list[str] | None = None) -> Outcome:
    options = arguments(__doc__, SIZE, argv)
    this, both = family(), models()

    def batch_of(generator):
        residues = this.sequences(64, generator)
        return residues, *masked(residues, generator)

    def loss_of(model, batch):
        residues, given, hidden = batch
        return F.cross_entropy(model(given)[hidden], residues[hidden])

    losses = train(both, loss_of, batch_of, options.steps)
    scores = {name: contact_scores(model, this) for name, model in both.items()}
    outcome = Outcome(
        losses,
        {name: accuracy(model, this, 20 if options.quick else 300) for name, model in both.items()},
        {name: precision(scores[name], this) for name in both},
    )
    tell(
        f"A protein family, {options.steps} steps",
        {name: (f"{outcome.accuracy[name]:.1%}", f"{outcome.precision[name]:.0%}") for name in both},
        ("hidden residues of contacts", "contacts found in the attention"),
    )

    figure, panels = figure_of(losses, (1.0, 1.0))
    for panel, name in zip(panels, both, strict=True):
        panel.imshow(scores[name].numpy(), cmap="magma_r")
        y, x = this.contacts.T.tolist()
        panel.scatter(x, y, s=40, facecolors="none", edgecolors="tab:blue", label="contacts")
        panel.set(title=f"attention, {name}", xlabel="column", ylabel="column")
        panel.legend(fontsize=8, loc="lower left")
    save(figure, options.out / "biology.png")
    return outcome


if __name__ == "__main__":
    main()
