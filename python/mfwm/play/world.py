"""What a run offers to play: its model, the real frames it can start from, its actions, and its level of drift."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.replay import Replay, split_levels
from ..evaluation.closed_loop import can_roll_out
from ..evaluation.held_out import device_for_evaluation
from ..evaluation.tokens import check_tokens, decoder_of
from ..models.tokenizer import Tokenizer
from ..models.world_model import WorldModel
from ..training.data_identity import open_data
from ..training.run_config import read
from ..training.world_model import TrainingConfig, load_model
from .actions import Actions, actions_of


@dataclass(frozen=True)
class Panel:
    """A horizon that is shown: its index in the model's heads, how many frames ahead it sees, and how much smaller."""

    index: int
    offset: int
    factor: int


@dataclass
class World:
    """replay has what the model reads, and pictures the pixels behind it: the same set unless the frames are tokens."""

    run: Path
    model: WorldModel
    step: int
    config: TrainingConfig
    device: torch.device
    replay: Replay
    pictures: Replay
    episodes: np.ndarray
    tokenizer: Tokenizer | None
    actions: Actions
    panels: list[Panel]
    level: float | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture."""
        _, height, width = self.pictures.frame
        return height, width

    @property
    def env(self) -> str:
        return str(self.replay.attributes.get("env", ""))

    @property
    def samples(self) -> bool:
        """Whether frames can be drawn at a temperature."""
        return self.model.tokens or self.model.heads.draws(near_only=True)


def load_world(
    run: Path, *, data: str | Path | None = None, pixels: str | Path | None = None, tokenizer: Path | None = None
) -> World:
    """The world of a run; data, pixels, tokenizer as in evaluate. ValueError where it has no next picture."""
    run = Path(run)
    config, digest = read(TrainingConfig, run)
    heads = config.model.heads
    check_tokens(config.model, pixels=pixels, tokenizer=tokenizer)
    if heads.output == "latents":
        raise ValueError(f"{run} predicts latents, which have no pictures: play needs a run on pixels or tokens")
    if not can_roll_out(config.model):
        raise ValueError(
            f"{run} cannot be rolled out: that needs a near horizon of offset 1 (masked: 0) and factor 1, got "
            f"{heads.horizons}"
        )
    model, _, step = load_model(run)
    device = device_for_evaluation()
    replay = open_data(config.data, digest, data)
    _, episodes = split_levels(replay, config.held_out, seed=config.seed)
    decoder = None
    if model.tokens:
        decoder = decoder_of(replay, 1, episodes, device, pixels=pixels, tokenizer=tokenizer)
        if decoder is None:
            raise ValueError(f"{replay.path} was imported without a tokenizer, so its tokens have no pictures to show")
    pictures = replay if decoder is None else decoder.clips.replay
    if pictures.frame[0] != 3:
        raise ValueError(f"play shows frames of 3 channels, and those of {pictures.path} have {pictures.frame[0]}")
    return World(
        run=run,
        model=model.to(device),
        step=step,
        config=config,
        device=device,
        replay=replay,
        pictures=pictures,
        episodes=episodes,
        tokenizer=None if decoder is None else decoder.tokenizer,
        actions=actions_of(config.model, replay),
        panels=panels_of(model),
        level=drift_level(run / "clips.npz"),
    )


def panels_of(model: WorldModel) -> list[Panel]:
    """The horizons that forecast a later frame from what has been seen."""
    heads = model.config.heads
    horizons = heads.horizons
    near_only = heads.conditioning == "frames" or heads.token_targets == "tokenised"
    pairs = zip(horizons.offsets, horizons.factors, strict=True)
    panels = [Panel(i, offset, factor) for i, (offset, factor) in enumerate(pairs) if offset > 0]
    return [panel for panel in panels if panel.index == 0] if near_only else panels


def drift_level(path: Path) -> float | None:
    """The disagreement of the far horizons at which half of the evaluated rollouts had grown worse than their start.

    The median, over clips and steps of the evaluation whose picture was worse than the last true frame repeated. None
    without an evaluation, or where that never happened.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as measures:
            needed = ("drift", "rollout_mse", "persistence_rollout_mse")
            if any(name not in measures for name in needed):
                return None
            drift, errors, baseline = (np.asarray(measures[name], float) for name in needed)
    except (ValueError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; evaluate the run again") from error
    worse = (errors > baseline) & np.isfinite(drift)
    return float(np.median(drift[worse])) if worse.any() else None


def describe(world: World) -> dict[str, Any]:
    """What the page is told about the world when it connects."""
    height, width = world.size
    return {
        "run": world.run.name,
        "env": world.env,
        "step": world.step,
        "steps": world.config.steps,
        "height": height,
        "width": width,
        "panels": [{"offset": panel.offset, "factor": panel.factor} for panel in world.panels],
        "actions": world.actions.described(),
        "level": world.level,
        "unit": "nats" if world.model.tokens else "dB",
        "samples": world.samples,
    }
