"""mfwm data import-videos: a folder of MP4 files and one table of actions, `actions.csv`, as a replay buffer.

    video,frame,action                 or   video,frame,action_0,action_1, ...
    first.mp4,0,3                           first.mp4,0,0.12,-0.5
    first.mp4,1,0                           first.mp4,1,0.10,-0.4

A file is an episode. `action` is a number 0, 1, ... of a discrete action; action_0, action_1, ... are the numbers of a
continuous one. A row's action was taken at its frame.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .import_episodes import Episode, write_episodes


def import_videos(
    folder: Path,
    out: str | Path,
    *,
    table: str = "actions.csv",
    size: tuple[int, int] | None = None,
    skip_damaged: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> list[str]:
    """Write the MP4 files of `folder` as the replay buffer `out`, one episode each, in the order of the table.

    size: height and width to scale frames to; None keeps those of the first video, and every other must have them.
    skip_damaged: leave out a video that cannot be decoded, or has not one action per frame; what is left out, with the
        reason, is returned. Otherwise ValueError names file, rule and value, and nothing is left in `out`.
    """
    folder = Path(folder)
    actions = read_actions(folder / table)
    discrete = next(iter(actions.values())).ndim == 1
    count = int(max(values.max() for values in actions.values())) + 1 if discrete else None

    def episode(name: str) -> Episode:
        video = np.stack([img for _, img in decoded(folder / name, size)])
        if len(video) != len(actions[name]):
            raise ValueError(
                f"{folder / name} has {len(video)} frames, but {table} has {len(actions[name])} rows for it"
            )
        return Episode(video, actions[name])

    return write_episodes(
        out,
        {name: lambda name=name: episode(name) for name in actions},  # type: ignore[misc]
        actions=count,
        skip_damaged=skip_damaged,
        overwrite=overwrite,
        progress=progress,
        env=folder.resolve().name,
    )


def read_actions(path: Path) -> dict[str, np.ndarray]:
    """Video name -> int64 [T] or float32 [T, A], rows in the order of their frames."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a table with columns video, frame, action")
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        columns = [name for name in names if name == "action" or name.startswith("action_")]
        if not {"video", "frame"} <= set(names) or not columns or ("action" in columns and len(columns) > 1):
            raise ValueError(
                f"{path} must have columns video, frame and action, or action_0, action_1, ...; got {names}"
            )
        kind: type = int if columns == ["action"] else float
        rows: dict[str, dict[int, list[Any]]] = {}
        for line, row in enumerate(reader, start=2):
            try:
                frame, values = int(row["frame"]), [kind(row[name]) for name in columns]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
            taken = rows.setdefault(row["video"], {})
            if frame in taken:
                raise ValueError(f"{path}, line {line}: frame {frame} of {row['video']} stands twice")
            if not np.isfinite(values).all() or (kind is int and values[0] < 0):
                raise ValueError(f"{path}, line {line}: an action must be finite and not negative, got {values}")
            taken[frame] = values
    if not rows:
        raise ValueError(f"{path} holds no rows")
    for name, taken in rows.items():
        if sorted(taken) != list(range(len(taken))):
            absent = next(frame for frame in range(len(taken)) if frame not in taken)
            raise ValueError(f"{path}: frame {absent} of {name} has no action")
    tables = {name: [taken[frame] for frame in range(len(taken))] for name, taken in rows.items()}
    if kind is int:
        return {name: np.array(values, np.int64)[:, 0] for name, values in tables.items()}
    return {name: np.array(values, np.float32) for name, values in tables.items()}


def decoded(path: Path, size: tuple[int, int] | None) -> Iterator[tuple[float, np.ndarray]]:
    """(time in seconds, uint8 [H, W, 3]) of every frame; ValueError where the file cannot be decoded to its end."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading MP4 files needs the package av: pip install 'mfwm-kernels[data]'") from error

    height, width = size or (None, None)
    count, promised = 0, 0
    try:
        with av.open(str(path)) as container:
            promised = container.streams.video[0].frames
            for frame in container.decode(video=0):
                yield frame.time or 0.0, frame.to_ndarray(format="rgb24", height=height, width=width)
                count += 1
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded after {count} frames: {error}") from error
    # For the decoder a file that was cut off ends as a whole one does.
    if count == 0 or count < promised:
        raise ValueError(f"{path} gives {count} frames and says that it holds {promised}")
