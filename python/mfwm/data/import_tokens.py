"""mfwm data import-tokens: token memmaps, such as those of the 1X World Model Challenge, as a replay buffer.

metadata.json      num_images, s (or h and w: rows and columns of tokens), vocab_size, token_dtype ("uint32")
video.bin          ids [num_images, rows, columns]
segment_ids.bin    int32 [num_images]; an episode is a run of frames with the same id
actions/*.bin      float32 [num_images, any], concatenated in the order of their names; or no such files
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from .check import INT64
from .import_episodes import Episode, integer_of, read_object, write_episodes

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")


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

    ids: split each id of a large vocabulary into this many ids of a smaller one, the lowest digit first. The
        small vocabulary is that root of the large one: 262,144 = 512 * 512.
    skip_damaged: leave out an episode with ids outside the vocabulary or actions that are not finite, and return the
        reasons. Without it, ValueError names file, rule and value, and `out` is left as it was.
    """
    folder = Path(folder)
    sizes = read_metadata(folder / "metadata.json")
    frames, vocabulary = sizes["num_images"], sizes["vocab_size"]
    # Fewer than 64, because each id has a vocabulary of at least 2 and their product fits into 64 bits.
    valid = type(ids) is int and 1 <= ids < 64
    base = round(vocabulary ** (1 / ids)) if valid else 0
    if base == 0 or base**ids != vocabulary:
        raise ValueError(f"ids must satisfy n ** ids = {vocabulary}, the vocabulary, for an integer n; got {ids}")
    tokens = mapped(folder / "video.bin", np.dtype(sizes["token_dtype"]), (frames, sizes["h"], sizes["w"]))
    segments = np.asarray(mapped(folder / "segment_ids.bin", np.dtype(np.int32), (frames,)))
    # Hidden files come from the operating system, such as ._joint_pos.bin.
    files = [path for path in sorted((folder / "actions").glob("*.bin")) if not path.name.startswith(".")]
    parts = [mapped(path, np.dtype(np.float32), (frames, -1)) for path in files]

    def episode(begin: int, end: int) -> Episode:
        video = np.asarray(tokens[begin:end])
        if not 0 <= video.min() <= video.max() < vocabulary:
            raise ValueError(f"ids must be in 0..{vocabulary - 1}, got {video.min()}..{video.max()}")
        video = video.astype(np.int64)
        if ids > 1:
            video = video[..., None] // base ** np.arange(ids) % base
        return Episode(video, np.concatenate([part[begin:end] for part in parts], axis=1) if parts else None)

    borders = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), frames]
    episodes = {
        f"{folder}, frames {begin} to {end - 1}": lambda begin=begin, end=end: episode(begin, end)  # type: ignore[misc]
        for begin, end in itertools.pairwise(borders)
    }
    return write_episodes(
        out,
        episodes,
        vocabulary=base,
        skip_damaged=skip_damaged,
        overwrite=overwrite,
        progress=progress,
        env=folder.resolve().name,
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """num_images, h, w, vocab_size and token_dtype."""
    found = read_object(path)
    found = {"h": found.get("s"), "w": found.get("s"), "token_dtype": "uint32", **found}
    for name in ("num_images", "h", "w", "vocab_size"):
        integer_of(path, name, found.get(name))
    if found["vocab_size"] > INT64:
        raise ValueError(f"{path}: vocab_size must fit into 64 bits, got {found['vocab_size']}")
    if found["token_dtype"] not in TOKEN_DTYPES:
        raise ValueError(f"{path}: token_dtype must be one of {', '.join(TOKEN_DTYPES)}, got {found['token_dtype']!r}")
    return found


def mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The file as an array of this shape, one entry of which may be -1. ValueError if its size does not fit."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size, row = path.stat().st_size, dtype.itemsize * abs(math.prod(shape))
    if size == 0 or (size % row if -1 in shape else size != row):
        rule = "a multiple of " if -1 in shape else ""
        raise ValueError(f"{path} must have {rule}{row} bytes for {shape[0]} frames, got {size}")
    return np.memmap(path, dtype, mode="r").reshape(shape)
