"""The random policy: actions that are each held for a few frames, known as far ahead as the panels look."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from .actions import Actions


class RandomPolicy:
    """Uniform actions, each held for 1 to `repeat` frames, as `mfwm collect` holds them."""

    def __init__(self, actions: Actions, seed: int) -> None:
        self.actions = actions
        self.rng = np.random.default_rng(seed)
        self.coming: deque[Any] = deque()

    def plan(self, length: int) -> list[Any]:
        """The next actions, without taking any."""
        while len(self.coming) < length:
            action = self._drawn()
            self.coming.extend([action] * int(self.rng.integers(1, self.actions.repeat + 1)))
        return [self.coming[i] for i in range(length)]

    def next(self) -> Any:
        self.plan(1)
        return self.coming.popleft()

    def _drawn(self) -> Any:
        if self.actions.kind == "discrete":
            return int(self.rng.integers(len(self.actions.names)))
        if self.actions.kind == "none":
            return None
        return tuple(self.rng.uniform(self.actions.low, self.actions.high).tolist())
