"""Closed-loop rollouts of held-out clips, measured frame by frame, beside pictures that anyone could have named.

A rollout starts from CONTEXT true frames. Copying the last of them and the mean image of the training levels are the
baselines: long rollouts of a world whose view moves end near the mean image, which is the better of the two there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfwm_kernels import video_pyramid

from ..data.replay import Replay
from ..metrics.intervals import drift_signal, interval
from ..metrics.lpips import LPIPS
from ..metrics.quality import psnr, similarity
from ..models.rollouts import rollout, rollout_with_drift
from ..models.world_model import WorldModel, WorldModelConfig
from .positions import PositionReader, frames_of, position_measures
from .tokens import Decoder

# Genie measures controllability after this many closed-loop steps.
DELTA_STEP = 4
CONTEXT = 4
# Frames of the training levels that their mean image is computed from.
MEAN_IMAGE_FRAMES = 2000

# Measurements of every clip, by name: [clips, steps], or [clips, steps, objects].
Measures = dict[str, np.ndarray]


def closed_loop(
    model: WorldModel,
    clips: dict[str, Tensor],
    steps: int,
    mean_image: Tensor,
    *,
    distance: LPIPS | None = None,
    decoder: Decoder | None = None,
    reader: PositionReader | None = None,
    sampling: dict[str, Any] | None = None,
) -> Measures:
    """Measures [clips, steps] of a rollout of `steps` frames from CONTEXT frames: squared errors, also of persistence,
    of the mean image [C, height, width], and with shuffled actions; SSIM; LPIPS; drift, the mean over the far horizons,
    NaN where none had predicted the frame; and with a reader position_measures, for which clips["positions"] is
    [clips, CONTEXT + steps or more, objects, 2]. sampling: temperature and generator of the rollouts; None: nothing is
    drawn."""
    video, actions = clips["video"], clips["actions"]
    (truth,) = video_pyramid(video if decoder is None else clips["pixels"], (1,), dtype=torch.float32)
    seen = video[:, :CONTEXT]
    drift, drawn = None, sampling or {}
    if has_drift(model):
        rolled, drift_of_horizons = rollout_with_drift(model, seen, actions, steps, **drawn)
        far = [i for i, k in enumerate(model.config.heads.horizons.offsets) if k > 1]
        drift = drift_of_horizons[..., far].nanmean(-1)
    else:
        rolled = rollout(model, seen, actions, steps, **drawn)
    shuffled = torch.cat([actions[:, : CONTEXT - 1], shuffle(actions)[:, CONTEXT - 1 :]], dim=1)
    rolled_shuffled = rollout(model, seen, shuffled, min(steps, DELTA_STEP), **drawn)
    if decoder is not None:
        rolled, rolled_shuffled = (
            decoder.pictures(torch.cat([seen, ids], dim=1), CONTEXT) for ids in (rolled, rolled_shuffled)
        )
    persistence = truth[:, CONTEXT - 1 : CONTEXT].expand(-1, steps, -1, -1, -1)
    future = truth[:, CONTEXT : CONTEXT + steps]

    def per_step(pictures: Tensor) -> np.ndarray:
        return (pictures - future[:, : pictures.shape[1]]).square().mean(dim=(2, 3, 4)).cpu().numpy()

    measures = {
        "rollout_mse": per_step(rolled),
        "persistence_rollout_mse": per_step(persistence),
        "mean_image_rollout_mse": per_step(mean_image.expand_as(future)),
        "shuffled_mse": per_step(rolled_shuffled),
        "rollout_ssim": similarity(rolled, future),
        "persistence_rollout_ssim": similarity(persistence, future),
    }
    if decoder is not None:
        measures["tokenised_rollout_mse"] = per_step(decoder.pictures(video[:, : CONTEXT + steps], CONTEXT))
    if drift is not None:
        measures["drift"] = drift.cpu().numpy()
    if distance is not None:
        for name, pictures in (("rollout_lpips", rolled), ("persistence_rollout_lpips", persistence)):
            distances = distance(pictures.flatten(0, 1).clamp(-1, 1), future.flatten(0, 1))
            measures[name] = distances.view(future.shape[:2]).cpu().numpy()
    if reader is not None:
        known = clips["positions"][:, CONTEXT - 1 : CONTEXT + steps]
        measures |= position_measures(reader, rolled, future, known)
    return measures


def mean_image(replay: Replay, episodes: np.ndarray) -> Tensor:
    """The mean [C, height, width] in [-1, 1] of evenly spaced frames of these episodes, MEAN_IMAGE_FRAMES at most."""
    numbers = frames_of(replay, episodes)
    chosen = numbers[np.linspace(0, len(numbers) - 1, min(MEAN_IMAGE_FRAMES, len(numbers))).astype(np.int64)]
    parts = np.array_split(chosen, -(-len(chosen) // 256))
    mean = sum(replay.read(part).sum(0, dtype=np.float64) for part in parts) / len(chosen)
    return torch.from_numpy((mean / 127.5 - 1).astype(np.float32)).permute(2, 0, 1)


def has_drift(model: WorldModel) -> bool:
    """Whether far horizons forecast what the frames of a rollout show."""
    heads = model.config.heads
    return heads.horizons.offsets[-1] > 1 and heads.conditioning != "frames" and heads.token_targets == "pooled"


def can_roll_out(config: WorldModelConfig) -> bool:
    """Whether the near horizon predicts the next frame at full size (masked: the frame itself), to be fed back."""
    horizons = config.heads.horizons
    return (horizons.offsets[0], horizons.factors[0]) == (0 if config.masked else 1, 1)


def shuffle(actions: Tensor) -> Tensor:
    """Give each clip another clip's actions (in a batch of one: its own, reversed)."""
    return actions.flip(1) if len(actions) == 1 else actions.roll(1, dims=0)


