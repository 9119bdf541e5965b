"""What both passes of fan_out do with a tile: ROWS rows of D features, as [ROWS, CHUNKS, LANES]."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import IN_INTERPRETER


@triton.jit
def cell_position(start, last, blocks_x, SIDE: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr):
    """The token (y, x) at the top left of ROWS cells of S x S tokens, and whether they exist; `last - 1` if not.

    Cells are counted by block of SIDE x SIDE tokens, and in rows in their block.
    """
    per_side: tl.constexpr = SIDE // S
    given = start + tl.arange(0, ROWS)
    cell = tl.minimum(given, last - 1)
    block, inner = cell // (per_side * per_side), cell % (per_side * per_side)
    y = block // blocks_x * SIDE + inner // per_side * S
    x = block % blocks_x * SIDE + inner % per_side * S
    return y, x, given < last


@triton.jit
def widened(tile):
    """The tile in fp32."""
    if IN_INTERPRETER or tile.dtype != tl.bfloat16 or tile.shape[2] < 64:
        return tile.to(tl.float32)
    else:
        # 2 instructions for 2 elements, where the compiler needs 3.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [tile], tl.float32, True, 2
        )


@triton.jit
def load_tile(pointers, in_d, FULL: tl.constexpr):
    # Without a mask, which would take an instruction for each register of the tile.
    if FULL:
        return tl.load(pointers)
    else:
        return tl.load(pointers, in_d, 0)


@triton.jit
def load_rows(base, y, x, d, in_d, steps, FULL: tl.constexpr):
    """[ROWS, CHUNKS, LANES]: the tokens at (y, x) of `base`, with strides (batch, time, row, column, feature)."""
    at = (y.to(tl.int64) * steps[2] + x.to(tl.int64) * steps[3])[:, None, None]
    return load_tile(base + at + d.to(tl.int64) * steps[4], in_d, FULL)


@triton.jit
def load_vector(pointer, d, in_d, step, FULL: tl.constexpr):
    """A vector of D, for every row of a tile."""
    return widened(load_tile(pointer + d.to(tl.int64) * step, in_d, FULL))


@triton.jit
def row_sum(tile):
    return tl.sum(tl.sum(tile, 1), 1)[:, None, None]


@triton.jit
def sum_of_rows(tile):
    """The sum of a tile's rows, in each of them."""
    return tl.broadcast_to(tl.sum(tile, 0, keep_dims=True), tile.shape)


@triton.jit
def only(tile, exists, EXACT: tl.constexpr):
    """The tile with zeros in rows that do not exist."""
    if EXACT:
        return tile
    else:
        return tl.where(exists[:, None, None], tile, 0)


@triton.jit
def wide_sum(base, top, left, d, in_d, steps, POOL: tl.constexpr, FULL: tl.constexpr):
    """The sum of the POOL x POOL tokens at (top, left), in each row of the tile."""
    ROWS: tl.constexpr = d.shape[0]
    total = tl.zeros(d.shape, tl.float32)
    for start in range(0, POOL * POOL, ROWS):
        token = start + tl.arange(0, ROWS)
        exists = token < POOL * POOL
        y, x = top + tl.where(exists, token // POOL, 0), left + tl.where(exists, token % POOL, 0)
        tokens = widened(load_rows(base, y, x, d, in_d, steps, FULL))
        total += only(tokens, exists, False)
    return sum_of_rows(total)


@triton.jit
def centred(state, in_d, per_depth, FULL: tl.constexpr):
    state -= row_sum(state) * per_depth
    return state if FULL else tl.where(in_d, state, 0)
