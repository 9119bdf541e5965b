"""action_window_sum in Triton, called by autograd.call; fan_out and multi_horizon_linear call `window_sums`.

forward   A program computes the K sums of a tile of ROWS positions x BLOCK_D features. Offsets do not decrease, so
          without gates each horizon's sum continues the previous one's, and each action is read once per lag.
          Bytes: actions once (lags overlap in cache), K sums.
backward  A program gathers the gradient of a tile of actions from the positions before them, without atomics.
          Bytes: the K gradients once, the gradient of actions.
gates     A program reduces the rows of a chunk for one (horizon, lag, block of features); torch adds up the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..op import Gradients, Want
from ..ops.action_window_sum import Arguments
from .launch import ceil_div, launch, power_of_2, strides, warps_of

# Rows that one program of action_window_sum_gates reduces.
CHUNK = 256


@triton.jit
def action_window_sum_forward(
    actions, lag_weight, segments, out, columns, positions, rows, width, blocks_d,
    action_strides, lag_strides, segment_strides,
    OFFSETS: tl.constexpr, FIRST_LAGS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_d * ROWS + tl.arange(0, ROWS)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    b, n = row // positions, row % positions
    in_row, in_d = row < rows, d < width
    segment = tl.zeros([ROWS], tl.int64)
    if segments is not None:
        segments += b * segment_strides[0]
        segment = tl.load(segments + n * segment_strides[1], in_row, 0).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.static_range(len(OFFSETS)):
        if lag_weight is not None:
            total = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for j in range(FIRST_LAGS[i], OFFSETS[i]):
            counts = in_row & (n + j < columns)
            if segments is not None:
                counts = counts & (tl.load(segments + (n + j) * segment_strides[1], counts, 0) == segment)
            index = (b * action_strides[0] + (n + j) * action_strides[1])[:, None] + (d * action_strides[2])[None, :]
            term = tl.load(actions + index, counts[:, None] & in_d[None, :], 0).to(tl.float32)
            if lag_weight is not None:
                gate = tl.load(lag_weight + i * lag_strides[0] + j * lag_strides[1] + d * lag_strides[2], in_d, 0)
                # Mask the product, not only the action: a gate may be infinite, and 0 * inf is NaN.
                term = tl.where(counts[:, None], term * gate.to(tl.float32)[None, :], 0)
            total += term
        index = ((row * len(OFFSETS) + i) * width)[:, None] + d[None, :]
        tl.store(out + index, total.to(out.dtype.element_ty), in_row[:, None] & in_d[None, :])


@triton.jit
def action_window_sum_backward(
    gradient, lag_weight, segments, out, columns, positions, rows, width, blocks_d,
    gradient_strides, lag_strides, segment_strides,
    OFFSETS: tl.constexpr, FIRST_LAG: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_d * ROWS + tl.arange(0, ROWS)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    b, m = row // columns, row % columns
    in_row, in_d = row < rows, d < width
    segment = tl.zeros([ROWS], tl.int64)
    if segments is not None:
        segments += b * segment_strides[0]
        segment = tl.load(segments + m * segment_strides[1], in_row, 0).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.static_range(len(OFFSETS)):
        for j in range(FIRST_LAG, OFFSETS[i]):
            n = m - j
            counts = in_row & (n >= 0) & (n < positions)
            if segments is not None:
                counts = counts & (tl.load(segments + n * segment_strides[1], counts, 0) == segment)
            index = b * gradient_strides[0] + n * gradient_strides[1] + i * gradient_strides[2]
            index = index[:, None] + (d * gradient_strides[3])[None, :]
            term = tl.load(gradient + index, counts[:, None] & in_d[None, :], 0).to(tl.float32)
            if lag_weight is not None:
                gate = tl.load(lag_weight + i * lag_strides[0] + j * lag_strides[1] + d * lag_strides[2], in_d, 0)
                term = tl.where(counts[:, None], term * gate.to(tl.float32)[None, :], 0)
            total += term
    tl.store(out + (row * width)[:, None] + d[None, :], total.to(out.dtype.element_ty), in_row[:, None] & in_d[None, :])


@triton.jit
def action_window_sum_gates(
    actions, gradient, segments, partial, columns, positions, rows, width, blocks_d, lags,
    action_strides, gradient_strides, segment_strides,
    OFFSETS: tl.constexpr, FIRST_LAG: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    gate = program // blocks_d
    i, j = gate // lags % len(OFFSETS), gate % lags
    chunk = gate // (lags * len(OFFSETS))
    in_d = d < width
    offset = 0
    for k in tl.static_range(len(OFFSETS)):
        offset = tl.where(i == k, OFFSETS[k], offset)
    summed = (j >= FIRST_LAG) & (j < offset)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        b, n = row // positions, row % positions
        counts = summed & (row < rows) & (n + j < columns)
        if segments is not None:
            here = segments + b * segment_strides[0]
            now = tl.load(here + n * segment_strides[1], counts, 0)
            counts = counts & (now == tl.load(here + (n + j) * segment_strides[1], counts, 0))
        mask = counts[:, None] & in_d[None, :]
        index = (b * action_strides[0] + (n + j) * action_strides[1])[:, None] + (d * action_strides[2])[None, :]
        action = tl.load(actions + index, mask, 0).to(tl.float32)
        index = b * gradient_strides[0] + n * gradient_strides[1] + i * gradient_strides[2]
        index = index[:, None] + (d * gradient_strides[3])[None, :]
        total += action * tl.load(gradient + index, mask, 0).to(tl.float32)
    tl.store(partial + gate * width + d, tl.sum(total, 0), in_d)


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return [window_sums(args, args.actions.shape[1], args.actions.dtype)], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    (gradient,) = upstream
    assert gradient is not None
    return gradients_of_sums(args, want, gradient)


def tile_of(rows: int, width: int) -> tuple[int, int]:
    """(ROWS, BLOCK_D) of about 2048 elements."""
    block = min(power_of_2(width), 512)
    return min(power_of_2(rows), 2048 // block), block


def window_sums(args: Arguments, positions: int, dtype: torch.dtype) -> Tensor:
    """[B, positions, K, D]: the sums at the first `positions` positions."""
    batch, columns, width = args.actions.shape
    sums = torch.empty(batch, positions, len(args.offsets), width, dtype=dtype, device=args.actions.device)
    rows = batch * positions
    tile = tile_of(rows, width)
    blocks = ceil_div(width, tile[1])
    gated = args.lag_weight is not None
    first_lags = [args.window_start if gated else max(args.window_start, o) for o in [0, *args.offsets[:-1]]]
    launch(
        action_window_sum_forward, ceil_div(rows, tile[0]) * blocks, args.actions.device,
        args.actions, args.lag_weight, args.segment_ids, sums, columns, positions, rows, width, blocks,
        strides(args.actions, 3), strides(args.lag_weight, 3), strides(args.segment_ids, 2),
        OFFSETS=tuple(args.offsets), FIRST_LAGS=tuple(first_lags), ROWS=tile[0], BLOCK_D=tile[1],
        num_warps=warps_of(tile[0] * tile[1], 16),
    )  # fmt: skip
    return sums


def gradients_of_sums(args: Arguments, want: Want, gradient: Tensor) -> Gradients:
    """The needed gradients of actions and lag_weight, given the gradient of the sums [B, N, K, D]."""
    actions, lag_weight, segments = args.actions, args.lag_weight, args.segment_ids
    batch, columns, width = actions.shape
    positions, device = gradient.shape[1], actions.device
    gradients: Gradients = {}
    if want["actions"]:
        actions_gradient = torch.empty(actions.shape, dtype=actions.dtype, device=device)
        rows = batch * columns
        tile = tile_of(rows, width)
        blocks = ceil_div(width, tile[1])
        launch(
            action_window_sum_backward, ceil_div(rows, tile[0]) * blocks, device,
            gradient, lag_weight, segments, actions_gradient, columns, positions, rows, width, blocks,
            strides(gradient, 4), strides(lag_weight, 3), strides(segments, 2),
            OFFSETS=tuple(args.offsets), FIRST_LAG=args.window_start, ROWS=tile[0], BLOCK_D=tile[1],
            num_warps=warps_of(tile[0] * tile[1], 16),
        )  # fmt: skip
        gradients["actions"] = actions_gradient
    if want["lag_weight"]:
        count, lags = lag_weight.shape[:2]
        rows = batch * positions
        tile = tile_of(min(rows, CHUNK), width)
        blocks, chunks = ceil_div(width, tile[1]), ceil_div(rows, CHUNK)
        partial = torch.empty(chunks, count, lags, width, dtype=torch.float32, device=device)
        launch(
            action_window_sum_gates, chunks * count * lags * blocks, device,
            actions, gradient, segments, partial, columns, positions, rows, width, blocks, lags,
            strides(actions, 3), strides(gradient, 4), strides(segments, 2),
            OFFSETS=tuple(args.offsets), FIRST_LAG=args.window_start,
            CHUNK=min(CHUNK, power_of_2(rows)), ROWS=tile[0], BLOCK_D=tile[1],
            num_warps=warps_of(tile[0] * tile[1], 16),
        )  # fmt: skip
        gradients["lag_weight"] = partial.sum(0).to(lag_weight.dtype)
    return gradients
