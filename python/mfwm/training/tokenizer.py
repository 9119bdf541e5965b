"""mfwm train-tokenizer: a tokenizer on clips of a replay buffer, and how well other frames come back from its ids."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfwm_kernels import video_pyramid

from ..data.replay import Clips, Replay, split_levels
from ..metrics.intervals import check_draw
from ..metrics.quality import check_size, psnr, similarity, squared_error
from ..models.looking import strip
from ..models.tokenizer import Tokenizer, TokenizerConfig
from ..models.world_model import parameters_of
from .checkpoints import write_atomically
from .data_identity import open_data
from .json_values import as_json, finite
from .run_config import read
from .run_log import column, read_log
from .trainer import Objective, TrainerConfig, load_weights, train_on_replay


@dataclass(frozen=True)
class TokenizerTraining(TrainerConfig):
    """One training run of a tokenizer. Small batches: many steps are worth more to it than sure ones.

    Args:
        model: its sizes.
    """

    steps: int = 1500
    batch: int = 2
    clip: int = 8
    lr: float = 3e-3
    model: TokenizerConfig = field(default_factory=TokenizerConfig)


class TokenizerLoss(Objective):
    """The squared error of the frames that come back: a mean over all of them, so parts count alike."""

    def __init__(self, model: Tokenizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: dict[str, Tensor], shares: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(clips["video"], clips["segment_ids"]).total, {}

    def look(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        frames = self.model.decode(self.model.encode(clips["video"], clips["segment_ids"]), clips["segment_ids"])
        (truth,) = video_pyramid(clips["video"], (1,), dtype=torch.float32)
        error = squared_error(frames, truth).mean().item()
        return {"psnr": [psnr(error)]}, {"frames": strip(list(truth[0]), list(frames[0]))}


def train_tokenizer(
    config: TokenizerTraining, out: Path, *, progress: bool = True, stop_after: int | None = None
) -> Tokenizer:
    """Train in `out`, or resume where a run with the same config stopped, as `train` does. Returns the tokenizer."""
    return train_on_replay(lambda: TokenizerLoss(Tokenizer(config.model)), config, out, progress, stop_after).model


def load_tokenizer(run: Path) -> tuple[Tokenizer, TokenizerTraining, int]:
    """The trained tokenizer of a run, its config and the step it stands at."""
    config, _ = read(TokenizerTraining, run)
    model = Tokenizer(config.model)
    step = load_weights(TokenizerLoss(model), run, averaged=config.ema > 0)
    return model.eval().requires_grad_(False), config, step


def evaluate_tokenizer(
    run: Path, *, data: str | Path | None = None, clips: int = 96, batch: int = 8, seed: int = 0
) -> dict[str, Any]:
    """PSNR and SSIM of reconstructed held-out frames; writes metrics.json beside the checkpoint and returns it.

    data: where the run's data set is, if it was moved.
    """
    run = Path(run)
    check_draw(clips=clips, batch=batch, seed=seed)
    config, known = read(TokenizerTraining, run)
    check_size(config.model.frame)
    log = run / "log.jsonl"
    seconds = sum(column(read_log(log), "seconds", log))
    replay = open_data(config.data, known, data)
    model, _, step = load_tokenizer(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    _, held_out = split_levels(replay, config.held_out, seed=config.seed)
    source = Clips(replay, config.clip, episodes=held_out)
    chosen = np.random.default_rng(seed).choice(len(source), size=min(clips, len(source)), replace=False)
    errors, likeness, used = [], [], np.zeros(config.model.vocabulary)
    for start in range(0, len(chosen), batch):
        held = {name: value.to(device) for name, value in source.batch(np.sort(chosen[start : start + batch])).items()}
        ids = model.encode(held["video"], held["segment_ids"])
        frames = model.decode(ids, held["segment_ids"])
        (truth,) = video_pyramid(held["video"], (1,))
        errors.append(squared_error(frames, truth).cpu().numpy())
        likeness.append(similarity(frames, truth))
        used += np.bincount(ids.flatten().cpu(), minlength=len(used))
    share = used[used > 0] / used.sum()
    metrics = {
        "psnr": float(psnr(np.concatenate(errors).mean())),
        "ssim": float(np.concatenate(likeness).mean()),
        "vocabulary": config.model.vocabulary,
        "ids_used": len(share),
        "bits_per_token": float(-(share * np.log2(share)).sum()),
        "tokens_per_frame": int(np.prod(config.model.grid)),
        "steps": step,
        "training_seconds": seconds,
        "parameters": parameters_of(model),
        "clips": len(chosen),
        "held_out_levels": len(np.unique(replay.episode_level[held_out])),
    }
    write_atomically(run / "metrics.json", as_json(metrics, indent=2).encode())
    return finite(metrics)


def for_pixels(config: Any) -> Any:
    """A config of a tokenizer or latent action model with the frame size of its data, which must be pixels."""
    replay = Replay(config.data)
    if replay.vocabulary:
        raise ValueError(f"data must be pixels, but {config.data} holds tokens")
    return replace(config, model=replace(config.model, frame=replay.frame))
