"""mfwm data import-tokens: token memmaps, as of the 1X World Model Challenge, as a replay buffer.

metadata.json      num_images, s (or h and w: rows and columns of tokens), vocab_size, token_dtype ("uint32")
video.bin          ids [num_images, rows, columns]
segment_ids.bin    int32 [num_images]; an episode is a run of frames of one id
actions/*.bin      float32 [num_images, any]: side by side, in the order of their names; or none
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from .check import INT64
from .import_episodes import Episode, read_object, whole, write_episodes

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

    ids: of a token. An id of a large vocabulary is split into this many of a vocabulary of its ids-th root, the lowest
        digit first: 262,144 = 512 * 512.
    skip_damaged: leave out an episode with ids outside the vocabulary or actions that are not finite; what is left out,
        with the reason, is returned. Otherwise ValueError names file, rule and value, and nothing is left in `out`.
    """
    folder = Path(folder)
    sizes = read_metadata(folder / "metadata.json")
    frames, vocabulary = sizes["num_images"], sizes["vocab_size"]
    # An id of a vocabulary of one says nothing: no more of them than bits.
    base = round(vocabulary ** (1 / ids)) if type(ids) is int and 1 <= ids < 64 else 0
    if base == 0 or base**ids != vocabulary:
        raise ValueError(f"ids must be a root that the vocabulary, {vocabulary}, has; got {ids}")
    tokens = mapped(folder / "video.bin", np.dtype(sizes["token_dtype"]), (frames, sizes["h"], sizes["w"]))
    segments = np.asarray(mapped(folder / "segment_ids.bin", np.dtype(np.int32), (frames,)))
    # A hidden file is the operating system's, such as ._joint_pos.bin.
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
    found = read_object(path)
    found = {"h": found.get("s"), "w": found.get("s"), "token_dtype": "uint32", **found}
    for name in ("num_images", "h", "w", "vocab_size"):
        whole(path, name, found.get(name))
    if found["vocab_size"] > INT64:
        raise ValueError(f"{path}: vocab_size must be in 64 bits, got {found['vocab_size']}")
    if found["token_dtype"] not in TOKEN_DTYPES:
        raise ValueError(f"{path}: token_dtype must be one of {', '.join(TOKEN_DTYPES)}, got {found['token_dtype']!r}")
    return found


def mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The file as an array of this shape, one entry of which may be -1; ValueError where it is shorter or longer."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size, row = path.stat().st_size, dtype.itemsize * abs(math.prod(shape))
    if size == 0 or (size % row if -1 in shape else size != row):
        rule = "a multiple of " if -1 in shape else ""
        raise ValueError(f"{path} must have {rule}{row} bytes for {shape[0]} frames, got {size}")
    return np.memmap(path, dtype, mode="r").reshape(shape)
