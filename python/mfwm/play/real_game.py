"""The real game beside the model: the same start, the same actions, and the picture that the game shows."""

from __future__ import annotations

from collections import deque

import numpy as np

from ..data.coinrun_recorder import GAMES
from ..data.collect import resized
from ..data.replay import Replay
from .engine import Engine, Recorded
from .starts import CONTEXT, Start
from .world import World

# The mean difference of two frames, of 255, up to which they show the same: a game is drawn alike each time.
SAME = 1.0


class RealGame:
    """A game in step with the model. After `start`, `frames` has the last frames and `actions` those between them."""

    def __init__(self, world: World, engine: Engine) -> None:
        self.world, self.engine = world, engine
        self.size = world.size[0]
        self.frames: deque[np.ndarray] = deque(maxlen=CONTEXT)
        self.actions: deque[int] = deque(maxlen=CONTEXT - 1)
        self.over = False

    def start(self, start: Start) -> bool:
        """Play an episode again up to its frame `last`. False if the frame then differs from the recorded one."""
        replay, pictures = self.world.replay, self.world.pictures
        first = int(replay.episode_starts[start.episode])
        self.frames.clear()
        self.actions.clear()
        self.over = False
        self._see(self.engine.begin(start.episode, int(replay.episode_level[start.episode])))
        for action in replay.action[first : start.last].tolist():
            self.step(action)
        recorded = pictures.read(np.array([start.last]))[0].astype(np.float32)
        return not self.over and float(np.abs(recorded - self.frame).mean()) <= SAME

    def step(self, action: int) -> None:
        """Take an action; once the episode is over, its last frame stays."""
        if self.over:
            return
        frame, self.over = self.engine.step(action)
        if not self.over:
            self.actions.append(action)
            self._see(frame)

    @property
    def frame(self) -> np.ndarray:
        return self.frames[-1]

    def error(self, frame: np.ndarray) -> float:
        """The mean squared difference of a frame from the game's, in -1..1; NaN once the episode is over."""
        if self.over:
            return float("nan")
        return float((((frame.astype(np.float32) - self.frame) / 127.5) ** 2).mean())

    def _see(self, frame: np.ndarray) -> None:
        self.frames.append(np.ascontiguousarray(resized(frame[None], self.size)[0]))


def real_game(world: World) -> RealGame | None:
    """The game that the run's data was recorded from. None if there is none, or its package is not installed."""
    recorded = recorded_of(world.pictures, world)
    if recorded is None:
        return None
    engine = engine_of(recorded)
    return None if engine is None else RealGame(world, engine)


def recorded_of(pictures: Replay, world: World) -> Recorded | None:
    """None for a set that `mfwm collect` did not write with the model's own actions, or whose frames are not square."""
    attributes = pictures.attributes
    env, seed, ticks = (attributes.get(name) for name in ("env", "seed", "ticks_per_frame"))
    height, width = world.size
    if not isinstance(env, str) or type(seed) is not int or type(ticks) is not int or ticks < 1 or height != width:
        return None
    # Inferred codes are actions of the model's own, which no game understands.
    if world.actions.kind != "discrete" or pictures.actions is None or "latent_actions" in world.replay.attributes:
        return None
    return Recorded(env, seed, ticks, height, attributes)


def engine_of(recorded: Recorded) -> Engine | None:
    """The engine of a recording; None where it is not installed."""
    name = recorded.env.partition(":")[0]
    try:
        if name == "balls":
            from .game_balls import BallsEngine

            return BallsEngine(recorded)
        if name == "atari":
            from .game_atari import AtariEngine

            return AtariEngine(recorded)
        if name == "doom":
            from .game_doom import DoomEngine

            return DoomEngine(recorded)
        if recorded.env in GAMES:
            from .game_procgen import ProcgenEngine

            return ProcgenEngine(recorded)
    except ImportError:
        return None
    return None
