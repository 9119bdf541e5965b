"""Training of a video tokenizer on clips of a replay buffer: mfwm train-tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfwm_kernels import arguments as check
from mfwm_kernels import video_pyramid

from ..data.replay import Replay
from ..metrics.quality import psnr, squared_error
from ..models.tokenizer import Tokenizer, TokenizerConfig
from .trainer import Objective, TrainerConfig, load_trained, train_on_replay
from .validation import strip


@dataclass(frozen=True)
class TokenizerTraining(TrainerConfig):
    """One training run of a tokenizer.

    Small batches on purpose: for the same compute, many noisy steps do better than a few precise ones.

    Args:
        factor: the frames are box averages, smaller by this; mfwm encode then writes them as targets beside the ids of
            the frames themselves.
        model: its sizes.
    """

    factor: int = 1
    steps: int = 1500
    batch: int = 2
    clip: int = 8
    lr: float = 3e-3
    model: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check.integer("factor", self.factor, least=1)


class TokenizerLoss(Objective):
    """Mean squared reconstruction error. Every part of a batch holds as many elements, so `counts` is not needed."""

    def __init__(self, config: TokenizerTraining) -> None:
        super().__init__()
        self.model, self.factor = Tokenizer(config.model), config.factor

    def forward(self, clips: dict[str, Tensor], shares: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(smaller(clips["video"], self.factor), clips["segment_ids"]).total, {}

    def validate(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        video = smaller(clips["video"], self.factor)
        frames = self.model.decode(self.model.encode(video, clips["segment_ids"]), clips["segment_ids"])
        (truth,) = video_pyramid(video, (1,), dtype=torch.float32)
        error = squared_error(frames, truth).mean().item()
        return {"psnr": [psnr(error)]}, {"frames": strip(list(truth[0]), list(frames[0]))}


def train_tokenizer(
    config: TokenizerTraining, out: Path, *, progress: bool = True, stop_after: int | None = None
) -> Tokenizer:
    """Train in `out`, or resume the run with the same config there, as `train` does. Returns the tokenizer."""
    return train_on_replay(TokenizerLoss, config, out, progress, stop_after).model


def load_tokenizer(run: Path) -> tuple[Tokenizer, TokenizerTraining, int]:
    """The trained tokenizer of a run, its config and its step."""
    objective, config, step = load_trained(TokenizerTraining, TokenizerLoss, run)
    return objective.model.eval().requires_grad_(False), config, step


def smaller(video: Tensor, factor: int) -> Tensor:
    """Box averages of frames, in fp32; the frames as they are for a factor of 1."""
    return video if factor == 1 else video_pyramid(video, (factor,), dtype=torch.float32)[0]


def for_pixels(config: Any) -> Any:
    """The config of a tokenizer or latent action model with the frame size of its data, which must be pixels."""
    replay = Replay(config.data)
    if replay.vocabulary:
        raise ValueError(f"data must be pixels, but {config.data} holds tokens")
    channels, height, width = replay.frame
    factor = config.factor if isinstance(config, TokenizerTraining) else 1
    if height % factor or width % factor:
        raise ValueError(f"factor must divide the frames of {config.data}, {height} x {width}, got {factor}")
    return replace(config, model=replace(config.model, frame=(channels, height // factor, width // factor)))
