"""mfwm data import-tokens: token memmaps, as of the 1X World Model Challenge, as a replay buffer.

metadata.json      num_images, s (or h and w: rows and columns of tokens), vocab_size, token_dtype ("uint32")
video.bin          ids [num_images, rows, columns]
segment_ids.bin    int32 [num_images]; an episode is a run of frames of one id
actions/*.bin      float32 [num_images, any]: side by side, in the order of their names; or none
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from .import_episodes import Episode, write_episodes


def import_tokens(
    folder: Path,
    out: str | Path,
    *,
    ids: int = 1,
    skip_damaged: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> list[str]:
    """Write the token memmaps of `folder` as the replay buffer `out`.

    ids: of a token. An id of a large vocabulary is split into this many of a vocabulary of its ids-th root, the lowest
        digit first: 262,144 = 512 * 512.
    skip_damaged: leave out an episode with ids outside the vocabulary or actions that are not finite; what is left out,
        with the reason, is returned. Otherwise ValueError names file, rule and value, and nothing is left in `out`.
    """
    folder = Path(folder)
    sizes = read_metadata(folder / "metadata.json")
    frames, vocabulary = sizes["num_images"], sizes["vocab_size"]
    base = round(vocabulary ** (1 / ids)) if ids >= 1 else 0
    if base**ids != vocabulary:
        raise ValueError(f"ids must be a root that the vocabulary, {vocabulary}, has; got {ids}")
    tokens = mapped(folder / "video.bin", np.dtype(sizes["token_dtype"]), (frames, sizes["h"], sizes["w"]))
    segments = np.asarray(mapped(folder / "segment_ids.bin", np.dtype(np.int32), (frames,)))
    parts = [mapped(path, np.dtype(np.float32), (frames, -1)) for path in sorted((folder / "actions").glob("*.bin"))]

    def episode(begin: int, end: int) -> Episode:
        video = np.asarray(tokens[begin:end]).astype(np.int64)
        if not 0 <= video.min() <= video.max() < vocabulary:
            raise ValueError(f"ids must be in 0..{vocabulary - 1}, got {video.min()}..{video.max()}")
        if ids > 1:
            video = video[..., None] // base ** np.arange(ids) % base
        return Episode(video, np.concatenate([part[begin:end] for part in parts], axis=1) if parts else None)

    borders = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), frames]
    makes = {
        f"{folder}, frames {begin} to {end - 1}": lambda begin=begin, end=end: episode(begin, end)  # type: ignore[misc]
        for begin, end in itertools.pairwise(borders)
    }
    return write_episodes(
        out,
        makes,
        vocabulary=base,
        skip_damaged=skip_damaged,
        overwrite=overwrite,
        progress=progress,
        env=folder.resolve().name,
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """num_images, h, w, vocab_size and token_dtype."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    found.setdefault("h", found.get("s"))
    found.setdefault("w", found.get("s"))
    found.setdefault("token_dtype", "uint32")
    for name in ("num_images", "h", "w", "vocab_size"):
        if type(found.get(name)) is not int or found[name] < 1:
            raise ValueError(f"{path}: {name} must be an integer >= 1, got {found.get(name)!r}")
    if np.dtype(found["token_dtype"]).kind not in "iu":
        raise ValueError(f"{path}: token_dtype must be of integers, got {found['token_dtype']!r}")
    return found


def mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The file as an array of this shape, one entry of which may be -1; ValueError where it is shorter or longer."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size, row = path.stat().st_size, dtype.itemsize * int(abs(np.prod(shape)))
    if size == 0 or (size % row if -1 in shape else size != row):
        rule = "a multiple of " if -1 in shape else ""
        raise ValueError(f"{path} must have {rule}{row} bytes for {shape[0]} frames, got {size}")
    return np.memmap(path, dtype, mode="r").reshape(shape)
