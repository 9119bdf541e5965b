"""balls, played again from its seed and level."""

from __future__ import annotations

import copy

import numpy as np

from ..data.balls import ACTIONS, Box, draw
from ..data.recording import Balls
from .engine import Recorded


class BallsEngine:
    def __init__(self, recorded: Recorded) -> None:
        dials = recorded.attributes["balls"]
        count = len(recorded.attributes["state_names"]) // 4
        self.options = Balls(count, dials["speed"], dials["noise"], dials["texture"])
        self.recorded = recorded
        self.directions = list(ACTIONS.values())

    def begin(self, episode: int, level: int) -> np.ndarray:
        rng = np.random.default_rng((self.recorded.seed, level))
        self.box = Box(self.options, rng)
        self.rng = rng
        return self._frame()

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        for _ in range(self.recorded.ticks):
            self.box.step(self.directions[action])
        return self._frame(), False

    def close(self) -> None:
        pass

    def _frame(self) -> np.ndarray:
        size = self.recorded.size
        center_TN2 = size * np.stack([self.box.x, self.box.y], axis=-1)[None]
        # Drawn from a copy, because the texture of the background is the first thing that is drawn from it.
        return draw(center_TN2, size, self.options, copy.deepcopy(self.rng))[0]
