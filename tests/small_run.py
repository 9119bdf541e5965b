"""A small data set and training run for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mfwm import HeadsConfig, WorldModelConfig
from mfwm.data import ReplayWriter
from mfwm.training import TrainingConfig

from mfwm_kernels import Horizons


def moving_squares(path: Path) -> None:
    """Episodes of a bright square that goes where the action says."""
    rng = np.random.default_rng(0)
    writer = ReplayWriter(path, 16, 16, actions=4, env="squares")
    steps = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])
    for level in range(12):
        place, img = rng.integers(4, 12, 2), []
        actions = rng.integers(0, 4, 30).repeat(2)[:40]
        for action in actions:
            frame = np.full((16, 16, 3), 20 * (level % 3), np.uint8)
            frame[place[0] - 2 : place[0] + 2, place[1] - 2 : place[1] + 2] = 200
            img.append(frame)
            place = np.clip(place + steps[action], 2, 14)
        writer.append(np.stack(img), actions, level)


def small_config(data: Path) -> TrainingConfig:
    """Three horizons on moving_squares."""
    heads = HeadsConfig(
        Horizons((1, 2, 4), (1, 2, 4)),
        patch_sizes=(4, 4, 2),
        blocks=(0, 1, 1),
        weights=(1.0, 0.5, 0.25),
        consistency=(0.0, 0.1, 0.1),
    )
    model = WorldModelConfig((3, 16, 16), 4, 32, 2, 16, context=8, actions=4, heads=heads)
    return TrainingConfig(
        str(data), steps=20, batch=4, clip=12, warmup=5, dtype="float32", held_out=0.2,
        checkpoint_every=5, look_every=0, tensorboard=False, model=model,
    )  # fmt: skip
