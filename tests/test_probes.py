"""Ridge probes: against the textbook's formula, and on hidden states that hold what is asked, or do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mfwm import HeadsConfig, WorldModel, WorldModelConfig
from mfwm.data import Replay, ReplayWriter
from mfwm.data.collect import collect
from mfwm.data.recording import Balls
from mfwm.data.replay import Clips, split_levels
from mfwm.evaluation import probes as module
from mfwm.evaluation.positions import objects_of
from mfwm.evaluation.probes import best_penalties, features, probe, probed, ridge, samples, velocities

from mfwm_kernels import Horizons


def test_ridge_is_the_minimum_of_its_objective() -> None:
    """By least squares on the rows of the penalty, written below those of the data."""
    rng = np.random.default_rng(0)
    x, y, at = rng.normal(3, [1, 5, 0.1, 2], (50, 4)), rng.normal(2, 1, (50, 3)), rng.normal(3, 1, (7, 4))
    for penalty in (1e-3, 1.0):
        z = (x - x.mean(0)) / x.std(0)
        rows = np.concatenate([z / 50**0.5, penalty**0.5 * np.eye(4)])
        w = np.linalg.lstsq(rows, np.concatenate([(y - y.mean(0)) / 50**0.5, np.zeros((4, 3))]), rcond=None)[0]
        expected = (at - x.mean(0)) / x.std(0) @ w + y.mean(0)
        np.testing.assert_allclose(ridge(x, y, at, (penalty,))[penalty], expected, rtol=1e-9)
    # A feature that never changes is not divided by its spread.
    x[:, 1] = 0.1
    assert np.isfinite(ridge(x, y, at, (1e-4,))[1e-4]).all()


def test_the_penalty_is_large_where_there_is_only_noise() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 40))
    y = np.stack([x[:, :2], rng.normal(size=(300, 2))], 1)
    exact, noise = best_penalties(x, y, np.arange(300) < 60)
    assert exact == min(module.PENALTIES) and noise == max(module.PENALTIES)


def test_probes_read_what_is_there() -> None:
    """Object 0's position is linear in the features, object 1's half noise, and object 1 is often not visible."""
    rng = np.random.default_rng(0)
    x, x_held = rng.normal(size=(3000, 20)), rng.normal(size=(1000, 20))
    mix = rng.normal(size=(20, 4)) / 20**0.5

    def targets(features: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
        y = 5 * (features @ mix).reshape(-1, 2, 2)
        y[:, 1] += 5 * rng.normal(size=y[:, 1].shape)
        noise = rng.normal(size=y.shape)
        noise[:, 0, 1] = 7
        y[rng.random(len(y)) < 0.5, 1] = np.nan
        return {("position", 0): y, ("velocity", 0): noise}

    held = targets(x_held)
    found = probed(x, targets(x), np.arange(3000) // 10, x_held, held, np.random.default_rng(0))
    # Squared errors: none for object 0, 25 for object 1; variances are 25 * |mix|^2, and 25 more.
    variance = [np.nanvar(held["position", 0][:, i], axis=0).sum() for i in range(2)]
    seen = (~np.isnan(held["position", 0][:, 1, 0])).sum()
    expected = 1 - 50 * seen / (1000 * variance[0] + seen * variance[1])
    assert found["position", 0]["r2"] == pytest.approx(expected, abs=0.03)
    # Mean absolute error of a normal: sqrt(2 / pi) of its deviation, over two of the coordinates.
    assert found["position", 0]["mae"] == pytest.approx(5 * (2 / np.pi) ** 0.5 * seen / (1000 + seen), rel=0.05)
    assert abs(found["velocity", 0]["r2"]) < 0.05
    assert found["velocity", 0]["mae"] == pytest.approx((2 / np.pi) ** 0.5, rel=0.05)


def test_many_features_are_summed_with_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(200, 600)
    assert torch.equal(features(hidden), hidden)
    monkeypatch.setattr(module, "MOST_FEATURES", 300)
    found = features(hidden)
    assert found.shape == (200, 300) and torch.equal(found[:9], features(hidden[:9]))
    # Distances are kept on average.
    kept = torch.pdist(found).square().mean() / torch.pdist(hidden).square().mean()
    assert kept == pytest.approx(1, abs=0.05)


def small_model(context: int = 6) -> WorldModel:
    model = WorldModelConfig(
        (3, 16, 16), 8, 32, 2, 16, context=context, actions=5, heads=HeadsConfig(Horizons.next_frame())
    )
    return WorldModel(model)


class Oracle(WorldModel):
    """Its hidden state holds the number of the frame that it was given, as a code in the first pixel."""

    def states(self, video, actions, segment_ids=None, token_mask=None):  # type: ignore[no-untyped-def]
        code = video[:, :, 0, 0, :2].float() @ torch.tensor([256.0, 1.0], device=video.device)
        return {"hidden": code[:, :, None, None, None].expand(-1, -1, 2, 2, 3)}


def test_states_and_targets_are_of_the_same_frames(tmp_path: Path) -> None:
    names, units = ["a_x", "a_y", "b_x", "b_y", "b_vx", "b_vy"], ["pixels"] * 4 + ["pixels/frame"] * 2
    writer = ReplayWriter(tmp_path / "data", 16, 16, actions=5, env="codes", state_names=names, state_units=units)
    first = 0
    for level in range(4):
        number = first + np.arange(40)
        img = np.zeros((40, 16, 16, 3), np.uint8)
        img[:, 0, 0, 0], img[:, 0, 1, 0] = number // 256, number % 256
        state = np.stack([number, number**2 / 100, number + 0.5, 2.0 * number, 3.0 * number, -number], 1)
        writer.append(img, np.zeros(40, np.int64), level, state=state.astype(np.float32))
        first += 40
    replay = Replay(tmp_path / "data")
    objects = objects_of(replay)
    frames = np.array([5, 9])
    found = velocities(replay, frames, objects)
    np.testing.assert_allclose(found[:, 0], np.stack([[1, 1], (frames**2 - (frames - 1) ** 2) / 100], 1), rtol=1e-4)
    np.testing.assert_allclose(found[:, 1], np.stack([3 * frames, -frames], 1))
    oracle = Oracle(small_model().config)
    x, targets, episode = samples(oracle, Clips(replay, 15, within_episode=True), np.arange(7), objects, 3)
    # Clip i begins at frame i, the model sees i + 1 to i + 6, and of these the last three have hidden states.
    assert x.shape == (21, 12) and x[:, 0].tolist() == [i + 1 + n for i in range(7) for n in (3, 4, 5)]
    for lead in (0, 1, 8):
        assert targets["position", lead][:, 0, 0].tolist() == (x[:, 0] + lead).tolist()
        assert targets["velocity", lead][:, 1, 0].tolist() == (3 * (x[:, 0] + lead)).tolist()
    assert episode.tolist() == [0] * 21


def test_probes_of_a_model_on_balls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a model that was not trained holds the frame that it sees, and so where the balls are, but not for long."""
    collect("balls", 6000, tmp_path / "data", size=16, balls=Balls(count=2), progress=False)
    replay = Replay(tmp_path / "data")
    trained, held_out = split_levels(replay, 0.2, seed=0)
    found = probe(small_model(), replay, trained, held_out, seed=0)
    assert found is not None and list(found) == ["position", "velocity"]
    assert list(found["position"]) == list(found["velocity"]) == ["0", "1", "8"]
    assert found["position"]["0"]["r2"] > 0.7 > found["position"]["8"]["r2"]
    assert found["position"]["0"]["mae"] < found["position"]["1"]["mae"] < found["position"]["8"]["mae"]
    # Episodes of 256 frames are too short for this context.
    assert probe(small_model(context=250), replay, trained, held_out, seed=0) is None
