"""mfwm collect: records CoinRun (and the other procgen games), Atari, Doom or balls, played by a random policy.

The policy holds each action for several frames, because an agent with a new action at every frame hardly moves. Frames
are resized to size x size by box averages (Pillow's BOX filter). Episodes are written one by one, beside `out`, and
become the replay buffer together. Worlds whose state is known write it beside the frames, as docs/data.md lists.
"""

from __future__ import annotations

import platform
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..progress import Progress
from .atari import KNOWN, atari_episodes
from .balls import balls_episodes
from .coinrun_recorder import GAMES
from .doom import SCENARIOS, doom_episodes
from .place import Place, location
from .procgen import PYTHONS, procgen_episodes
from .recording import Balls, Episode, Recording
from .replay_writer import ReplayWriter

__all__ = ["Balls", "Episode", "collect", "default_environment", "source_of"]


def collect(
    env: str,
    frames: int,
    out: str | Path,
    *,
    seed: int = 0,
    size: int = 64,
    action_repeat: int = 4,
    num_levels: int = 500,
    frame_skip: int = 1,
    field: bool = False,
    balls: Balls | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Record `frames` frames of `env` into the replay buffer `out`.

    Args:
        env: "coinrun" or another procgen game, "atari:<Game>" such as "atari:Breakout", "doom" or "doom:<scenario>",
            or "balls".
        frames: number of frames over all episodes; the last episode may be cut short.
        out: a directory that is empty or does not exist, or a URL that fsspec supports. With `overwrite`, a replay
            buffer there stays until the new one is complete and replaces it.
        size: side of the square frames, in pixels.
        action_repeat: each action is held for 1 to this many frames.
        num_levels: number of procgen levels to play.
        frame_skip: each action is repeated for this many of the source's frames, of which the last one is recorded.
            A frame of Atari and of Doom is 4 ticks. The attribute ticks_per_frame has the product.
        field: crop to the playing field, in Freeway, Pong and Breakout.
        balls: options of the world "balls".
    """
    source = checked_source(
        env, frames=frames, seed=seed, size=size, action_repeat=action_repeat, num_levels=num_levels,
        frame_skip=frame_skip, field=field, balls=balls,
    )  # fmt: skip
    # Raise before an environment is started.
    Place(location(out), overwrite=overwrite)
    recording = Recording(frames, seed, action_repeat, num_levels, size, frame_skip, field, balls or Balls())
    episodes = source(env, recording)
    description: dict[str, Any] = next(episodes)  # type: ignore[assignment]
    bar = Progress(f"collect {env}", frames, "frame", shown=progress)
    writer = ReplayWriter(
        out, size, size, actions=len(description["action_names"]), env=env, action_repeat=action_repeat, seed=seed,
        overwrite=overwrite, **description,
    )  # fmt: skip
    with closing(episodes), bar, writer:
        for episode in episodes:
            count = min(len(episode.img), frames - writer.frames)
            state = None if episode.state is None else episode.state[:count]
            writer.append(resized(episode.img[:count], size), episode.action[:count], episode.level, state=state)
            bar.update(count)
            if writer.frames >= frames:
                return
        raise RuntimeError(f"{env} produced {writer.frames} of {frames} frames")


def checked_source(
    env: str,
    *,
    frames: int,
    seed: int = 0,
    size: int = 64,
    action_repeat: int = 4,
    num_levels: int = 500,
    frame_skip: int = 1,
    field: bool = False,
    balls: Balls | None = None,
) -> Any:
    """The generator for `env`. ValueError where `collect` cannot record with these arguments."""
    for name, value, least in (
        ("frames", frames, 1),
        ("seed", seed, 0),
        ("size", size, 1),
        ("action_repeat", action_repeat, 1),
        ("num_levels", num_levels, 1),
        ("frame_skip", frame_skip, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
        if value >= 2**31:
            raise ValueError(f"{name} must be less than 2**31, got {value}")
    source = source_of(env)
    if balls is not None and env != "balls":
        raise ValueError(f'balls must be None unless env is "balls", got {balls} and {env!r}')
    if field and env.removeprefix("atari:") not in KNOWN:
        raise ValueError(
            f"field must be False for {env!r}: only {', '.join(f'atari:{game}' for game in KNOWN)} have one"
        )
    return source


def source_of(env: str) -> Any:
    """The generator for `env`: it yields a description, then episodes."""
    name, _, rest = env.partition(":")
    if env in GAMES:
        return procgen_episodes
    if name == "atari" and rest:
        return atari_episodes
    if name == "doom" and (not rest or rest in SCENARIOS):
        return doom_episodes
    if env == "balls":
        return balls_episodes
    raise ValueError(
        f"env must be one of {', '.join(GAMES)}, atari:<Game>, doom, doom:<{' | '.join(SCENARIOS)}> or balls; "
        f"got {env!r}"
    )


def default_environment() -> str:
    """CoinRun if its package has a wheel for this Python, else Doom, with a printed reason."""
    if sys.version_info[:2] in PYTHONS and (sys.platform, platform.machine()) == ("linux", "x86_64"):
        return "coinrun"
    print(
        f"CoinRun's package has no wheel for Python {platform.python_version()} on {platform.platform()}: "
        "collecting Doom instead"
    )
    return "doom"


def resized(img: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T, size, size, 3] from [T, H, W, 3]."""
    if img.shape[1:3] == (size, size):
        return img
    return np.stack([np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BOX)) for f in img])
