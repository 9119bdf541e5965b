"""Evaluation of rollouts in jumps, and of upsamplers beside plain enlargement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mfwm.evaluation import evaluate, write_report
from mfwm.evaluation.closed_loop import CONTEXT
from mfwm.evaluation.jumps import jump_measures, jump_summary
from mfwm.models.rollouts import rollout, rollout_in_jumps
from mfwm.training import train
from small_model import build, clip
from small_run import moving_squares, small_config

from mfwm_kernels import Horizons, video_pyramid

UPSAMPLED = Horizons((2, 2, 4), (1, 2, 2))


def error(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return (a - b).square().mean((2, 3, 4)).numpy()


def test_jumps_are_measured_at_their_period_and_size() -> None:
    model, clips = build().eval(), clip(14)
    found = jump_measures(model, clips, 10, 1, torch.Generator())
    assert set(found) == {f"jumps {k}:{name}" for k in (2, 4) for name in ("mse", "persistence", "rollout")}
    seen, pyramid = clips["video"][:, :CONTEXT], video_pyramid(clips["video"], (1, 2, 4), dtype=torch.float32)
    near = rollout(model, seen, clips["actions"], 10)
    for i, k in ((1, 2), (2, 4)):
        truth = torch.stack([pyramid[i][:, CONTEXT - 1 + k * jump] for jump in range(1, 10 // k + 1)], dim=1)
        jumped = rollout_in_jumps(model, seen, clips["actions"], 10 // k, i)
        assert found[f"jumps {k}:mse"] == pytest.approx(error(jumped, truth))
        last = pyramid[i][:, CONTEXT - 1].unsqueeze(1)
        assert found[f"jumps {k}:persistence"] == pytest.approx(error(last, truth))
        (small,) = video_pyramid(near[:, k - 1 :: k][:, : 10 // k], (2**i,))
        assert found[f"jumps {k}:rollout"] == pytest.approx(error(small, truth))
    metrics = jump_summary(found, 0)
    assert len(metrics["2"]["psnr"]) == len(metrics["2"]["rollout_psnr_95"]) == 5 and len(metrics["4"]["psnr"]) == 2


def test_jumps_of_an_upsampler_are_measured_at_full_size() -> None:
    model, clips = build(horizons=UPSAMPLED, upsampler=8, upsampling="analogy").eval(), clip(9)
    found = jump_measures(model, clips, 5, 1, torch.Generator())
    small = rollout_in_jumps(model, clips["video"][:, :CONTEXT], clips["actions"], 2, 1)
    on_top = rollout_in_jumps(model, clips["video"][:, :CONTEXT], clips["actions"], 2, 1, full_size=True)
    (truth,) = video_pyramid(clips["video"][:, [5, 7]], (1,), dtype=torch.float32)
    plain = F.interpolate(small.flatten(0, 1), scale_factor=2).view(truth.shape)
    assert found["jumps 2@1/2:full_size"] == pytest.approx(error(on_top, truth))
    assert found["jumps 2@1/2:enlarged"] == pytest.approx(error(plain, truth))
    assert "jumps 2@1/1:mse" in found and "jumps 2@1/1:full_size" not in found and "jumps 4:rollout" not in found


def test_the_best_of_several_rollouts_of_a_clip_is_measured() -> None:
    torch.manual_seed(0)
    model, clips = build(latent=3).eval(), clip(14)
    for embed in model.heads.latents.embed:  # type: ignore[union-attr]
        torch.nn.init.normal_(embed.weight)
    found = jump_measures(model, clips, 10, 3, torch.Generator().manual_seed(2))
    generator, (seen, actions) = torch.Generator().manual_seed(2), (clips["video"][:, :CONTEXT], clips["actions"])
    pyramid = video_pyramid(clips["video"], (1, 2, 4), dtype=torch.float32)
    for i, k in ((1, 2), (2, 4)):
        truth = pyramid[i][:, CONTEXT - 1 + k :: k][:, : 10 // k]
        options: dict[str, Any] = {"temperature": 1.0, "generator": generator}
        drawn = [error(rollout_in_jumps(model, seen, actions, 10 // k, i, **options), truth) for _ in range(3)]
        best = [min((errors[b] for errors in drawn), key=np.mean) for b in range(2)]
        assert found[f"jumps {k}:best"] == pytest.approx(np.stack(best))
        assert found[f"jumps {k}:draws"] == pytest.approx(np.mean(drawn, axis=0))


def test_a_run_with_an_analogy_is_evaluated(tmp_path: Path) -> None:
    moving_squares(tmp_path / "data")
    small = small_config(tmp_path / "data")
    heads = replace(small.model.heads, horizons=UPSAMPLED, upsampler=8, upsampling="analogy", consistency=None)
    heads = replace(heads, blocks=(0, 0, 1), patch_sizes=(4, 4, 4))
    config = replace(small, model=replace(small.model, heads=heads), steps=3)
    train(config, tmp_path / "run", progress=False)
    options: dict[str, Any] = {"clips": 6, "batch": 3, "progress": False, "probes": False}
    metrics = evaluate(tmp_path / "run", jumps=True, **options)
    low, high = metrics["upsampler_gain_95"]["2@1/1"]
    assert low <= metrics["psnr"]["2@1/1"] - metrics["enlarged_psnr"]["2@1/1"] <= high
    assert len(metrics["jumps"]["2@1/2"]["full_size_psnr"]) == 4 and len(metrics["jumps"]["4"]["psnr"]) == 2
    page = write_report(tmp_path / "run").read_text()
    assert "plainly enlarged" in page and "Rollouts in jumps" in page
    assert "jumps" not in evaluate(tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("heads", "clip", "message"),
    [
        ({"horizons": Horizons((1,), (1,)), "patch_sizes": (4,)}, 12, "jumps need pixels or latents, and a horizon of"),
        ({}, 7, "jumps need clips of at least 4 frames and the longest offset, 4; got 7"),
    ],
)
def test_jumps_that_do_not_fit_are_refused(tmp_path: Path, heads: dict[str, Any], clip: int, message: str) -> None:
    moving_squares(tmp_path / "data")
    small = small_config(tmp_path / "data")
    given = {"blocks": None, "weights": None, "consistency": None, **heads}
    config = replace(small, steps=1, clip=clip, model=replace(small.model, heads=replace(small.model.heads, **given)))
    train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "run", jumps=True, clips=2, progress=False)
