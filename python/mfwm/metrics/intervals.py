"""Bootstrap intervals over clips, and rank correlations with such intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mfwm_kernels import arguments as check

RESAMPLES = 1000


def interval(seed: int, statistic: Callable[..., np.ndarray], *values: np.ndarray) -> list[list[float]]:
    """For each column, the 95% bootstrap interval of a statistic of the means of `values`, [clips, columns] each.

    All values are resampled with the same clips, so that the interval of a difference is that of paired measurements.
    """
    draw = resamples(seed, len(values[0]))
    return np.percentile(statistic(*(v[draw].mean(1) for v in values)), [2.5, 97.5], axis=0).T.tolist()


def interval_of_defined(seed: int, values: np.ndarray) -> list[list[float]]:
    """For each column of [clips, columns], the 95% bootstrap interval of the mean of those that are not NaN.

    Resamples without any are left out; NaN where all are.
    """
    draw, known = resamples(seed, len(values)), ~np.isnan(values)
    counts = known[draw].sum(1)
    means = np.where(counts > 0, np.where(known, values, 0.0)[draw].sum(1) / np.maximum(counts, 1), np.nan)
    found = []
    for column in means.T:
        defined = column[~np.isnan(column)]
        found.append(np.percentile(defined, [2.5, 97.5]).tolist() if len(defined) else [np.nan, np.nan])
    return found


def drift_signal(drift: np.ndarray, errors: np.ndarray, seed: int) -> dict[str, Any]:
    """Rank correlations of the horizons' disagreement, which needs no ground truth, with the true error.

    drift, errors [clips, steps]; steps without a drift or an error (NaN) are left out, and "steps" lists the others.
    "overall" is over all clips and steps, and is high in part because both grow with the steps. "within_step" is not:
    it is the mean over steps of the correlation over clips at that step. "per_rollout" correlates the means over steps
    of clips, and "auroc" is the probability that of two rollouts, one with a mean error above the median and one
    without, the former has the larger mean drift. All have 95% intervals over clips.
    The correlation of values that are all equal is undefined, as is "auroc" where the errors are. Such steps, and
    resamples, are left out of means and intervals; a mean or interval of none is NaN.
    """
    known = ~(np.isnan(drift) | np.isnan(errors)).any(0)
    pair = drift[:, known], errors[:, known]
    clips, steps = pair[0].shape
    if clips < 3 or steps == 0:
        return {"steps": []}
    among_all = [ranks(values.reshape(-1, 1)).reshape(values.shape) for values in pair]
    among_clips = [ranks(values) for values in pair]

    def overall(draw: np.ndarray) -> np.ndarray:
        return correlation(*(values[draw].reshape(len(draw), -1, 1) for values in among_all))[:, 0]

    def within_step(draw: np.ndarray) -> np.ndarray:
        return mean_of_defined(correlation(*(values[draw] for values in among_clips)))

    # By rollout: the mean drift and the mean error over the steps.
    drift_C, error_C = (values.mean(1) for values in pair)
    among_rollouts = [ranks(values[:, None]) for values in (drift_C, error_C)]
    worse = error_C > np.median(error_C)

    def per_rollout(draw: np.ndarray) -> np.ndarray:
        return correlation(*(values[draw] for values in among_rollouts))[:, 0]

    def auroc(draw: np.ndarray) -> np.ndarray:
        return area_under_curve(drift_C, worse, draw)

    found: dict[str, Any] = {"steps": (np.flatnonzero(known) + 1).tolist()}
    measured = {"overall": overall, "within_step": within_step, "per_rollout": per_rollout, "auroc": auroc}
    for name, statistic in measured.items():
        found[name] = float(statistic(np.arange(clips)[None])[0])
        resampled = statistic(resamples(seed, clips))
        defined = resampled[~np.isnan(resampled)]
        # If the statistic itself is undefined, so is its interval.
        has_interval = len(defined) and not np.isnan(found[name])
        found[f"{name}_95"] = np.percentile(defined, [2.5, 97.5]).tolist() if has_interval else [np.nan, np.nan]
    return found


def check_draw(*, clips: int, batch: int, seed: int) -> None:
    """Check the arguments that all evaluations have: how many clips to draw, in batches of how many, by which seed."""
    for name, value, least in (("clips", clips, 1), ("batch", batch, 1), ("seed", seed, 0)):
        check.integer(name, value, least=least)


def resamples(seed: int, clips: int) -> np.ndarray:
    """[RESAMPLES, clips]: numbers of clips, drawn with replacement."""
    return np.random.default_rng(seed).integers(clips, size=(RESAMPLES, clips))


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value in its column, from 0; equal values share the mean of their ranks."""
    found = np.empty(values.shape)
    for column in range(values.shape[1]):
        _, index, counts = np.unique(values[:, column], return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        found[:, column] = (ends - (counts + 1) / 2)[index.reshape(-1)]
    return found


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation over axis 1; NaN where a side is constant."""
    constant = np.zeros(a[:, 0].shape, bool)
    for x in (a, b):
        constant |= (x == x[:, :1]).all(1)
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    lengths = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(constant, np.nan, (a * b).sum(1) / lengths)


def area_under_curve(score: np.ndarray, positive: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """[R]: for each of R resamples `draw` [R, C] of C clips, the share of pairs of a positive and a negative clip in
    which the positive one has the higher score; a tie counts half. NaN where one side is empty.
    """
    above, below = score[positive][:, None], score[~positive][None]
    wins = (above > below) + 0.5 * (above == below)
    counts = np.stack([np.bincount(row, minlength=len(score)) for row in draw])
    of_positive, of_negative = counts[:, positive], counts[:, ~positive]
    pairs = of_positive.sum(1) * of_negative.sum(1)
    won = ((of_positive @ wins) * of_negative).sum(1)
    return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """[rows]: the mean of each row's entries that are not NaN; NaN if all are."""
    counts = (~np.isnan(values)).sum(1)
    return np.where(counts > 0, np.nansum(values, 1) / np.maximum(counts, 1), np.nan)
