"""Ratios of times and how far to believe them: bootstrap intervals, steadiness."""

import math
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 1000
SAME = 0.01
"""Ratios within this of 1 are called the same."""

DRIFT, NOISE = 0.05, 0.15


class Ratio(NamedTuple):
    """How many times as long something takes: the value, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "same" (the interval within 1 % of 1), "slower", "faster", or "unclear" (the interval holds 1)."""
        if max(abs(self.low - 1.0), abs(self.high - 1.0)) <= SAME:
            return "same"
        return "slower" if self.low > 1.0 else "faster" if self.high < 1.0 else "unclear"

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}...{self.high:.2f})"


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The ratio of two medians of times that were measured in the same rounds: whole rounds are drawn again."""
    pairs = list(zip(numerator, denominator, strict=True))

    def ratio(drawn):
        return statistics.median(a for a, _ in drawn) / statistics.median(b for _, b in drawn)

    return _interval(ratio(pairs), lambda draw: ratio(draw(pairs)))


def unpaired(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The same of times from two runs: each is drawn again by itself."""

    def ratio(a, b):
        return statistics.median(a) / statistics.median(b)

    return _interval(ratio(numerator, denominator), lambda draw: ratio(draw(numerator), draw(denominator)))


def geometric_mean(ratios: Sequence[Ratio]) -> Ratio:
    """Of several ratios: rows are drawn again, so that one row alone decides little."""

    def mean(values):
        return math.exp(statistics.fmean(math.log(x.value) for x in values))

    return _interval(mean(ratios), lambda draw: mean(draw(ratios)))


def unsteady(times: Sequence[float]) -> list[str]:
    """What is wrong with the times of the rounds of one contender, in their order."""
    found, half = [], len(times) // 2
    median = statistics.median(times)
    if half >= 3:
        drift = statistics.median(times[-half:]) / statistics.median(times[:half]) - 1.0
        found += [f"drifts by {100 * drift:+.0f} %"] if abs(drift) > DRIFT else []
    low, *_, high = statistics.quantiles(times, n=10)
    found += [f"noisy: {100 * (high - low) / median:.0f} % between deciles"] if high - low > NOISE * median else []
    return found


def _interval(value: float, resample) -> Ratio:
    generator = random.Random(0)

    def draw(values):
        return generator.choices(values, k=len(values))

    values = sorted(resample(draw) for _ in range(RESAMPLES))
    return Ratio(value, values[int(0.025 * RESAMPLES)], values[int(0.975 * RESAMPLES)])
