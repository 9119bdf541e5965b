"""An Atari game, played again from the console's start: without repeated actions it goes the same way each time."""

from __future__ import annotations

import numpy as np

from ..data.atari import console, field_of
from .engine import Recorded


class AtariEngine:
    def __init__(self, recorded: Recorded) -> None:
        self.ale = console(recorded.env, recorded.seed)
        self.legal = self.ale.getMinimalActionSet()
        self.ticks = recorded.ticks
        self.field = field_of(recorded.env, bool(recorded.attributes.get("field")))

    def begin(self, episode: int, level: int) -> np.ndarray:
        self.ale.reset_game()
        self.before = self.screen = self.ale.getScreenRGB()
        return self._frame()

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        for _ in range(self.ticks):
            self.ale.act(self.legal[action])
            self.before, self.screen = self.screen, self.ale.getScreenRGB()
        return self._frame(), bool(self.ale.game_over())

    def close(self) -> None:
        pass

    def _frame(self) -> np.ndarray:
        # As recorded: the maximum of two ticks.
        top, bottom, left, right = self.field
        return np.maximum(self.before, self.screen)[top:bottom, left:right]
