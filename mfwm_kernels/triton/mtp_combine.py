"""mtp_combine in Triton, called by autograd.call: passes over rows around torch's matrix products.

norm      Bytes: both states once, the normed states.
gradient  Bytes: both states and the gradients of the normed states once, the gradients of the states.
finish    Bytes: the weight and its gradient in fp32 once, the gradients of the weight and the norm weights.

A kernel that multiplies the states and scales the products by row statistics moves half of the forward's bytes, but at
D = 512 the tensor cores already take longer than these, and at D = 2048 they take three times as long: it would have to
multiply as fast as cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm import mtp_combine as around_products
from ..gemm.mtp_combine import Passes
from ..op import Gradients, Want
from ..ops.mtp_combine import Arguments
from .launch import ceil_div, launch, power_of_2, strides


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


@triton.jit
def mtp_combine_finish(
    weight, norm_weights, product, weight_gradient, norm_gradient, rows, columns, weight_strides,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < columns
    factor = tl.load(norm_weights + column, in_columns, 0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & in_columns[None, :]
        offsets = (row * columns)[:, None] + column[None, :]
        gradient = tl.load(product + offsets, mask, 0)
        given = (row * weight_strides[0])[:, None] + (column.to(tl.int64) * weight_strides[1])[None, :]
        total += gradient * tl.load(weight + given, mask, 0).to(tl.float32)
        tl.store(weight_gradient + offsets, (gradient * factor[None, :]).to(weight_gradient.dtype.element_ty), mask)
    tl.store(norm_gradient + column, tl.sum(total, 0).to(norm_gradient.dtype.element_ty), in_columns)


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return [around_products.forward(args, PASSES)], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    (out_gradient,) = upstream
    assert out_gradient is not None
    return around_products.backward(args, want, out_gradient, PASSES)


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


def finish(args: Arguments, norm_weights: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    weight, (rows, columns) = args.weight, args.weight.shape
    weight_gradient = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    norm_gradient = torch.empty(columns, dtype=weight.dtype, device=weight.device)
    launch(
        mtp_combine_finish, ceil_div(columns, 16), weight.device,
        weight, norm_weights, product, weight_gradient, norm_gradient, rows, columns, strides(weight, 2),
        ROWS=128, COLUMNS=16, num_warps=4,
    )  # fmt: skip
    return weight_gradient, norm_gradient


PASSES = Passes(lambda dtype: dtype, norm, gradient, finish)
