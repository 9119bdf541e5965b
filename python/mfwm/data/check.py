"""mfwm data check: what is wrong with a replay buffer, all of it, with its place.

Every rule about a set stands here once. `Replay` refuses a set by the first rule that it breaks; `check` reads every
chunk and lists all that are broken. What is left out or trained differently, and not refused, is listed too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .stored import ACTION, ENDS, IMG, LEVELS, TOKENS, Stored, missing_and_damaged, open_stored, read_rows

# Type, rank and the words for them.
FRAMES = {
    IMG: "uint8 [N, H, W, 3], or floats that are whole numbers in 0..255",
    TOKENS: "integers [N, rows, columns] or [N, rows, columns, F]",
}
LISTED = 100  # chunks of an array
INT64 = 2**63 - 1
VOCABULARY = 2**31  # ids are written as int32


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the set is refused for it, or a count of what it means for training is given."""

    what: str
    refused: bool = True

    def __str__(self) -> str:
        return ("" if self.refused else "note: ") + self.what


def refuse(place: object, problems: Iterable[Problem]) -> None:
    """ValueError for the first problem that a set is refused for; a warning for what is not."""
    where = f"{place}: " if place else ""
    for problem in problems:
        if problem.refused:
            raise ValueError(f"{where}{problem}")
        warnings.warn(f"{where}{problem.what}", stacklevel=3)


def layout_problems(stored: Stored) -> Iterator[Problem]:
    """Arrays, their types and ranks, and the attributes that say what they hold."""
    arrays, attributes = stored.arrays, stored.attributes
    for name, reason in stored.unreadable.items():
        yield Problem(f"array {name} is missing or unreadable: {reason}")
    found = [*arrays, *stored.unreadable]
    for name in [ACTION, ENDS] if has_actions(attributes) else [ENDS]:
        if name not in found:
            yield Problem(f"array {name} is missing or unreadable")
    frames = [name for name in FRAMES if name in found]
    if len(frames) != 1:
        yield Problem(f"a replay buffer has either {IMG} or {TOKENS}, got {' and '.join(frames) or 'neither'}")
    for name in FRAMES.keys() & arrays.keys():
        array = arrays[name]
        fits = (array.dtype == np.uint8 or array.dtype.kind == "f") and array.ndim == 4 and array.shape[3] == 3
        if name == TOKENS:
            fits = array.dtype.kind in "iu" and array.ndim in (3, 4)
        if not fits or 0 in array.shape[1:]:
            yield Problem(f"{name} must be {FRAMES[name]}, got {array.dtype} {list(array.shape)}")
    for name, kinds, what in (
        (ACTION, (("i", 1), ("u", 1), ("f", 2)), "integers [N] or floats [N, A]"),
        (ENDS, (("i", 1), ("u", 1)), "integers [E]"),
        (LEVELS, (("i", 1), ("u", 1)), "integers [E]"),
    ):
        array = arrays.get(name)
        if array is not None and (array.dtype.kind, array.ndim) not in kinds:
            yield Problem(f"{name} must be {what}, got {array.dtype} {list(array.shape)}")
    for name, needed, most in (("actions", False, INT64), ("vocabulary", TOKENS in found, VOCABULARY)):
        value = attributes.get(name)
        if (needed or value is not None) and (type(value) is not int or not 1 <= value <= most):
            yield Problem(f"attribute {name} must be an integer >= 1, up to {most}, got {value!r}")
    if ACTION in arrays and attributes.get("actions") is not None and arrays[ACTION].ndim != 1:
        yield Problem(
            f"{ACTION} must be integers [N], since attribute actions is {attributes['actions']!r}, "
            f"got {arrays[ACTION].dtype} {list(arrays[ACTION].shape)}"
        )


def has_actions(attributes: dict[str, Any]) -> bool:
    """Video without actions says so: a set that has lost them is not taken for it."""
    return attributes.get("actions") is not None or attributes.get("action_size") != 0


def chunk_problems(name: str, array: Any, rows: int, *, read: bool) -> Iterator[Problem]:
    """Missing chunks among the first `rows` rows, and with `read` those that cannot be decoded."""
    yield from map(Problem, missing_and_damaged(name, array, 0, rows, read=read))


