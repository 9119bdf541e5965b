"""What the imports share: reading JSON, and writing episodes, made one by one, as a replay buffer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .place import Place, location
from .replay_writer import ReplayWriter


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
    """Make `episodes`, by name, and write them as the replay buffer `out`, all or none; sizes are those of the first.

    Where an episode cannot be made or written it is left out with `skip_damaged`; otherwise ValueError says why.
    Returns why each one that was left out is.
    """
    left_out: list[str] = []
    writer: ReplayWriter | None = None
    # Before an episode is decoded.
    Place(location(out), overwrite=overwrite)
    with ExitStack() as writing:
        for name, make in tqdm(episodes.items(), desc="import", unit="episode", disable=not progress):
            try:
                video, action = made(make)
                if writer is None:
                    continuous = action is not None and action.ndim == 2
                    writer = ReplayWriter(
                        out,
                        *video.shape[1:3],
                        actions=actions,
                        action_size=action.shape[1] if action is not None and continuous else 0,
                        vocabulary=vocabulary,
                        ids=video.shape[3] if vocabulary and video.ndim == 4 else 1,
                        overwrite=overwrite,
                        **attributes,
                    )
                    writing.enter_context(writer)
                writer.append(video, action)
            except ValueError as error:
                reason = str(error) if name in str(error) else f"{name}: {error}"
                if not skip_damaged:
                    raise ValueError(reason) from error
                left_out.append(reason)
        if writer is None or not writer.episodes:
            raise ValueError(f"no episode can be read: {left_out[0] if left_out else 'there is none'}")
    return left_out


def made(make: Callable[[], Episode]) -> Episode:
    """The episode; ValueError for whatever its files' decoders raise on damaged bytes, so that it can be left out."""
    try:
        return make()
    except (ImportError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_object(path: Path, text: str | None = None) -> dict[str, Any]:
    """The JSON object in `text`, or in the file; ValueError names the file, and what it holds instead."""
    try:
        found = json.loads(read_text(path) if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {str(found)[:60]}")
    return found


def whole(place: object, name: str, value: Any, least: int = 1) -> int:
    """`value` of metadata, which must be an integer."""
    if type(value) is not int or value < least:
        raise ValueError(f"{place}: {name} must be an integer >= {least}, got {value!r}")
    return value
