"""mfwm data import-videos: a folder of MP4 files and one table of actions, `actions.csv`, as a replay buffer.

    video,frame,action                 or   video,frame,action_0,action_1, ...
    first.mp4,0,3                           first.mp4,0,0.12,-0.5
    first.mp4,1,0                           first.mp4,1,0.10,-0.4

Each file is an episode. `action` is the number 0, 1, ... of a discrete action; action_0, action_1, ... are the
components of a continuous one. A row's action was taken at its frame. actions_table.py lists the variants of the table
that are read.
"""

from __future__ import annotations

from pathlib import Path

from .actions_table import read_actions
from .import_episodes import Episode, write_episodes
from .pictures import check_size, decoded, stacked


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

    size: height and width to scale frames to; None keeps those of the first video, which all others must have.
    skip_damaged: leave out a video that cannot be decoded or does not have one action per frame, and return the
        reasons. Without it, ValueError names file, rule and value, and `out` is left as it was.
    """
    check_size(size)
    folder = Path(folder)
    actions = read_actions(folder / table)
    discrete = next(iter(actions.values())).ndim == 1
    count = int(max(values.max() for values in actions.values())) + 1 if discrete else None

    def episode(name: str) -> Episode:
        video = stacked(folder / name, (img for _, img in decoded(folder / name, size)))
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
