"""mfwm evaluate: how good are the predictions on levels that the model has never seen?

PSNR = 10 log10(2^2 / MSE), pixels in -1..1, the MSE over all clips. Everything is compared with persistence: the last
frame that was seen, kept.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from mfwm_kernels import Horizons, __version__, video_pyramid
from mfwm_kernels.info import cpu_name

from .checkpoints import write_atomically
from .data import Clips, Replay, split_levels
from .model import WorldModel, parameters_of
from .run_log import read_log
from .training import load_model

PEAK = 2.0
# Genie measures controllability after this many closed-loop steps.
DELTA_STEP = 4
CONTEXT = 4
ROLLOUT_STEPS = 12


def psnr(squared_error: np.ndarray | float) -> Any:
    """dB, from a mean squared error."""
    return 10 * np.log10(PEAK**2 / np.maximum(squared_error, 1e-12))


def evaluate(run: Path, *, clips: int = 96, batch: int = 8, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Evaluate the run on its held-out levels; writes metrics.json beside the checkpoint and returns it."""
    run = Path(run)
    model, config, step = load_model(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    replay = Replay(config.data)
    _, held_out = split_levels(replay, config.held_out, seed=config.seed)
    horizons = config.model.heads.horizons
    source = Clips(replay, config.clip, episodes=held_out, within_episode=True)
    chosen = np.random.default_rng(seed).choice(len(source), size=min(clips, len(source)), replace=False)

    began = time.perf_counter()
    parts: list[dict[str, np.ndarray]] = []
    for start in tqdm(range(0, len(chosen), batch), desc="evaluate", unit="batch", disable=not progress):
        held = {name: value.to(device) for name, value in source.batch(np.sort(chosen[start : start + batch])).items()}
        rolled = closed_loop(model, held, seed + start) if rolls(horizons) else {}
        parts.append({**open_loop(model, held), **rolled})
    errors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    log = read_log(run / "log.jsonl")
    metrics = {
        **summary(errors, horizons, seed),
        "steps": step,
        "parameters": parameters_of(model),
        "frames_per_second": float(np.median([row["frames_per_second"] for row in log])),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "clips": len(chosen),
        "held_out_levels": len(np.unique(replay.episode_level[held_out])),
        "data": {
            key: replay.attributes[key] for key in ("env", "package", "package_version") if key in replay.attributes
        },
        "evaluation_seconds": time.perf_counter() - began,
        "versions": {"mfwm_kernels": __version__, "torch": torch.__version__},
    }
    write_atomically(run / "metrics.json", json.dumps(metrics, indent=2).encode())
    return metrics


def open_loop(model: WorldModel, clips: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """[clips, K] mean squared errors of every horizon, at its own resolution, over the positions that count."""
    horizons = model.config.heads.horizons
    pyramid = video_pyramid(clips["video"], horizons.factors, dtype=torch.float32)
    shuffled = shuffle(clips["actions"])
    predictions = model.predict(clips["video"], clips["actions"], clips["segment_ids"])
    misled = model.predict(clips["video"], shuffled, clips["segment_ids"])
    errors: dict[str, list[Tensor]] = {"horizon": [], "horizon_persistence": [], "horizon_shuffled": []}
    for i, offset in enumerate(horizons.offsets):
        end = min(predictions[i].shape[1], pyramid[i].shape[1] - offset)
        truth = pyramid[i][:, offset : offset + end]
        errors["horizon"].append(squared_error(predictions[i][:, :end], truth))
        errors["horizon_persistence"].append(squared_error(pyramid[i][:, :end], truth))
        errors["horizon_shuffled"].append(squared_error(misled[i][:, :end], truth))
    return {name: torch.stack(columns, 1).cpu().numpy() for name, columns in errors.items()}


def closed_loop(model: WorldModel, clips: dict[str, Tensor], seed: int) -> dict[str, np.ndarray]:
    """[clips, steps] errors of a rollout from CONTEXT frames, of persistence, and with shuffled actions; and SSIM."""
    video, actions = clips["video"], clips["actions"]
    (truth,) = video_pyramid(video, (1,), dtype=torch.float32)
    steps = rollout_steps(video)
    rolled = model.rollout(video[:, :CONTEXT], actions, steps)
    misled_actions = torch.cat([actions[:, : CONTEXT - 1], shuffle(actions)[:, CONTEXT - 1 :]], dim=1)
    misled = model.rollout(video[:, :CONTEXT], misled_actions, min(steps, DELTA_STEP))
    kept = truth[:, CONTEXT - 1 : CONTEXT].expand(-1, steps, -1, -1, -1)
    future = truth[:, CONTEXT : CONTEXT + steps]

    def per_step(pictures: Tensor) -> np.ndarray:
        return (pictures - future[:, : pictures.shape[1]]).square().mean(dim=(2, 3, 4)).cpu().numpy()

    return {
        "rollout": per_step(rolled),
        "rollout_persistence": per_step(kept),
        "rollout_shuffled": per_step(misled),
        "ssim": similarity(rolled, future),
        "ssim_persistence": similarity(kept, future),
    }


def rolls(horizons: Horizons) -> bool:
    """Only a near horizon that predicts the next frame whole can be fed back."""
    return (horizons.offsets[0], horizons.factors[0]) == (1, 1)


def names_of(horizons: Horizons) -> list[str]:
    """A name per horizon: its offset; with its factor where several horizons share an offset: "1@1/4"."""
    pairs = zip(horizons.offsets, horizons.factors, strict=True)
    return [str(k) if horizons.offsets.count(k) == 1 else f"{k}@1/{f}" for k, f in pairs]


def rollout_steps(video: Tensor) -> int:
    return min(ROLLOUT_STEPS, video.shape[1] - CONTEXT)


def similarity(pictures: Tensor, truth: Tensor) -> np.ndarray:
    """[clips, steps] structural similarity."""
    values = structural_similarity_index_measure(
        pictures.flatten(0, 1), truth.flatten(0, 1), data_range=PEAK, reduction="none"
    )
    return torch.as_tensor(values).view(truth.shape[:2]).cpu().numpy()  # type: ignore[arg-type]


def shuffle(actions: Tensor) -> Tensor:
    """Each clip gets another clip's actions (in a batch of one: its own, backwards)."""
    return actions.flip(1) if len(actions) == 1 else actions.roll(1, dims=0)


def squared_error(pictures: Tensor, truth: Tensor) -> Tensor:
    """[clips] mean squared error."""
    return (pictures - truth).square().flatten(1).mean(1)


def summary(errors: dict[str, np.ndarray], horizons: Horizons, seed: int) -> dict[str, Any]:
    """The metrics; those of rollouts only where the model can be rolled out."""
    names = names_of(horizons)

    def by_horizon(values: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(names, values, strict=True)}

    means = {name: values.mean(0) for name, values in errors.items()}
    gain = interval(errors["horizon"], errors["horizon_persistence"], seed)
    metrics = {
        "psnr": by_horizon(psnr(means["horizon"])),
        "persistence_psnr": by_horizon(psnr(means["horizon_persistence"])),
        "psnr_gain_95": dict(zip(names, gain, strict=True)),
        "delta_psnr_by_horizon": by_horizon(psnr(means["horizon"]) - psnr(means["horizon_shuffled"])),
    }
    if "rollout" not in errors:
        return metrics
    last = errors["rollout_shuffled"].shape[1] - 1
    delta = interval(errors["rollout"][:, last : last + 1], errors["rollout_shuffled"][:, last:], seed)
    return {
        **metrics,
        "delta_psnr": float(psnr(means["rollout"][last]) - psnr(means["rollout_shuffled"][last])),
        "delta_psnr_95": delta[0],
        "delta_psnr_step": last + 1,
        "rollout_context": CONTEXT,
        "rollout_psnr": psnr(means["rollout"]).tolist(),
        "persistence_rollout_psnr": psnr(means["rollout_persistence"]).tolist(),
        "rollout_ssim": means["ssim"].tolist(),
        "persistence_rollout_ssim": means["ssim_persistence"].tolist(),
    }


def interval(errors: np.ndarray, others: np.ndarray, seed: int, resamples: int = 1000) -> list[list[float]]:
    """For each column, the 95% bootstrap interval over clips of psnr(errors) - psnr(others), in dB."""
    draw = np.random.default_rng(seed).integers(len(errors), size=(resamples, len(errors)))
    gains = psnr(errors[draw].mean(1)) - psnr(others[draw].mean(1))
    return np.percentile(gains, [2.5, 97.5], axis=0).T.tolist()
