"""mtp_combine in Triton, called by autograd.call: both matrix products in one tile, scaled by row statistics.

forward   A program computes a tile of rows x columns. For each state it sums squares along the rows, then multiplies.
          Norms are factors of a row, so they scale the two products, not the states. Bytes: both states once for each
          block of columns; the second read of a state hits L2.
backward  torch's matrix products and two passes over rows, see gemm/mtp_combine.py.
norm      Bytes: both states once, the normed states.
gradient  Bytes: both states and the gradients of the normed states once, the gradients of the states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm.mtp_combine import Passes, norm_weights_of, ordered
from ..gemm.mtp_combine import backward as shared_backward
from ..gemm.rows import chunks, flat, rows_of
from ..op import Gradients, Want
from ..ops.mtp_combine import Arguments
from .launch import add_product, ceil_div, dot_precision, launch, power_of_2, strides


@triton.jit
def mtp_combine_forward(
    states, weight, out, rows, depth, columns, column_blocks, eps, state_strides,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program // column_blocks * ROWS
    row = first + tl.arange(0, ROWS)
    column = (program % column_blocks * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < rows, column < columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for half in tl.static_range(2):
        # The statistics need a separate loop: Triton 3.6 allocates one buffer too few for a tile that wgmma reads and
        # registers load too, so the copy of a later tile overwrites it while wgmma still reads. The second read hits
        # L2.
        squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            state = load_tile(states[half], row, d, in_rows, d < depth, state_strides[half][0], state_strides[half][1])
            squares += state * state
        inverse_rms = tl.rsqrt(tl.sum(squares, 1) / depth + eps)
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            in_d = d < depth
            offsets = (row * state_strides[half][0])[:, None] + (d.to(tl.int64) * state_strides[half][1])[None, :]
            state = tl.load(states[half] + offsets, in_rows[:, None] & in_d[None, :], 0)
            offsets = (column.to(tl.int64) * (2 * depth))[None, :] + (half * depth + d)[:, None]
            factor = tl.load(weight + offsets, in_columns[None, :] & in_d[:, None], 0)
            product = add_product(product, state, factor, PRECISION)
        total += product * inverse_rms[:, None]
    offsets = (tl.arange(0, ROWS) * columns)[:, None] + column[None, :]
    tl.store(out + first * columns + offsets, total.to(out.dtype.element_ty), in_rows[:, None] & in_columns[None, :])


@triton.jit
def load_tile(pointer, row, d, in_rows, in_d, row_step, step):
    offsets = (row * row_step)[:, None] + (d.to(tl.int64) * step)[None, :]
    return tl.load(pointer + offsets, in_rows[:, None] & in_d[None, :], 0).to(tl.float32)


@triton.jit
def mtp_combine_norm(
    states, joined, rows, depth, eps, state_strides, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    for half in tl.static_range(2):
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            state = load_tile(states[half], row, d, in_rows, d < depth, state_strides[half][0], state_strides[half][1])
            squares += tl.sum(state * state, 1)
        inverse_rms = tl.rsqrt(squares / depth + eps)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            state = load_tile(states[half], row, d, in_rows, d < depth, state_strides[half][0], state_strides[half][1])
            offsets = (row * (2 * depth))[:, None] + (half * depth + d)[None, :]
            normed = (state * inverse_rms[:, None]).to(joined.dtype.element_ty)
            tl.store(joined + offsets, normed, in_rows[:, None] & (d < depth)[None, :])


@triton.jit
def mtp_combine_gradient(
    states, joined, gradients, rows, depth, eps, state_strides, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    for half in tl.static_range(2):
        if gradients[half] is not None:
            squares = tl.zeros([ROWS], tl.float32)
            dots = tl.zeros([ROWS], tl.float32)
            for start in range(0, depth, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                in_d = d < depth
                state = load_tile(states[half], row, d, in_rows, in_d, state_strides[half][0], state_strides[half][1])
                gradient = load_tile(joined + half * depth, row, d, in_rows, in_d, 2 * depth, 1)
                squares += tl.sum(state * state, 1)
                dots += tl.sum(state * gradient, 1)
            inverse_rms = tl.rsqrt(squares / depth + eps)
            along = dots * inverse_rms * inverse_rms / depth
            for start in range(0, depth, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                in_d = d < depth
                state = load_tile(states[half], row, d, in_rows, in_d, state_strides[half][0], state_strides[half][1])
                gradient = load_tile(joined + half * depth, row, d, in_rows, in_d, 2 * depth, 1)
                state_gradient = (gradient - state * along[:, None]) * inverse_rms[:, None]
                offsets = (row * depth)[:, None] + d[None, :]
                mask = in_rows[:, None] & in_d[None, :]
                tl.store(gradients[half] + offsets, state_gradient.to(gradients[half].dtype.element_ty), mask)


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    hidden, (columns, depth) = args.hidden, args.weight.shape
    weight = (args.weight.float() * norm_weights_of(args, torch.float32)).to(hidden.dtype).contiguous()
    out = torch.empty(*hidden.shape[:-1], columns, dtype=hidden.dtype, device=hidden.device)
    half = hidden.element_size() == 2
    tile_rows, tile_columns = (128, min(128, max(16, power_of_2(columns)))) if half else (32, 64)
    # A state whose strides allow no view of its rows is copied, one chunk at a time.
    copies = sum(flat(state) is None for state in (hidden, args.embedding))
    for first, last in chunks(hidden, copies * hidden.shape[-1] * hidden.element_size()):
        states = [rows_of(state, first, last) for state in ordered(args, hidden, args.embedding)]
        column_blocks = ceil_div(columns, tile_columns)
        launch(
            mtp_combine_forward, ceil_div(last - first, tile_rows) * column_blocks, hidden.device,
            tuple(states), weight, rows_of(out, first, last), last - first, depth // 2, columns, column_blocks,
            args.norm_eps, tuple(strides(state, 2) for state in states),
            PRECISION=dot_precision(), ROWS=tile_rows, COLUMNS=tile_columns,
            BLOCK_D=min(32, max(16, power_of_2(depth // 2))), num_warps=8 if half else 4, num_stages=3,
        )  # fmt: skip
    return [out], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    (out_gradient,) = upstream
    assert out_gradient is not None
    return shared_backward(args, want, out_gradient, PASSES)


def tile_of(depth: int) -> tuple[int, int]:
    """(ROWS, BLOCK_D) of 2048 elements."""
    block = min(512, power_of_2(depth))
    return max(1, 2048 // block), block


def norm(states: Sequence[Tensor], joined: Tensor, eps: float) -> None:
    rows, depth = states[0].shape
    tile_rows, block = tile_of(depth)
    launch(
        mtp_combine_norm, ceil_div(rows, tile_rows), joined.device,
        tuple(states), joined, rows, depth, eps, tuple(strides(state, 2) for state in states),
        ROWS=tile_rows, BLOCK_D=block, num_warps=4,
    )  # fmt: skip


def gradient(states: Sequence[Tensor], joined: Tensor, eps: float, gradients: Sequence[Tensor | None]) -> None:
    rows, depth = states[0].shape
    tile_rows, block = tile_of(depth)
    launch(
        mtp_combine_gradient, ceil_div(rows, tile_rows), joined.device,
        tuple(states), joined, tuple(gradients), rows, depth, eps, tuple(strides(state, 2) for state in states),
        ROWS=tile_rows, BLOCK_D=block, num_warps=4,
    )  # fmt: skip


PASSES = Passes(lambda dtype: dtype, norm, gradient)
