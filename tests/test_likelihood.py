"""Evaluation of distributions: likelihood, coverage and the single scale that they are compared with."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfwm.evaluation import evaluate, write_report
from mfwm.evaluation.distributions import likelihood_measures, likelihood_summary, scored_by_halves
from mfwm.models.distributions import DISTRIBUTIONS, Distribution, likelihood_of_one_scale
from mfwm.training import train
from mfwm.training.run_log import read_log
from small_run import moving_squares, small_config
from torch import Tensor

CLIPS = 40


def calibrated(kind: Any, error: float = 1.0) -> tuple[Distribution, Tensor]:
    """Predictions whose scale differs from element to element, `error` times too large, and frames they predict."""
    torch.manual_seed(0)
    mean = torch.randn(CLIPS, 2, 3, 16, 16)
    log_deviation = torch.randn_like(mean).clamp(-2, 2)
    truth = Distribution(kind, mean, 2 * log_deviation if kind == "gaussian" else log_deviation).draw(1.0)
    log_deviation = log_deviation + math.log(error)
    return Distribution(kind, mean, 2 * log_deviation if kind == "gaussian" else log_deviation), truth


def measured(kind: Any, error: float = 1.0) -> dict[str, Any]:
    found, truth = calibrated(kind, error)
    measures = likelihood_measures([found], [truth])
    measures["level"] = np.arange(CLIPS) // 4
    return {name: value["8"] for name, value in likelihood_summary(measures, [kind], ["8"], 0).items()}


def share_within(kind: str, share: float, error: float) -> float:
    """Share of the true values inside the central interval of a distribution whose scale is `error` times too large."""
    if kind == "laplace":
        return 1 - (1 - share) ** error
    normal = torch.distributions.Normal(0.0, 1.0)
    half = normal.icdf(torch.tensor(0.5 + share / 2)) * error
    return float(2 * normal.cdf(half) - 1)


@pytest.mark.parametrize("error", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_coverage_is_what_it_should_be_and_a_wrong_scale_shows(kind: str, error: float) -> None:
    found = measured(kind, error)
    count = CLIPS * 2 * 3 * 16 * 16
    for share, name in ((0.5, "coverage_50"), (0.9, "coverage_90")):
        expected = share_within(kind, share, error)
        sampling = 4 * math.sqrt(expected * (1 - expected) / count)
        assert abs(found[name] - expected) < sampling
        low, high = found[f"{name}_95"]
        assert low <= found[name] <= high
        if error != 1:
            assert abs(found[name] - share) > 10 * sampling
            assert not low <= share <= high


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_likelihoods_are_those_of_torch_and_best_with_the_true_scale(kind: Any) -> None:
    found, truth = calibrated(kind)
    peer = torch.distributions.Normal if kind == "gaussian" else torch.distributions.Laplace
    torch.testing.assert_close(found.negative_log_likelihood(truth), -peer(found.mean, found.scale).log_prob(truth))
    for share in (0.5, 0.9):
        half = peer(torch.zeros(1), found.scale).icdf(torch.tensor(0.5 + share / 2))
        assert torch.equal(found.covers(truth, share), (truth - found.mean).abs() <= half) or (
            (found.covers(truth, share) != ((truth - found.mean).abs() <= half)).float().mean() < 1e-4
        )
    true, half, double = (measured(kind, error) for error in (1.0, 0.5, 2.0))
    assert true["nll"] < min(half["nll"], double["nll"]) - 0.1
    # The scales of elements differ, so knowing them is worth more than one scale for all, by more than chance.
    assert true["nll_gain_95"][0] > 0.1 and true["nll"] < true["nll_one_scale"]
    # What the means alone reach does not depend on the predicted scale.
    assert half["nll_one_scale"] == pytest.approx(true["nll_one_scale"])
    one = likelihood_of_one_scale(kind, torch.tensor(4.0), torch.tensor(4.0))
    exact = Distribution(kind, torch.zeros(1), torch.tensor([math.log(4.0)]))
    deviation = torch.tensor([2.0 if kind == "gaussian" else 4.0])
    torch.testing.assert_close(one, exact.negative_log_likelihood(deviation)[0])


def test_no_scale_is_fitted_to_the_frames_it_is_scored_on() -> None:
    """Two levels of different deviations: each is scored with the scale of the other, whichever half it is in."""
    deviation, level = np.array([[1.0], [1.0], [4.0]]), np.array([7, 7, 3])
    scored = scored_by_halves(deviation, level, ["gaussian"], 0)[:, 0]
    expected = [0.5 * (math.log(2 * math.pi * other) + own / other) for own, other in ((1, 4), (1, 4), (4, 1))]
    np.testing.assert_allclose(scored, expected)
    scored = scored_by_halves(deviation, level, ["laplace"], 1)[:, 0]
    np.testing.assert_allclose(scored, [math.log(8) + 1 / 4] * 2 + [math.log(2) + 4])
    assert np.isnan(scored_by_halves(deviation, np.zeros(3), ["gaussian"], 0)).all()


def test_horizons_without_a_scale_are_left_out() -> None:
    found, truth = calibrated("gaussian")
    alone = likelihood_measures([found], [truth[:, :1]])
    mixed = likelihood_measures([Distribution("mse", found.mean), found], [truth, truth[:, :1]])
    assert all(np.array_equal(alone[name], mixed[name]) for name in alone) and mixed["nll"].shape == (CLIPS, 1)
    assert likelihood_measures([Distribution("mse", found.mean)], [truth]) == {}
    with pytest.raises(ValueError, match=r"kind must be .* for a scale and a likelihood, got 'mse'"):
        Distribution("mse", found.mean).negative_log_likelihood(truth)


def test_a_run_with_distributions_is_trained_evaluated_and_reported(tmp_path: Path) -> None:
    moving_squares(tmp_path / "data")
    config = small_config(tmp_path / "data")
    heads = replace(config.model.heads, kind=("mse", "gaussian", "laplace"))
    config = replace(config, steps=4, look_every=2, model=replace(config.model, heads=heads))
    train(config, tmp_path / "run", progress=False)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert len(rows[-1]["per_horizon"]) == 3 and len(rows[-1]["held_out"]["squared_error"]) == 3
    errors = np.array(rows[-1]["held_out"]["squared_error"])
    np.testing.assert_allclose(rows[-1]["held_out"]["psnr"], 10 * np.log10(4 / errors), rtol=1e-5)
    metrics = evaluate(tmp_path / "run", clips=6, batch=3, progress=False)
    for name in ("nll", "nll_95", "nll_one_scale", "nll_gain_95", "coverage_50", "coverage_90", "coverage_90_95"):
        assert list(metrics[name]) == ["2", "4"], name
    assert all(0 <= metrics["coverage_50"][k] <= metrics["coverage_90"][k] <= 1 for k in ("2", "4"))
    page = write_report(tmp_path / "run").read_text()
    assert "Predicted distributions" in page and "coverage of 90%" in page
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    measured["nll_one_scale"]["2"], measured["nll_gain_95"]["2"] = None, [None, None]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(measured))
    assert "undefined" in write_report(tmp_path / "run").read_text()
