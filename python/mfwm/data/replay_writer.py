"""Writing a replay buffer, the layout of data.py, episode by episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from fsspec.core import url_to_fs
from numcodecs import Blosc
from numcodecs.checksum32 import CRC32

from .check import ACTION, ENDS, IMG, LEVELS, TOKENS, action_problems, location, refuse, token_problems

CHUNK_FRAMES = 64


class ReplayWriter:
    """Writes a replay buffer, one `append` per episode.

    path: a directory, or a URL that fsspec knows.
    height, width: of frames in pixels; with `vocabulary`, in tokens.
    actions: the number of discrete actions, or None for continuous ones of `action_size` numbers; where that is 0, the
        set is video without actions.
    vocabulary: of tokens, each of `ids` ids; 0 for pixels.
    attributes: kept with the set; the names that readers know stand in data.py.

    Safe against a crash: an episode's end is written after its frames, and a reader trusts only the ends.
    FileExistsError where `path` holds anything, unless `overwrite`; and with it, ValueError where what it holds is no
    Zarr group, since deleting that would cost somebody else's files.
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
        overwrite: bool = False,
        **attributes: Any,
    ) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be at least 1, got {height} x {width}")
        if action_size < 0 or (actions is not None and (actions < 1 or action_size)):
            raise ValueError(
                "give either actions >= 1 (discrete) or actions=None and action_size >= 0 (continuous, or none), "
                f"got actions={actions}, action_size={action_size}"
            )
        if vocabulary < 0 or ids < 1 or (ids > 1 and not vocabulary):
            raise ValueError(f"vocabulary must be >= 0 and ids >= 1, 1 for pixels; got {vocabulary} and {ids}")
        self.path = location(path)
        self.attributes = {**attributes, "actions": actions, "action_size": action_size}
        frame = (height, width, 3)
        if vocabulary:
            self.attributes["vocabulary"] = vocabulary
            frame = (height, width) if ids == 1 else (height, width, ids)  # type: ignore[assignment]
        make_room(self.path, overwrite=overwrite)

        # Format 2, because diffusion-policy and its descendants pin zarr 2; zarr 3 reads both.
        root = zarr.open_group(str(self.path), mode="w", zarr_format=2)
        root.attrs.update(self.attributes)
        root.create_group("data")
        root.create_group("meta")

        def array(name: str, shape: tuple[int, ...], chunk: int, dtype: str) -> Any:
            return root.create_array(
                name,
                shape=(0, *shape),
                chunks=(chunk, *shape),
                dtype=dtype,
                # The checksum finds flipped bits that still decompress; without empty chunks, a missing one is damage.
                filters=[CRC32()],
                compressors=Blosc(cname="zstd", clevel=3),
                fill_value=0,
                config={"write_empty_chunks": True},
            )

        self._video = array(TOKENS if vocabulary else IMG, frame, CHUNK_FRAMES, "int32" if vocabulary else "uint8")
        self._action = None
        if actions or action_size:
            self._action = array(ACTION, () if actions else (action_size,), 4096, "int64" if actions else "float32")
        self._levels = array(LEVELS, (), 4096, "int64")
        self._ends = array(ENDS, (), 4096, "int64")
        self.frames = 0
        self.episodes = 0

    def append(self, video: np.ndarray, action: np.ndarray | None, level: int | None = None) -> None:
        """One episode: `video` uint8 [T, H, W, 3], or ids [T, rows, columns(, F)]; `action` integers [T] or floats
        [T, A], with `action[t]` taken at `video[t]`, or None in a set without actions.

        Two calls are two episodes, also where both are fragments of one. `level=None` takes the episode's index.
        """
        pixels = self._video.dtype == np.uint8
        fits = video.dtype == np.uint8 if pixels else video.dtype.kind in "iu"
        want = (*video.shape[:1], *self._video.shape[1:])
        if not fits or video.shape != want or len(video) == 0:
            what = "uint8" if pixels else "integers"
            raise ValueError(f"video must be {what} {['T >= 1', *want[1:]]}, got {video.dtype} {list(video.shape)}")
        if not pixels:
            refuse("", token_problems("video", video, self.attributes["vocabulary"]))
        if (action is None) != (self._action is None):
            raise ValueError(f"action must be {'None' if self._action is None else 'given'} for this set")
        if self._action is not None:
            self._action.append(self._checked(np.asarray(action), len(video)))
        self._video.append(video.astype(self._video.dtype, copy=False))
        self._levels.append(np.array([self.episodes if level is None else level], np.int64))
        self._ends.append(np.array([self.frames + len(video)], np.int64))
        self.frames += len(video)
        self.episodes += 1

    def _checked(self, action: np.ndarray, frames: int) -> np.ndarray:
        assert self._action is not None
        want = (frames, *self._action.shape[1:])
        discrete = self._action.ndim == 1
        if action.shape != want or action.dtype.kind not in ("iu" if discrete else "f"):
            kind = "integers" if discrete else "floats"
            raise ValueError(
                f"action must be {kind} {list(want)} for this set, got {action.dtype} {list(action.shape)}"
            )
        refuse("", action_problems("action", action, self.attributes))
        return action.astype(self._action.dtype)


def make_room(path: Path | str, *, overwrite: bool) -> None:
    """Raise where `path` holds anything; with `overwrite` delete it first, if it is a Zarr group."""
    files, root = url_to_fs(path if isinstance(path, str) else str(path.absolute()))
    if not files.exists(root) or (files.isdir(root) and not files.ls(root)):
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} is not empty: choose another directory, or say overwrite to delete what it holds"
        )
    if not any(files.isfile(f"{root}/{name}") for name in (".zgroup", "zarr.json")):
        raise ValueError(f"{path} is not empty and no Zarr group, so overwrite does not delete it: remove it yourself")
    files.rm(root, recursive=True)
