"""Evaluation: LPIPS against torchmetrics, intervals, the drift signal, and a run beside another one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as peer
from mfwm import HeadsConfig, WorldModel, WorldModelConfig
from mfwm.data import Replay, ReplayWriter
from mfwm.data.collect import collect
from mfwm.data.recording import Balls
from mfwm.data.replay import Clips, split_levels
from mfwm.demo import Demo
from mfwm.evaluation import write_report
from mfwm.evaluation.closed_loop import CONTEXT, closed_loop
from mfwm.evaluation.world_model import evaluate
from mfwm.metrics.intervals import area_under_curve, correlation, drift_signal, interval, ranks
from mfwm.metrics.lpips import CONVOLUTIONS, LPIPS
from mfwm.metrics.quality import psnr, similarity
from mfwm.models.rollouts import rollout
from mfwm.training import train
from mfwm.training.json_values import as_json
from mfwm.training.run_log import read_log
from small_run import moving_squares, small_config
from torch import Tensor, nn

from mfwm_kernels import Horizons


@pytest.fixture
def lpips_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """LPIPS on an AlexNet of random weights, with the published weights of its layers; and its state dict in a file."""

    def alexnet(net: str, pretrained: bool = False) -> nn.Sequential:
        assert net == "alexnet" and not pretrained
        layers: list[nn.Module] = []
        for i, (read, made, kernel, stride, padding, _) in enumerate(CONVOLUTIONS):
            layers += [nn.Conv2d(read, made, kernel, stride, padding), nn.ReLU()]
            if i in (0, 1, 4):
                layers.append(nn.MaxPool2d(3, 2))
        return nn.Sequential(*layers)

    monkeypatch.setattr(peer, "_get_tv_model_features", alexnet)
    model = peer._LPIPS(net="alex", pnet_rand=True)
    torch.save(model.state_dict(), tmp_path / "lpips.pt")
    return tmp_path / "lpips.pt", model


@pytest.mark.parametrize("size", [(64, 64), (31, 47)])
def test_lpips(lpips_of_torchmetrics: tuple[Path, nn.Module], size: tuple[int, int]) -> None:
    file, theirs = lpips_of_torchmetrics
    a, b = torch.rand(2, 3, 3, *size) * 2 - 1
    ours = LPIPS(file)
    torch.testing.assert_close(ours(a, b), theirs(a, b).flatten())
    assert ours(a, a).abs().max() == 0
    with pytest.raises(ValueError, match=r"pictures \[N, 3, >= 31, >= 31\], got \[3, 3, 30, 64\]"):
        ours(torch.zeros(3, 3, 30, 64), torch.zeros(3, 3, 30, 64))


def test_lpips_of_another_file(tmp_path: Path) -> None:
    torch.save({"lin0.model.1.weight": torch.zeros(1)}, tmp_path / "half.pt")
    with pytest.raises(
        ValueError, match=r"half.pt must be the state dict of lpips.LPIPS.* it lacks net.slice1.0.weight"
    ):
        LPIPS(tmp_path / "half.pt")


def test_an_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal([3.0, 5.0], [1.0, 0.1], size=(400, 2))
    low, high = np.array(interval(0, np.asarray, values)).T
    half = 1.96 * values.std(0) / 20
    assert np.allclose(low, values.mean(0) - half, rtol=0, atol=0.2 * half)
    assert np.allclose(high, values.mean(0) + half, rtol=0, atol=0.2 * half)
    # Both sides of a difference are the same clips: what is common to them does not widen it.
    shifted = interval(0, np.subtract, values + 1, values)
    assert np.allclose(shifted, 1)


def test_the_drift_signal_tells_clips_from_steps() -> None:
    rng = np.random.default_rng(0)
    growth = np.exp(np.arange(8))
    clips = np.exp(rng.normal(size=(200, 1)))
    unrelated = [growth * np.exp(0.3 * rng.normal(size=(200, 8))) for _ in range(2)]
    found = drift_signal(*unrelated, 0)
    assert found["overall"] > 0.9 and abs(found["within_step"]) < 0.1
    low, high = found["within_step_95"]
    assert low < 0 < high and high - low < 0.2
    drift = clips * growth
    drift[:, 0] = np.nan
    found = drift_signal(drift, (clips * growth) ** 2, 0)
    assert found["steps"] == [2, 3, 4, 5, 6, 7, 8] and found["within_step"] == pytest.approx(1)


def test_the_drift_signal_of_whole_rollouts() -> None:
    """Six rollouts of two steps. The means of the errors are 1 to 6, and 5 of 9 pairs are in order."""
    errors = np.arange(1.0, 7)[:, None] + [[-0.5, 0.5]]
    drift = np.array([[5, 1], [6, 2], [1, 1], [7, 3], [1, 3], [3, 4]], float)
    found = drift_signal(drift, errors, 0)
    # Means 3, 4, 1 against 5, 2, 3.5: 3 + 1 + 2 of 9; Spearman by 1 - 6 sum d^2 / (n (n^2 - 1)).
    assert found["auroc"] == pytest.approx(6 / 9)
    order = np.array([3, 5, 1, 6, 2, 4]) - np.arange(1, 7)
    assert found["per_rollout"] == pytest.approx(1 - 6 * (order**2).sum() / 210)
    for name in ("auroc", "per_rollout"):
        low, high = found[f"{name}_95"]
        assert -1 <= low < found[name] < high <= 1 + 1e-12, name
    # Ties count half; errors that are all equal say nothing.
    assert drift_signal(np.ones((6, 2)), errors, 0)["auroc"] == 0.5
    assert np.isnan(drift_signal(drift, np.ones((6, 2)), 0)["auroc"])


def test_auroc_of_resamples_counts_clips_as_often_as_they_are_drawn() -> None:
    score, positive = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    draws = np.array([[0, 1, 2, 3], [0, 1, 1, 2], [1, 1, 2, 2], [0, 0, 1, 1]])
    found = area_under_curve(score, positive, draws)
    np.testing.assert_allclose(found, [0.75, 1 / 3, 0, np.nan])


def mid_ranks(values: np.ndarray) -> list[float]:
    """The definition: the values below, and half of the others that are equal."""
    return [(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]


@pytest.mark.parametrize("values", [[2, 2, 2], [3, 1, 2], [1, 2, 2, 0], [0, 0, 1, 1, 1, 5], [math.inf, 1, math.inf]])
def test_equal_values_share_a_rank(values: list[float]) -> None:
    column = np.array(values, float)
    assert np.array_equal(ranks(np.stack([column, column[::-1]], 1)).T, [mid_ranks(column), mid_ranks(column[::-1])])


def test_a_constant_correlates_with_nothing() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 20, 4))
    for pair in ((np.zeros((20, 4)), np.zeros((20, 4))), (np.ones((20, 4)), one), (one, np.ones((20, 4)))):
        found = drift_signal(*pair, 0)
        for name in ("overall", "overall_95", "within_step", "within_step_95"):
            assert np.isnan(found[name]).all(), name
        assert json.loads(as_json(found))["overall"] is None
    # Values whose mean is not exactly theirs.
    assert np.isnan(correlation(np.full((1, 3, 1), 0.1), rng.random((1, 3, 1)))).all()
    # One step at which all clips are alike says nothing of the other three.
    part, whole = one.copy(), drift_signal(one[:, 1:], other[:, 1:], 0)
    part[:, 0] = 0.5
    found = drift_signal(part, other, 0)
    assert found["within_step"] == pytest.approx(whole["within_step"])
    assert found["within_step_95"] == pytest.approx(whole["within_step_95"])
    # Half the clips are still in both: ties, not perfect agreement.
    still = np.arange(20)[:, None] < 10
    found = drift_signal(np.where(still, 0, one), np.where(still, 0, other), 0)
    pair = (np.array(mid_ranks(np.where(still, 0, x).ravel())) for x in (one, other))
    assert found["overall"] == pytest.approx(np.corrcoef(*pair)[0, 1])
    # Steps whose error is not a number are left out, as those without a drift are.
    other[3, 2] = np.nan
    assert drift_signal(one, other, 0)["steps"] == [1, 2, 4]


def test_few_clips_that_are_alike_have_an_interval_of_the_resamples_that_differ() -> None:
    drift, errors = np.array([[0.0], [0.0], [1.0]]), np.array([[0.0], [1.0], [2.0]])
    found = drift_signal(drift, errors, 0)
    low, high = found["overall_95"]
    assert -1 <= low <= found["overall"] <= high + 1e-12 and high <= 1 + 1e-12


def test_psnr_is_of_pixels_between_minus_1_and_1() -> None:
    assert psnr(2.0**2) == 0 and psnr(0.04) == pytest.approx(20)


def test_small_pictures_are_told_by_ssim() -> None:
    for size in ((5, 64), (64, 5), (4, 4)):
        with pytest.raises(ValueError, match=rf"at least 6 x 6 pixels for SSIM, got {size[0]} x {size[1]}"):
            similarity(torch.zeros(1, 1, 3, *size), torch.zeros(1, 1, 3, *size))
    assert similarity(torch.zeros(1, 2, 3, 6, 6), torch.zeros(1, 2, 3, 6, 6)) == pytest.approx(np.ones((1, 2)))


@pytest.fixture
def clips() -> dict[str, Tensor]:
    video = torch.randint(0, 256, (2, 9, 3, 32, 32), dtype=torch.uint8)
    return {"video": video, "actions": torch.randint(0, 4, (2, 9)), "segment_ids": torch.zeros(2, 9, dtype=torch.long)}


def model_of(horizons: Horizons) -> WorldModel:
    heads = HeadsConfig(horizons, patch_sizes=(4,) * len(horizons), blocks=(1,) * len(horizons), residual=False)
    return WorldModel(WorldModelConfig((3, 32, 32), 4, 32, 2, 16, context=8, actions=4, heads=heads))


def test_rollouts_are_measured_frame_by_frame(
    clips: dict[str, Tensor], lpips_of_torchmetrics: tuple[Path, nn.Module]
) -> None:
    model, (file, theirs) = model_of(Horizons((1, 2, 4), (1, 2, 4))), lpips_of_torchmetrics
    found = closed_loop(model, clips, 5, torch.zeros(3, 32, 32), distance=LPIPS(file))
    truth = clips["video"].float() / 127.5 - 1
    rolled = rollout(model, clips["video"][:, :CONTEXT], clips["actions"], 5)
    for step in range(5):
        frame, seen = truth[:, CONTEXT + step], truth[:, CONTEXT - 1]
        for name, picture in (("rollout", rolled[:, step]), ("persistence_rollout", seen)):
            error = (picture - frame).square().mean((1, 2, 3))
            np.testing.assert_allclose(found[f"{name}_mse"][:, step], error, rtol=1e-4)
            distance = theirs(picture.clamp(-1, 1), frame).flatten()
            np.testing.assert_allclose(found[f"{name}_lpips"][:, step], distance, rtol=1e-3)
    # The horizon of offset 2 speaks of a frame from the second step on. It is the far one's own, not the near one's.
    assert np.isnan(found["drift"][:, 0]).all() and (found["drift"][:, 1:] > 0).all()
    assert "drift" not in closed_loop(model_of(Horizons.next_frame()), clips, 5, torch.zeros(3, 32, 32))


def test_the_demo_says_how_long_its_stages_took(tmp_path: Path) -> None:
    """Those that an earlier command finished, too."""
    moving_squares(tmp_path / "data")
    (tmp_path / "data" / "complete").write_text("3.5\n")
    Demo(tmp_path / "run", tmp_path / "data", steps=1).run()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (row,) = read_log(tmp_path / "run" / "log.jsonl")
    seconds = results["seconds"]
    assert seconds["collect"] == 3.5 and seconds["training"] == row["seconds"]
    assert seconds["this_command"] > seconds["training"] + seconds["evaluation"]
    assert (
        list(results["world_model"]["psnr"]) == ["1", "2", "4", "8"] and "torch" in results["world_model"]["versions"]
    )


def test_a_run_beside_another(tmp_path: Path) -> None:
    moving_squares(tmp_path / "data")
    # Adam's first step is the same in both: it follows the signs of the near head's gradient.
    config = replace(small_config(tmp_path / "data"), steps=3)
    alone = replace(config.model, heads=HeadsConfig(Horizons.next_frame()))
    for name, model in (("run", config.model), ("next", alone)):
        train(replace(config, model=model), tmp_path / name, progress=False)
    metrics = evaluate(tmp_path / "run", against=tmp_path / "next", clips=6, batch=3, progress=False)
    assert list(metrics["psnr"]) == list(metrics["persistence_psnr"]) == ["1", "2", "4"]
    for k, (low, high) in metrics["action_ratio_95"].items():
        assert low <= metrics["action_ratio"][k] <= high
    # Episodes have 40 frames, of which four are seen.
    assert len(metrics["rollout_psnr"]) == len(metrics["gain"]) == metrics["rollout_steps"] == 32
    beside = evaluate(tmp_path / "next", clips=6, batch=3, progress=False)
    # The same clips: the other run's figures are those of its own evaluation.
    assert metrics["against_rollout_psnr"] == pytest.approx(beside["rollout_psnr"], abs=1e-4)
    gain = np.subtract(metrics["rollout_psnr"], metrics["against_rollout_psnr"])
    low, high = np.array(metrics["against_gain_95"]).T
    assert (low <= gain).all() and (gain <= high).all() and (high > low).any()
    for name in ("rollout_psnr", "rollout_ssim", "persistence_rollout_psnr", "against_rollout_ssim"):
        low, high = np.array(metrics[f"{name}_95"]).T
        assert (low <= metrics[name]).all() and (metrics[name] <= high).all(), name
    assert 0 < metrics["data_wait"] < 1
    assert metrics["drift"]["steps"] == list(range(2, 33)) and "drift" not in beside
    page = write_report(tmp_path / "run").read_text()
    assert page.count("data:image/png;base64,") == 6 and "http" not in page
    assert "over the other run, dB" in page and "Drift signal" in page and "Position error" not in page
    auroc = f"an error above the median: {metrics['drift']['auroc']:.2f}"
    assert "action ratio" in page and auroc in page
    assert (tmp_path / "run" / "rollout.gif").stat().st_size > 1000
    # A model that is far off at every clip alike.
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    measured["drift"] |= {"overall": None, "overall_95": [None, None]}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(measured))
    assert "the true error: undefined" in write_report(tmp_path / "run").read_text()
    other = tmp_path / "next/config.json"
    other.write_text(other.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"against must be a run with the same held-out levels: its seed is 1, not 0"):
        evaluate(tmp_path / "run", against=tmp_path / "next", progress=False)


def episodes_of(path: Path, lengths: list[int]) -> None:
    writer = ReplayWriter(path, 16, 16, actions=4, env="noise")
    rng = np.random.default_rng(0)
    for level, length in enumerate(lengths):
        writer.append(rng.integers(0, 256, (length, 16, 16, 3), np.uint8), rng.integers(0, 4, length), level)


@pytest.mark.parametrize(
    ("held_out", "steps", "length"),
    [([13, 14, 20, 90], 32, 20), ([13, 18, 20, 21, 90], 32, 20), ([50, 60, 13], 32, 36), ([50, 50, 50], 5, 12)],
)
def test_rollouts_are_as_long_as_half_of_the_episodes_allow(
    tmp_path: Path, held_out: list[int], steps: int, length: int
) -> None:
    lengths = held_out + [40] * 20
    episodes_of(tmp_path / "all", lengths)
    config = small_config(tmp_path / "data")
    # Put the lengths where the run's held-out levels will be.
    config = replace(config, held_out=len(held_out) / len(lengths), steps=1)
    _, chosen = split_levels(Replay(tmp_path / "all"), config.held_out, seed=config.seed)
    ordered = [40] * len(lengths)
    for episode, frames in zip(chosen, held_out, strict=True):
        ordered[episode] = frames
    episodes_of(tmp_path / "data", ordered)
    train(config, tmp_path / "run", progress=False)
    metrics = evaluate(tmp_path / "run", steps=steps, clips=4, batch=2, progress=False)
    assert metrics["rollout_steps"] == min(steps, length - 4)
    assert metrics["episodes_shorter_than_a_clip"] == sum(frames < length for frames in held_out)


def test_open_loop_measures_are_of_clips_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving_squares(tmp_path / "data")
    config = replace(small_config(tmp_path / "data"), steps=1)
    train(config, tmp_path / "run", progress=False)
    seen: list[int] = []
    monkeypatch.setattr(
        "mfwm.evaluation.world_model.open_loop",
        lambda model, clips, *draws: seen.append(clips["video"].shape[1]) or {"level": np.zeros(len(clips["video"]))},
    )
    evaluate(tmp_path / "run", clips=4, batch=2, progress=False)
    assert seen == [config.clip] * 2


def test_positions_of_objects_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect("balls", 2600, tmp_path / "data", size=16, balls=Balls(count=2, speed=0.2), progress=False)
    config = small_config(tmp_path / "data")
    config = replace(config, steps=1, model=replace(config.model, actions=5))
    train(config, tmp_path / "run", progress=False)
    monkeypatch.setattr("mfwm.evaluation.positions.STEPS", 200)
    file = tmp_path / "reader.safetensors"
    metrics = evaluate(tmp_path / "run", reader=file, clips=6, batch=3, progress=False)
    again = evaluate(tmp_path / "run", reader=file, clips=6, batch=3, progress=False)
    assert again["position_error"] == metrics["position_error"] and metrics["reader_seen_levels"] == 0
    assert len(metrics["position_error"]) == metrics["rollout_steps"] == 32
    with np.load(tmp_path / "run" / "clips.npz") as measures:
        assert measures["position_error"].shape == (6, 32) and measures["object_position_error"].shape == (6, 32, 2)
        np.testing.assert_allclose(measures["position_error"].mean(0), metrics["position_error"], rtol=1e-6)
    # Positions are those of the frames shown: a frame earlier or later, the balls are about three pixels away.
    assert metrics["reader_error"] < 1.5 < metrics["position_error_copy"][31]
    page = write_report(tmp_path / "run").read_text()
    assert "Position error of objects" in page and "ball1" in page and "What the hidden state holds" in page
    assert f"<td>32</td><td>{metrics['position_error'][31]:.2f}</td>" in page
    assert f"position at n + 8</td><td>{metrics['probe']['position']['8']['r2']:.3f}</td>" in page
    assert metrics["probe"]["position"]["0"]["mae"] < metrics["probe"]["position"]["8"]["mae"]
    moving_squares(tmp_path / "squares")
    plain = replace(small_config(tmp_path / "squares"), steps=1)
    train(plain, tmp_path / "plain", progress=False)
    with pytest.raises(ValueError, match="reader is for rollouts of sets whose state holds positions in pixels"):
        evaluate(tmp_path / "plain", reader=file, progress=False)
    with pytest.raises(FileNotFoundError, match="reader must be in a directory that exists"):
        evaluate(tmp_path / "run", reader=tmp_path / "none" / "reader", progress=False)


def test_held_out_clips_are_measured_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving_squares(tmp_path / "data")
    config = replace(small_config(tmp_path / "data"), steps=1, clip=36)
    train(config, tmp_path / "run", progress=False)
    measured: list[int] = []
    batch = Clips.batch

    def noted(self: Clips, indices: np.ndarray) -> dict[str, Tensor]:
        found = batch(self, indices)
        measured.extend((1000 * found["segment_ids"][:, 0] + torch.from_numpy(indices)).tolist())
        return found

    monkeypatch.setattr(Clips, "batch", noted)
    metrics = evaluate(tmp_path / "run", clips=1000, batch=4, progress=False)
    _, held_out = split_levels(Replay(config.data), config.held_out, seed=config.seed)
    # Five clips of 36 frames in each episode of 40.
    assert sorted(measured) == [1000 * episode + i for i, episode in enumerate(held_out.repeat(5))]
    assert metrics["clips"] == len(measured)


@pytest.mark.parametrize(
    ("horizons", "patches", "names"),
    [
        (Horizons((1, 1, 2), (1, 2, 2)), (4, 2, 2), ["1@1/1", "1@1/2", "2"]),
        (Horizons((0, 1, 3), (1, 1, 1)), (4, 4, 4), ["0", "1", "3"]),
    ],
    ids=["one offset at two factors", "no next frame to roll out"],
)
def test_other_horizons_are_evaluated(
    tmp_path: Path, horizons: Horizons, patches: tuple[int, ...], names: list[str]
) -> None:
    moving_squares(tmp_path / "data")
    config = small_config(tmp_path / "data")
    heads = replace(config.model.heads, horizons=horizons, patch_sizes=patches)
    config = replace(config, steps=1, clip=5, model=replace(config.model, heads=heads, context=4))
    train(config, tmp_path / "run", progress=False)
    metrics = evaluate(tmp_path / "run", clips=4, batch=2, progress=False)
    assert list(metrics["psnr"]) == list(metrics["psnr_gain_95"]) == names
    assert ("rollout_psnr" in metrics) == (horizons.offsets[0] == 1)
    assert "data:image/png" in write_report(tmp_path / "run").read_text()


def test_latents_are_evaluated_by_their_draws(tmp_path: Path) -> None:
    moving_squares(tmp_path / "data")
    config = small_config(tmp_path / "data")
    config = replace(config, model=replace(config.model, heads=replace(config.model.heads, latent=3)), steps=3)
    train(config, tmp_path / "run", progress=False)
    options: dict[str, Any] = {"clips": 6, "batch": 3, "steps": 2, "progress": False}
    metrics = evaluate(tmp_path / "run", samples=3, **options)
    assert metrics["latent_samples"] == 3
    for k in ("2", "4"):
        assert metrics["latent_draws_psnr"][k] < metrics["latent_best_psnr"][k]
        assert metrics["latent_kl"][k] > 0
        assert metrics["latent_prediction_psnr"][k] == pytest.approx(metrics["psnr"][k], abs=1e-4)
    assert "best of 3" in write_report(tmp_path / "run").read_text()
    assert evaluate(tmp_path / "run", samples=3, **options)["latent_best_psnr"] == metrics["latent_best_psnr"]
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        evaluate(tmp_path / "run", samples=0, **options)
