"""mfwm data check: lists every problem of a replay buffer, and where it is.

Every rule about a set is stated here once. `Replay` raises at the first rule that a set breaks; `check` reads every
chunk and lists all rules that it breaks. It also lists what does not make a set invalid but is left out or trained
differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .stored import (
    ACTION,
    ENDS,
    IMG,
    LEVELS,
    STATE,
    TOKENS,
    Stored,
    low_factors,
    low_name,
    missing_and_damaged,
    open_stored,
    read_rows,
)

# What the arrays of frames must hold.
FRAMES = {
    IMG: "uint8 [N, H, W, 3], or floats that are integers in 0..255",
    TOKENS: "integers [N, rows, columns] or [N, rows, columns, F]",
}
LISTED = 100  # chunks of an array that are listed at most
INT64 = 2**63 - 1
VOCABULARY = 2**31  # ids are written as int32


@dataclass(frozen=True)
class Problem:
    """One problem of a set: it makes the set invalid, or is a note on what is left out or trained differently."""

    what: str
    invalid: bool = True

    def __str__(self) -> str:
        return ("" if self.invalid else "note: ") + self.what


def raise_invalid(place: object, problems: Iterable[Problem]) -> None:
    """ValueError for the first problem that makes a set invalid; a warning for each of the others before it."""
    where = f"{place}: " if place else ""
    for problem in problems:
        if problem.invalid:
            raise ValueError(f"{where}{problem}")
        warnings.warn(f"{where}{problem.what}", stacklevel=3)


def layout_problems(stored: Stored) -> Iterator[Problem]:
    """Problems of the arrays, their types and ranks, and of the attributes that describe them."""
    arrays, attributes = stored.arrays, stored.attributes
    for name, reason in stored.unreadable.items():
        yield Problem(f"array {name} is missing or unreadable: {reason}")
    found = [*arrays, *stored.unreadable]
    stated = attributes.get("state_names") is not None
    for name, needed in ((ACTION, has_actions(attributes)), (STATE, stated), (ENDS, True)):
        if needed and name not in found:
            yield Problem(f"array {name} is missing or unreadable")
    frames = [name for name in FRAMES if name in found]
    if len(frames) != 1:
        yield Problem(f"a replay buffer must have either {IMG} or {TOKENS}, got {' and '.join(frames) or 'neither'}")
    for name in FRAMES.keys() & arrays.keys():
        array = arrays[name]
        fits = (array.dtype == np.uint8 or array.dtype.kind == "f") and array.ndim == 4 and array.shape[3] == 3
        if name == TOKENS:
            fits = array.dtype.kind in "iu" and array.ndim in (3, 4)
        if not fits or 0 in array.shape[1:]:
            yield Problem(f"{name} must be {FRAMES[name]}, got {array.dtype} {list(array.shape)}")
    yield from low_problems(stored)
    for name, kinds, what in (
        (ACTION, (("i", 1), ("u", 1), ("f", 2)), "integers [N] or floats [N, A]"),
        (STATE, (("f", 2),), "floats [N, S]"),
        (ENDS, (("i", 1), ("u", 1)), "integers [E]"),
        (LEVELS, (("i", 1), ("u", 1)), "integers [E]"),
    ):
        array = arrays.get(name)
        if array is not None and (array.dtype.kind, array.ndim) not in kinds:
            yield Problem(f"{name} must be {what}, got {array.dtype} {list(array.shape)}")
    for name, needed, most in (("actions", False, INT64), ("vocabulary", TOKENS in found, VOCABULARY)):
        value = attributes.get(name)
        if (needed or value is not None) and (type(value) is not int or not 1 <= value <= most):
            yield Problem(f"attribute {name} must be an integer in 1..{most}, got {value!r}")
    if ACTION in arrays and attributes.get("actions") is not None and arrays[ACTION].ndim != 1:
        yield Problem(
            f"{ACTION} must be integers [N], since attribute actions is {attributes['actions']!r}, "
            f"got {arrays[ACTION].dtype} {list(arrays[ACTION].shape)}"
        )
    if stated:
        names = attributes["state_names"]
        broken = list(state_name_problems(names, attributes.get("state_units")))
        yield from broken
        if STATE in arrays and not broken and arrays[STATE].shape[1:] != (len(names),):
            yield Problem(
                f"{STATE} must have {len(names)} columns, one per name in attribute state_names, "
                f"got shape {list(arrays[STATE].shape)}"
            )


def low_problems(stored: Stored) -> Iterator[Problem]:
    """Problems of the ids of smaller frames, and of the attribute that lists their factors."""
    arrays, stated = stored.arrays, stored.attributes.get("low_factors")
    if stated is None:
        return
    factors, tokens = low_factors(stored.attributes), arrays.get(TOKENS)
    if not factors or tokens is None:
        yield Problem(
            f"attribute low_factors must be a list of increasing factors >= 2, in a set with {TOKENS}, got {stated!r}"
        )
        return
    for factor in factors:
        name = low_name(factor)
        if name not in arrays:
            if name not in stored.unreadable:
                yield Problem(f"array {name} is missing or unreadable")
            continue
        _, rows, columns, *ids = tokens.shape
        fits = rows % factor == columns % factor == 0 and arrays[name].dtype.kind in "iu"
        if not fits or arrays[name].shape[1:] != (rows // factor, columns // factor, *ids):
            yield Problem(
                f"{name} must be integers with {factor} times fewer rows and columns than {TOKENS}, which is "
                f"{list(tokens.shape)}, got {arrays[name].dtype} {list(arrays[name].shape)}"
            )


def state_name_problems(names: Any, units: Any) -> Iterator[Problem]:
    """Problems of the names and units of a state's columns."""
    for what, values in (("state_names", names), ("state_units", units)):
        if not isinstance(values, list) or not all(type(value) is str for value in values):
            yield Problem(f"attribute {what} must be a list of strings, one per column of {STATE}, got {values!r}")
            return
    if not names or len(set(names)) < len(names) or len(units) != len(names):
        yield Problem(
            f"attribute state_names must have at least one name, each once, and state_units as many units, "
            f"got {names} and {units}"
        )


