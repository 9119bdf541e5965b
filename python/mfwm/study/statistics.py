"""Paired comparisons of arms: bootstrap over seeds and clips, and Holm's correction for several comparisons.

Values are [seeds, clips]: of each seed, an arm's and its rival's were measured on the same clips, from the same initial
trunk and with the same batches, so differences are taken clip by clip. NaN where a clip has no value, or a seed has
fewer clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..metrics.intervals import mean_of_defined

RESAMPLES = 10_000
# To bound the memory.
AT_ONCE = 500


@dataclass(frozen=True)
class Difference:
    """The mean of a - b with its 95% interval, and the two-sided p-value of no difference, of the bootstrap."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> Difference | None:
    """Of paired values [seeds, clips]. Seeds are drawn with replacement, then clips within each seed drawn.

    Seeds weigh the same, however many of their clips have a value. None if no seed has any.
    With one seed the interval is over its clips alone, and says nothing about another seed.
    """
    values = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    values = values[~np.isnan(values).all(1)]
    if not values.size:
        return None
    seeds, clips = values.shape
    counts = (~np.isnan(values)).sum(1)
    # The clips with a value first.
    values = np.take_along_axis(values, np.argsort(np.isnan(values), axis=1, kind="stable"), axis=1)
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(RESAMPLES // AT_ONCE):
        chosen = rng.integers(seeds, size=(AT_ONCE, seeds, 1))
        drawn = values[chosen, rng.integers(counts[chosen], size=(AT_ONCE, seeds, clips))]
        used = np.where(np.arange(clips) < counts[chosen], drawn, 0.0)
        parts.append((used.sum(2) / counts[chosen[..., 0]]).mean(1))
    means = np.concatenate(parts)
    low, high = np.percentile(means, [2.5, 97.5])
    # The share of resamples on the other side of zero, counted as if one more had been there: a p of 0 is not known.
    sides = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (sides + 1) / (RESAMPLES + 1))
    return Difference(float(mean_of_defined(values).mean()), float(low), float(high), p, seeds)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values adjusted for their number by Holm's method (1979)."""
    found: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        found[name] = largest
    return {name: found[name] for name in p_values}


def seeds_needed(values: np.ndarray, effect: float) -> int:
    """How many paired seeds show a difference `effect` in 80% of studies, at 5%, given the differences of some seeds.

    values: [seeds], the mean difference of each. By the normal approximation, (1.96 + 0.84)^2 * variance / effect^2; at
    least 2.
    """
    variance = float(np.var(values, ddof=1))
    return max(2, int(np.ceil((1.96 + 0.84) ** 2 * variance / effect**2)))
