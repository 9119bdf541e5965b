"""Real starts: frames of held-out episodes that a walk through the model begins from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.replay import Replay
from .world import World

COUNT = 12
# Frames that the model sees before the first step, if the episode has so many; evaluation starts from as many.
CONTEXT = 4


@dataclass(frozen=True)
class Start:
    """A frame of an episode, by its number in the set: the last one that the model sees before the first step."""

    episode: int
    first: int
    last: int

    @property
    def frames(self) -> np.ndarray:
        return np.arange(self.first, self.last + 1)


def choose_starts(world: World, rng: np.random.Generator) -> list[Start]:
    """COUNT starts, spread over the held-out episodes."""
    replay = world.replay
    episodes = rng.permutation(world.episodes)
    # Episodes shorter than the context are taken only if there is nothing else.
    long = episodes[replay.episode_lengths[episodes] >= CONTEXT]
    episodes = long if len(long) else episodes
    starts = []
    for episode in np.resize(episodes, max(COUNT, len(episodes)))[:COUNT].tolist():
        first, length = int(replay.episode_starts[episode]), int(replay.episode_lengths[episode])
        last = first + int(rng.integers(min(CONTEXT, length) - 1, length))
        starts.append(Start(episode, max(first, last - CONTEXT + 1), last))
    return sorted(set(starts), key=lambda start: start.last)


def frames_of(world: World, start: Start) -> tuple[Tensor, Tensor | None]:
    """The frames [1, T, ...] that the model starts from, and the actions [1, T - 1] between them."""
    read = torch.from_numpy(world.replay.read(start.frames))[None]
    video = read.long() if world.model.tokens else read.permute(0, 1, 4, 2, 3)
    if world.actions.kind == "none":
        return video.to(world.device), None
    actions = torch.from_numpy(world.replay.action[start.frames[:-1]])[None]
    return video.to(world.device), actions.to(world.device)


def picture_of(pictures: Replay, start: Start) -> np.ndarray:
    """uint8 [H, W, 3]: the real frame of a start."""
    return np.ascontiguousarray(pictures.read(np.array([start.last]))[0], dtype=np.uint8)
