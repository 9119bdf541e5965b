"""What a handful of clips can tell: bootstrap intervals over clips, and rank correlations with theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

RESAMPLES = 1000


def interval(seed: int, statistic: Callable[..., np.ndarray], *values: np.ndarray) -> list[list[float]]:
    """For each column, the 95% bootstrap interval of a statistic of the means of `values`, [clips, columns] each.

    The same clips are drawn of each: the interval of a difference is that of paired measurements.
    """
    draw = drawn(seed, len(values[0]))
    return np.percentile(statistic(*(v[draw].mean(1) for v in values)), [2.5, 97.5], axis=0).T.tolist()


def drift_signal(drift: np.ndarray, errors: np.ndarray, seed: int) -> dict[str, Any]:
    """How well the disagreement of the horizons, which needs no truth, tells the true error: rank correlations.

    drift, errors [clips, steps]; steps without a drift (NaN) are left out, and named are those that stay.
    "overall" is over all clips and steps, and owes something to both growing with the steps. "within_step" does not:
    it is the mean over the steps of the correlation over clips at one step. Both with 95% intervals over clips.
    """
    known = ~np.isnan(drift).any(0)
    pair = drift[:, known], errors[:, known]
    clips, steps = pair[0].shape
    if clips < 3 or steps == 0:
        return {"steps": []}
    among_all = [ranks(values.reshape(-1, 1)).reshape(values.shape) for values in pair]
    among_clips = [ranks(values) for values in pair]

    def overall(draw: np.ndarray) -> np.ndarray:
        return correlation(*(values[draw].reshape(len(draw), -1, 1) for values in among_all))[:, 0]

    def within_step(draw: np.ndarray) -> np.ndarray:
        return correlation(*(values[draw] for values in among_clips)).mean(1)

    found: dict[str, Any] = {"steps": (np.flatnonzero(known) + 1).tolist()}
    for name, statistic in (("overall", overall), ("within_step", within_step)):
        found[name] = float(statistic(np.arange(clips)[None])[0])
        found[f"{name}_95"] = np.percentile(statistic(drawn(seed, clips)), [2.5, 97.5]).tolist()
    return found


def drawn(seed: int, clips: int) -> np.ndarray:
    """[RESAMPLES, clips] numbers of clips, with replacement."""
    return np.random.default_rng(seed).integers(clips, size=(RESAMPLES, clips))


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value in its column."""
    return values.argsort(0).argsort(0).astype(np.float64)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, over axis 1; 0 where a side is constant."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    return (a * b).sum(1) / np.maximum(np.sqrt((a**2).sum(1) * (b**2).sum(1)), 1e-30)
