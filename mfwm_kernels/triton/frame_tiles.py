"""Tiles of frames that one warp holds in registers, in image or token layout.

A tile of level l (see frames.py) is a tuple of planes [rows, columns, channels]. Level 0 has one for each row of a box
of its step and each of the `planes` channels, row by row, so that a thread adds up the rows of a box without its
neighbours. Coarser levels have one for each of the `planes` channels.

Where channels are innermost in memory and not a power of 2, as in tokens of RGB, a thread moves whole runs: `high` rows
x `wide` columns of all planes, whose elements it sorts in registers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .frames import above, axis, below, padded_chain
from .launch import ceil_div, power_of_2, widened

# Columns of the finest level that a thread has: two of fp32's vectors of 16 bytes, one of bf16's.
WIDE = 8


class Tiles(NamedTuple):
    """How the frames of one chain of factors are cut into tiles. See frames.py for true and pads.

    rows      rows of level 0 per box that are planes of their own
    planes    channels that are planes of their own; the others are the last axis, `channels` at a time
    exact     whether the tiles fill the frames, so that no element needs a mask
    """

    factors: tuple[int, ...]
    true: tuple[int, ...]
    pads: tuple[int, ...]
    cells_y: int
    cells_x: int
    channels: int
    rows: int
    planes: int
    exact: bool

    def level(self, factor: int) -> int:
        return self.factors.index(factor)

    def plane_size(self, level: int) -> int:
        """Elements of a plane."""
        above = 1 if level == 0 and self.rows > 1 else level
        return self.cells_y * self.pads[above] * self.cells_x * self.pads[level] * self.channels


@dataclass(frozen=True)
class Run:
    """What a thread moves at a time.

    wide      columns that a thread has; in tokens, they may be of several
    high      rows, and
    columns   columns of them that are contiguous in memory with all planes
    vector    elements of the vectors that divide them, or 0 for planes that are moved one by one
    """

    wide: int
    high: int = 1
    columns: int = 1
    vector: int = 0


def tiles_of(
    video: Tensor, factors: Sequence[int], patch_sizes: Sequence[int] | None, target: int
) -> tuple[Tiles, tuple[int, int, int]]:
    """Tiles of about `target` elements, or more if a single cell of the coarsest factor has more; and how many of them
    fill a frame's rows, its columns and its channels."""
    levels = {1, *factors}
    # Divide a step of 8 into three of 2: only the rows of the first step's boxes are planes.
    for low, high in itertools.pairwise(sorted(levels)):
        levels.update(high >> k for k in range(1, high.bit_length()) if high % (low << k) == 0 and high >> k > low)
    ordered = tuple(sorted(levels))
    true, pads = padded_chain(ordered)
    channels = video.shape[2]
    height, width = (size // ordered[-1] for size in video.shape[3:])
    innermost = patch_sizes is not None or (channels > 1 and video.stride(2) < video.stride(4))
    planes = channels if innermost and channels in (2, 3) else 1
    block = min(16, power_of_2(channels)) if innermost and planes == 1 else 1
    rows = true[0] // true[1] if len(true) > 1 and true[0] // true[1] <= 3 else 1
    if any(patch % rows for patch in patch_sizes or ()):
        rows = 1
    cell = rows * pads[1 if rows > 1 else 0] * pads[0] * planes
    while block > 1 and block * cell > target:
        block //= 2
    cells_x = cells_y = 1
    # First make rows long enough for whole sectors of uint8 video, then add as many rows as fit.
    while cells_x < width and cells_x * pads[0] < 64 and 2 * cells_x * cell * block <= target:
        cells_x *= 2
    while cells_y < height and 2 * cells_y * cells_x * cell * block <= target:
        cells_y *= 2
    # Small frames: fill the tile with more channels.
    while planes == 1 and block < min(16, channels) and 2 * cells_y * cells_x * cell * block <= target:
        block *= 2
    exact = true == pads and not (height % cells_y or width % cells_x or channels % (block * planes))
    tiles = Tiles(ordered, true, pads, cells_y, cells_x, block, rows, planes, exact)
    return tiles, (ceil_div(height, cells_y), ceil_div(width, cells_x), ceil_div(channels, block * planes))


def run_of(tiles: Tiles, level: int, patch: int, *tensors: Tensor | None) -> Run:
    """How a thread moves its elements of a level of tokens, in all of `tensors`."""
    given = [tensor for tensor in tensors if tensor is not None]
    wide = columns_per_thread(tiles, level)
    if wide == 0 or any(tensor.stride(3) != 1 for tensor in given) or patch & (patch - 1):
        return Run(1)
    columns = min(patch, wide)
    high = tiles.rows if level == 0 and columns == patch else 1
    # Every run starts at a multiple of the vector's size.
    steps = [step for tensor in given for step in (16 // tensor.element_size(), *tensor.stride()[:3])]
    return Run(wide, high, columns, math.gcd(high * columns * tiles.planes, *steps))


def video_run_of(tiles: Tiles) -> Run:
    """As many columns per thread as predictions of level 0 have."""
    return Run(columns_per_thread(tiles, 0) or 1)


def columns_per_thread(tiles: Tiles, level: int) -> int:
    """Columns that a thread has in its runs; 0 where it moves no runs."""
    if tiles.planes == 1 or tiles.true != tiles.pads:
        return 0
    return max(1, min(WIDE * tiles.true[level] // tiles.true[0], tiles.plane_size(level) // 32))


@triton.jit
def zeros(TILES: tl.constexpr, LEVEL: tl.constexpr):
    """A plane of zeros."""
    ABOVE: tl.constexpr = 1 if LEVEL == 0 and TILES.rows > 1 else LEVEL
    HIGH: tl.constexpr = TILES.cells_y * TILES.pads[ABOVE]
    LONG: tl.constexpr = TILES.cells_x * TILES.pads[LEVEL]
    CHANNELS: tl.constexpr = TILES.channels
    return tl.zeros([HIGH, LONG, CHANNELS], tl.float32)


@triton.jit
def steps_of(given, time, channels, height, width, PATCH: tl.constexpr):
    """The strides of frames: those given, or of a contiguous tensor if None. See frame_offsets for their order."""
    if given is not None:
        return given
    elif PATCH == 0:
        frame = tl.full([], 1, tl.int64) * channels * (height * width)
        return frame * time, frame, height * width, width, 1
    else:
        features = channels * (PATCH * PATCH)
        frame = tl.full([], 1, tl.int64) * features * ((height // PATCH) * (width // PATCH))
        return frame * time, frame, features, 1


@triton.jit
def frame_offset(b, n, steps, RUN: tl.constexpr):
    """The offset of frame n of clip b."""
    E: tl.constexpr = RUN.vector
    offset = b * steps[0] + n.to(tl.int64) * steps[1]
    return tl.multiple_of(offset, E) if E > 1 else offset


@triton.jit
def places(
    first_y, first_x, first_c, cells_y, cells_x, channels, steps,
    TILES: tl.constexpr, LEVEL: tl.constexpr, RUN: tl.constexpr, PATCH: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Offsets in a frame of the first plane's elements, or of the first vector of runs, and which ones exist.

    Offsets have 32 bits unless LONG, to save half the registers. With TILES.exact all exist: the mask is True.
    """
    CELLS_Y: tl.constexpr = TILES.cells_y
    CELLS_X: tl.constexpr = TILES.cells_x
    CHANNELS: tl.constexpr = TILES.channels
    TRUE: tl.constexpr = TILES.true
    PADS: tl.constexpr = TILES.pads
    WIDE: tl.constexpr = RUN.wide
    if LEVEL == 0 and TILES.rows > 1:
        y, in_y = axis(first_y, cells_y, CELLS_Y, TRUE, PADS, 1)
        y *= TILES.rows
    else:
        y, in_y = axis(first_y, cells_y, CELLS_Y, TRUE, PADS, LEVEL)
    if WIDE > 1:
        x = first_x * TRUE[LEVEL] + tl.arange(0, CELLS_X * PADS[LEVEL] // WIDE) * WIDE
        in_x = x < cells_x * TRUE[LEVEL]
    else:
        x, in_x = axis(first_x, cells_x, CELLS_X, TRUE, PADS, LEVEL)
    c = first_c + tl.arange(0, CHANNELS)
    mask = True
    if not TILES.exact:
        mask = in_y[:, None, None] & in_x[None, :, None] & (c < channels)[None, None, :]
    if LONG:
        y, x, c = y.to(tl.int64), x.to(tl.int64), c.to(tl.int64)
    if PATCH == 0:
        y_offsets, x_offsets, last = y * steps[3], x * steps[4], c * steps[2]
        if WIDE > 1:
            last = tl.arange(0, WIDE) * steps[4]
    else:
        y_offsets = above(y, PATCH) * (cells_x * TRUE[LEVEL] // PATCH) * steps[2]
        x_offsets = above(x, PATCH) * steps[2]
        if RUN.vector > 0:
            # In units of whole runs, so that the compiler sees that each starts at a multiple of the vector's size.
            PLANES: tl.constexpr = TILES.planes
            HIGH: tl.constexpr = RUN.high
            COLUMNS: tl.constexpr = RUN.columns
            E: tl.constexpr = RUN.vector
            y_offsets += below(above(y, HIGH), PATCH // HIGH) * (HIGH * PATCH * PLANES)
            x_offsets += below(above(x, COLUMNS), PATCH // COLUMNS) * (COLUMNS * PLANES)
            last = tl.arange(0, E)
        else:
            y_offsets += below(y, PATCH) * (PATCH * channels * steps[3])
            x_offsets += below(x, PATCH) * (channels * steps[3])
            last = c * steps[3]
    return y_offsets[:, None, None] + x_offsets[None, :, None] + last[None, None, :], mask


@triton.jit
def load_planes(
    base, offsets, mask, channels, steps,
    TILES: tl.constexpr, LEVEL: tl.constexpr, RUN: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    """The planes of a tile in fp32, 0 outside the mask. See places."""
    ROWS: tl.constexpr = TILES.rows if LEVEL == 0 else 1
    PLANES: tl.constexpr = TILES.planes
    CHANNELS: tl.constexpr = TILES.channels
    WIDE: tl.constexpr = RUN.wide
    HIGH: tl.constexpr = RUN.high
    Y: tl.constexpr = offsets.shape[0]
    X: tl.constexpr = offsets.shape[1]
    row, channel = plane_steps(channels, steps, PLANES, RUN, PATCH)
    planes = ()
    if RUN.vector == 0:
        for r in tl.static_range(ROWS):
            for p in tl.static_range(PLANES):
                plane = widened(tl.load(base + (r * row + p * channel) + offsets, mask, 0))
                planes = planes + (tl.reshape(plane, [Y, X * WIDE, CHANNELS]),)
    else:
        COLUMNS: tl.constexpr = RUN.columns
        E: tl.constexpr = RUN.vector
        for r in tl.static_range(0, ROWS, HIGH):
            runs = ()
            for part in tl.static_range(WIDE // COLUMNS):
                pointers = base + (r * row + part * steps[2]) + offsets
                elements = ()
                for v in tl.static_range(HIGH * COLUMNS * PLANES // E):
                    elements = elements + split_all(widened(tl.load(pointers + v * E, mask, 0)), Y, X, E)
                runs = runs + (elements,)
            for h in tl.static_range(HIGH):
                for p in tl.static_range(PLANES):
                    plane = ()
                    for k in tl.static_range(WIDE):
                        plane = plane + (runs[k // COLUMNS][(h * COLUMNS + k % COLUMNS) * PLANES + p],)
                    planes = planes + (tl.reshape(join_all(plane, WIDE), [Y, X * WIDE, 1]),)
    return planes


@triton.jit
def store_planes(
    base, planes, offsets, mask, channels, steps,
    TILES: tl.constexpr, LEVEL: tl.constexpr, RUN: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    """The inverse of load_planes."""
    ROWS: tl.constexpr = TILES.rows if LEVEL == 0 else 1
    PLANES: tl.constexpr = TILES.planes
    WIDE: tl.constexpr = RUN.wide
    HIGH: tl.constexpr = RUN.high
    Y: tl.constexpr = offsets.shape[0]
    X: tl.constexpr = offsets.shape[1]
    row, channel = plane_steps(channels, steps, PLANES, RUN, PATCH)
    if RUN.vector == 0:
        for r in tl.static_range(ROWS):
            for p in tl.static_range(PLANES):
                plane = tl.reshape(planes[r * PLANES + p], offsets.shape).to(base.dtype.element_ty)
                tl.store(base + (r * row + p * channel) + offsets, plane, mask)
    else:
        COLUMNS: tl.constexpr = RUN.columns
        E: tl.constexpr = RUN.vector
        SIZE: tl.constexpr = HIGH * COLUMNS * PLANES
        for r in tl.static_range(0, ROWS, HIGH):
            columns = ()
            for k in tl.static_range(HIGH * PLANES):
                columns = columns + (split_all(planes[r * PLANES + k], Y, X, WIDE),)
            for part in tl.static_range(WIDE // COLUMNS):
                # The elements in the order of memory: by row, column and plane.
                elements = ()
                for h in tl.static_range(HIGH):
                    for k in tl.static_range(COLUMNS):
                        for p in tl.static_range(PLANES):
                            elements = elements + (columns[h * PLANES + p][part * COLUMNS + k],)
                pointers = base + (r * row + part * steps[2]) + offsets
                # In pieces whose sizes are powers of 2.
                for piece in tl.static_range(6, -1, -1):
                    if SIZE >> piece & 1:
                        store_piece(pointers, elements, mask, SIZE >> (piece + 1) << (piece + 1), 1 << piece, E)


@triton.jit
def store_piece(pointers, elements, mask, FIRST: tl.constexpr, SIZE: tl.constexpr, E: tl.constexpr):
    """Store the elements FIRST to FIRST + SIZE - 1 of each run.

    Neighbouring threads store neighbouring vectors, so that a warp writes whole sectors: Triton divides the first axis
    among threads before the others.
    """
    Y: tl.constexpr = pointers.shape[0]
    X: tl.constexpr = pointers.shape[1]
    chosen = ()
    for k in tl.static_range(SIZE):
        chosen = chosen + (elements[FIRST + k],)
    vectors = tl.permute(tl.reshape(join_all(chosen, SIZE), [Y, X, SIZE // E, E]), [2, 0, 1, 3])
    v = FIRST + tl.arange(0, SIZE // E)[:, None, None, None] * E
    tl.store(
        pointers[None, :, :, :] + v,
        vectors.to(pointers.dtype.element_ty),
        mask[None, :, :, :] if isinstance(mask, tl.tensor) and len(mask.shape) > 0 else mask,
    )


@triton.jit
def plane_steps(channels, steps, PLANES: tl.constexpr, RUN: tl.constexpr, PATCH: tl.constexpr):
    """The steps from a plane to the one of the next row, and of the next channel. A box of rows is within a token."""
    if PATCH == 0:
        return steps[3], steps[2]
    elif RUN.vector == 0:
        return PATCH * channels * steps[3], steps[3]
    else:
        return PATCH * PLANES, 1


@triton.jit
def split_all(tile, Y: tl.constexpr, X: tl.constexpr, SIZE: tl.constexpr):
    """The SIZE elements of each [Y, X], a power of 2 up to 64, as tensors [Y, X]."""
    # Entry k of parts has the elements k, k + len(parts), k + 2 * len(parts), ...
    parts = (tl.reshape(tile, binary_shape(Y, X, SIZE)),)
    for step in tl.static_range(6):
        if SIZE >> step > 1:
            even = ()
            odd = ()
            for k in tl.static_range(len(parts)):
                first, second = tl.split(parts[k])
                even = even + (first,)
                odd = odd + (second,)
            parts = even + odd
    return parts


@triton.jit
def join_all(elements, SIZE: tl.constexpr):
    """The inverse of split_all, in its shape [Y, X, 2, 2, ...]."""
    parts = elements
    for step in tl.static_range(6):
        if SIZE >> step > 1:
            pairs = ()
            for k in tl.static_range(len(parts) // 2):
                pairs = pairs + (tl.join(parts[k], parts[k + len(parts) // 2]),)
            parts = pairs
    return parts[0]


@triton.constexpr_function
def entry(values, i):
    """values[i], as an argument that is a constant."""
    return values[i]


@triton.constexpr_function
def run_at(runs, i):
    """Run number i, whose fields are an argument, because Triton must be able to write arguments as JSON."""
    return Run(*runs[i])


@triton.constexpr_function
def binary_shape(y, x, size):
    return [y, x] + [2] * (size.bit_length() - 1)


@triton.jit
def pyramid_of(planes, TILES: tl.constexpr, LEVEL: tl.constexpr):
    """Planes by level: (), up to those of LEVEL, then their means over the boxes of each coarser level."""
    pyramid = ()
    for _ in tl.static_range(LEVEL):
        pyramid = pyramid + ((),)
    pyramid = pyramid + (planes,)
    for level in tl.static_range(LEVEL, len(TILES.true) - 1):
        pyramid = pyramid + (coarser(pyramid[level], TILES, level),)
    return pyramid


@triton.jit
def coarser(planes, TILES: tl.constexpr, LEVEL: tl.constexpr):
    """Means over boxes, which zeros pad."""
    ROWS: tl.constexpr = TILES.rows if LEVEL == 0 else 1
    PLANES: tl.constexpr = TILES.planes
    WIDE: tl.constexpr = TILES.pads[LEVEL] // TILES.pads[LEVEL + 1]
    HIGH: tl.constexpr = 1 if ROWS > 1 else WIDE
    SHARE: tl.constexpr = (TILES.true[LEVEL + 1] / TILES.true[LEVEL]) ** 2
    means = ()
    for p in tl.static_range(PLANES):
        total = planes[p]
        for r in tl.static_range(1, ROWS):
            total += planes[r * PLANES + p]
        if WIDE > 1:
            total = tl.sum(tl.reshape(total, [total.shape[0], total.shape[1] // WIDE, WIDE, total.shape[2]]), 2)
        if HIGH > 1:
            total = tl.sum(tl.reshape(total, [total.shape[0] // HIGH, HIGH, total.shape[1], total.shape[2]]), 1)
        means = means + (total * SHARE,)
    return means


@triton.jit
def finer(planes, TILES: tl.constexpr, LEVEL: tl.constexpr):
    """The planes of LEVEL - 1 that have each value of LEVEL in its whole box."""
    ROWS: tl.constexpr = TILES.rows if LEVEL == 1 else 1
    WIDE: tl.constexpr = TILES.pads[LEVEL - 1] // TILES.pads[LEVEL]
    HIGH: tl.constexpr = 1 if ROWS > 1 else WIDE
    boxes = ()
    for p in tl.static_range(len(planes)):
        boxes = boxes + (spread(planes[p], HIGH, WIDE),)
    rows = boxes
    for _ in tl.static_range(1, ROWS):
        rows = rows + boxes
    return rows


@triton.jit
def spread(plane, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """Each value HIGH x WIDE times."""
    Y: tl.constexpr = plane.shape[0]
    X: tl.constexpr = plane.shape[1]
    C: tl.constexpr = plane.shape[2]
    return tl.reshape(tl.broadcast_to(plane[:, None, :, None, :], [Y, HIGH, X, WIDE, C]), [Y * HIGH, X * WIDE, C])


@triton.jit
def plus(planes, others, factor: tl.constexpr):
    """planes + others * factor; either may be ()."""
    total = planes if len(others) == 0 else ()
    for k in tl.static_range(len(others)):
        term = others[k] if factor == 1.0 else others[k] * factor
        total = total + (term if len(planes) == 0 else planes[k] + term,)
    return total


@triton.jit
def load_frame(frame, offsets, mask, condition, channels, steps, scale, shift, TILES: tl.constexpr, RUN: tl.constexpr):
    """Planes of normalised pixels. They are 0 outside the mask, but not where only the condition is false."""
    planes = load_planes(frame, offsets, mask & condition, channels, steps, TILES, 0, RUN, 0)
    if scale is None:
        return planes
    else:
        normalised = ()
        for k in tl.static_range(len(planes)):
            normalised = normalised + (inside_only(planes[k] * scale + shift, mask, TILES),)
        return normalised


@triton.jit
def inside_only(plane, mask, TILES: tl.constexpr):
    """The plane, 0 outside the frame. The mask may be of runs."""
    if TILES.exact:
        return plane
    else:
        X: tl.constexpr = mask.shape[1]
        WIDE: tl.constexpr = plane.shape[1] // X
        if WIDE > 1:
            mask = tl.reshape(tl.broadcast_to(mask, [plane.shape[0], X, WIDE]), plane.shape)
        return tl.where(mask, plane, 0)
