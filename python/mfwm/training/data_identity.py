"""Identifies the data set of a run, and the sources of a token set, by content, so that they can be moved."""

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
# Where the models and frames of an encoded set were, and their digests. They do not change what the set holds.
ORIGINS = ("pixels", "tokenizer", "low_tokenizers", "latent_actions", PIXELS_DIGEST, TOKENIZER_DIGEST)
SAMPLED_FRAMES = 16


def resolved(path: str | Path) -> str:
    """The path of a data set, valid from any directory; URLs are unchanged."""
    place = location(path)
    return str(place.resolve()) if isinstance(place, Path) else place


def digest(replay: Replay) -> str:
    """A digest that is equal for copies of a set, and differs where episodes, levels, actions, attributes or frames do.

    It reads SAMPLED_FRAMES evenly spaced frames, so that a large set costs no more than a small one.
    """
    attributes = {name: value for name, value in replay.attributes.items() if name not in ORIGINS}
    sampled = np.linspace(0, replay.frames - 1, min(SAMPLED_FRAMES, replay.frames)).astype(np.int64)
    found = hashlib.sha256(json.dumps([replay.frame, replay.vocabulary, attributes], sort_keys=True).encode())
    columns = [replay.episode_ends, replay.episode_level, replay.action, replay.read(sampled)]
    columns += [replay.read_low(factor, sampled) for factor in replay.low_factors]
    for column in columns:
        found.update(f"{column.dtype.str} {column.shape}".encode())
        found.update(column.tobytes())
    return found.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A digest that is equal for models with the same weights."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def open_data(stored: str, expected: str | None, data: str | Path | None) -> Replay:
    """The data set of a run: at `data` if given, else where the run last found it, or renamed in the same directory.

    stored: the path in the run's config. expected: the set's digest; None in runs that have none. ValueError where the
    set is another one.
    """
    if data is None and expected is not None and (renamed := find_renamed(stored, expected)) is not None:
        warnings.warn(f"{stored} no longer exists; using {renamed.path}, which holds the same data set", stacklevel=2)
        return renamed
    place = stored if data is None else str(data)
    try:
        replay = Replay(place)
    except (ValueError, OSError) as error:
        if data is not None:
            raise
        raise ValueError(
            f"the run's data set cannot be read ({error}); if it was moved, give its new place as data"
        ) from error
    if expected is not None and digest(replay) != expected:
        raise ValueError(
            f"data must be the set that the run was trained on, which was in {stored}; {place} holds another one"
        )
    return replay


def find_renamed(stored: str, expected: str) -> Replay | None:
    """If nothing is at `stored` any more, the set with this digest in the same directory, if there is one."""
    place = location(stored)
    if isinstance(place, str) or place.exists() or not place.parent.is_dir():
        return None
    for candidate in sorted(place.parent.iterdir()):
        if not any((candidate / name).is_file() for name in (".zgroup", "zarr.json")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                same = digest(Replay(candidate, memory_limit=0)) == expected
        except (ValueError, OSError):
            continue  # What cannot be read is not the set.
        if same:
            return Replay(candidate)
    return None
