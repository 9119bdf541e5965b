"""The protocol of a game that replays its recording, and the description of a recording that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """A game that can replay an episode of its recording, and continue from there. Frames are uint8 [H, W, 3]."""

    def begin(self, episode: int, level: int) -> np.ndarray:
        """The first frame of an episode, by its number in the set and its level."""

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        """The next frame, and whether the episode is over."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Recorded:
    """How a set was recorded, by its attributes: what an engine needs to play it again."""

    env: str
    seed: int
    ticks: int
    size: int
    attributes: dict[str, Any]
