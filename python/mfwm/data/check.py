"""mfwm data check: what is wrong with a replay buffer, all of it, with its place.

Every rule about a set stands here once. `Replay` refuses a set by the first rule that it breaks; `check` reads every
chunk and lists all that are broken. What is left out or trained differently, and not refused, is listed too.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

IMG, TOKENS, ACTION = "data/img", "data/tokens", "data/action"
ENDS, LEVELS = "meta/episode_ends", "meta/episode_level"
# Type, rank and the words for them.
FRAMES = {IMG: "uint8 [N, H, W, 3]", TOKENS: "integers [N, rows, columns] or [N, rows, columns, F]"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the set is refused for it, or a count of what it means for training is given."""

    what: str
    refused: bool = True

    def __str__(self) -> str:
        return ("" if self.refused else "note: ") + self.what


def open_root(path: Path | str) -> zarr.Group:
    if isinstance(path, Path) and not path.exists():
        raise ValueError(f"{path} does not exist: expected a Zarr replay buffer")
    try:
        return zarr.open_group(str(path), mode="r")
    except (OSError, KeyError, TypeError, ValueError) as error:  # FileNotFoundError and zarr's own errors among these
        raise ValueError(f"{path} is not a Zarr group: {error}") from error


def refuse(place: object, problems: Iterable[Problem]) -> None:
    """ValueError for the first problem that a set is refused for; a warning for what is not."""
    where = f"{place}: " if place else ""
    for problem in problems:
        if problem.refused:
            raise ValueError(f"{where}{problem}")
        warnings.warn(f"{where}{problem.what}", stacklevel=3)


def arrays_of(root: zarr.Group) -> dict[str, Any]:
    """The arrays of the layout that are there, by name; None where what is there cannot be read as an array."""
    found: dict[str, Any] = {}
    for name in (IMG, TOKENS, ACTION, ENDS, LEVELS):
        try:
            array = root.get(name)
        except (KeyError, TypeError, ValueError):
            found[name] = None
        else:
            if array is not None:
                found[name] = array if isinstance(array, zarr.Array) else None
    return found


def layout_problems(root: zarr.Group) -> Iterator[Problem]:
    """Arrays, their types and ranks, and the attributes that say what they hold."""
    found, attributes = arrays_of(root), dict(root.attrs)
    required = [ACTION, ENDS] if has_actions(attributes) else [ENDS]
    for name in {**found, **dict.fromkeys(required)}:
        if found.get(name) is None:
            yield Problem(f"array {name} is missing or unreadable")
    frames = [name for name in FRAMES if name in found]
    if len(frames) != 1:
        yield Problem(f"a replay buffer has either {IMG} or {TOKENS}, got {' and '.join(frames) or 'neither'}")
    arrays = {name: array for name, array in found.items() if array is not None}
    for name in FRAMES.keys() & arrays.keys():
        array = arrays[name]
        fits = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3
        if name == TOKENS:
            fits = array.dtype.kind in "iu" and array.ndim in (3, 4)
        if not fits:
            yield Problem(f"{name} must be {FRAMES[name]}, got {array.dtype} {list(array.shape)}")
    for name, kinds, what in (
        (ACTION, (("i", 1), ("u", 1), ("f", 2)), "integers [N] or floats [N, A]"),
        (ENDS, (("i", 1), ("u", 1)), "integers [E]"),
        (LEVELS, (("i", 1), ("u", 1)), "integers [E]"),
    ):
        array = arrays.get(name)
        if array is not None and (array.dtype.kind, array.ndim) not in kinds:
            yield Problem(f"{name} must be {what}, got {array.dtype} {list(array.shape)}")
    for name, needed in (("actions", False), ("vocabulary", TOKENS in found)):
        value = attributes.get(name)
        if (needed or value is not None) and (type(value) is not int or value < 1):
            yield Problem(f"attribute {name} must be an integer >= 1, got {value!r}")


def has_actions(attributes: dict[str, Any]) -> bool:
    """Video without actions says so: a set that has lost them is not taken for it."""
    return attributes.get("actions") is not None or attributes.get("action_size") != 0


