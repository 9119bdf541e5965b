"""The forward pass of fan_out; triton/fan_out.py launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from .fan_out_tiles import (
    cell_position,
    centred,
    load_rows,
    load_vector,
    only,
    row_sum,
    sum_of_rows,
    wide_sum,
    widened,
)


@triton.jit
def store_state(
    output, total, sums, norm_weight, norm_bias, i, position, y, x, exists, height, width, d, in_d, depth, eps,
    weight_strides, LAYER: tl.constexpr, POOL: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Stores the states of horizon i whose cells have the token (y, x) and the sum `total`."""
    state = total * (1.0 / (POOL * POOL)) + load_vector(sums + i * depth, d, in_d, 1, FULL)
    if norm_weight is not None:
        per_depth = 1.0 / depth
        if LAYER:
            state = centred(state, in_d, per_depth, FULL)
        state *= tl.rsqrt(row_sum(state * state) * per_depth + eps)
        state *= load_vector(norm_weight + i * weight_strides[0], d, in_d, weight_strides[1], FULL)
        if norm_bias is not None:
            state += load_vector(norm_bias + i * depth, d, in_d, 1, FULL)
    at = ((position * (height // POOL) + y // POOL) * (width // POOL) + x // POOL) * depth
    mask = exists[:, None, None] if FULL else exists[:, None, None] & in_d
    tl.store(output + at[:, None, None] + d, state.to(output.dtype.element_ty), mask)


@triton.jit
def fan_out_forward(
    hidden, sums, norm_weight, norm_bias, outputs, positions, height, width, depth, cells, chunk, chunks, eps,
    hidden_strides, weight_strides, LAYER: tl.constexpr,
    HORIZONS: tl.constexpr, POOLS: tl.constexpr, SIDE: tl.constexpr, S: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    QUADS: tl.constexpr = 4 if S == 4 else 1
    CELLS: tl.constexpr = 4 * ROWS if S == 1 else ROWS
    program = tl.program_id(0)
    position = (program // chunks).to(tl.int64)
    first = program % chunks * chunk
    last = tl.minimum(first + chunk, cells)
    d = tl.arange(0, CHUNKS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    d = tl.broadcast_to(d, [ROWS, CHUNKS, LANES])
    in_d = d < depth
    base = hidden + (program // chunks // positions).to(tl.int64) * hidden_strides[0]
    base += (program // chunks % positions).to(tl.int64) * hidden_strides[1]
    sums += position * len(POOLS) * depth
    blocks_x = width // SIDE
    alone = tl.arange(0, ROWS) == 0
    top, left, _ = cell_position(first, first + 1, blocks_x, SIDE, S, ROWS)
    for i in tl.static_range(len(POOLS)):
        if S % POOLS[i] != 0 and POOLS[i] != SIDE:
            for cell in range(0, (SIDE // POOLS[i]) * (SIDE // POOLS[i])):
                y, x = top + cell // (SIDE // POOLS[i]) * POOLS[i], left + cell % (SIDE // POOLS[i]) * POOLS[i]
                total = wide_sum(base, y, x, d, in_d, hidden_strides, POOLS[i], FULL)
                store_state(outputs[i], total, sums, norm_weight, norm_bias, HORIZONS[i], position, y, x, alone, height,
                            width, d, in_d, depth, eps, weight_strides, LAYER, POOLS[i], FULL)  # fmt: skip

    block_total = tl.zeros(d.shape, tl.float32)
    cell_y, cell_x, cell_exists = cell_position(first, last, blocks_x, SIDE, S, ROWS)
    tokens = ()
    for t in tl.static_range(2):
        if S == 1:
            y, x, _ = cell_position(first + t * ROWS, last, blocks_x, SIDE, S, ROWS)
        else:
            y, x = cell_y + t // 2, cell_x + t % 2
        tokens = tokens + (load_rows(base, y, x, d, in_d, hidden_strides, FULL),)
    for tile in range(0, TILES):
        start = first + tile * CELLS
        next_y, next_x, next_exists = cell_y, cell_x, cell_exists
        if TILES > 1:
            next_y, next_x, next_exists = cell_position(start + CELLS, last, blocks_x, SIDE, S, ROWS)
        cell_total = tl.zeros(d.shape, tl.float32)
        for quad in range(0, QUADS):
            quad_total = tl.zeros(d.shape, tl.float32)
            for t in tl.static_range(4):
                token = widened(tokens[0])
                # Request the token after the next before this one is reduced.
                if S == 1:
                    y, x, _ = cell_position(start + (t + 2) * ROWS, last, blocks_x, SIDE, S, ROWS)
                elif t < 2:
                    y, x = cell_y + quad // 2 * 2 + 1, cell_x + quad % 2 * 2 + t
                elif QUADS == 1:
                    y, x = next_y, next_x + t - 2
                else:
                    ahead = (quad + 1) % 4 if TILES > 1 else tl.minimum(quad + 1, 3)
                    y = tl.where(quad < 3, cell_y, next_y) + ahead // 2 * 2
                    x = tl.where(quad < 3, cell_x, next_x) + ahead % 2 * 2 + t - 2
                tokens = (tokens[1], load_rows(base, y, x, d, in_d, hidden_strides, FULL))
                if S == 1:
                    y, x, exists = cell_position(start + t * ROWS, last, blocks_x, SIDE, S, ROWS)
                else:
                    y, x, exists = cell_y + quad // 2 * 2 + t // 2, cell_x + quad % 2 * 2 + t % 2, cell_exists
                quad_total += only(token, exists, EXACT)
                for i in tl.static_range(len(POOLS)):
                    if POOLS[i] == 1:
                        store_state(
                            outputs[i], token, sums, norm_weight, norm_bias, HORIZONS[i], position, y, x, exists,
                            height, width, d, in_d, depth, eps, weight_strides, LAYER, 1, FULL,
                        )  # fmt: skip
            cell_total += quad_total
            for i in tl.static_range(len(POOLS)):
                if S % 2 == 0 and POOLS[i] == 2:
                    y, x = cell_y + quad // 2 * 2, cell_x + quad % 2 * 2
                    store_state(
                        outputs[i], quad_total, sums, norm_weight, norm_bias, HORIZONS[i], position, y, x, cell_exists,
                        height, width, d, in_d, depth, eps, weight_strides, LAYER, 2, FULL,
                    )  # fmt: skip
        block_total += cell_total
        for i in tl.static_range(len(POOLS)):
            if S == 4 and POOLS[i] == 4:
                store_state(
                    outputs[i], cell_total, sums, norm_weight, norm_bias, HORIZONS[i], position, cell_y, cell_x,
                    cell_exists, height, width, d, in_d, depth, eps, weight_strides, LAYER, 4, FULL,
                )  # fmt: skip
        cell_y, cell_x, cell_exists = next_y, next_x, next_exists
    for i in tl.static_range(len(POOLS)):
        if S % POOLS[i] != 0 and POOLS[i] == SIDE:
            store_state(outputs[i], sum_of_rows(block_total), sums, norm_weight, norm_bias, HORIZONS[i], position, top,
                        left, alone, height, width, d, in_d, depth, eps, weight_strides, LAYER, SIDE, FULL)  # fmt: skip
