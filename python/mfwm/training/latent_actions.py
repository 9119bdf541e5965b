"""Training of a latent action model on clips of a replay buffer: mfwm train-latent-actions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfwm_kernels import Horizons, video_pyramid

from ..metrics.quality import psnr
from ..models.latent_actions import LatentActions, LatentActionsConfig
from .trainer import Objective, TrainerConfig, load_trained, train_on_replay
from .validation import strip
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

    def __init__(self, config: LatentActionsTraining) -> None:
        super().__init__()
        self.model = LatentActions(config.model)

    def counts(self, clips: dict[str, Tensor]) -> Tensor:
        return positions_that_count(Horizons.next_frame(), clips["segment_ids"], self.model.config.context)

    def forward(self, clips: dict[str, Tensor], shares: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        total = self.model(clips["video"], clips["segment_ids"]).total
        return total if shares is None else total * shares[0, 0], {}

    def validate(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    """Train in `out`, or resume the run with the same config there, as `train` does. Returns the model."""
    return train_on_replay(LatentActionsLoss, config, out, progress, stop_after).model


def load_latent_actions(run: Path) -> tuple[LatentActions, LatentActionsTraining, int]:
    """The trained model of a run, its config and its step."""
    objective, config, step = load_trained(LatentActionsTraining, LatentActionsLoss, run)
    return objective.model.eval().requires_grad_(False), config, step
