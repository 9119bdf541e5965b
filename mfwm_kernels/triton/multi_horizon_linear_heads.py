"""What multi_horizon_linear computes once per call, around the passes over rows: all horizons in one launch each.

prepare        The concatenated heads times their norm weights, W', and the biases side by side.
project        Each horizon's conditioning sums times its head.
finish_sums    The gradient of the sums: (P summed over tokens) W', less what the norm subtracts.
finish_heads   d W' = P^T hidden + (P summed over tokens)^T sums; from it the gradients of the weights and norm weights.

torch needs some thirty small ops for these, 2 us each in a graph. LayerNorm centres heads along D and takes torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm import multi_horizon_linear as in_torch
from ..gemm.multi_horizon_linear import columns_of, is_layer
from ..op import Gradients, Want
from ..ops.multi_horizon_linear import Arguments
from .launch import add_product, ceil_div, dot_precision, launch, power_of_2, strides


@triton.jit
def of_horizon(i, values):
    """values[i] of a tuple, for an index that is known at run time only."""
    value = values[0]
    for j in tl.static_range(1, len(values)):
        value = tl.where(i == j, values[j], value)
    return value


@triton.jit
def offsets_of(rows, columns, steps):
    return (rows.to(tl.int64) * steps[0])[:, None] + (columns.to(tl.int64) * steps[1])[None, :]


@triton.jit
def load_norm(norm_weight, i, d, in_d, steps):
    """The norm weight of horizon i, in fp32."""
    return tl.load(norm_weight + i * steps[0] + d.to(tl.int64) * steps[1], in_d, 0).to(tl.float32)


@triton.jit
def multi_horizon_linear_prepare(
    weights, norm_weight, biases, heads, bias, counts, firsts, blocks, depth, weight_strides, norm_strides,
    bias_strides, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n = program % blocks * ROWS + tl.arange(0, ROWS)
    for i in tl.static_range(COUNT):
        if program // blocks == i:
            in_n = n < counts[i]
            if bias is not None:
                tl.store(bias + firsts[i] + n, tl.load(biases[i] + n.to(tl.int64) * bias_strides[i], in_n, 0), in_n)
            for start in range(0, depth, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                mask = in_n[:, None] & (d < depth)[None, :]
                offsets = (n.to(tl.int64) * weight_strides[i][0])[:, None] + (d.to(tl.int64) * weight_strides[i][1])[
                    None, :
                ]
                head = tl.load(weights[i] + offsets, mask, 0).to(tl.float32)
                if norm_weight is not None:
                    offsets = i * norm_strides[0] + d.to(tl.int64) * norm_strides[1]
                    head *= tl.load(norm_weight + offsets, d < depth, 0).to(tl.float32)[None, :]
                offsets = ((firsts[i] + n).to(tl.int64) * depth)[:, None] + d[None, :]
                tl.store(heads + offsets, head.to(heads.dtype.element_ty), mask)


@triton.jit
def multi_horizon_linear_project(
    sums, heads, projected, counts, firsts, positions, blocks, blocks_n, depth, columns,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = program // (blocks * blocks_n)
    position = (program // blocks_n % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n = program % blocks_n * COLUMNS + tl.arange(0, COLUMNS)
    in_positions, in_n = position < positions, n < of_horizon(i, counts)
    column = of_horizon(i, firsts) + n
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < depth
        added = tl.load(sums + ((position * COUNT + i) * depth)[:, None] + d[None, :],
                        in_positions[:, None] & in_d[None, :], 0)  # fmt: skip
        head = tl.load(heads + (column.to(tl.int64) * depth)[None, :] + d[:, None], in_n[None, :] & in_d[:, None], 0)
        rounded = added.to(head.dtype)
        total = add_product(total, rounded, head, PRECISION)
        if head.dtype != tl.float32:
            # The sums have more digits than the heads, which count where they cancel hidden.
            total = add_product(total, (added - rounded.to(tl.float32)).to(head.dtype), head, PRECISION)
    tl.store(projected + (position * columns)[:, None] + column[None, :], total, in_positions[:, None] & in_n[None, :])


@triton.jit
def multi_horizon_linear_finish_sums(
    scaled_sums, heads, sums, gradient, counts, firsts, positions, blocks, blocks_d, depth, width, factor,
    COUNT: tl.constexpr, NORM: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = program // (blocks * blocks_d)
    position = (program // blocks_d % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_positions, in_d = position < positions, d < depth
    count, first = of_horizon(i, counts), of_horizon(i, firsts)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        in_n = n < count
        scaled = tl.load(scaled_sums + (position * width)[:, None] + (first + n)[None, :],
                         in_positions[:, None] & in_n[None, :], 0)  # fmt: skip
        head = tl.load(heads + ((first + n).to(tl.int64) * depth)[:, None] + d[None, :],
                       in_n[:, None] & in_d[None, :], 0)  # fmt: skip
        total = add_product(total, scaled.to(head.dtype), head, PRECISION)
    offsets = ((position * COUNT + i) * depth)[:, None] + d[None, :]
    mask = in_positions[:, None] & in_d[None, :]
    if NORM:
        subtracted = tl.load(gradient + offsets, mask, 0)
        if SHARES:
            # The shares, summed over tokens, are the last columns of P.
            share = tl.load(scaled_sums + position * width + (width - COUNT + i), in_positions, 0)
            subtracted += share[:, None] * tl.load(sums + offsets, mask, 0)
        total -= subtracted * factor
    tl.store(gradient + offsets, total, mask)


@triton.jit
def multi_horizon_linear_finish_heads(
    scaled_sums, sums, products, weights, norm_weight, gradients, norm_gradient, counts, firsts, positions, blocks_d,
    depth, width, weight_strides, norm_strides,
    COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < depth
    for i in tl.static_range(COUNT):
        if program // blocks_d == i:
            factor = tl.full([BLOCK_D], 1.0, tl.float32)
            if norm_weight is not None:
                factor = load_norm(norm_weight, i, d, in_d, norm_strides)
            along = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for start in range(0, counts[i], BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                in_n = n < counts[i]
                mask = in_n[:, None] & in_d[None, :]
                column = (firsts[i] + n).to(tl.int64)
                total = tl.load(products + (column * depth)[:, None] + d[None, :], mask, 0)
                for first in range(0, positions, ROWS):
                    position = (first + tl.arange(0, ROWS)).to(tl.int64)
                    in_positions = position < positions
                    scaled = tl.load(scaled_sums + (position * width)[None, :] + column[:, None],
                                     in_n[:, None] & in_positions[None, :], 0)  # fmt: skip
                    added = tl.load(sums + ((position * COUNT + i) * depth)[:, None] + d[None, :],
                                    in_positions[:, None] & in_d[None, :], 0)  # fmt: skip
                    dtype: tl.constexpr = weights[0].dtype.element_ty
                    total = add_product(total, scaled.to(dtype), added.to(dtype), PRECISION)
                if norm_gradient is not None:
                    along += total * tl.load(weights[i] + offsets_of(n, d, weight_strides[i]), mask, 0).to(tl.float32)
                if gradients[i] is not None:
                    gradient = (total * factor[None, :]).to(gradients[i].dtype.element_ty)
                    tl.store(gradients[i] + offsets_of(n, d, (depth, 1)), gradient, mask)
            if norm_gradient is not None:
                tl.store(norm_gradient + i * tl.cast(depth, tl.int64) + d, tl.sum(along, 0), in_d)


def firsts_of(columns: list[int]) -> tuple[int, ...]:
    """The first column of each head among all columns, and the total number of columns."""
    return tuple(sum(columns[:i]) for i in range(len(columns) + 1))


def norm_strides_of(args: Arguments) -> tuple[int, int]:
    """Per horizon, per feature."""
    norm_weight = args.norm_weight
    if norm_weight is None:
        return (0, 0)
    return (norm_weight.stride(0) if norm_weight.dim() == 2 else 0, norm_weight.stride(-1))


def heads_and_bias(args: Arguments, dtype: torch.dtype, computed: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if is_layer(args):
        return in_torch.heads_and_bias(args, dtype, computed)
    columns, (_, depth), device = columns_of(args), args.weights[0].shape, args.hidden.device
    heads = torch.empty(sum(columns), depth, dtype=dtype, device=device)
    bias = torch.empty(sum(columns), dtype=computed, device=device) if args.biases else None
    blocks = ceil_div(max(columns), 16)
    launch(
        multi_horizon_linear_prepare, len(columns) * blocks, device,
        tuple(args.weights), args.norm_weight, tuple(args.biases) or None, heads, bias, tuple(columns),
        firsts_of(columns), blocks, depth, tuple(strides(weight, 2) for weight in args.weights), norm_strides_of(args),
        tuple(bias.stride(0) for bias in args.biases) or None,
        COUNT=len(columns), ROWS=16, BLOCK_D=min(256, power_of_2(depth)), num_warps=4,
    )  # fmt: skip
    return heads, bias


def projected_of(args: Arguments, sums: Tensor, heads: Tensor) -> Tensor:
    """[B * T, sum N_i] in fp32: each horizon's conditioning sums, of [B, T, K, D], times its head."""
    columns, depth, positions = columns_of(args), sums.shape[-1], sums.shape[:2].numel()
    projected = torch.empty(positions, sum(columns), dtype=torch.float32, device=sums.device)
    tile_columns = min(64, max(16, power_of_2(max(columns))))
    blocks, blocks_n = ceil_div(positions, 16), ceil_div(max(columns), tile_columns)
    launch(
        multi_horizon_linear_project, len(columns) * blocks * blocks_n, sums.device,
        sums, heads, projected, tuple(columns), firsts_of(columns), positions, blocks, blocks_n, depth, sum(columns),
        COUNT=len(columns), ROWS=16, COLUMNS=tile_columns,
        # Products of fp32 keep both operands in registers.
        BLOCK_D=min(64 if heads.element_size() == 2 else 32, max(16, power_of_2(depth))),
        # ptxas spills 8 bytes to stay below limits that it chooses.
        PRECISION=dot_precision(), num_warps=4, num_stages=2, maxnreg=255,
    )  # fmt: skip
    return projected