def has_actions(attributes: dict[str, Any]) -> bool:
    """Whether a set has actions. A set without them says so, unlike one that has lost them."""
    return attributes.get("actions") is not None or attributes.get("action_size") != 0


def chunk_problems(name: str, array: Any, rows: int, *, read: bool) -> Iterator[Problem]:
    """Missing chunks among the first `rows` rows; with `read`, also chunks that cannot be decoded."""
    yield from map(Problem, missing_and_damaged(name, array, 0, rows, read=read))


def integer_problems(name: str, values: np.ndarray) -> Iterator[Problem]:
    """Values that do not fit into int64."""
    if values.size and int(values.max()) > INT64:
        yield Problem(f"{name} must fit into signed 64 bits, up to {INT64}, got {int(values.max())}")


def written_ends(ends: np.ndarray) -> np.ndarray:
    """int64 [E]: the ends without zeros at the back. The array grows before it is written, so a 0 there means that a
    crash came before an episode's end was written."""
    return ends[: len(np.trim_zeros(ends, "b"))].astype(np.int64)


def end_problems(ends: np.ndarray, name: str, frames: int) -> Iterator[Problem]:
    """Problems of meta/episode_ends, for a set with `frames` frames in the array `name`."""
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
        yield Problem(f"{name}: {surplus} frames after the last episode's end are left out", invalid=False)


def length_problems(name: str, array: Any, rows: int, of: str) -> Iterator[Problem]:
    if array.shape[0] < rows:
        yield Problem(f"{name} must have {rows} rows, one per {of}, got shape {list(array.shape)}")


def action_problems(name: str, action: np.ndarray, attributes: dict[str, Any]) -> Iterator[Problem]:
    """Actions that float32, or int64 and the number of actions, cannot hold."""
    if action.dtype.kind == "f":
        with np.errstate(over="ignore"):
            broken = np.flatnonzero(~np.isfinite(action.astype(np.float32)).all(axis=1))
        if len(broken):
            first = int(broken[0])
            yield Problem(
                f"{name} must be finite, got {action[first].tolist()} at frame {first}, and {len(broken) - 1} more "
                "(as float32, up to 3.4e38)"
            )
        return
    stated = attributes.get("actions")
    count = min(int(action.max(initial=0)), INT64 - 1) + 1 if stated is None else stated
    broken = np.flatnonzero((action < 0) | (action >= count))
    if len(broken):
        yield Problem(
            f"{name} must be in 0..{count - 1}, got {action.min()}..{action.max()}, "
            f"first at frame {broken[0]}, {len(broken)} in all"
        )


def state_problems(name: str, state: np.ndarray) -> Iterator[Problem]:
    """Infinite numbers; NaN is allowed, and says that the thing is not there or not visible."""
    with np.errstate(over="ignore"):
        broken = np.argwhere(np.isinf(state.astype(np.float32)))
    if len(broken):
        frame, column = broken[0].tolist()
        yield Problem(
            f"{name} must be finite, or NaN for what is not visible, got {state[frame, column]} at frame {frame}, "
            f"column {column}, and {len(broken) - 1} more (as float32, up to 3.4e38)"
        )


