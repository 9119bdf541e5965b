"""Evaluation of horizons that predict distributions: likelihood of held-out frames, and coverage of central intervals.

The likelihood is compared with the best that the same means reach without the predicted scale: one scale for all
elements of a horizon, of maximum likelihood. It is never fitted to the frames that it is scored on: the held-out levels
are split into two halves at random, and each half is scored with the scale fitted to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics.intervals import interval
from ..models.distributions import Distribution, likelihood_of_one_scale

# Central intervals whose coverage is measured, by the share of the true values that they should cover.
SHARES = {"coverage_50": 0.5, "coverage_90": 0.9}


def likelihood_measures(found: Sequence[Distribution], truths: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Measures [clips, M] of the M horizons that predict distributions, over the elements of their true frames.

    nll: mean negative log-likelihood in nats; deviation: mean square (of "laplace": absolute) difference from the mean;
    coverage_50 and coverage_90: shares of the elements inside these central intervals.
    """
    measured: dict[str, list[Tensor]] = {name: [] for name in ("nll", "deviation", *SHARES)}
    for distribution, truth in zip(found, truths, strict=True):
        if distribution.log_scale is None:
            continue
        end = truth.shape[1]
        cut = Distribution(distribution.kind, distribution.mean[:, :end], distribution.log_scale[:, :end])
        difference = truth - cut.mean
        deviation = difference.square() if cut.kind == "gaussian" else difference.abs()
        values = {"nll": cut.negative_log_likelihood(truth), "deviation": deviation}
        values |= {name: cut.covers(truth, share).float() for name, share in SHARES.items()}
        for name, value in values.items():
            measured[name].append(value.flatten(1).double().mean(1))
    return {name: torch.stack(columns, 1).cpu().numpy() for name, columns in measured.items() if columns}


def likelihood_summary(
    measures: dict[str, np.ndarray], kinds: Sequence[str], names: Sequence[str], seed: int
) -> dict[str, Any]:
    """Metrics of likelihood_measures, by the names of the M horizons of these kinds, with 95% intervals over clips.

    nll_one_scale: with one scale per horizon in place of the predicted ones. nll_gain_95: how many nats per element the
    predicted scales gain on it. Both are undefined (NaN) where all clips are of one level. measures["level"]: [clips].
    """

    def by_horizon(values: Any) -> dict[str, Any]:
        return dict(zip(names, np.asarray(values).tolist(), strict=True))

    one_scale = scored_by_halves(measures["deviation"], measures["level"], kinds, seed)
    metrics = {
        "nll": by_horizon(measures["nll"].mean(0)),
        "nll_95": by_horizon(interval(seed, np.asarray, measures["nll"])),
        "nll_one_scale": by_horizon(one_scale.mean(0)),
        "nll_gain_95": by_horizon(interval(seed, np.subtract, one_scale, measures["nll"])),
    }
    for name in SHARES:
        metrics[name] = by_horizon(measures[name].mean(0))
        metrics[f"{name}_95"] = by_horizon(interval(seed, np.asarray, measures[name]))
    return metrics


def scored_by_halves(deviation: np.ndarray, level: np.ndarray, kinds: Sequence[str], seed: int) -> np.ndarray:
    """[clips, M] mean negative log-likelihoods with one scale per horizon, fitted to the clips of other levels.

    deviation [clips, M], level [clips]. NaN where all clips are of one level.
    """
    levels = np.random.default_rng(seed).permutation(np.unique(level))
    in_first = np.isin(level, levels[: len(levels) // 2])
    scored = np.full(deviation.shape, np.nan)
    if len(levels) < 2:
        return scored
    for half in (in_first, ~in_first):
        fitted = torch.from_numpy(deviation[~half].mean(0))
        for column, kind in enumerate(kinds):
            of_half = torch.from_numpy(deviation[half, column])
            scored[half, column] = likelihood_of_one_scale(kind, of_half, fitted[column]).numpy()
    return scored
