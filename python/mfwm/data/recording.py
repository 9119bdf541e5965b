"""What `collect` asks of a source of frames, and what it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .balls import Balls


@dataclass(frozen=True)
class Recording:
    """What to record. `collect` describes the fields."""

    frames: int
    seed: int
    action_repeat: int
    num_levels: int
    size: int
    frame_skip: int
    field: bool
    balls: Balls


@dataclass
class Episode:
    """img uint8 [T, H, W, 3]; action int64 [T], action[t] taken at img[t]; level: the level's seed, or None;
    state float32 [T, S], of img[t], positions in pixels of the recorded frame, or None."""

    img: np.ndarray
    action: np.ndarray
    level: int | None
    state: np.ndarray | None = None
