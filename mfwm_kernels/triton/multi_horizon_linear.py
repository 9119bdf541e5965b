"""multi_horizon_linear in Triton, called by autograd.call: one kernel for row statistics and one matrix product.

forward   In 16-bit dtypes with few columns, at least 64 tokens per position and no LayerNorm, one pass over hidden
          (multi_horizon_linear_narrow.py). Bytes: hidden once, the outputs. For all other calls, a program computes a
          tile of rows x columns of the concatenated heads. It first reads its rows of hidden to sum squares, with each
          horizon's window sum added, and then again, from L2, for the product. The epilogue adds the projected window
          sums, multiplies by the rows' norm factors, adds the bias and stores each horizon's part. LayerNorm reads its
          rows once more, from L2, for their means.
          Bytes: hidden once for each block of columns (one block, up to 256 columns), the outputs.
          It stores the norm factors, and with LayerNorm the means, for the backward.
backward  see gemm/multi_horizon_linear.py: a pass `scale`, and after it in 16-bit dtypes with few columns one for all
          products (multi_horizon_linear_products.py), else torch's matrix products and a pass. Each program sums over
          its tokens of a position; torch adds up the programs' sums in a fixed order.
both      see multi_horizon_linear_heads.py for what precedes and follows the passes over rows.
scale     Bytes: the outputs and their gradients once, P.
combine   Bytes: hidden and the product once, d hidden.
monitor   Bytes: hidden and K products once, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm.multi_horizon_linear import (
    Passes,
    Rows,
    columns_of,
    head_sums_of,
    is_layer,
    parts_of,
    shape_of,
    sums_of,
)
from ..gemm.multi_horizon_linear import backward as shared_backward
from ..op import Gradients, Want
from ..ops.multi_horizon_linear import Arguments, statistics_of
from .action_window_sum import gradients_of_sums as gradients_of_window
from .action_window_sum import window_sums
from .launch import add_product, architecture_of, ceil_div, dot_precision, launch, power_of_2, strides
from .multi_horizon_linear_heads import finish_heads, finish_sums, firsts_of, heads_and_bias, projected_of
from .multi_horizon_linear_narrow import launch_narrow, narrow_shape_of
from .multi_horizon_linear_products import FEW_COLUMNS, groups_of, multi_horizon_linear_products, widths_of

# The fewest programs of the pass `combine`: 4 per SM of an H200.
PROGRAMS = 528


@triton.jit
def multi_horizon_linear_forward(
    hidden, sums, heads, projected, head_sums, bias, outputs, inverse_rms, means, firsts, positions, width, tokens,
    rows, depth, columns, column_blocks, tiles, eps, hidden_strides,
    COUNT: tl.constexpr, NORM: tl.constexpr, ONE_POSITION: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = (program % column_blocks * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)
    in_columns = column < columns
    if ONE_POSITION:
        # All rows of the tile are tokens of the same position.
        position = program // column_blocks // tiles
        first_token = (program // column_blocks % tiles * ROWS).to(tl.int32)
        token = first_token + tl.arange(0, ROWS)
        in_rows = token < tokens
        first = position * tokens + first_token
    else:
        first = program // column_blocks * ROWS
        row = first + tl.arange(0, ROWS)
        in_rows = row < rows
        position = row // tokens
        token = (row % tokens).to(tl.int32)
    base = position // positions * hidden_strides[0] + position % positions * hidden_strides[1]
    base = base + (token // width).to(tl.int64) * hidden_strides[2] + (token % width).to(tl.int64) * hidden_strides[3]

    # The statistics need a separate loop: Triton 3.6 allocates one buffer too few for a tile that wgmma reads and
    # registers load too, so the copy of a later tile overwrites it while wgmma still reads. The second read hits L2.
    factors = ()
    if head_sums is not None:
        totals = tl.zeros([ROWS, STEP], tl.float32)
        for start in tl.range(0, depth, STEP):
            d = start + tl.arange(0, STEP)
            totals += tl.load(hidden + base[:, None] + (d.to(tl.int64) * hidden_strides[4])[None, :],
                              in_rows[:, None] & (d < depth)[None, :], 0).to(tl.float32)  # fmt: skip
        mean = tl.sum(totals, 1) / depth
    if NORM:
        squares = ()
        for _ in tl.static_range(COUNT):
            squares = squares + (tl.zeros([ROWS, STEP], tl.float32),)
        for start in tl.range(0, depth, STEP):
            d = start + tl.arange(0, STEP)
            in_d = d < depth
            state = tl.load(hidden + base[:, None] + (d.to(tl.int64) * hidden_strides[4])[None, :],
                            in_rows[:, None] & in_d[None, :], 0).to(tl.float32)  # fmt: skip
            if head_sums is not None:
                state = tl.where(in_d[None, :], state - mean[:, None], 0)
            added_squares = ()
            for i in tl.static_range(COUNT):
                if ONE_POSITION:
                    added = tl.load(sums + (position * COUNT + i) * depth + d, in_d, 0)[None, :]
                else:
                    added = tl.load(sums + ((position * COUNT + i) * depth)[:, None] + d[None, :],
                                    in_rows[:, None] & in_d[None, :], 0)  # fmt: skip
                biased = state + added
                added_squares = added_squares + (squares[i] + biased * biased,)
            squares = added_squares
        for i in tl.static_range(COUNT):
            factors = factors + (tl.rsqrt(tl.sum(squares[i], 1) / depth + eps),)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < depth
        state = tl.load(hidden + base[:, None] + (d.to(tl.int64) * hidden_strides[4])[None, :],
                        in_rows[:, None] & in_d[None, :], 0)  # fmt: skip
        head = tl.load(heads + column[None, :].to(tl.int64) * depth + d[:, None],
                       in_columns[None, :] & in_d[:, None], 0)  # fmt: skip
        total = add_product(total, state, head, PRECISION)

    if ONE_POSITION:
        total += tl.load(projected + position * columns + column, in_columns, 0)[None, :]
    else:
        total += tl.load(projected + (position * columns)[:, None] + column[None, :],
                         in_rows[:, None] & in_columns[None, :], 0)  # fmt: skip
    if head_sums is not None:
        total -= mean[:, None] * tl.load(head_sums + column, in_columns, 0)[None, :]
    shift = tl.zeros([COLUMNS], tl.float32)
    if bias is not None:
        shift = tl.load(bias + column, in_columns, 0)
    for i in tl.static_range(COUNT):
        in_head = (column >= firsts[i]) & (column < firsts[i + 1])
        out = total
        if NORM:
            out = total * factors[i][:, None]
        out += shift[None, :]
        # Offsets one_position the tile are 32-bit, because 64-bit ones would spill registers.
        count = firsts[i + 1] - firsts[i]
        offsets = (tl.arange(0, ROWS) * count)[:, None] + (column - firsts[i])[None, :]
        tl.store(
            outputs[i] + first * count + offsets,
            out.to(outputs[i].dtype.element_ty),
            in_rows[:, None] & in_head[None, :],
        )
    # Every block of columns computes the statistics, and the first one stores them.
    stores = in_rows & (program % column_blocks == 0)
    if head_sums is not None:
        tl.store(means + first + tl.arange(0, ROWS), mean, stores)
    for i in tl.static_range(len(factors)):
        tl.store(inverse_rms + i * tl.cast(rows, tl.int64) + first + tl.arange(0, ROWS), factors[i], stores)


@triton.jit
def rows_of_program(program, first, last, tokens, tiles, ROWS: tl.constexpr):
    """A program's position, its row numbers relative to `first`, and which of them are in the chunk first .. last."""
    position = first // tokens + program // tiles
    token = program % tiles * ROWS + tl.arange(0, ROWS)
    row = position * tokens + token
    return position, row - first, (token < tokens) & (row >= first) & (row < last)


