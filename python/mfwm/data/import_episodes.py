"""What the imports share: episodes, made one by one, into a replay buffer; damaged ones refused or left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fsspec.core import url_to_fs
from tqdm import tqdm

from .check import location
from .replay_writer import ReplayWriter, make_room


class Episode(NamedTuple):
    """video uint8 [T, H, W, 3] or ids [T, rows, columns(, F)]; action [T], [T, A] or None, taken at each frame."""

    video: np.ndarray
    action: np.ndarray | None


def write_episodes(
    out: str | Path,
    episodes: Mapping[str, Callable[[], Episode]],
    *,
    actions: int | None = None,
    vocabulary: int = 0,
    skip_damaged: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **attributes: Any,
) -> list[str]:
    """Make `episodes`, by name, and write them as the replay buffer `out`; sizes are those of the first.

    Where one raises ValueError it is left out with `skip_damaged`; otherwise what was written is removed and the error
    raised. Returns why each one that was left out is.
    """
    left_out: list[str] = []
    writer: ReplayWriter | None = None
    if not overwrite:
        make_room(location(out), overwrite=False)
    try:
        for name, make in tqdm(episodes.items(), desc="import", unit="episode", disable=not progress):
            try:
                video, action = make()
                if writer is None:
                    continuous = action is not None and action.ndim == 2
                    writer = ReplayWriter(
                        out,
                        *video.shape[1:3],
                        actions=actions,
                        action_size=action.shape[1] if action is not None and continuous else 0,
                        vocabulary=vocabulary,
                        ids=video.shape[3] if vocabulary and video.ndim == 4 else 1,
                        # Only here, with an episode in hand: an import of nothing deletes nothing.
                        overwrite=overwrite,
                        **attributes,
                    )
                writer.append(video, action)
            except ValueError as error:
                reason = str(error) if name in str(error) else f"{name}: {error}"
                if not skip_damaged:
                    raise ValueError(reason) from error
                left_out.append(reason)
        if writer is None:
            raise ValueError(f"no episode can be read: {left_out[0] if left_out else 'there is none'}")
    except BaseException:
        if writer is not None:
            files, root = url_to_fs(str(writer.path))
            files.rm(root, recursive=True)
        raise
    return left_out