def chunk_problems(name: str, array: Any, rows: int, *, read: bool) -> Iterator[Problem]:
    """Missing chunks among the first `rows` rows, and with `read` those that cannot be decoded."""
    unit = array.shards or array.chunks

    async def stored() -> set[str]:
        listing: AsyncIterator[str] = array.store.list_prefix(f"{array.path}/")
        return {key async for key in listing}

    present = sync(stored())
    for place in np.ndindex(*(-(-size // step) for size, step in zip(array.shape, unit, strict=True))):
        begin = place[0] * unit[0]
        if begin >= rows:
            return
        key = array.metadata.encode_chunk_key(place)
        where = f"{name}: chunk {key} (rows {begin} to {min(begin + unit[0], array.shape[0]) - 1})"
        if f"{array.path}/{key}" not in present:
            yield Problem(f"{where} is missing; it would be read as zeros")
        elif read:
            try:
                array[tuple(slice(i * step, (i + 1) * step) for i, step in zip(place, unit, strict=True))]
            except Exception as error:  # whatever the codec raises on damaged bytes
                yield Problem(f"{where} cannot be decoded: {error}")


def read_rows(name: str, array: Any, begin: int, end: int) -> np.ndarray:
    """array[begin:end]; ValueError names the chunk where it cannot be decoded."""
    try:
        return np.asarray(array[begin:end])
    except Exception as error:  # whatever the codec raises on damaged bytes
        named = next(chunk_problems(name, array, end, read=True), f"{name}: rows {begin} to {end - 1}: {error}")
        raise ValueError(str(named)) from error


def whole_ends(ends: np.ndarray) -> np.ndarray:
    """int64 [E]. An array grows before it is written: a 0 at the back is an episode whose end a crash kept off it."""
    return ends[: len(np.trim_zeros(ends, "b"))].astype(np.int64)


def end_problems(ends: np.ndarray, name: str, frames: int) -> Iterator[Problem]:
    """Of meta/episode_ends, for a set whose frames, `frames` of them, are in the array `name`."""
    if len(ends) == 0:
        yield Problem(f"{ENDS} must hold at least one episode, got none")
        return
    lengths = np.diff(ends, prepend=0)
    for e in np.flatnonzero(lengths <= 0):
        before = int(ends[e - 1]) if e else 0
        yield Problem(f"{ENDS} must increase, got {int(ends[e])} after {before}, episode {e}")
    if ends[-1] > frames:
        yield Problem(f"{ENDS} ends at {int(ends[-1])}, but {name} has {frames} frames")
    if ends[-1] < frames:
        surplus = frames - int(ends[-1])
        yield Problem(f"{name}: {surplus} frames after the last episode's end are left out", refused=False)


def length_problems(name: str, array: Any, rows: int, of: str) -> Iterator[Problem]:
    if array.shape[0] < rows:
        yield Problem(f"{name} must have {rows} rows, one per {of}, got shape {list(array.shape)}")


def action_problems(name: str, action: np.ndarray, attributes: dict[str, Any]) -> Iterator[Problem]:
    if action.dtype.kind == "f":
        broken = np.flatnonzero(~np.isfinite(action).all(axis=1))
        if len(broken):
            first = int(broken[0])
            yield Problem(
                f"{name} must be finite, got {action[first].tolist()} at frame {first}, and {len(broken) - 1} more"
            )
        return
    said = attributes.get("actions")
    count = int(action.max()) + 1 if said is None else said
    broken = np.flatnonzero((action < 0) | (action >= count))
    if len(broken):
        yield Problem(
            f"{name} must be in 0..{count - 1}, got {action.min()}..{action.max()}, "
            f"first at frame {broken[0]}, {len(broken)} in all"
        )


def token_problems(name: str, tokens: np.ndarray, vocabulary: int, first: int = 0) -> Iterator[Problem]:
    """Of the ids of frames `first` and on."""
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        place = tuple(np.argwhere((tokens < 0) | (tokens >= vocabulary))[0].tolist())
        yield Problem(
            f"{name} must be in 0..{vocabulary - 1}, got {int(tokens[place])} in frame {first + place[0]}, "
            f"token {list(place[1:])}"
        )


def clip_problems(ends: np.ndarray, clip: int) -> Iterator[Problem]:
    short = np.flatnonzero(np.diff(ends, prepend=0) < clip)
    if len(short):
        first = ", ".join(str(e) for e in short[:10]) + (", ..." if len(short) > 10 else "")
        yield Problem(
            f"{len(short)} of {len(ends)} episodes are shorter than a clip of {clip} frames ({first}): they train in "
            "clips that span episodes, and cannot be evaluated",
            refused=False,
        )
    if len(ends) and ends[-1] < clip:
        yield Problem(f"all episodes together have {int(ends[-1])} frames, fewer than a clip of {clip}")


def check(path: str | Path, clip: int) -> list[Problem]:
    """All problems of the set at `path`, for clips of `clip` frames; empty where there are none."""
    try:
        root = open_root(location(path))
    except ValueError as error:
        return [Problem(str(error))]
    attributes: dict[str, Any] = dict(root.attrs)
    arrays = arrays_of(root)
    problems = list(layout_problems(root))
    for name, array in arrays.items():
        if array is not None:
            problems += chunk_problems(name, array, array.shape[0], read=True)
    if problems:
        return problems
    name = IMG if IMG in arrays else TOKENS
    ends = whole_ends(arrays[ENDS][:])
    problems += end_problems(ends, name, arrays[name].shape[0])
    frames = int(ends.max(initial=0))
    if ACTION in arrays:
        problems += length_problems(ACTION, arrays[ACTION], frames, "frame")
        if frames and arrays[ACTION].shape[0]:
            problems += action_problems(ACTION, arrays[ACTION][:frames], attributes)
    if LEVELS in arrays:
        problems += length_problems(LEVELS, arrays[LEVELS], len(ends), "episode")
    if name == TOKENS:
        for first in range(0, min(frames, arrays[name].shape[0]), arrays[name].chunks[0]):
            last = min(first + arrays[name].chunks[0], frames)
            problems += token_problems(name, arrays[name][first:last], attributes["vocabulary"], first)
    return [*problems, *clip_problems(ends, clip)]


def location(path: str | Path) -> Path | str:
    """A URL that fsspec knows stays a string."""
    return str(path) if "://" in str(path) else Path(path)
