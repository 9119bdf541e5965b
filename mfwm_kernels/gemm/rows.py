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


def by_clip(states: Tensor, positions: int) -> Tensor | None:
    """The rows of the first `positions` of every clip of [B, T, ..., D] as [B, rows, D]; None where the strides do not
    allow it without a copy."""
    inside = states[:, :positions]
    try:
        return inside.view(inside.shape[0], inside.shape[1:-1].numel(), inside.shape[-1])
    except RuntimeError:
        return None


def pieces(clips: Tensor, rows: slice) -> Iterator[Tensor]:
    """Rows of [B, R, D], numbered from clip to clip, in order: views [clips, rows, D], as few as there can be."""
    first, size = rows.start, clips.shape[1]
    while first < rows.stop:
        clip, row = divmod(first, size)
        whole = 0 if row else (rows.stop - first) // size
        if whole:
            yield clips[clip : clip + whole]
            first += whole * size
        else:
            end = min(size, row + rows.stop - first)
            yield clips[clip : clip + 1, row:end]
            first += end - row


def rows_of(states: Tensor, first: int, last: int) -> Tensor:
    """Rows first .. last of [..., D]; a copy only where the strides have no other way."""
    rows = flat(states)
    if rows is not None:
        return rows[first:last]
    return rows_at(states, torch.arange(first, last, device=states.device))


def rows_at(states: Tensor, numbers: Tensor) -> Tensor:
    """Rows of [..., D] by their numbers, copied."""
    rows = flat(states)
    if rows is not None:
        return rows[numbers]
    # Not torch.unravel_index: it copies the sizes from the host, and waits for that.
    places = []
    for size in reversed(states.shape[:-1]):
        places.append(numbers % size)
        numbers = numbers // size
    return states[tuple(reversed(places))]
