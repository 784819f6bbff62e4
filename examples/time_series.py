"""Half a year of the atmosphere's CO2, forecast and watched for faults: scores with a bias for each distance.

    python examples/time_series.py --out out            needs: pip install "fastattn[demo]"
                                                        and:   pip install --no-deps statsmodels==0.15.0

Weekly CO2 at Mauna Loa, 1958 to 2001, comes with statsmodels, of which only the data are read; without it a series of
the same kind (trend, year, noise) is generated, and that is said. Two small transformers see three years and forecast
the next 26 weeks. One has learned positions. Its twin's scores have a learned bias for each head and distance instead
(`bias=`; T5, arXiv 1910.10683), so that "a year ago" is one number, learned from every week: it needs fewer steps, and
the bias that it learns has a peak at each year. Both learn from the years before 1990. The distance from the forecast
then tells faults of the instrument: weeks that were shifted by 2 ppm.
"""

import csv
import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from training import Size, Transformer, arguments, console, figure_of, save, tell, train

import fastattn

PLAIN, OURS, NAIVE = "learned positions", "bias by distance", "as a year ago"
PAST, AHEAD, YEAR = 156, 26, 52
WIDTH, HEADS, LAYERS = 32, 2, 1
SIZE = Size(steps=300, quick_steps=10)


class BiasByDistance(nn.Module):
    """Attention with a learned number for each head and distance, added to the scores."""

    def __init__(self, seqlen: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(HEADS, 2 * seqlen - 1))
        at = torch.arange(seqlen)
        self.distance = at[:, None] - at + seqlen - 1

    def forward(self, q, k, v):
        return fastattn.attention(q, k, v, bias=10.0 * self.table[:, self.distance])


def co2() -> tuple[torch.Tensor, torch.Tensor, str]:
    """(ppm of each week, its year as a number, what it is)."""
    package = importlib.util.find_spec("statsmodels")  # found, not imported: only its data are wanted
    path = package and Path(package.submodule_search_locations[0]) / "datasets" / "co2" / "co2.csv"
    if not path or not path.exists():
        year = 1958.25 + torch.arange(2284) / 52.18
        noise = 0.3 * torch.randn(len(year), generator=torch.Generator().manual_seed(0))
        season = 3.0 * torch.sin(2.0 * torch.pi * year) + 0.8 * torch.sin(4.0 * torch.pi * year + 1.0)
        return 315.0 + 0.8 * (year - 1958) + 0.011 * (year - 1958) ** 2 + season + noise, year, "a generated series"
    rows = list(csv.DictReader(path.open()))
    ppm = torch.tensor([float(row["co2"] or "nan") for row in rows])
    for week in range(1, len(ppm)):  # a missing week is like the one before
        if ppm[week].isnan():
            ppm[week] = ppm[week - 1]
    return ppm, 1958.24 + torch.arange(len(ppm)) / 52.18, "weekly CO2 at Mauna Loa, from statsmodels"


def windows(ppm: torch.Tensor) -> torch.Tensor:
    """[windows, PAST + AHEAD, 1], less the last week of the past, in units of 3 ppm."""
    found = ppm.unfold(0, PAST + AHEAD, 1)
    return ((found - found[:, PAST - 1 : PAST]) / 3.0)[..., None]


def models() -> dict[str, Transformer]:
    made = {}
    for name in (PLAIN, OURS):
        torch.manual_seed(0)
        attends = [fastattn.attention if name == PLAIN else BiasByDistance(PAST + AHEAD) for _ in range(LAYERS)]
        seqlen = PAST + AHEAD if name == PLAIN else None
        made[name] = Transformer(nn.Linear(2, WIDTH), WIDTH, HEADS, attends, 1, seqlen)
    return made


def forecast(model: Transformer, given: torch.Tensor) -> torch.Tensor:
    """[windows, AHEAD]: the weeks after the past, which are hidden, and marked as such."""
    known = torch.ones_like(given)
    known[:, PAST:] = 0.0
    return model(torch.cat([given * known, known], dim=-1))[:, PAST:, 0]


