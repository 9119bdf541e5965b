"""Shared by the imports: reads JSON, and writes episodes, decoded one by one, as a replay buffer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..progress import Progress
from .place import Place, location
from .replay_writer import ReplayWriter


class Episode(NamedTuple):
    """video uint8 [T, H, W, 3] or ids [T, rows, columns(, F)]; action [T], [T, A] or None, taken at each frame."""

    video: np.ndarray
    action: np.ndarray | None


# The shapes of a frame and of an action, None without actions.
Sizes = tuple[tuple[int, ...], tuple[int, ...] | None]


class OtherSizes(Exception):
    """Most episodes differ in size from the first one, whose sizes all should have."""


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
    """Decode `episodes`, by name, and write them all as the replay buffer `out`; sizes are those of the first.

    An episode that cannot be decoded or written raises ValueError. With `skip_damaged` it is left out, and sizes are
    those of most episodes, so that an odd first episode is left out and not all the others.
    Returns the reason for each episode that was left out.
    """
    # Raise before an episode is decoded.
    Place(location(out), overwrite=overwrite)

    def attempt(sizes: Sizes | None) -> list[str]:
        left_out: list[str] = []
        seen: Counter[Sizes] = Counter()
        writer: ReplayWriter | None = None
        with ExitStack() as writing:
            for name, decode in Progress("import", len(episodes), "episode", shown=progress).over(episodes.items()):
                try:
                    video, action = decoded(decode)
                    own = (video.shape[1:], None if action is None else action.shape[1:])
                    seen[own] += 1
                    if sizes is None:
                        sizes = own
                    if own != sizes:
                        raise ValueError(
                            f"frames and actions must be of sizes {sizes_text(sizes)}, got {sizes_text(own)}"
                        )
                    if writer is None:
                        frame, numbers = sizes
                        writer = ReplayWriter(
                            out,
                            *frame[:2],
                            actions=actions,
                            action_size=numbers[0] if numbers else 0,
                            vocabulary=vocabulary,
                            ids=frame[2] if vocabulary and len(frame) == 3 else 1,
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
            if sizes and seen[sizes] < seen.most_common(1)[0][1]:
                raise OtherSizes(seen.most_common(1)[0][0])
            if writer is None or not writer.episodes:
                raise ValueError(f"no episode can be read: {left_out[0] if left_out else 'there are none'}")
        return left_out

    try:
        return attempt(None)
    except OtherSizes as most:
        return attempt(most.args[0])


def sizes_text(sizes: Sizes) -> str:
    frame, numbers = sizes
    return f"{list(frame)} and {'none' if numbers is None else list(numbers)}"


def decoded(decode: Callable[[], Episode]) -> Episode:
    """The episode. Whatever decoders raise on damaged bytes becomes a ValueError, so that it can be left out."""
    try:
        return decode()
    except (ImportError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    return parse_object(path, read_text(path))


def parse_object(place: object, text: str) -> dict[str, Any]:
    """The JSON object in `text`. ValueError names its place, and what it is instead."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} must hold a JSON object, got {str(found)[:60]}")
    return found


def integer_of(place: object, name: str, value: Any, least: int = 1) -> int:
    """`value`, read from metadata, which must be an integer."""
    if type(value) is not int or value < least:
        raise ValueError(f"{place}: {name} must be an integer >= {least}, got {value!r}")
    return value
