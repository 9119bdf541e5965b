"""Training of a world model on clips of a replay buffer: mfwm train."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfwm_kernels import Horizons

from ..data.replay import Replay
from ..metrics.quality import psnr
from ..models.maskgit import training_mask
from ..models.world_model import WorldModel, WorldModelConfig
from .run_config import read
from .trainer import Objective, TrainerConfig, load_trained, train_on_replay
from .validation import prediction_strips, validation_figures


@dataclass(frozen=True)
class TrainingConfig(TrainerConfig):
    """One training run of a world model.

    Args:
        model: its sizes and heads.
    """

    model: WorldModelConfig = field(default_factory=WorldModelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest = max(5, 1 + min(self.model.heads.horizons.offsets))
        if self.clip < shortest:
            raise ValueError(f"clip must be >= {shortest} (four frames to see and one to roll out), got {self.clip}")

    @property
    def frames_per_step(self) -> int:
        return self.batch * min(self.clip, self.model.context)


class WorldModelLoss(Objective):
    """The multi-frame loss of a world model."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.model = model
        heads = model.config.heads
        # Losses of different kinds are in different units: viewers show "2_gaussian" beside "1".
        labels = zip(heads.horizons.labels, heads.kinds, strict=True)
        self.names = [label if kind == "mse" else f"{label}_{kind}" for label, kind in labels]

    def random_inputs(self, clips: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.model.config.masked:
            return {}
        video = clips["video"]
        return {"token_mask": training_mask(video.shape[0], video.shape[1], self.model.grid, video.device)}

    def counts(self, clips: dict[str, Tensor]) -> Tensor:
        config = self.model.config
        if config.heads.weighting == "gradients" or config.heads.surgery:
            raise ValueError(
                'weighting "gradients" and surgery need the gradients of a whole batch at once: '
                "processes * accumulate must be 1"
            )
        segments, mask = clips["segment_ids"], clips.get("token_mask")
        return positions_that_count(config.heads.horizons, segments, config.context, mask)

    def forward(self, clips: dict[str, Tensor], shares: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.model(
            clips["video"],
            clips.get("actions"),
            clips["segment_ids"],
            token_mask=clips.get("token_mask"),
            shares=shares,
        )
        figures = {"per_horizon": loss.per_horizon, "consistency": loss.consistency}
        if loss.accuracy is not None:
            figures["accuracy"] = loss.accuracy
        if shares is not None:
            for name, means in figures.items():
                of_pairs = shares[0] if means.ndim == 1 else shares
                figures[name] = means * (of_pairs if name == "consistency" else shares.diagonal())
        return loss.total, figures

    def validate(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        # Pictures first: the backward in validation_figures makes FSDP release the gathered weights.
        pictures = prediction_strips(self.model, clips)
        found: dict[str, Any] = {name: value.tolist() for name, value in validation_figures(self.model, clips).items()}
        if self.model.config.heads.output == "pixels":
            found["psnr"] = [psnr(error) for error in found.get("squared_error", found["per_horizon"])]
        return found, pictures


def objective_of(config: TrainingConfig) -> WorldModelLoss:
    return WorldModelLoss(WorldModel(config.model))


def positions_that_count(
    horizons: Horizons, segment_ids: Tensor, context: int, token_mask: Tensor | None = None
) -> Tensor:
    """[K, K]: on the diagonal the positions where each horizon counts, at [i, j] those of the consistency of i and j.

    segment_ids [B, V]; the horizons are predicted from the first `context` frames of it. With token_mask [B, V, H, W],
    a horizon of offset 0 counts in cells: those with a masked token.
    """
    frames = segment_ids.shape[1]
    offsets, positions = horizons.offsets, min(frames, context)
    valid = [horizons.valid(i, positions, frames, segment_ids) for i in range(len(offsets))]
    counts = torch.zeros(len(offsets), len(offsets), device=segment_ids.device)
    for i, j in itertools.combinations_with_replacement(range(len(offsets)), 2):
        # The far prediction at n against the near one at n + apart.
        apart = offsets[j] - offsets[i]
        both = valid[j][:, : max(0, positions - apart)] & valid[i][:, apart:]
        if i == j and offsets[i] == 0 and token_mask is not None:
            cells = F.max_pool2d(token_mask[:, :positions].float(), horizons.factors[i]) > 0
            both = both[..., None, None] & cells
        counts[i, j] = both.sum()
    return counts


def train(config: TrainingConfig, out: Path, *, progress: bool = True, stop_after: int | None = None) -> WorldModel:
    """Train in `out`, or resume the run with the same config and data set there. Returns the model.

    Signals and stop_after as in Trainer.fit.
    """
    return train_on_replay(objective_of, config, out, progress, stop_after).model


def for_replay(config: TrainingConfig, replay: Replay) -> TrainingConfig:
    """The config with the frame size and actions of the data."""
    if config.model.heads.vocabulary != replay.vocabulary:
        raise ValueError(
            f"model.heads.vocabulary must be that of the data, {replay.vocabulary} (0 for pixels), "
            f"got {config.model.heads.vocabulary}"
        )
    model = replace(
        config.model,
        frame=replay.frame,
        actions=replay.actions or 0,
        action_size=0 if replay.actions else replay.action.shape[1],
    )
    return replace(config, model=model)


def load_config(run: Path) -> TrainingConfig:
    """The config that a run was started with. ValueError names file, rule and value where it is not valid."""
    return read(TrainingConfig, run)[0]


def load_model(run: Path) -> tuple[WorldModel, TrainingConfig, int]:
    """The trained model of a run (its moving average, where it keeps one), its config and its step."""
    objective, config, step = load_trained(TrainingConfig, objective_of, run)
    return objective.model.eval(), config, step