def token_problems(name: str, tokens: np.ndarray, vocabulary: int, first: int = 0) -> Iterator[Problem]:
    """Ids outside the vocabulary, in frames from number `first` on."""
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        index = tuple(np.argwhere((tokens < 0) | (tokens >= vocabulary))[0].tolist())
        yield Problem(
            f"{name} must be in 0..{vocabulary - 1}, got {int(tokens[index])} in frame {first + index[0]}, "
            f"token {list(index[1:])}"
        )


def pixel_problems(name: str, pixels: np.ndarray, first: int = 0) -> Iterator[Problem]:
    """Floats that uint8 cannot hold, in frames from number `first` on."""
    with np.errstate(invalid="ignore"):
        broken = np.argwhere(pixels != pixels.astype(np.uint8))
    if len(broken):
        index = tuple(broken[0].tolist())
        yield Problem(
            f"{name} must hold integers in 0..255 when it is {pixels.dtype}, got {pixels[index]} in frame "
            f"{first + index[0]}, pixel {list(index[1:])}"
        )


def clip_problems(ends: np.ndarray, clip: int) -> Iterator[Problem]:
    short = np.flatnonzero(np.diff(ends, prepend=0) < clip)
    if len(short):
        first = ", ".join(str(e) for e in short[:10]) + (", ..." if len(short) > 10 else "")
        yield Problem(
            f"{len(short)} of {len(ends)} episodes are shorter than a clip of {clip} frames ({first}): they are "
            "trained on in clips that span episodes, and cannot be evaluated",
            invalid=False,
        )
    if len(ends) and ends[-1] < clip:
        yield Problem(f"all episodes together have {int(ends[-1])} frames, fewer than a clip, which has {clip}")


def check(path: str | Path, clip: int) -> list[Problem]:
    """All problems of the set at `path`, for clips of `clip` frames."""
    try:
        stored = open_stored(path)
    except ValueError as error:
        return [Problem(str(error))]
    arrays = stored.arrays
    problems = list(layout_problems(stored))
    rows = dict.fromkeys(arrays, INT64)
    # Ends first, because rows past them are not read.
    for name in sorted(arrays, key=lambda name: name != ENDS):
        found = list(islice(chunk_problems(name, arrays[name], rows[name], read=True), LISTED + 1))
        problems += found[:LISTED]
        if len(found) > LISTED:
            problems.append(Problem(f"{name}: more chunks than these are missing or damaged"))
        if name == ENDS and not problems:
            ends = written_ends(read_rows(ENDS, arrays[ENDS], 0, arrays[ENDS].shape[0]))
            rows = dict.fromkeys(arrays, int(ends.max(initial=0))) | {LEVELS: len(ends)}
    if problems:
        return problems
    try:
        return [*value_problems(arrays, stored.attributes, clip)]
    except ValueError as error:  # a chunk that disappeared meanwhile
        return [Problem(str(error))]


def value_problems(arrays: dict[str, Any], attributes: dict[str, Any], clip: int) -> Iterator[Problem]:
    """Problems of the values, in a set whose chunks can all be read."""

    def rows(name: str, begin: int, end: int) -> np.ndarray:
        return read_rows(name, arrays[name], begin, min(end, arrays[name].shape[0]))

    name = IMG if IMG in arrays else TOKENS
    stored_ends = rows(ENDS, 0, INT64)
    yield from integer_problems(ENDS, stored_ends)
    ends = written_ends(stored_ends)
    yield from end_problems(ends, name, arrays[name].shape[0])
    frames = min(int(ends.max(initial=0)), arrays[name].shape[0])
    if ACTION in arrays:
        yield from length_problems(ACTION, arrays[ACTION], frames, "frame")
        if frames and arrays[ACTION].shape[0]:
            yield from action_problems(ACTION, rows(ACTION, 0, frames), attributes)
    if STATE in arrays:
        yield from length_problems(STATE, arrays[STATE], frames, "frame")
        yield from state_problems(STATE, rows(STATE, 0, frames))
    if LEVELS in arrays:
        yield from length_problems(LEVELS, arrays[LEVELS], len(ends), "episode")
        yield from integer_problems(LEVELS, rows(LEVELS, 0, len(ends)))
    for low in map(low_name, low_factors(attributes)):
        yield from length_problems(low, arrays[low], frames, "frame")
        for first in range(0, frames, arrays[low].chunks[0]):
            values = rows(low, first, min(first + arrays[low].chunks[0], frames))
            yield from token_problems(low, values, attributes["vocabulary"], first)
    step = arrays[name].chunks[0]
    for first in range(0, frames if name == TOKENS or arrays[name].dtype.kind == "f" else 0, step):
        values = rows(name, first, min(first + step, frames))
        if name == TOKENS:
            yield from token_problems(name, values, attributes["vocabulary"], first)
        else:
            yield from pixel_problems(name, values, first)
    yield from clip_problems(ends, clip)