def finish_sums(args: Arguments, scaled_sums: Tensor, heads: Tensor, sums: Tensor, sums_gradient: Tensor) -> None:
    """Add (P summed over tokens) W' to the gradient of the sums, which holds what the norm subtracts: sum_i c_i x_i,
    or D c_i hidden if the shares times D are columns of P."""
    columns, depth, positions = columns_of(args), sums.shape[-1], sums.shape[:2].numel()
    has_shares = scaled_sums.shape[1] > sum(columns)
    block_d = min(64, max(16, power_of_2(depth)))
    blocks, blocks_d = ceil_div(positions, 32), ceil_div(depth, block_d)
    launch(
        multi_horizon_linear_finish_sums, len(columns) * blocks * blocks_d, sums.device,
        scaled_sums, heads, sums, sums_gradient, tuple(columns), firsts_of(columns), positions, blocks, blocks_d, depth,
        scaled_sums.shape[1], 1 / depth if has_shares else 1.0,
        COUNT=len(columns), NORM=args.norm_weight is not None, SHARES=has_shares and args.norm_weight is not None,
        ROWS=32, BLOCK_N=min(32, max(16, power_of_2(max(columns)))), BLOCK_D=block_d, PRECISION=dot_precision(),
        num_warps=4, num_stages=2,
    )  # fmt: skip


