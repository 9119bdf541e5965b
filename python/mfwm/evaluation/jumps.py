"""Evaluation of rollouts in jumps: one far horizon fed back, at its own period and size, as MSPred's levels tick.

Each is compared with the last frame seen and, where the model can be rolled out frame by frame, with that rollout at
the same frames and size. With an upsampler, jumps at low resolution are also measured at full size, enlarged by it and
without it. With latents, several rollouts are drawn of each clip, and the best one is measured, as in SVG.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfwm_kernels import video_pyramid

from ..metrics.intervals import interval
from ..metrics.quality import psnr
from ..models.rollouts import rollout, rollout_in_jumps
from ..models.upsampler import enlarged
from ..models.world_model import WorldModel, WorldModelConfig
from .closed_loop import CONTEXT, can_roll_out

# What the measures of a horizon's jumps begin with; its label and a colon follow.
PREFIX = "jumps "


def check_jumps(config: WorldModelConfig, length: int) -> None:
    """ValueError unless clips of so many frames have room for a jump of every far horizon."""
    heads = config.heads
    if heads.output == "tokens" or heads.conditioning == "frames" or heads.horizons.offsets[-1] < 2:
        raise ValueError(
            "jumps need pixels or latents, and a horizon of offset 2 or more that forecasts from what has been seen; "
            f'got output "{heads.output}", conditioning "{heads.conditioning}", {heads.horizons}'
        )
    if length < CONTEXT + heads.horizons.offsets[-1]:
        raise ValueError(
            f"jumps need clips of at least {CONTEXT} frames and the longest offset, {heads.horizons.offsets[-1]}; "
            f"got {length}"
        )


def jump_measures(
    model: WorldModel, clips: dict[str, Tensor], steps: int, samples: int, generator: torch.Generator
) -> dict[str, np.ndarray]:
    """Squared errors [clips, jumps] of the jumps that fit into `steps` frames after the first CONTEXT of the clips.

    By "jumps LABEL:NAME", for the label of each horizon of offset 2 or more and the names mse, persistence and, where
    the model can be rolled out, rollout, all at the horizon's size; of the one that an upsampler enlarges, also
    full_size and enlarged, both at full size; with latents, best and draws: the rollout of the least mean error among
    `samples` drawn ones of each clip, and the mean over all of them.
    """
    video, actions, horizons = clips["video"], clips["actions"], model.config.heads.horizons
    seen = video[:, :CONTEXT]
    found: dict[str, np.ndarray] = {}
    pyramid = video_pyramid(video, horizons.factors, dtype=torch.float32)
    (full,) = video_pyramid(video, (1,), dtype=torch.float32)
    rolled = rollout(model, seen, actions, steps) if can_roll_out(model.config) else None
    for i, (offset, factor, label) in enumerate(zip(horizons.offsets, horizons.factors, horizons.labels, strict=True)):
        count = steps // offset
        if offset < 2 or count == 0:
            continue
        ahead = slice(CONTEXT - 1 + offset, CONTEXT + count * offset, offset)
        truth = pyramid[i][:, ahead]
        jumped = rollout_in_jumps(model, seen, actions, count, i)
        pairs = {"mse": (jumped, truth), "persistence": (pyramid[i][:, CONTEXT - 1 : CONTEXT], truth)}
        if rolled is not None:
            pairs["rollout"] = (video_pyramid(rolled[:, offset - 1 : count * offset : offset], (factor,))[0], truth)
        if model.heads.upsampler is not None and i == 1:
            on_top = rollout_in_jumps(model, seen, actions, count, i, full_size=True)
            pairs |= {"full_size": (on_top, full[:, ahead]), "enlarged": (enlarged(jumped, factor), full[:, ahead])}
        errors = {name: squared_errors(*pair) for name, pair in pairs.items()}
        if model.heads.latents is not None:
            draws: dict[str, Any] = {"temperature": 1.0, "generator": generator}
            drawn = (rollout_in_jumps(model, seen, actions, count, i, **draws) for _ in range(samples))
            errors |= best_and_mean(torch.stack([squared_errors(frames, truth) for frames in drawn]))
        found |= {f"{PREFIX}{label}:{name}": error.cpu().numpy() for name, error in errors.items()}
    return found


def squared_errors(predicted: Tensor, truth: Tensor) -> Tensor:
    """[B, T] of frames [B, T, C, h, w]."""
    return (predicted - truth).square().mean((2, 3, 4))


def best_and_mean(errors_SBT: Tensor) -> dict[str, Tensor]:
    """Of S rollouts of each clip, the errors [B, T] of the one whose mean error is least, and the means over all."""
    chosen = errors_SBT.mean(2).argmin(0)
    return {"best": errors_SBT[chosen, torch.arange(len(chosen), device=chosen.device)], "draws": errors_SBT.mean(0)}


def jump_summary(measures: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """By label: "psnr" and those of the other names of jump_measures, by jump, each with its 95% interval."""
    metrics: dict[str, Any] = {}
    for name, values in measures.items():
        if not name.startswith(PREFIX):
            continue
        label, of = name.removeprefix(PREFIX).split(":")
        key = "psnr" if of == "mse" else f"{of}_psnr"
        metrics.setdefault(label, {})[key] = psnr(values.mean(0)).tolist()
        metrics[label][f"{key}_95"] = interval(seed, psnr, values)
    return metrics