def rollout_summary(measures: Measures, seed: int, *, controlled: bool) -> dict[str, Any]:
    """Metrics of closed_loop with 95% intervals over clips; those of actions only if the model has some.

    gain: PSNR over the better, at that step, of copying the last frame seen and the mean image. gain_zero_step: the
    first step at which it is not positive; None if there is none.
    """

    def gain(errors: np.ndarray, others: np.ndarray) -> list[list[float]]:
        return interval(seed, lambda a, b: psnr(a) - psnr(b), errors, others)

    def gain_over_better(errors: np.ndarray, *others: np.ndarray) -> np.ndarray:
        return psnr(errors) - psnr(np.minimum(*others))

    means = {name: values.mean(0) for name, values in measures.items()}
    rolled = measures["rollout_mse"]
    metrics: dict[str, Any] = {"rollout_context": CONTEXT, "rollout_steps": rolled.shape[1]}
    for name, values in measures.items():
        if "rollout_" in name:
            statistic = psnr if name.endswith("mse") else np.asarray
            label = name.replace("mse", "psnr")
            metrics |= {label: statistic(means[name]).tolist(), f"{label}_95": interval(seed, statistic, values)}
    metrics["rollout_gain_95"] = gain(rolled, measures["persistence_rollout_mse"])
    compared = ("rollout_mse", "persistence_rollout_mse", "mean_image_rollout_mse")
    gains = gain_over_better(*(means[name] for name in compared))
    metrics |= {
        "gain": gains.tolist(),
        "gain_95": interval(seed, gain_over_better, *(measures[name] for name in compared)),
        "gain_zero_step": int(np.argmax(gains <= 0)) + 1 if (gains <= 0).any() else None,
    }
    if "against_rollout_mse" in measures:
        metrics["against_gain_95"] = gain(rolled, measures["against_rollout_mse"])
    if controlled:
        last = measures["shuffled_mse"].shape[1] - 1
        metrics |= {
            "delta_psnr": float(psnr(means["rollout_mse"][last]) - psnr(means["shuffled_mse"][last])),
            "delta_psnr_95": gain(rolled[:, last:][:, :1], measures["shuffled_mse"][:, last:])[0],
            "delta_psnr_step": last + 1,
            **action_ratio(measures["shuffled_mse"], rolled[:, : last + 1], seed, "rollout_action_ratio"),
        }
    if "drift" in measures:
        metrics["drift"] = drift_signal(measures["drift"], rolled, seed)
    return metrics


def action_ratio(shuffled: np.ndarray, true: np.ndarray, seed: int, name: str) -> dict[str, Any]:
    """The mean squared error with shuffled actions over that with the true ones, and its interval, by column.

    Above 1 if the predictions follow the actions, NaN where both errors are 0. Both are [clips, columns].
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = shuffled.mean(0) / true.mean(0)
        return {name: ratio.tolist(), f"{name}_95": interval(seed, np.divide, shuffled, true)}
