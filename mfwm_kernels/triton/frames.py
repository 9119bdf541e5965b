"""Tiles of frames that divide into boxes at every factor, in image or token layout, for the ops on video.

A tile is [rows, columns, channels]. Its factors form a chain in which each divides the next. Level l has factor f_l,
and level 0 is the pixels. An index along an axis has one digit per step of the chain, each padded to a power of 2
(factors 1, 3, 6: digits of 3 and 2 values, padded to 4 and 2), so that a box average is a reshape and a sum in
registers.

    TRUE[l] = f_last / f_l         PADS[l] = the same with every step padded         both end in 1
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, power_of_2


@triton.jit
def axis(first, cells, CELLS: tl.constexpr, TRUE: tl.constexpr, PADS: tl.constexpr, LEVEL: tl.constexpr):
    """The index at LEVEL of each element along an axis of the tile with first cell `first`, and which ones exist."""
    element = tl.arange(0, CELLS * PADS[LEVEL])
    if TRUE[LEVEL] == PADS[LEVEL]:
        index = first * TRUE[LEVEL] + element
        return index, index < cells * TRUE[LEVEL]
    else:
        index = element * 0
        exists = element >= 0
        for q in tl.static_range(LEVEL, len(TRUE) - 1):
            digit = element % (PADS[q] // PADS[q + 1])
            element = element // (PADS[q] // PADS[q + 1])
            exists = exists & (digit < TRUE[q] // TRUE[q + 1])
            index += digit * (TRUE[LEVEL] // TRUE[q])
        return index + (first + element) * TRUE[LEVEL], exists & (first + element < cells)


@triton.jit
def above(index, SIZE: tl.constexpr):
    """index // SIZE of indices that are not negative: one shift if SIZE is a power of 2, signed division takes three
    instructions."""
    return (index.to(tl.uint64 if index.dtype == tl.int64 else tl.uint32) // SIZE).to(index.dtype)


@triton.jit
def below(index, SIZE: tl.constexpr):
    """index % SIZE of indices that are not negative."""
    return (index.to(tl.uint64 if index.dtype == tl.int64 else tl.uint32) % SIZE).to(index.dtype)


@triton.jit
def inside(y, x, c):
    """The mask of a tile, from the masks of its three axes."""
    return y[:, None, None] & x[None, :, None] & c[None, None, :]


@triton.jit
def frame_offsets(y, x, c, channels, width, steps, PATCH: tl.constexpr, LONG: tl.constexpr):
    """Offsets of a tile in one frame of strides `steps`.

    PATCH 0: an image, steps (batch, time, channel, row, column). Otherwise tokens, steps (batch, time, token, feature),
    with features in (row, column, channel) order. Offsets have 32 bits unless LONG, to save half the registers.
    """
    if LONG:
        y, x, c = y.to(tl.int64), x.to(tl.int64), c.to(tl.int64)
    if PATCH == 0:
        return (y * steps[3])[:, None, None] + (x * steps[4])[None, :, None] + (c * steps[2])[None, None, :]
    else:
        y_offsets = above(y, PATCH) * (width // PATCH) * steps[2] + below(y, PATCH) * (PATCH * channels) * steps[3]
        x_offsets = above(x, PATCH) * steps[2] + below(x, PATCH) * channels * steps[3]
        return y_offsets[:, None, None] + x_offsets[None, :, None] + (c * steps[3])[None, None, :]


@triton.jit
def average(tile, PADDED: tl.constexpr, RATIO: tl.constexpr):
    """Mean over RATIO x RATIO boxes, which zeros pad to PADDED x PADDED."""
    if PADDED == 1:
        return tile
    else:
        boxes = tl.reshape(
            tile, [tile.shape[0] // PADDED, PADDED, tile.shape[1] // PADDED, PADDED, tile.shape[2]]
        )  # fmt: skip
        return tl.sum(tl.sum(boxes, 3), 1) * (1.0 / (RATIO * RATIO))


@triton.jit
def repeated(tile, PADDED: tl.constexpr):
    """Each value PADDED x PADDED times: the inverse of the shape change in `average`."""
    if PADDED == 1:
        return tile
    else:
        shape: tl.constexpr = [tile.shape[0], PADDED, tile.shape[1], PADDED, tile.shape[2]]
        boxes = tl.broadcast_to(tile[:, None, :, None, :], shape)
        return tl.reshape(boxes, [tile.shape[0] * PADDED, tile.shape[1] * PADDED, tile.shape[2]])


@triton.jit
def load_frame(video, offsets, mask, scale, shift):
    """A tile of normalised pixels, 0 outside the mask."""
    return tl.where(mask, tl.load(video + offsets, mask, 0).to(tl.float32) * scale + shift, 0)


class Tiling(NamedTuple):
    """How frames are cut into tiles for one chain of factors."""

    true: tuple[int, ...]
    pads: tuple[int, ...]
    cells_y: int
    cells_x: int
    channels: int
    tiles_y: int
    tiles_x: int
    channel_blocks: int
    factors: tuple[int, ...]

    @property
    def tiles(self) -> int:
        return self.tiles_y * self.tiles_x * self.channel_blocks

    @property
    def elements(self) -> int:
        return self.pads[0] ** 2 * self.cells_y * self.cells_x * self.channels

    def level(self, factor: int) -> int:
        return self.factors.index(factor)


def tiling_of(video: Tensor, factors: Sequence[int], channels_inside: bool, target: int) -> Tiling:
    """Tiles of about `target` elements; a single cell of the coarsest factor may be more.

    With `channels_inside`, for channels that are innermost in memory, a tile has up to 16 channels, so that
    neighbouring bytes are read together.
    """
    levels = sorted({1, *factors})
    true, pads = padded_chain(levels)
    height, width = (size // levels[-1] for size in video.shape[3:])
    channels = min(16, power_of_2(video.shape[2])) if channels_inside else 1
    while channels > 1 and channels * pads[0] ** 2 > target:
        channels //= 2
    cells_x = cells_y = 1
    # First make rows long enough for whole cache lines, then add as many rows as fit.
    while cells_x < width and cells_x * pads[0] < 128 and 2 * cells_x * pads[0] ** 2 * channels <= target:
        cells_x *= 2
    while cells_y < height and 2 * cells_y * cells_x * pads[0] ** 2 * channels <= target:
        cells_y *= 2
    # Small frames: fill the tile with more channels.
    while channels < min(16, video.shape[2]) and 2 * cells_y * cells_x * pads[0] ** 2 * channels <= target:
        channels *= 2
    return Tiling(
        true, pads, cells_y, cells_x, channels,
        ceil_div(height, cells_y), ceil_div(width, cells_x), ceil_div(video.shape[2], channels), tuple(levels),
    )  # fmt: skip


def padded_chain(levels: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """TRUE and PADS of factors that divide one another, in rising order."""
    pads = [1]
    for low, high in zip(levels[-2::-1], levels[:0:-1], strict=True):
        pads.insert(0, pads[0] * power_of_2(high // low))
    return tuple(levels[-1] // factor for factor in levels), tuple(pads)


def needs_long(*frames: Tensor | None) -> bool:
    """Whether an offset within one frame of these tensors (without batch and time) exceeds 32 bits."""
    extents = [
        sum((size - 1) * step for size, step in zip(t.shape[2:], t.stride()[2:], strict=True))
        for t in frames
        if t is not None
    ]
    return any(extent >= 2**31 for extent in extents)


def channels_innermost(video: Tensor, patch_sizes: Sequence[int] | None) -> bool:
    return patch_sizes is not None or (video.shape[2] > 1 and video.stride(2) < video.stride(4))


def fits_a_chain(factors: Sequence[int]) -> bool:
    ordered = sorted(set(factors))
    return all(high % low == 0 for low, high in itertools.pairwise(ordered))


def chains_of(terms: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group terms, given the factors that each needs, greedily into chains of factors that divide one another.

    Each chain is one launch and one read of the video. There is one, unless a factor does not divide a larger one, as
    with 2 and 3.
    """
    chains: list[tuple[set[int], list[int]]] = []
    for number, needed in enumerate(terms):
        for factors, members in chains:
            if fits_a_chain([*factors, *needed]):
                factors.update(needed)
                members.append(number)
                break
        else:
            chains.append((set(needed), [number]))
    return [members for _, members in chains]
