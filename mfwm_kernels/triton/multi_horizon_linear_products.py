"""The matrix products of multi_horizon_linear's backward in 16-bit dtypes, and all that needs hidden beside them.

A program has BLOCK_D features of a group of positions. In one loop over tiles of tokens it reads hidden once, computes

    d hidden = P W' - sum_i c_i x_i            stored
    P^T hidden                                 summed over the group in registers, in fp32
    c_i^T hidden                               summed over each position

and keeps W' in shared memory. D c_i are columns of `scaled` behind those of P, so one product serves the last two. P is
read once per slice of BLOCK_D features, from L2 but for the first. Tiles of hidden are requested a tile ahead, in
registers, and so are those of P if it has few columns: with more stages, Triton 3.6 copies a later tile over one that
wgmma still reads, where registers load that tile too.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import add_product, ceil_div

# About two per SM. Each program stores a partial sum of P^T hidden.
PROGRAMS = 264
# With BLOCK_D = 128, the registers of 8 warps hold the sums of this many columns, and the next tile of P.
FEW_COLUMNS = 144
# With BLOCK_D = 64 they hold the sums of this many, but no next tile: ptxas would spill 16 bytes. P is then read from
# L2 16 times at D = 1024, in half of the time that the instructions take.
MOST_COLUMNS = 272


class Groups(NamedTuple):
    """Positions are assigned to groups whole, or in `splits` of `split_tiles` tiles where there are few positions."""

    groups: int
    positions: int
    splits: int
    split_tiles: int


def groups_of(positions: int, tiles: int, slices: int) -> Groups:
    wanted = max(1, PROGRAMS // slices)
    if positions >= wanted:
        each = ceil_div(positions, wanted)
        return Groups(ceil_div(positions, each), each, 1, tiles)
    split_tiles = ceil_div(tiles, min(tiles, wanted // max(1, positions)))
    splits = ceil_div(tiles, split_tiles)
    return Groups(positions * splits, 1, splits, split_tiles)


def widths_of(columns: int, shares: int) -> tuple[int, ...] | None:
    """Powers of 2, at least 16 and in decreasing order, that cover `columns` and after them, in the last one, `shares`.

    wgmma multiplies 66 + 4 columns as 64 + 16 in five eighths of the time of 128. None if a program's registers cannot
    hold the sums.
    """
    total = 16 * ceil_div(columns + shares, 16)
    widths = tuple(width for width in (256, 128, 64, 32, 16) if total & width)
    return widths if total <= MOST_COLUMNS and shares <= 16 else None


@triton.jit
def tile_of(step, first_position, first_tile, own_tiles, tokens, ROWS: tl.constexpr):
    """The first row of a program's tile number `step`, counted from the chunk's first row, and which rows it has."""
    token = (first_tile + step % own_tiles) * ROWS
    row = (first_position + step // own_tiles) * tl.cast(tokens, tl.int64) + token
    return row, tl.arange(0, ROWS) < tokens - token


@triton.jit
def load_tile(pointer, row, columns, in_rows, in_columns, step):
    offsets = (tl.arange(0, in_rows.shape[0]) * step)[:, None] + columns[None, :]
    return tl.load(pointer + row * step + offsets, in_rows[:, None] & in_columns[None, :], 0)


@triton.jit
def multi_horizon_linear_products(
    hidden, sums, heads, scaled, shares, hidden_gradient, heads_partial, states_partial,
    positions, tokens, tiles, group_positions, splits, split_tiles, slices, depth, columns,
    hidden_step, scaled_step,
    COUNT: tl.constexpr, NORM: tl.constexpr, WIDTHS: tl.constexpr, FIRSTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = len(WIDTHS)
    program = tl.program_id(0)
    group = program // slices
    d = program % slices * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < depth
    first_position = group // splits * group_positions
    first_tile = group % splits * split_tiles
    own_tiles = tl.minimum(split_tiles, tiles - first_tile)
    steps = tl.minimum(group_positions, positions - first_position) * own_tiles

    weights = ()
    totals = ()
    for c in tl.static_range(CHUNKS):
        n = FIRSTS[c] + tl.arange(0, WIDTHS[c])
        weights = weights + (
            tl.load(heads + n[:, None] * tl.cast(depth, tl.int64) + d[None, :],
                    (n < columns)[:, None] & in_d[None, :], 0),
        )  # fmt: skip
        totals = totals + (tl.zeros([BLOCK_D, n.shape[0]], tl.float32),)
    n = FIRSTS[CHUNKS - 1] + tl.arange(0, WIDTHS[CHUNKS - 1])
    horizon = n - (FIRSTS[CHUNKS - 1] + WIDTHS[CHUNKS - 1] - COUNT)

    row, in_rows = tile_of(0, first_position, first_tile, own_tiles, tokens, ROWS)
    state = load_tile(hidden, row, d, in_rows, in_d, hidden_step)
    parts = ()
    if AHEAD:
        for c in tl.static_range(CHUNKS):
            n = FIRSTS[c] + tl.arange(0, WIDTHS[c])
            parts = parts + (load_tile(scaled, row, n, in_rows, n >= 0, scaled_step),)
    for step in range(0, steps):
        position, tile = first_position + step // own_tiles, step % own_tiles
        row, in_rows = tile_of(step, first_position, first_tile, own_tiles, tokens, ROWS)
        last_weights = weights[CHUNKS - 1]
        gradient = tl.zeros([ROWS, BLOCK_D], tl.float32)
        if NORM:
            # The rows of W' for the shares, which are times depth, are -sums_i / depth of this position.
            place = position * tl.cast(COUNT, tl.int64) + horizon
            added = tl.load(sums + (place * depth)[:, None] + d[None, :], (horizon >= 0)[:, None] & in_d[None, :], 0)
            last_weights = tl.where(
                (horizon >= 0)[:, None], (added * (-1.0 / depth)).to(last_weights.dtype), last_weights
            )
            share = tl.load(shares + row + tl.arange(0, ROWS), in_rows, 0)
            gradient -= share[:, None] * state.to(tl.float32)
        here_state, here_parts = tl.trans(state), parts
        if not AHEAD:
            for c in tl.static_range(CHUNKS):
                n = FIRSTS[c] + tl.arange(0, WIDTHS[c])
                here_parts = here_parts + (load_tile(scaled, row, n, in_rows, n >= 0, scaled_step),)
        after = tl.minimum(step + 1, steps - 1)
        next_row, next_in_rows = tile_of(after, first_position, first_tile, own_tiles, tokens, ROWS)
        state = load_tile(hidden, next_row, d, next_in_rows, in_d, hidden_step)
        parts = ()
        if AHEAD:
            for c in tl.static_range(CHUNKS):
                n = FIRSTS[c] + tl.arange(0, WIDTHS[c])
                parts = parts + (load_tile(scaled, next_row, n, next_in_rows, n >= 0, scaled_step),)
        next_totals = ()
        for c in tl.static_range(CHUNKS):
            weight = last_weights if c == CHUNKS - 1 else weights[c]
            gradient = add_product(gradient, here_parts[c], weight, PRECISION)
            next_totals = next_totals + (add_product(totals[c], here_state, here_parts[c], PRECISION),)
        totals = next_totals
        if hidden_gradient is not None:
            tl.store(
                hidden_gradient + row * depth + (tl.arange(0, ROWS) * depth)[:, None] + d[None, :],
                gradient.to(hidden_gradient.dtype.element_ty),
                in_rows[:, None] & in_d[None, :],
            )
        if states_partial is not None:
            ends = tile == own_tiles - 1
            if ends:
                slot = (position * splits + group % splits).to(tl.int64) * COUNT
                tl.store(
                    states_partial + (slot + horizon[None, :]) * depth + d[:, None],
                    totals[CHUNKS - 1],
                    in_d[:, None] & (horizon >= 0)[None, :],
                )
            kept = tl.where((horizon >= 0)[None, :] & ends, 0, totals[CHUNKS - 1])
            totals = totals[: CHUNKS - 1] + (kept,)
    if heads_partial is not None:
        for c in tl.static_range(CHUNKS):
            n = FIRSTS[c] + tl.arange(0, WIDTHS[c])
            tl.store(
                heads_partial + (group.to(tl.int64) * columns + n[None, :]) * depth + d[:, None],
                totals[c],
                (n < columns)[None, :] & in_d[:, None],
            )