def finish_heads(
    args: Arguments,
    want: Want,
    scaled_sums: Tensor,
    heads: Tensor,
    sums: Tensor,
    heads_gradient: Tensor,
    totals: Tensor | None,
) -> Gradients:
    if is_layer(args):
        return in_torch.finish_heads(args, want, scaled_sums, heads, sums, heads_gradient, totals)
    columns, (_, depth), device = columns_of(args), heads.shape, heads.device
    positions, most, half = scaled_sums.shape[0], max(columns), heads.element_size() == 2
    weights = [
        torch.empty(weight.shape, dtype=weight.dtype, device=device) if wants else None
        for weight, wants in zip(args.weights, want["weights"], strict=True)
    ]
    norm_gradient = None
    if want["norm_weight"]:
        norm_gradient = torch.empty(len(columns), depth, dtype=torch.float32, device=device)
    block_d = min(64, max(16, power_of_2(depth)))
    blocks_d = ceil_div(depth, block_d)
    launch(
        multi_horizon_linear_finish_heads, len(columns) * blocks_d, device,
        scaled_sums, sums, heads_gradient, tuple(args.weights), args.norm_weight, tuple(weights), norm_gradient,
        tuple(columns), firsts_of(columns), positions, blocks_d, depth, scaled_sums.shape[1],
        tuple(strides(weight, 2) for weight in args.weights), norm_strides_of(args),
        # Products of fp32 keep both operands in registers. One stage, because in two, for sm_100, a copy of the next
        # total overwrites the one that is being added to.
        COUNT=len(columns), ROWS=64 if half else 32, BLOCK_N=min(64 if half else 32, max(16, power_of_2(most))),
        BLOCK_D=block_d, PRECISION=dot_precision(), num_warps=8, num_stages=1,
        # ptxas spills up to 32 bytes on sm_80 to stay below limits that it chooses.
        maxnreg=255,
    )  # fmt: skip
    gradients: Gradients = {"weights": weights}
    if norm_gradient is not None:
        assert args.norm_weight is not None
        shared = args.norm_weight.dim() == 1
        gradients["norm_weight"] = (norm_gradient.sum(0) if shared else norm_gradient).to(args.norm_weight.dtype)
    return gradients
