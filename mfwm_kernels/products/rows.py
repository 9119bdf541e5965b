"""Rows of a tensor [..., D] in chunks: what surrounds a matrix product needs no temporary as large as its input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of a chunk's temporaries, at most.
CHUNK_BYTES = 64 * 2**20


def chunks(like: Tensor, temporary: int) -> Iterator[tuple[int, int]]:
    """(first, last) of chunks of the rows of `like`, whose `temporary` bytes a row come to half of `like` at most."""
    rows, row = like.shape[:-1].numel(), like.shape[-1] * like.element_size()
    size = max(256, min(rows * row // 2, CHUNK_BYTES) // temporary) if temporary else max(1, rows)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def flat(states: Tensor) -> Tensor | None:
    """[..., D] as [rows, D] where the strides allow it without a copy."""
    try:
        return states.view(-1, states.shape[-1])
    except RuntimeError:
        return None


def rows_of(states: Tensor, first: int, last: int) -> Tensor:
    """Rows first .. last of [..., D]; a copy only where the strides have no other way."""
    return rows_at(states, slice(first, last))


def rows_at(states: Tensor, place: slice | Tensor) -> Tensor:
    """Rows of [..., D] by their numbers; of a slice a copy only where the strides have no other way."""
    rows = flat(states)
    if rows is not None:
        return rows[place]
    if isinstance(place, slice):
        place = torch.arange(place.start, place.stop, device=states.device)
    return states[torch.unravel_index(place, states.shape[:-1])]