@triton.jit
def load_tile(pointer, row, d, in_rows, in_d, steps):
    offsets = (row * steps[0])[:, None] + (d.to(tl.int64) * steps[1])[None, :]
    return tl.load(pointer + offsets, in_rows[:, None] & in_d[None, :], 0).to(tl.float32)


@triton.jit
def load_states(hidden, means, row, d, in_rows, in_d, steps):
    """Rows of hidden in fp32, less their means unless `means` is None."""
    state = load_tile(hidden, row, d, in_rows, in_d, steps)
    if means is not None:
        mean = tl.load(means + row, in_rows, 0)
        state = tl.where(in_d[None, :], state - mean[:, None], 0)
    return state


@triton.jit
def multi_horizon_linear_scale(
    gradients, outputs, bias, inverse_rms, scaled, shares, partial, counts, firsts, first, last, tokens, tiles, depth,
    columns, rows, gradient_strides, output_strides,
    COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    _, row, in_rows = rows_of_program(program, first, last, tokens, tiles, ROWS)
    row_shares = ()
    for i in tl.static_range(COUNT):
        share = tl.zeros([ROWS], tl.float32)
        factor = tl.full([ROWS], 1.0, tl.float32)
        if inverse_rms is not None:
            factor = tl.load(inverse_rms + i * rows + row, in_rows, 0)
        for start in range(0, counts[i], BLOCKS[i]):
            n = start + tl.arange(0, BLOCKS[i])
            in_n = n < counts[i]
            out = tl.zeros([ROWS, n.shape[0]], tl.float32)
            if gradients[i] is not None:
                gradient = load_tile(gradients[i], row, n, in_rows, in_n, gradient_strides[i])
                if inverse_rms is not None:
                    product = load_tile(outputs[i], row, n, in_rows, in_n, output_strides[i])
                    if bias is not None:
                        product -= tl.load(bias + firsts[i] + n, in_n, 0)[None, :]
                    share += tl.sum(gradient * product, 1)
                out = gradient * factor[:, None]
            offsets = (row * columns)[:, None] + (firsts[i] + n)[None, :]
            tl.store(scaled + offsets, out.to(scaled.dtype.element_ty), in_rows[:, None] & in_n[None, :])
            if partial is not None:
                tl.store(partial + program * columns + firsts[i] + n, tl.sum(out, 0), in_n)
        if inverse_rms is not None:
            row_shares = row_shares + (share * factor * factor / depth,)
    if TAIL == 0:
        for i in tl.static_range(len(row_shares)):
            tl.store(shares + row * COUNT + i, row_shares[i], in_rows)
    else:
        # The columns behind those of the heads: zeros, and last the shares times depth, because these alone would
        # underflow in fp16.
        n = firsts[COUNT] + tl.arange(0, TAIL)
        in_n = n < columns
        out = tl.zeros([ROWS, TAIL], tl.float32)
        for i in tl.static_range(len(row_shares)):
            out += tl.where(in_rows[:, None] & (n == columns - COUNT + i)[None, :], row_shares[i][:, None] * depth, 0)
        offsets = (row * columns)[:, None] + n[None, :]
        tl.store(scaled + offsets, out.to(scaled.dtype.element_ty), in_rows[:, None] & in_n[None, :])
        if inverse_rms is not None:
            tl.store(shares + row, tl.sum(out, 1) / depth, in_rows)
        if partial is not None:
            tl.store(partial + program * columns + n, tl.sum(out, 0), in_n)


@triton.jit
def multi_horizon_linear_combine(
    hidden, sums, product, shares, means, hidden_gradient, partial, first_position, tokens, parts, part_tiles, blocks_d,
    depth, hidden_strides, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks_d
    position = part // parts
    d = (program % blocks_d * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)
    in_d = d < depth
    added = ()
    totals = ()
    counted = ()
    for i in tl.static_range(COUNT):
        place = (first_position + position) * COUNT + i
        added = added + (tl.load(sums + place * depth + d, in_d, 0)[None, :],)
        totals = totals + (tl.zeros([ROWS, BLOCK_D], tl.float32),)
        counted = counted + (tl.zeros([ROWS], tl.float32),)
    start = (part % parts).to(tl.int32) * part_tiles * ROWS
    for first_token in range(start, tl.minimum(tokens, start + part_tiles * ROWS), ROWS):
        token = first_token + tl.arange(0, ROWS)
        in_rows = token < tokens
        row = position * tokens + token
        mask = in_rows[:, None] & in_d[None, :]
        offsets = (row * depth)[:, None] + d[None, :]
        state = load_states(hidden, means, row, d, in_rows, in_d, hidden_strides)
        subtracted = tl.zeros([ROWS, BLOCK_D], tl.float32)
        share_sum = tl.zeros([ROWS], tl.float32)
        next_totals = ()
        next_counted = ()
        for i in tl.static_range(COUNT):
            share = tl.load(shares + row * COUNT + i, in_rows, 0)
            subtracted += share[:, None] * added[i]
            share_sum += share
            next_totals = next_totals + (totals[i] + share[:, None] * state,)
            next_counted = next_counted + (counted[i] + share,)
        totals = next_totals
        counted = next_counted
        if hidden_gradient is not None:
            gradient = tl.load(product + offsets, mask, 0).to(tl.float32) - subtracted - share_sum[:, None] * state
            tl.store(hidden_gradient + offsets, gradient.to(hidden_gradient.dtype.element_ty), mask)
    if partial is not None:
        for i in tl.static_range(COUNT):
            total = tl.sum(totals[i], 0)[None, :] + tl.sum(counted[i], 0) * added[i]
            tl.store(partial + (part * COUNT + i) * depth + d[None, :], total, in_d[None, :])


@triton.jit
def multi_horizon_linear_monitor(
    hidden, sums, states, shares, means, scale, hidden_gradient, partial, gram, first, last, tokens, tiles, blocks_d,
    depth, hidden_strides, COUNT: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile = program // blocks_d
    position, row, in_rows = rows_of_program(tile, first, last, tokens, tiles, ROWS)
    d = (program % blocks_d * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)
    in_d = d < depth
    mask = in_rows[:, None] & in_d[None, :]
    offsets = (row * depth)[:, None] + d[None, :]
    if NORM:
        state = load_states(hidden, means, row, d, in_rows, in_d, hidden_strides)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    gradients = ()
    for i in tl.static_range(COUNT):
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        if states[i] is not None:
            gradient = tl.load(states[i] + offsets, mask, 0).to(tl.float32)
            if NORM:
                share = tl.load(shares + row * COUNT + i, in_rows, 0)
                added = tl.load(sums + (position * COUNT + i) * depth + d, in_d, 0)[None, :]
                gradient -= share[:, None] * (state + added)
        if scale is not None:
            total += gradient * tl.load(scale + i).to(tl.float32)
        else:
            total += gradient
        if partial is not None:
            tl.store(partial + (tile * COUNT + i) * depth + d, tl.sum(gradient, 0), in_d)
        gradients = gradients + (gradient,)
        for j in tl.static_range(i + 1):
            dot = tl.sum(tl.sum(gradients[j] * gradient, 1), 0)
            tl.store(gram + (program * COUNT + i) * COUNT + j, dot)
            tl.store(gram + (program * COUNT + j) * COUNT + i, dot)
    tl.store(hidden_gradient + offsets, total.to(hidden_gradient.dtype.element_ty), mask)


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    hidden, columns = on_grid(args.hidden), columns_of(args)
    positions, tokens = shape_of(args.hidden)
    depth, total, count = hidden.shape[-1], sum(columns), len(columns)
    outputs = [torch.empty(*args.hidden.shape[:-1], n, dtype=hidden.dtype, device=hidden.device) for n in columns]
    sums = sums_of(args, window_sums, torch.float32)
    heads, bias = heads_and_bias(args, hidden.dtype, torch.float32)
    projected, head_sums = projected_of(args, sums, heads), head_sums_of(args, heads, torch.float32)
    statistics = statistics_of(args)
    half = hidden.element_size() == 2
    inverse_rms, means = parts_of(args, statistics)
    shape = None if means is not None else narrow_shape_of(hidden, columns, 0 if inverse_rms is None else count)
    if shape is not None:
        launch_narrow(shape, hidden, sums, heads, projected, bias, outputs, inverse_rms, args.norm_eps)
        return [*outputs, statistics], {}
    # fp32 products use FMA instructions, so the tile must fit into registers.
    tile_rows, tile_columns = (64, min(256, max(16, power_of_2(total)))) if half else (32, 64)
    # Three stages of both tiles fit into the shared memory of every GPU from sm_80 on.
    block_d = 64 if half and tile_columns <= 128 else 32
    one_position = tokens >= tile_rows // 2
    position_tiles, column_blocks = ceil_div(tokens, tile_rows), ceil_div(total, tile_columns)
    tiles = positions * position_tiles if one_position else ceil_div(positions * tokens, tile_rows)
    launch(
        multi_horizon_linear_forward, tiles * column_blocks, hidden.device,
        hidden, sums, heads, projected, head_sums, bias, tuple(outputs), inverse_rms, means,
        firsts_of(columns), hidden.shape[1], hidden.shape[3], tokens, positions * tokens, depth, total, column_blocks,
        position_tiles, args.norm_eps, strides(hidden, 5),
        COUNT=count, NORM=args.norm_weight is not None, ONE_POSITION=one_position, PRECISION=dot_precision(),
        ROWS=tile_rows, COLUMNS=tile_columns, BLOCK_D=min(block_d, max(16, power_of_2(depth))),
        STEP=min(32, power_of_2(depth)),
        # With 4 warps, fp32 spills up to 16 bytes on sm_100, and LayerNorm 32 on sm_80.
        num_warps=8 if tile_columns >= 128 or not half or head_sums is not None else 4,
        # In fp32, whose FMA loops hide the loads in two stages, a third costs registers that ptxas spills on sm_100.
        num_stages=3 if half else 2,
        # Without, ptxas spills 8 bytes on sm_100 to stay below a limit of 64 that it chooses.
        maxnreg=112 if head_sums is not None and not half and depth >= 64 else None,
    )  # fmt: skip
    return [*outputs, statistics], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    return shared_backward(args, want, upstream, outputs, PASSES)


def on_grid(states: Tensor) -> Tensor:
    """[B, T, S, D] -> [B, T, 1, S, D]."""
    return states.unsqueeze(2) if states.dim() == 4 else states


class Split:
    """Assigns the rows of a chunk to programs: each gets a tile of at most `most` tokens of one position."""

    def __init__(self, rows: Rows, most: int) -> None:
        self.last = rows.first + rows.hidden.shape[0]
        self.first_position, end = rows.first // rows.tokens, ceil_div(self.last, rows.tokens)
        self.rows = min(most, power_of_2(rows.tokens))
        self.tiles = ceil_div(rows.tokens, self.rows)
        self.positions = end - self.first_position
        self.programs = self.positions * self.tiles

    def slices(self, sums: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The programs' partial sums, and where `sum_up` writes them: the chunk's positions of sums [B * T, ...]."""
        if sums is None:
            return None, None
        to = sums[self.first_position : self.first_position + self.positions]
        # A position's only program writes its sums itself.
        partial = to if self.tiles == 1 else to.new_empty(self.programs, *to.shape[1:])
        return partial, to

    def sum_up(self, partial: Tensor | None, to: Tensor | None) -> None:
        if partial is not None and to is not None and self.tiles > 1:
            torch.sum(partial.view(self.positions, self.tiles, *to.shape[1:]), 1, out=to)


def scale(
    args: Arguments,
    rows: Rows,
    upstream: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    bias: Tensor | None,
    scaled: Tensor,
    shares: Tensor,
    scaled_sums: Tensor | None,
) -> None:
    columns, width = columns_of(args), scaled.shape[1]
    split = Split(rows, 16)
    partial, to = split.slices(scaled_sums)
    inverse_rms = rows.inverse_rms
    launch(
        multi_horizon_linear_scale, split.programs, scaled.device,
        tuple(upstream), tuple(outputs), bias, inverse_rms, scaled, shares, partial,
        tuple(columns), firsts_of(columns), rows.first, split.last, rows.tokens, split.tiles, rows.hidden.shape[1],
        width, 0 if inverse_rms is None else inverse_rms.stride(0),
        tuple(strides(g, 2) for g in upstream), tuple(strides(o, 2) for o in outputs),
        COUNT=len(columns), ROWS=split.rows, BLOCKS=tuple(min(64, power_of_2(n)) for n in columns),
        TAIL=power_of_2(width - sum(columns)) if width > sum(columns) else 0, num_warps=1,
    )  # fmt: skip
    split.sum_up(partial, to)


def combine(
    args: Arguments,
    rows: Rows,
    product: Tensor | None,
    shares: Tensor,
    hidden_gradient: Tensor | None,
    sums_gradient: Tensor | None,
) -> None:
    (chunk, depth), device, count = rows.hidden.shape, shares.device, len(args.offsets)
    # The sums of a position stay in registers: 64 of each thread.
    tile_rows, block = max(1, 32 // power_of_2(ceil_div(count, 4))), min(64, power_of_2(depth))
    positions, first_position = chunk // rows.tokens, rows.first // rows.tokens
    tiles, blocks = ceil_div(rows.tokens, tile_rows), ceil_div(depth, block)
    # A program takes all tokens of a position, unless few positions would leave multiprocessors idle.
    part_tiles = ceil_div(tiles, min(tiles, ceil_div(PROGRAMS, max(1, positions * blocks))))
    parts = ceil_div(tiles, part_tiles)
    to = None if sums_gradient is None else sums_gradient.flatten(0, 1)[first_position : first_position + positions]
    partial = to if to is None or parts == 1 else to.new_empty(positions, parts, count, depth)
    launch(
        multi_horizon_linear_combine, positions * parts * blocks, device,
        rows.hidden, rows.sums, product, shares, rows.means, hidden_gradient, partial, first_position, rows.tokens,
        parts, part_tiles, blocks, depth, strides(rows.hidden, 2),
        # ptxas spills 16 bytes on sm_100 to stay below a limit of 80 that it chooses, and 8 on sm_90 without a limit.
        COUNT=count, ROWS=tile_rows, BLOCK_D=block, num_warps=4,
        maxnreg=255 if architecture_of(device) >= 100 else None,
    )  # fmt: skip
    if partial is not None and parts > 1:
        torch.sum(partial, 1, out=to)


def monitor(
    args: Arguments,
    rows: Rows,
    states: Sequence[Tensor | None],
    shares: Tensor,
    hidden_gradient: Tensor,
    sums_gradient: Tensor | None,
    gram: Tensor,
) -> None:
    (_, depth), device, count = rows.hidden.shape, shares.device, len(args.offsets)
    split, block = Split(rows, 16), min(64, power_of_2(depth))
    partial, to = split.slices(None if sums_gradient is None else sums_gradient.flatten(0, 1))
    blocks = ceil_div(depth, block)
    grams = torch.empty(split.programs * blocks, count, count, dtype=torch.float32, device=device)
    monitor_scale = None if args.scale is None else args.scale.contiguous()
    launch(
        multi_horizon_linear_monitor, split.programs * blocks, device,
        rows.hidden, rows.sums, tuple(states), shares, rows.means, monitor_scale, hidden_gradient, partial, grams,
        rows.first, split.last, rows.tokens, split.tiles, blocks, depth, strides(rows.hidden, 2),
        # With LayerNorm in fp32, ptxas spills 8 bytes to stay below a limit of 72 that it chooses.
        COUNT=count, NORM=args.norm_weight is not None, ROWS=split.rows, BLOCK_D=block, num_warps=4,
        maxnreg=None if rows.means is None else 128,
    )  # fmt: skip
    gram += grams.sum(0, dtype=torch.float64)
    split.sum_up(partial, to)


def fused_width(args: Arguments, monitored: bool) -> int | None:
    if monitored or is_layer(args) or args.hidden.element_size() != 2:
        return None
    if architecture_of(args.hidden.device) // 10 != 9:
        # Without wgmma the sums take registers that the operands need, and ptxas spills 344 bytes on sm_80; for
        # sm_100, Triton 3.6 fails to move sums that change outside a product into tensor memory.
        return None
    widths = widths_of(sum(columns_of(args)), 0 if args.norm_weight is None else len(args.offsets))
    return None if widths is None else sum(widths)


def products(
    args: Arguments,
    rows: Rows,
    scaled: Tensor,
    shares: Tensor,
    heads: Tensor,
    hidden_gradient: Tensor | None,
    needs_heads: bool,
    heads_gradient: Tensor | None,
    sums_gradient: Tensor | None,
) -> Tensor | None:
    norm, count, device = args.norm_weight is not None, len(args.offsets), scaled.device
    columns, depth = heads.shape
    widths = widths_of(columns, count if norm else 0)
    assert widths is not None
    hidden = rows.hidden
    if hidden.stride(1) != 1 or hidden.stride(0) >= 2**24:
        # The kernel reads features side by side, and computes offsets in a tile with 32 bits.
        hidden = hidden.contiguous()
    positions, tile_rows = rows.hidden.shape[0] // rows.tokens, max(16, min(64, power_of_2(rows.tokens)))
    # Masks of features take registers too.
    few = sum(widths) <= FEW_COLUMNS and depth % 128 == 0
    block = max(16, min(128 if few else 64, power_of_2(depth)))
    tiles, slices = ceil_div(rows.tokens, tile_rows), ceil_div(depth, block)
    groups = groups_of(positions, tiles, slices)
    of_chunk = slice(rows.first // rows.tokens, rows.first // rows.tokens + positions)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    heads_partial = empty(groups.groups, columns, depth) if needs_heads else None
    states_partial, states_sums = None, None
    if norm and sums_gradient is not None:
        states_sums = sums_gradient.flatten(0, 1)[of_chunk]
        states_partial = states_sums if groups.splits == 1 else empty(positions, groups.splits, count, depth)
    launch(
        multi_horizon_linear_products, groups.groups * slices, device,
        hidden, rows.sums.flatten(0, 1)[of_chunk], heads, scaled, shares, hidden_gradient, heads_partial,
        states_partial,
        positions, rows.tokens, tiles, groups.positions, groups.splits, groups.split_tiles, slices, depth, columns,
        hidden.stride(0), scaled.stride(0),
        COUNT=count, NORM=norm, WIDTHS=widths, FIRSTS=tuple(sum(widths[:c]) for c in range(len(widths))),
        ROWS=tile_rows, BLOCK_D=block, PRECISION=dot_precision(), AHEAD=few,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    if states_partial is not None and states_sums is not None and groups.splits > 1:
        torch.sum(states_partial, 1, out=states_sums)
    if heads_partial is None:
        return None
    total = heads_partial.sum(0)
    return total if heads_gradient is None else heads_gradient.add_(total)


PASSES = Passes(
    window_sums,
    gradients_of_window,
    lambda dtype: dtype,
    scale,
    combine,
    monitor,
    fused_width,
    products,
    whole_positions=True,
    heads_and_bias=heads_and_bias,
    finish_sums=finish_sums,
    finish_heads=finish_heads,
)
