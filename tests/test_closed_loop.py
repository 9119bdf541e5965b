"""What rollouts are compared with, and the metrics of measurements whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mfwm.data import Replay
from mfwm.evaluation.closed_loop import action_ratio, mean_image, rollout_summary
from small_run import moving_squares


def measures_of(errors: dict[str, list[list[float]]]) -> dict[str, np.ndarray]:
    return {f"{name}_mse": np.array(values) for name, values in errors.items()}


def test_gain_is_over_the_better_of_the_last_frame_and_the_mean_image() -> None:
    """Two clips, four steps: the last frame is the better baseline at first, the mean image later."""
    found = rollout_summary(
        measures_of(
            {
                "rollout": [[0.01, 0.04, 0.1, 0.2], [0.01, 0.04, 0.1, 0.1]],
                "persistence_rollout": [[0.05, 0.1, 0.4, 0.5], [0.15, 0.3, 0.6, 0.7]],
                "mean_image_rollout": [[0.3, 0.3, 0.1, 0.15], [0.3, 0.3, 0.1, 0.15]],
            }
        ),
        0,
        controlled=False,
    )
    assert found["gain"] == pytest.approx([10, 10 * np.log10(5), 0, 0])
    assert found["gain_zero_step"] == 3 and found["rollout_steps"] == 4
    # Resamples hold either clip alone or both. At step 1: 7, 10 or 11.8 dB.
    low, high = np.array(found["gain_95"]).T
    assert low == pytest.approx([10 * np.log10(5), 10 * np.log10(0.1 / 0.04), 0, 10 * np.log10(0.15 / 0.2)])
    assert high == pytest.approx([10 * np.log10(15), 10 * np.log10(0.3 / 0.04), 0, 10 * np.log10(1.5)])
    assert found["mean_image_rollout_psnr"][0] == pytest.approx(10 * np.log10(4 / 0.3))


def test_a_gain_that_stays_positive_has_no_zero() -> None:
    errors = {"rollout": [[0.1, 0.1]], "persistence_rollout": [[0.2, 0.2]], "mean_image_rollout": [[0.11, 0.3]]}
    assert rollout_summary(measures_of(errors), 0, controlled=False)["gain_zero_step"] is None


def test_the_action_ratio_is_that_of_mean_errors() -> None:
    """Two clips: shuffled actions double one clip's error, and leave the other's."""
    found = action_ratio(np.array([[4.0, 3], [1, 3]]), np.array([[2.0, 1], [1, 1]]), 0, "ratio")
    assert found["ratio"] == pytest.approx([5 / 3, 3])
    assert found["ratio_95"] == [pytest.approx([1, 2]), pytest.approx([3, 3])]
    errors = {"rollout": [[0.1] * 6], "shuffled": [[0.2, 0.3, 0.4, 0.1]]}
    errors |= {"persistence_rollout": [[0.2] * 6], "mean_image_rollout": [[0.2] * 6]}
    metrics = rollout_summary(measures_of(errors), 0, controlled=True)
    assert metrics["rollout_action_ratio"] == pytest.approx([2, 3, 4, 1])
    assert "rollout_action_ratio" not in rollout_summary(measures_of(errors), 0, controlled=False)


def test_the_mean_image_is_that_of_the_chosen_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving_squares(tmp_path / "data")
    replay = Replay(tmp_path / "data")
    chosen = np.array([2, 5, 11])
    frames = np.concatenate([replay.video[40 * episode : 40 * episode + 40] for episode in chosen])
    expected = torch.from_numpy(frames.mean(0) / 127.5 - 1).float().permute(2, 0, 1)
    torch.testing.assert_close(mean_image(replay, chosen), expected)
    # Fewer frames: evenly spaced, the first and the last included.
    monkeypatch.setattr("mfwm.evaluation.closed_loop.MEAN_IMAGE_FRAMES", 8)
    expected = torch.from_numpy(frames[[0, 17, 34, 51, 68, 85, 102, 119]].mean(0) / 127.5 - 1).float().permute(2, 0, 1)
    torch.testing.assert_close(mean_image(replay, chosen), expected)
