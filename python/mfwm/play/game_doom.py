"""Doom, played again: its episodes follow from the seed one after another."""

from __future__ import annotations

import contextlib

import numpy as np

from ..data.doom import pressed, started
from .engine import Recorded


class DoomEngine:
    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.game, self.settings = started(recorded.env, recorded.seed)
        self.presses = pressed(len(self.game.get_available_buttons()))
        # The number of episodes begun since the game was started.
        self.begun = 0

    def begin(self, episode: int, level: int) -> np.ndarray:
        if self.begun > episode:
            self.close()
            self.game, self.settings = started(self.recorded.env, self.recorded.seed)
            self.begun = 0
        while self.begun <= episode:
            self.game.new_episode()
            self.begun += 1
        return self._frame()

    def step(self, action: int) -> tuple[np.ndarray, bool]:
        self.game.make_action(self.presses[action], self.recorded.ticks)
        if self.game.is_episode_finished():
            return np.empty((0, 0, 3), np.uint8), True
        return self._frame(), False

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.game.close()
        self.settings.cleanup()

    def _frame(self) -> np.ndarray:
        return self.game.get_state().screen_buffer.copy()
