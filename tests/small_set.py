"""A replay buffer of one value, for tests of how data sets are written and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mfwm.data import Replay, ReplayWriter
from mfwm.data.check import check

OLD, NEW = 1, 2


def write(path: Path | str, value: int = OLD, *, episodes: int = 2, overwrite: bool = False) -> None:
    writer = ReplayWriter(path, 8, 8, actions=4, overwrite=overwrite)
    for _ in range(episodes):
        writer.append(np.full((4, 8, 8, 3), value, np.uint8), np.full(4, value))


def value_of(path: Path | str) -> int:
    """Of a set that `write` wrote, both of whose episodes must be there."""
    replay = Replay(path)
    assert replay.frames == 8 and (replay.video == replay.video[0, 0, 0, 0]).all()
    assert (replay.action == replay.video[0, 0, 0, 0]).all() and check(path, 4) == []
    return int(replay.video[0, 0, 0, 0])


def beside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if entry != path)
