"""Writes a replay buffer episode by episode; replay.py describes the layout."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from numcodecs import Blosc
from numcodecs.checksum32 import CRC32

from .check import (
    ACTION,
    ENDS,
    IMG,
    INT64,
    LEVELS,
    STATE,
    TOKENS,
    VOCABULARY,
    action_problems,
    raise_invalid,
    state_name_problems,
    state_problems,
    token_problems,
)
from .place import Place, location
from .stored import low_name

CHUNK_FRAMES = 64


class ReplayWriter:
    """Writes a replay buffer, one `append` per episode.

    Args:
        path: a directory, or a URL that fsspec supports.
        height, width: of frames, in pixels; with `vocabulary`, in tokens.
        actions: the number of discrete actions, or None for continuous ones of `action_size` numbers; if that is 0, the
            set is video without actions.
        vocabulary: of tokens, each of which has `ids` ids; 0 for pixels.
        low_factors: increasing factors >= 2 of smaller frames whose ids each episode has, too; for tokens.
        state_names, state_units: of the columns of a state that each episode has; None for a set without state.
        overwrite: replace the replay buffer at `path`.
        attributes: stored with the set as JSON; replay.py lists the names that readers use.

    In a `with` block, all episodes together become the set when the block ends; if it raises or is killed, what was at
    `path` stays. Without one, the first episode becomes the set at once and each `append` extends it: an episode's end
    is written after its frames, and readers rely only on the ends. Nothing is written before the first episode.

    `Place` documents what is not overwritten, and where a set is written directly to `path`.
    """

    def __init__(
        self,
        path: str | Path,
        height: int,
        width: int,
        *,
        actions: int | None,
        action_size: int = 0,
        vocabulary: int = 0,
        ids: int = 1,
        low_factors: Sequence[int] = (),
        state_names: Sequence[str] | None = None,
        state_units: Sequence[str] | None = None,
        overwrite: bool = False,
        **attributes: Any,
    ) -> None:
        sizes = (height, width, action_size, vocabulary, ids)
        height, width, action_size, vocabulary, ids = map(operator.index, sizes)
        actions = None if actions is None else operator.index(actions)
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be at least 1, got {height} x {width}")
        if action_size < 0 or (actions is not None and (not 1 <= actions <= INT64 or action_size)):
            raise ValueError(
                "give either actions >= 1 (discrete) or actions=None and action_size >= 0 (continuous, or none), "
                f"got actions={actions}, action_size={action_size}"
            )
        if not 0 <= vocabulary <= VOCABULARY or ids < 1 or (ids > 1 and not vocabulary):
            raise ValueError(
                f"vocabulary must be 0 for pixels or up to {VOCABULARY}, and ids >= 1, 1 for pixels; "
                f"got {vocabulary} and {ids}"
            )
        self.attributes = {**attributes, "actions": actions, "action_size": action_size}
        if state_names is not None or state_units is not None:
            state = {"state_names": listed(state_names), "state_units": listed(state_units)}
            raise_invalid("", state_name_problems(*state.values()))
            self.attributes |= state
        self._frame: tuple[int, ...] = (height, width, 3)
        if vocabulary:
            self.attributes["vocabulary"] = vocabulary
            self._frame = (height, width) if ids == 1 else (height, width, ids)
        factors = [operator.index(factor) for factor in low_factors]
        divide = all(factor >= 2 and height % factor == width % factor == 0 for factor in factors)
        if factors and (not vocabulary or not divide or sorted(set(factors)) != factors):
            raise ValueError(
                f"low_factors must be increasing, >= 2 and divide frames of tokens, got {factors} for "
                f"{height} x {width}" + ("" if vocabulary else " pixels")
            )
        self._low = {factor: (height // factor, width // factor, *self._frame[2:]) for factor in factors}
        if factors:
            self.attributes["low_factors"] = factors
        try:
            json.dumps(self.attributes, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"attributes must be representable in JSON: {error}") from error
        self._vocabulary, self._video = vocabulary, TOKENS if vocabulary else IMG
        self.path = location(path)
        self._place = Place(self.path, overwrite=overwrite)
        self._arrays: dict[str, Any] = {}
        self._discarded = False
        self.frames = 0
        self.episodes = 0

    def __enter__(self) -> ReplayWriter:
        self._create()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.episodes:
            self._open(self._place.publish())
            return
        self._place.discard()
        self._discarded = True
        if kind is None:
            raise ValueError(f"{self.path}: a replay buffer must have at least one episode, and none was written")

    def _create(self) -> None:
        place = self._place.begin()
        try:
            # "a", because "w" removes the directory itself, which fails on a mount point after its files are gone.
            # Format 2, because diffusion-policy and its descendants pin zarr 2; zarr 3 reads both formats.
            root = zarr.open_group(str(place), mode="a", zarr_format=2)
            root.attrs.update(self.attributes)
            root.create_group("data")
            root.create_group("meta")
            actions, size = self.attributes["actions"], self.attributes["action_size"]
            layout: dict[str, tuple[tuple[int, ...], int, str]] = {
                self._video: (self._frame, CHUNK_FRAMES, "int32" if self._vocabulary else "uint8"),
                **{low_name(factor): (frame, CHUNK_FRAMES, "int32") for factor, frame in self._low.items()},
                LEVELS: ((), 4096, "int64"),
                ENDS: ((), 4096, "int64"),
            }
            if actions or size:
                layout[ACTION] = (() if actions else (size,), 4096, "int64" if actions else "float32")
            if "state_names" in self.attributes:
                layout[STATE] = ((len(self.attributes["state_names"]),), 4096, "float32")
            for name, (shape, chunk, dtype) in layout.items():
                # The checksum detects flipped bits that still decompress.
                root.create_array(
                    name,
                    shape=(0, *shape),
                    chunks=(chunk, *shape),
                    dtype=dtype,
                    filters=[CRC32()],
                    compressors=Blosc(cname="zstd", clevel=3),
                    fill_value=0,
                )
            self._open(place)
        except (NotImplementedError, OSError, ValueError) as error:
            self._place.discard()
            raise ValueError(f"{self.path} cannot be written: {error}") from error
        except BaseException:
            self._place.discard()
            raise

    def _open(self, place: Path | str) -> None:
        # Write empty chunks too, so that a missing chunk always means damage.
        with zarr.config.set({"array.write_empty_chunks": True}):
            root = zarr.open_group(str(place), mode="r+", zarr_format=2)
            names = (self._video, *map(low_name, self._low), ACTION, STATE, LEVELS, ENDS)
            found = {name: root.get(name) for name in names}
        self._arrays = {name: array for name, array in found.items() if array is not None}

    def append(
        self,
        video: np.ndarray,
        action: np.ndarray | None,
        level: int | None = None,
        *,
        state: np.ndarray | None = None,
        low_tokens: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """Add one episode: `video` uint8 [T, H, W, 3], or ids [T, rows, columns(, F)]; `action` integers [T] or floats
        [T, A], with `action[t]` taken at `video[t]`, or None in a set without actions; `state` floats [T, S], with
        `state[t]` that of `video[t]` and NaN for what is not visible, or None in a set without state; `low_tokens` by
        factor, the ids [T, rows / factor, columns / factor(, F)] of smaller frames, or None in a set without them.

        Two calls add two episodes, even if both are fragments of one. `level=None`: the episode's index.
        """
        if self._discarded:
            raise ValueError(f"{self.path}: the `with` block that wrote it raised, and its episodes are deleted")
        level = self.episodes if level is None else operator.index(level)
        if not -INT64 <= level <= INT64:
            raise ValueError(f"level must fit into 64 bits, got {level}")
        if not isinstance(video, np.ndarray):
            raise TypeError(f"video must be a NumPy array, got {type(video).__name__}")
        fits = video.dtype.kind in "iu" if self._vocabulary else video.dtype == np.uint8
        want = (*video.shape[:1], *self._frame)
        if not fits or video.shape != want or len(video) == 0:
            what = "integers" if self._vocabulary else "uint8"
            raise ValueError(f"video must be {what} {['T >= 1', *want[1:]]}, got {video.dtype} {list(video.shape)}")
        if self._vocabulary:
            raise_invalid("", token_problems("video", video, self._vocabulary))
        rows: dict[str, np.ndarray] = {self._video: video}
        low_tokens = low_tokens or {}
        if sorted(low_tokens) != sorted(self._low):
            raise ValueError(
                f"low_tokens must have the factors {list(self._low)} of this set, got {sorted(low_tokens)}"
            )
        for factor, low in low_tokens.items():
            expected = (len(video), *self._low[factor])
            if not isinstance(low, np.ndarray) or low.dtype.kind not in "iu" or low.shape != expected:
                got = f"{low.dtype} {list(low.shape)}" if isinstance(low, np.ndarray) else type(low).__name__
                raise ValueError(f"low_tokens[{factor}] must be integers {list(expected)}, got {got}")
            raise_invalid("", token_problems(f"low_tokens[{factor}]", low, self._vocabulary))
            rows[low_name(factor)] = low
        has_actions = bool(self.attributes["actions"] or self.attributes["action_size"])
        if (action is not None) != has_actions:
            raise ValueError(f"action must be {'given' if has_actions else 'None'} for this set")
        if action is not None:
            rows[ACTION] = self._checked(np.asarray(action), len(video))
        names = self.attributes.get("state_names")
        if (state is not None) != (names is not None):
            raise ValueError(f"state must be {'given' if names else 'None'} for this set")
        if state is not None and names is not None:
            state = np.asarray(state)
            if state.shape != (len(video), len(names)) or state.dtype.kind != "f":
                raise ValueError(
                    f"state must be floats {[len(video), len(names)]} for this set, "
                    f"got {state.dtype} {list(state.shape)}"
                )
            raise_invalid("", state_problems("state", state))
            rows[STATE] = state

        first = not self._arrays
        if first:
            self._create()
        try:
            for name, values in rows.items():
                self._write(name, self.frames, values)
            self._write(LEVELS, self.episodes, np.array([level]))
            self._write(ENDS, self.episodes, np.array([self.frames + len(video)]))
            if first:
                self._open(self._place.publish())
        except BaseException:
            if first:
                self._place.discard()
                self._arrays = {}
            raise
        self.frames += len(video)
        self.episodes += 1

    def _write(self, name: str, begin: int, values: np.ndarray) -> None:
        # At row `begin`, not at the array's end: an append that failed may have left rows there.
        array = self._arrays[name]
        array.resize((begin + len(values), *array.shape[1:]))
        array[begin:] = values.astype(array.dtype, copy=False)

    def _checked(self, action: np.ndarray, frames: int) -> np.ndarray:
        discrete = self.attributes["actions"] is not None
        want = (frames,) if discrete else (frames, self.attributes["action_size"])
        if action.shape != want or action.dtype.kind not in ("iu" if discrete else "f"):
            kind = "integers" if discrete else "floats"
            raise ValueError(
                f"action must be {kind} {list(want)} for this set, got {action.dtype} {list(action.shape)}"
            )
        raise_invalid("", action_problems("action", action, self.attributes))
        return action


def listed(values: Any) -> Any:
    """A list, as JSON has it, of a sequence of names; anything else, such as one name, as it is."""
    return list(values) if isinstance(values, (list, tuple)) else values
