"""What `collect` asks of a source of frames, and what it gets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_BALLS = 6


@dataclass(frozen=True)
class Balls:
    """Options of `mfwm collect balls`."""

    count: int = 4
    """Number of balls, 1 to 6."""
    speed: float = 0.03
    """Of the balls at first, on average, in sides of the box per frame. A push adds half of it, up to twice it."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise in every pixel, as a share of the range 0..255."""
    texture: bool = False
    """Draw a random color in every pixel of the background, fixed for an episode."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_BALLS:
            raise ValueError(f"balls.count must be in 1..{MOST_BALLS}, got {self.count}")
        if not 0 < self.speed <= 0.5:
            raise ValueError(f"balls.speed must be above 0 and at most 0.5, got {self.speed}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"balls.noise must be in 0..1, got {self.noise}")


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
