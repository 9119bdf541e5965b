"""mfwm train-latent-actions: a latent action model on clips of a replay buffer, and what its codes say on others.

Delta-PSNR (Genie, arXiv 2402.15391): the PSNR of the next frame given the inferred codes, minus that given random ones.
Above 0, the decoder uses the codes. The random ones are the inferred ones in a random order: as frequent, and wrong.
Mutual information with the true actions, in bits: above that of the random codes, codes and actions have to do with
each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfwm_kernels import Horizons, video_pyramid

from ..data.replay import Clips, split_levels
from ..metrics.intervals import check_draw, interval
from ..metrics.quality import psnr, squared_error
from ..models.latent_actions import LatentActions, LatentActionsConfig
from ..models.looking import strip
from ..models.world_model import parameters_of
from .checkpoints import write_atomically
from .data_identity import open_data
from .json_values import as_json, finite
from .run_config import read
from .trainer import Objective, TrainerConfig, load_weights, train_on_replay
from .world_model import positions_that_count


@dataclass(frozen=True)
class LatentActionsTraining(TrainerConfig):
    """One training run of a latent action model.

    Args:
        model: its sizes.
    """

    steps: int = 1000
    batch: int = 2
    clip: int = 9
    lr: float = 2e-3
    model: LatentActionsConfig = field(default_factory=LatentActionsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip < 2:
            raise ValueError(f"clip must be >= 2 (a frame and the next), got {self.clip}")


class LatentActionsLoss(Objective):
    """The squared error of each next frame, given its code."""

    def __init__(self, model: LatentActions) -> None:
        super().__init__()
        self.model = model

    def counts(self, clips: dict[str, Tensor]) -> Tensor:
        return positions_that_count(Horizons.next_frame(), clips["segment_ids"], self.model.config.context)

    def forward(self, clips: dict[str, Tensor], shares: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        total = self.model(clips["video"], clips["segment_ids"]).total
        return total if shares is None else total * shares[0, 0], {}

    def look(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        video, segments = clips["video"], clips["segment_ids"]
        with torch.no_grad():
            error = self.model(video, segments).total.item()
        (truth,) = video_pyramid(video[:1], (1,), dtype=torch.float32)
        codes = self.model.infer(video[:1], segments[:1])
        predicted = self.model.predict(video[:1, :-1], codes[:, :-1], segments[:1, :-1])[0]
        return {"psnr": [psnr(error)]}, {"next": strip(list(truth[0, 1 : len(predicted) + 1]), list(predicted))}


def train_latent_actions(
    config: LatentActionsTraining, out: Path, *, progress: bool = True, stop_after: int | None = None
) -> LatentActions:
    """Train in `out`, or resume where a run with the same config stopped, as `train` does. Returns the model."""
    return train_on_replay(
        lambda: LatentActionsLoss(LatentActions(config.model)), config, out, progress, stop_after
    ).model


def load_latent_actions(run: Path) -> tuple[LatentActions, LatentActionsTraining, int]:
    """The trained model of a run, its config and the step it stands at."""
    config, _ = read(LatentActionsTraining, run)
    model = LatentActions(config.model)
    step = load_weights(LatentActionsLoss(model), run, averaged=config.ema > 0)
    return model.eval().requires_grad_(False), config, step


def evaluate_latent_actions(
    run: Path, *, data: str | Path | None = None, clips: int = 256, batch: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Delta-PSNR and mutual information on held-out clips; writes metrics.json beside the checkpoint and returns it.

    data: where the run's data set is, if it was moved.
    """
    run = Path(run)
    check_draw(clips=clips, batch=batch, seed=seed)
    config, known = read(LatentActionsTraining, run)
    replay = open_data(config.data, known, data)
    model, _, step = load_latent_actions(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    _, held_out = split_levels(replay, config.held_out, seed=config.seed)
    source = Clips(replay, min(config.clip, config.model.context + 1), episodes=held_out, within_episode=True)
    draw = np.random.default_rng(seed)
    chosen = np.sort(draw.choice(len(source), size=min(clips, len(source)), replace=False))
    parts = [source.batch(chosen[start : start + batch]) for start in range(0, len(chosen), batch)]
    inferred = [model.infer(part["video"].to(device)).cpu() for part in parts]
    codes_BT = torch.cat(inferred)[:, :-1].numpy()
    shuffled_BT = draw.permutation(codes_BT.ravel()).reshape(codes_BT.shape)

    errors: dict[str, list[np.ndarray]] = {"inferred": [], "random": [], "persistence": []}
    for start, part in zip(range(0, len(chosen), batch), parts, strict=True):
        video = part["video"].to(device)
        (frames,) = video_pyramid(video, (1,))
        for name, codes in (("inferred", codes_BT), ("random", shuffled_BT)):
            given = torch.from_numpy(codes[start : start + batch]).to(device)
            predicted = model.predict(video[:, :-1], given)
            errors[name].append(squared_error(predicted, frames[:, 1:]).cpu().numpy())
        errors["persistence"].append(squared_error(frames[:, :-1], frames[:, 1:]).cpu().numpy())
    of_clips = {name: np.concatenate(values)[:, None] for name, values in errors.items()}
    means = {name: float(psnr(values.mean())) for name, values in of_clips.items()}
    metrics: dict[str, Any] = {
        "psnr": means["inferred"],
        "random_codes_psnr": means["random"],
        "persistence_psnr": means["persistence"],
        "delta_psnr": means["inferred"] - means["random"],
        "delta_psnr_95": interval(seed, lambda a, b: psnr(a) - psnr(b), of_clips["inferred"], of_clips["random"])[0],
        "codes": config.model.codes,
        "code_shares": (np.bincount(codes_BT.ravel(), minlength=config.model.codes) / codes_BT.size).tolist(),
        "code_entropy_bits": mutual_information(codes_BT.ravel(), codes_BT.ravel()),
        "steps": step,
        "parameters": parameters_of(model),
        "clips": len(chosen),
        "held_out_levels": len(np.unique(replay.episode_level[held_out])),
    }
    if replay.actions:
        actions = torch.cat([part["actions"] for part in parts])[:, :-1].numpy().ravel()
        metrics |= {
            "mutual_information_bits": mutual_information(codes_BT.ravel(), actions),
            "mutual_information_of_random_codes_bits": mutual_information(shuffled_BT.ravel(), actions),
            "action_entropy_bits": mutual_information(actions, actions),
        }
    write_atomically(run / "metrics.json", as_json(metrics, indent=2).encode())
    return finite(metrics)


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that two columns of small integers say about each other, from their frequencies; of one with itself, its
    entropy. It is above 0 by chance, the more so the fewer the rows."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / apart[seen])).sum())