def integer_problems(name: str, values: np.ndarray) -> Iterator[Problem]:
    """Of what is about to become int64."""
    if values.size and int(values.max()) > INT64:
        yield Problem(f"{name} must be in 64 bits with a sign, up to {INT64}, got {int(values.max())}")


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
    """Of actions as they are given, for what they become: float32 or int64."""
    if action.dtype.kind == "f":
        with np.errstate(over="ignore"):
            broken = np.flatnonzero(~np.isfinite(action.astype(np.float32)).all(axis=1))
        if len(broken):
            first = int(broken[0])
            yield Problem(
                f"{name} must be finite, got {action[first].tolist()} at frame {first}, and {len(broken) - 1} more "
                "(as float32, which ends at 3.4e38)"
            )
        return
    said = attributes.get("actions")
    count = min(int(action.max(initial=0)), INT64 - 1) + 1 if said is None else said
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


def pixel_problems(name: str, pixels: np.ndarray, first: int = 0) -> Iterator[Problem]:
    """Of the floats of frames `first` and on, which become uint8."""
    with np.errstate(invalid="ignore"):
        broken = np.argwhere(pixels != pixels.astype(np.uint8))
    if len(broken):
        place = tuple(broken[0].tolist())
        yield Problem(
            f"{name} must hold whole numbers in 0..255 where it is {pixels.dtype}, got {pixels[place]} in frame "
            f"{first + place[0]}, pixel {list(place[1:])}"
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
        stored = open_stored(path)
    except ValueError as error:
        return [Problem(str(error))]
    arrays = stored.arrays
    problems = list(layout_problems(stored))
    rows = dict.fromkeys(arrays, INT64)
    # Ends first: what is after them is not read.
    for name in sorted(arrays, key=lambda name: name != ENDS):
        found = list(islice(chunk_problems(name, arrays[name], rows[name], read=True), LISTED + 1))
        problems += found[:LISTED]
        if len(found) > LISTED:
            problems.append(Problem(f"{name}: and more chunks"))
        if name == ENDS and not problems:
            ends = whole_ends(read_rows(ENDS, arrays[ENDS], 0, arrays[ENDS].shape[0]))
            rows = dict.fromkeys(arrays, int(ends.max(initial=0))) | {LEVELS: len(ends)}
    if problems:
        return problems
    try:
        return [*value_problems(arrays, stored.attributes, clip)]
    except ValueError as error:  # a chunk that was there a moment ago
        return [Problem(str(error))]


def value_problems(arrays: dict[str, Any], attributes: dict[str, Any], clip: int) -> Iterator[Problem]:
    """Of a set whose chunks can all be read."""

    def rows(name: str, begin: int, end: int) -> np.ndarray:
        return read_rows(name, arrays[name], begin, min(end, arrays[name].shape[0]))

    name = IMG if IMG in arrays else TOKENS
    stored_ends = rows(ENDS, 0, INT64)
    yield from integer_problems(ENDS, stored_ends)
    ends = whole_ends(stored_ends)
    yield from end_problems(ends, name, arrays[name].shape[0])
    frames = min(int(ends.max(initial=0)), arrays[name].shape[0])
    if ACTION in arrays:
        yield from length_problems(ACTION, arrays[ACTION], frames, "frame")
        if frames and arrays[ACTION].shape[0]:
            yield from action_problems(ACTION, rows(ACTION, 0, frames), attributes)
    if LEVELS in arrays:
        yield from length_problems(LEVELS, arrays[LEVELS], len(ends), "episode")
        yield from integer_problems(LEVELS, rows(LEVELS, 0, len(ends)))
    step = arrays[name].chunks[0]
    for first in range(0, frames if name == TOKENS or arrays[name].dtype.kind == "f" else 0, step):
        values = rows(name, first, min(first + step, frames))
        if name == TOKENS:
            yield from token_problems(name, values, attributes["vocabulary"], first)
        else:
            yield from pixel_problems(name, values, first)
    yield from clip_problems(ends, clip)