def naive(given: torch.Tensor) -> torch.Tensor:
    """A year ago, and what that year has added."""
    ago = given[:, PAST - YEAR : PAST - YEAR + AHEAD, 0]
    return ago + (given[:, PAST - YEAR : PAST, 0].mean(1) - given[:, PAST - 2 * YEAR : PAST - YEAR, 0].mean(1))[:, None]


def detection(errors: torch.Tensor, shifts: torch.Tensor) -> float:
    """The probability that a shifted week is farther from the forecast than a sound one (area under the ROC curve)."""
    sound, shifted = errors.abs(), (errors + shifts).abs()
    return (shifted[:, None] > sound[None]).float().mean().item()


class Outcome(NamedTuple):
    """ppm: mean error of the forecasts; detected: see `detection`; by model; data: which."""

    losses: dict[str, list[float]]
    ppm: dict[str, float]
    detected: dict[str, float]
    data: str


def main(argv: list[str] | None = None) -> Outcome:
    options = arguments(__doc__, SIZE, argv)
    ppm, year, data = co2()
    console.print(f"Data: {data}.", highlight=False)
    split = int((year < 1990.0).sum())
    seen, later = windows(ppm[:split]), windows(ppm[split - PAST :])[::4]
    both = models()

    def batch_of(generator):
        return seen[torch.randint(len(seen), (32,), generator=generator)]

    losses = train(
        both, lambda model, given: F.l1_loss(forecast(model, given), given[:, PAST:, 0]), batch_of, options.steps
    )
    with torch.no_grad():
        found = {name: forecast(model, later) for name, model in both.items()}
    found[NAIVE] = naive(later)
    errors = {name: 3.0 * (later[:, PAST:, 0] - guess) for name, guess in found.items()}
    shifts = 4.0 * torch.randint(2, errors[NAIVE].shape, generator=torch.Generator().manual_seed(0)) - 2.0
    outcome = Outcome(
        losses,
        {name: error.abs().mean().item() for name, error in errors.items()},
        {name: detection(error.flatten()[::5], shifts.flatten()[::5]) for name, error in errors.items()},
        data,
    )
    tell(
        f"CO2 from 1990 on, {AHEAD} weeks ahead, {options.steps} steps",
        {name: (f"{outcome.ppm[name]:.2f} ppm", f"{outcome.detected[name]:.1%}") for name in found},
        ("mean error of the forecast", "a shifted week is farther off than a sound one"),
    )

    figure, (panel, learned) = figure_of(losses, (1.7, 1.0))
    window = len(later) // 2
    base, start = ppm[split - PAST :].unfold(0, PAST + AHEAD, 1)[::4][window], split - PAST + 4 * window
    panel.plot(
        year[start : start + PAST + AHEAD].numpy(), base.numpy(), color="tab:gray", linewidth=1, label="measured"
    )
    for name, guess in found.items():
        ahead = year[start + PAST : start + PAST + AHEAD]
        panel.plot(ahead.numpy(), (base[PAST - 1] + 3.0 * guess[window]).numpy(), linewidth=1.5, label=name)
    panel.set(xlabel="year", ylabel="CO2, ppm")
    panel.legend(fontsize=8)
    table = 10.0 * both[OURS].blocks[0].attend.table.detach()
    back = torch.arange(PAST)
    for head, values in enumerate(table):
        learned.plot(back.numpy(), values[PAST + AHEAD - 1 + back].numpy(), linewidth=1, label=f"head {head}")
    for years in (1, 2):
        learned.axvline(years * YEAR, color="black", linestyle=":", linewidth=1)
    learned.set(xlabel="weeks back", ylabel="learned bias")
    learned.legend(fontsize=8)
    save(figure, options.out / "time_series.png")
    return outcome


if __name__ == "__main__":
    main()
