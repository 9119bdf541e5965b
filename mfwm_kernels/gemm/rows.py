"""Chunks of rows of a tensor [..., D], so that no temporary around a matrix product is as large as its input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The most bytes of temporaries that a chunk may need on a CPU, for each thread, so that they stay in its L2 cache
# between a product and a pass. On 2 threads with 1 MiB of L2 each, multi_horizon_linear in fp32 takes 12 to 16% less
# time than with chunks of 16 MiB in all. Half as much is as fast; a quarter is 4% slower.
CHUNK_BYTES = 2**20
# A chunk on a GPU may need this share of its memory. mfwm_kernels.aot reports launches on an H200, without a GPU.
GPU_SHARE, H200_BYTES = 64, 139 * 2**30


def chunk_bytes(like: Tensor) -> int:
    """The most bytes of temporaries of a chunk of the rows of `like`.

    On a CPU, chunks stay in its cache. On a GPU each chunk costs launches, so only memory limits them.
    """
    every = like.numel() * like.element_size()
    if like.device.type == "cuda":
        return min(every, torch.cuda.get_device_properties(like.device).total_memory // GPU_SHARE)
    if like.device.type == "meta":
        return min(every, H200_BYTES // GPU_SHARE)
    return min(every // 2, CHUNK_BYTES * torch.get_num_threads())


def chunks(like: Tensor, temporary: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (first, last) for chunks of the rows of `like`, `first` a multiple of `multiple`.

    The temporaries of a chunk, `temporary` bytes a row, take at most chunk_bytes, but a chunk has at least 256 rows and
    at least `multiple`.
    """
    rows = like.shape[:-1].numel()
    size = max(256, chunk_bytes(like) // temporary) if temporary else max(1, rows)
    size = max(1, size // multiple) * multiple
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def flat(states: Tensor) -> Tensor | None:
    """A view of [..., D] as [rows, D], or None if the strides allow none."""
    try:
        return states.view(-1, states.shape[-1])
    except RuntimeError:
        return None


def by_clip(states: Tensor, positions: int) -> Tensor | None:
    """A view [B, rows, D] of the first `positions` positions of every clip of [B, T, ..., D], or None if the strides
    allow none."""
    inside = states[:, :positions]
    try:
        return inside.view(inside.shape[0], inside.shape[1:-1].numel(), inside.shape[-1])
    except RuntimeError:
        return None


def clip_views(clips: Tensor, rows: slice) -> Iterator[Tensor]:
    """Rows of [B, R, D], numbered through all clips, as the fewest possible views [clips, rows, D] in order."""
    first, size = rows.start, clips.shape[1]
    while first < rows.stop:
        clip, row = divmod(first, size)
        complete = 0 if row else (rows.stop - first) // size
        if complete:
            yield clips[clip : clip + complete]
            first += complete * size
        else:
            end = min(size, row + rows.stop - first)
            yield clips[clip : clip + 1, row:end]
            first += end - row


def rows_of(states: Tensor, first: int, last: int) -> Tensor:
    """Rows first .. last - 1 of [..., D]: a view if the strides allow one, else a copy."""
    rows = flat(states)
    if rows is not None:
        return rows if last - first == rows.shape[0] else rows[first:last]
    return rows_at(states, torch.arange(first, last, device=states.device))


def rows_at(states: Tensor, numbers: Tensor) -> Tensor:
    """A copy of the rows of [..., D] with these numbers."""
    rows = flat(states)
    if rows is not None:
        return rows[numbers]
    # Not torch.unravel_index, which copies the sizes from the host and waits for the copy.
    indices = []
    for size in reversed(states.shape[:-1]):
        indices.append(numbers % size)
        numbers = numbers // size
    return states[tuple(reversed(indices))]
