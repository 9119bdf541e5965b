"""Which data set a run is about, and what a set of tokens was made from: their content, wherever it is."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..data.place import location
from ..data.replay import Replay

PIXELS_DIGEST, TOKENIZER_DIGEST = "pixels_digest", "tokenizer_digest"
# Where the models and frames of an encoded set were, and which: what it holds is the same with and without them.
ORIGINS = ("pixels", "tokenizer", "latent_actions", PIXELS_DIGEST, TOKENIZER_DIGEST)
SAMPLED_FRAMES = 16


def resolved(path: str | Path) -> str:
    """The path of a data set from any directory; URLs are as they are."""
    place = location(path)
    return str(place.resolve()) if isinstance(place, Path) else place


def digest(replay: Replay) -> str:
    """Equal for copies of a set, and different where episodes, levels, actions, attributes or frames differ.

    Of the frames, SAMPLED_FRAMES at equal distances are read, so that a large set costs no more than a small one.
    """
    attributes = {name: value for name, value in replay.attributes.items() if name not in ORIGINS}
    sampled = np.linspace(0, replay.frames - 1, min(SAMPLED_FRAMES, replay.frames)).astype(np.int64)
    found = hashlib.sha256(json.dumps([replay.frame, replay.vocabulary, attributes], sort_keys=True).encode())
    columns = (replay.episode_ends, replay.episode_level, replay.action, replay.read(sampled))
    for column in columns:
        found.update(f"{column.dtype.str} {column.shape}".encode())
        found.update(column.tobytes())
    return found.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Equal for models with the same weights, wherever they are."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def open_data(stored: str, known: str | None, data: str | Path | None) -> Replay:
    """The data set of a run: at `data` where it is given, else where the run found it, or under a new name beside that.

    stored: the path in its config. known: its digest; None in runs that have none. ValueError where the set differs.
    """
    if data is None and known is not None and (renamed := beside(stored, known)) is not None:
        warnings.warn(f"{stored} is not there any more; {renamed.path} holds the same data set", stacklevel=2)
        return renamed
    place = stored if data is None else str(data)
    try:
        replay = Replay(place)
    except (ValueError, OSError) as error:
        if data is not None:
            raise
        raise ValueError(
            f"the run's data set cannot be read ({error}); if it was moved, say by data where to"
        ) from error
    if known is not None and digest(replay) != known:
        raise ValueError(
            f"data must be the set that the run was trained on, then in {stored}; {place} holds another one"
        )
    return replay


def beside(stored: str, known: str) -> Replay | None:
    """The set of this digest in the directory where one that is gone was; None where it is still there, or nowhere."""
    place = location(stored)
    if isinstance(place, str) or place.exists() or not place.parent.is_dir():
        return None
    for candidate in sorted(place.parent.iterdir()):
        if not any((candidate / name).is_file() for name in (".zgroup", "zarr.json")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                same = digest(Replay(candidate, memory_limit=0)) == known
        except (ValueError, OSError):
            continue  # It cannot be read, so it is not the one.
        if same:
            return Replay(candidate)
    return None
