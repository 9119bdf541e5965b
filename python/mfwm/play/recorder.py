"""Records a walk as a replay buffer that `mfwm data check` accepts and `mfwm train` reads, and as a GIF."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from ..data.replay_writer import ReplayWriter
from .world import World

# Bytes of frames in memory at which a recording ends by itself.
MOST_BYTES = 256 << 20
# Frames of an episode: a longer one is written as several, so that training has levels to hold out.
EPISODE_FRAMES = 128
GIF_FRAMES = 300
ENLARGED = 256  # the GIF's frames are enlarged to about so many pixels
COPIED = ("env", "action_names", "noop", "action_repeat", "ticks_per_frame")

Episode = tuple[list[np.ndarray], list[Any]]


class Recorder:
    """Collects frames and the actions taken at them; `cut` ends an episode, `write` writes them all.

    source: whose frames they are, "model" or "game".
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.on = False
        self.source = "model"
        self.episodes: list[Episode] = []
        self.frames = 0

    def begin(self, source: str) -> None:
        self.on, self.source = True, source
        self.episodes, self.frames = [([], [])], 0

    @property
    def full(self) -> bool:
        height, width = self.world.size
        return self.frames * height * width * 3 >= MOST_BYTES

    def add(self, frame: np.ndarray, action: Any) -> None:
        """A frame, and the action taken at it."""
        frames, actions = self.episodes[-1]
        frames.append(frame)
        actions.append(action)
        self.frames += 1

    def cut(self, last: np.ndarray | None) -> None:
        """End the episode with the frame that the last action led to, if there is one. At it, no key is held."""
        if self.episodes[-1][0]:
            if last is not None:
                self.add(last, self.world.actions.rest)
            self.episodes.append(([], []))

    def taken(self) -> list[Episode]:
        """The episodes so far, and end the recording."""
        episodes, self.episodes, self.on = [episode for episode in self.episodes if episode[0]], [], False
        return episodes

    def resume(self, episodes: list[Episode]) -> None:
        """Go on with a recording that was taken and could not be written."""
        self.episodes, self.on = [*episodes, ([], [])], True


def write(world: World, source: str, episodes: list[Episode], fps: float) -> Path:
    """Write a recording into RUN/play, as the replay buffer NUMBER and NUMBER.gif. Returns the replay buffer's path."""
    folder = world.run / "play"
    folder.mkdir(exist_ok=True)
    path = next(folder / f"{i:04}" for i in itertools.count(1) if free(folder / f"{i:04}"))
    height, width = world.size
    attributes = {name: world.replay.attributes[name] for name in COPIED if name in world.replay.attributes}
    described: dict[str, Any] = {"actions": len(world.actions.names) or None, "action_size": len(world.actions.low)}
    with ReplayWriter(path, height, width, **described, **attributes, recorded_from=source) as writer:
        for frames, actions in parts(episodes):
            writer.append(np.stack(frames), as_array(world.actions.kind, actions))
    shown = list(itertools.islice(itertools.chain.from_iterable(frames for frames, _ in episodes), GIF_FRAMES))
    factor = max(1, ENLARGED // height)
    enlarged = [frame.repeat(factor, 0).repeat(factor, 1) for frame in shown]
    iio.imwrite(path.with_suffix(".gif"), enlarged, extension=".gif", duration=1000 / fps, loop=0)
    return path


def free(path: Path) -> bool:
    return not path.exists() and not path.with_suffix(".gif").exists()


def parts(episodes: list[Episode]) -> list[Episode]:
    """Episodes of at most EPISODE_FRAMES frames, and two at least if there are two frames."""
    length = EPISODE_FRAMES
    if len(episodes) == 1:
        length = min(length, -(-len(episodes[0][0]) // 2))
    return [
        (frames[begin : begin + length], actions[begin : begin + length])
        for frames, actions in episodes
        for begin in range(0, len(frames), length)
    ]


def as_array(kind: str, actions: list[Any]) -> np.ndarray | None:
    if kind == "none":
        return None
    return np.array(actions, np.int64 if kind == "discrete" else np.float32)
