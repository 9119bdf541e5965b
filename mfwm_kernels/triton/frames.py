"""Tiles of frames that divide into boxes at every factor, in image or token layout, for the ops on video.

A tile is [rows, columns, channels]. Its factors form a chain, each dividing the next: level l has factor f_l, and
level 0 the pixels. Along an axis the index is written in digits, one per step of the chain, each padded to a power of 2
(factors 1, 3, 6: digits of 3 and 2, padded to 4 and 2), so a box average is a reshape and a sum in registers.

    TRUE[l] = f_last / f_l         PADS[l] = the same, every step padded         both end in 1
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
    """Index at a level of each place along one axis of the tile that begins with the cell `first`, and which exist."""
    place = tl.arange(0, CELLS * PADS[LEVEL])
    if TRUE[LEVEL] == PADS[LEVEL]:
        index = first * TRUE[LEVEL] + place
        return index, index < cells * TRUE[LEVEL]
    else:
        index = place * 0
        exists = place >= 0
        for q in tl.static_range(LEVEL, len(TRUE) - 1):
            digit = place % (PADS[q] // PADS[q + 1])
            place = place // (PADS[q] // PADS[q + 1])
            exists = exists & (digit < TRUE[q] // TRUE[q + 1])
            index += digit * (TRUE[LEVEL] // TRUE[q])
        return index + (first + place) * TRUE[LEVEL], exists & (first + place < cells)


@triton.jit
def inside(y, x, c):
    """What the three axes know of which places exist, as the mask of a tile."""
    return y[:, None, None] & x[None, :, None] & c[None, None, :]


@triton.jit
def frame_offsets(y, x, c, channels, width, steps, PATCH: tl.constexpr, LONG: tl.constexpr):
    """Offsets of a tile in one frame of strides `steps`.

    PATCH 0: an image, steps (batch, time, channel, row, column). Else tokens, steps (batch, time, token, feature), with
    features in (row, column, channel) order. In 32 bits unless LONG: they are half the registers.
    """
    if LONG:
        y, x, c = y.to(tl.int64), x.to(tl.int64), c.to(tl.int64)
    if PATCH == 0:
        return (y * steps[3])[:, None, None] + (x * steps[4])[None, :, None] + (c * steps[2])[None, None, :]
    else:
        of_y = y // PATCH * (width // PATCH) * steps[2] + y % PATCH * (PATCH * channels) * steps[3]
        of_x = x // PATCH * steps[2] + x % PATCH * channels * steps[3]
        return of_y[:, None, None] + of_x[None, :, None] + (c * steps[3])[None, None, :]


@triton.jit
def average(tile, PADDED: tl.constexpr, RATIO: tl.constexpr):
    """Mean over RATIO x RATIO boxes, padded to PADDED with zeros."""
    if PADDED == 1:
        return tile
    else:
        boxes = tl.reshape(
            tile, [tile.shape[0] // PADDED, PADDED, tile.shape[1] // PADDED, PADDED, tile.shape[2]]
        )  # fmt: skip
        return tl.sum(tl.sum(boxes, 3), 1) * (1.0 / (RATIO * RATIO))


@triton.jit
def repeated(tile, PADDED: tl.constexpr):
    """Each value PADDED x PADDED times: the shape that `average` came from."""
    if PADDED == 1:
        return tile
    else:
        shape: tl.constexpr = [tile.shape[0], PADDED, tile.shape[1], PADDED, tile.shape[2]]
        boxes = tl.broadcast_to(tile[:, None, :, None, :], shape)
        return tl.reshape(boxes, [tile.shape[0] * PADDED, tile.shape[1] * PADDED, tile.shape[2]])


@triton.jit
def load_frame(video, offsets, mask, scale, shift):
    """A tile of pixels, normalised, zero where nothing is."""
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

    With `channels_inside` a tile holds up to 16 channels, so that neighbouring bytes are read together where channels
    are innermost in memory.
    """
    levels = sorted({1, *factors})
    true = tuple(levels[-1] // f for f in levels)
    pads = [1]
    for low, high in zip(levels[-2::-1], levels[:0:-1], strict=True):
        pads.insert(0, pads[0] * power_of_2(high // low))
    height, width = (size // levels[-1] for size in video.shape[3:])
    channels = min(16, power_of_2(video.shape[2])) if channels_inside else 1
    while channels > 1 and channels * pads[0] ** 2 > target:
        channels //= 2
    cells_x = cells_y = 1
    # Rows long enough for whole cache lines first, then as many rows as fit.
    while cells_x < width and cells_x * pads[0] < 128 and 2 * cells_x * pads[0] ** 2 * channels <= target:
        cells_x *= 2
    while cells_y < height and 2 * cells_y * cells_x * pads[0] ** 2 * channels <= target:
        cells_y *= 2
    # Small frames: several channels make a tile.
    while channels < min(16, video.shape[2]) and 2 * cells_y * cells_x * pads[0] ** 2 * channels <= target:
        channels *= 2
    return Tiling(
        true, tuple(pads), cells_y, cells_x, channels,
        ceil_div(height, cells_y), ceil_div(width, cells_x), ceil_div(video.shape[2], channels), tuple(levels),
    )  # fmt: skip


def needs_long(*frames: Tensor | None) -> bool:
    """Some offset within one frame of these tensors (batch and time left out) exceeds 32 bits."""
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
    """Terms, each with the factors that it needs together, sorted into as few chains as a greedy pass finds.

    One chain, and one read of the video, unless some factor does not divide a larger one (2 and 3).
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
