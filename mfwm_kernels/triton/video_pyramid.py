"""video_pyramid in Triton, called by autograd.call.

forward   A program reads a tile of one frame (see frames.py; about 4096 pixels), normalises it and stores every level
          of the chain from registers. Bytes: the video once, the outputs once.
backward  From the coarsest level down, a program adds each output's gradient to a tile and repeats it over the boxes
          of the next level. Bytes: the gradients of the outputs once, that of the video once.

If two factors do not divide one another (2 and 3), each needs a launch and a pass over the video or its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..op import Gradients, Want
from ..ops.video_pyramid import Arguments, output_shape
from .frames import (
    average,
    axis,
    chains_of,
    channels_innermost,
    frame_offsets,
    inside,
    load_frame,
    needs_long,
    repeated,
    tiling_of,
)
from .launch import launch, strides, warps_of

TILE_ELEMENTS = 4096


@triton.jit
def place_of_program(
    time, tiles_y, tiles_x, channel_blocks, CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The clip, the frame, the first cell along both axes and the channels of a program's tile."""
    program = tl.program_id(0).to(tl.int64)
    c = (program % channel_blocks * CHANNELS).to(tl.int32) + tl.arange(0, CHANNELS)
    tile = program // channel_blocks
    first_x = (tile % tiles_x * CELLS_X).to(tl.int32)
    first_y = (tile // tiles_x % tiles_y * CELLS_Y).to(tl.int32)
    frame = tile // (tiles_x * tiles_y)
    return frame // time, frame % time, first_y, first_x, c


@triton.jit
def video_pyramid(
    video, outputs, scale, shift, time, channels, width, cells_y, cells_x, tiles_y, tiles_x, channel_blocks,
    video_strides, output_strides,
    LEVELS: tl.constexpr, PATCHES: tl.constexpr, TRUE: tl.constexpr, PADS: tl.constexpr,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, CHANNELS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    b, t, first_y, first_x, c = place_of_program(
        time, tiles_y, tiles_x, channel_blocks, CELLS_Y, CELLS_X, CHANNELS
    )  # fmt: skip
    for level in tl.static_range(len(TRUE)):
        y, in_y = axis(first_y, cells_y, CELLS_Y, TRUE, PADS, level)
        x, in_x = axis(first_x, cells_x, CELLS_X, TRUE, PADS, level)
        mask = inside(in_y, in_x, c < channels)
        if level == 0:
            offsets = frame_offsets(y, x, c, channels, width, video_strides, 0, LONG)
            values = load_frame(video + b * video_strides[0] + t * video_strides[1], offsets, mask, scale, shift)
        else:
            values = average(values, PADS[level - 1] // PADS[level], TRUE[level - 1] // TRUE[level])
        for i in tl.static_range(len(LEVELS)):
            if LEVELS[i] == level:
                steps = output_strides[i]
                narrow = width // (TRUE[0] // TRUE[level])
                offsets = frame_offsets(y, x, c, channels, narrow, steps, PATCHES[i], LONG)
                frame_out = outputs[i] + b * steps[0] + t * steps[1]
                tl.store(frame_out + offsets, values.to(outputs[i].dtype.element_ty), mask)


@triton.jit
def video_pyramid_backward(
    video_gradient, gradients, scale, time, channels, width, cells_y, cells_x, tiles_y, tiles_x, channel_blocks,
    video_strides, gradient_strides,
    LEVELS: tl.constexpr, PATCHES: tl.constexpr, TRUE: tl.constexpr, PADS: tl.constexpr,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, CHANNELS: tl.constexpr, LONG: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    b, t, first_y, first_x, c = place_of_program(
        time, tiles_y, tiles_x, channel_blocks, CELLS_Y, CELLS_X, CHANNELS
    )  # fmt: skip
    total = tl.zeros([CELLS_Y, CELLS_X, CHANNELS], tl.float32)
    for level in tl.static_range(len(TRUE) - 1, -1, -1):
        if level < len(TRUE) - 1:
            total = repeated(total, PADS[level] // PADS[level + 1])
        y, in_y = axis(first_y, cells_y, CELLS_Y, TRUE, PADS, level)
        x, in_x = axis(first_x, cells_x, CELLS_X, TRUE, PADS, level)
        mask = inside(in_y, in_x, c < channels)
        for i in tl.static_range(len(LEVELS)):
            if LEVELS[i] == level:
                steps = gradient_strides[i]
                offsets = frame_offsets(y, x, c, channels, width // (TRUE[0] // TRUE[level]), steps, PATCHES[i], LONG)
                gradient = tl.load(gradients[i] + b * steps[0] + t * steps[1] + offsets, mask, 0).to(tl.float32)
                total += gradient * (scale * ((TRUE[level] / TRUE[0]) * (TRUE[level] / TRUE[0])))
    frame = video_gradient + b * video_strides[0] + t * video_strides[1]
    offsets = frame_offsets(y, x, c, channels, width, video_strides, 0, LONG)
    if ADDED:
        total += tl.load(frame + offsets, mask, 0)
    tl.store(frame + offsets, total.to(video_gradient.dtype.element_ty), mask)


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    video = args.video
    batch, time, channels, height, width = video.shape
    outputs = [
        torch.empty(output_shape(video, f, args.patch_sizes[i] if args.patch_sizes else None),
                    dtype=args.dtype, device=video.device)
        for i, f in enumerate(args.factors)
    ]  # fmt: skip
    for members in chains_of([[f] for f in args.factors]):
        chain_outputs = [outputs[i] for i in members]
        tiling = tiling_of(
            video, [args.factors[i] for i in members], channels_innermost(video, args.patch_sizes), TILE_ELEMENTS
        )
        launch(
            video_pyramid, batch * time * tiling.tiles, video.device,
            video, tuple(chain_outputs), args.scale, args.shift, time, channels, width,
            height // tiling.factors[-1], width // tiling.factors[-1],
            tiling.tiles_y, tiling.tiles_x, tiling.channel_blocks,
            strides(video, 5), tuple(output.stride() for output in chain_outputs),
            LEVELS=tuple(tiling.level(args.factors[i]) for i in members),
            PATCHES=tuple(args.patch_sizes[i] if args.patch_sizes else 0 for i in members),
            TRUE=tiling.true, PADS=tiling.pads,
            CELLS_Y=tiling.cells_y, CELLS_X=tiling.cells_x, CHANNELS=tiling.channels,
            LONG=needs_long(video, *chain_outputs), num_warps=warps_of(tiling.elements),
        )  # fmt: skip
    return outputs, {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    video = args.video
    batch, time, channels, height, width = video.shape
    chains = [[i for i in members if upstream[i] is not None] for members in chains_of([[f] for f in args.factors])]
    chains = [members for members in chains if members]
    # Several launches add up in fp32.
    dtype = video.dtype if len(chains) == 1 else torch.float32
    gradient = torch.empty(video.shape, dtype=dtype, device=video.device)
    if not chains:
        gradient.zero_()
    for number, members in enumerate(chains):
        given = tuple(upstream[i] for i in members)
        tiling = tiling_of(
            gradient, [args.factors[i] for i in members], channels_innermost(gradient, args.patch_sizes), TILE_ELEMENTS
        )
        launch(
            video_pyramid_backward, batch * time * tiling.tiles, video.device,
            gradient, given, args.scale, time, channels, width,
            height // tiling.factors[-1], width // tiling.factors[-1],
            tiling.tiles_y, tiling.tiles_x, tiling.channel_blocks,
            strides(gradient, 5), tuple(strides(g, 5 if args.patch_sizes is None else 4) for g in given),
            LEVELS=tuple(tiling.level(args.factors[i]) for i in members),
            PATCHES=tuple(args.patch_sizes[i] if args.patch_sizes else 0 for i in members),
            TRUE=tiling.true, PADS=tiling.pads,
            CELLS_Y=tiling.cells_y, CELLS_X=tiling.cells_x, CHANNELS=tiling.channels,
            LONG=needs_long(gradient, *given), ADDED=number > 0, num_warps=warps_of(tiling.elements),
        )  # fmt: skip
    return {"video": gradient.to(video.dtype)}
