"""The forward of multi_horizon_linear in 16-bit dtypes with few columns. It reads hidden once.

A program has ROWS tokens of one position. In one loop over features it sums the squares of hidden plus each horizon's
window sum, and multiplies hidden by the heads. What keeps its instructions few:

- A thread holds the same 8 features of several rows, so it loads each window sum once for all of them, and adds the
  squares of these 8 features in its registers. Threads exchange sums only after the loop.
- Tiles of hidden are requested AHEAD tiles ahead, in registers, as int32 that hold two features. The compiler would
  keep each 16-bit value that a loop carries in a register of its own.
- The columns of all heads are packed into one or two accumulators: each head is cut into pieces whose sizes are powers
  of 2 from 8 on, sorted by size. 66 columns of 4 heads take 64 + 16. A piece is split off its accumulator without
  moving data between threads, and its columns belong to one horizon. An accumulator per head needs more instructions
  for products, and one for all heads without order needs a masked store of every column for every horizon.
- The last tile of a position overlaps the one before and stores the same values again, so rows need no masks.
- The features per row and between rows are constants, so all loads of a tile share one address register. A model has
  few of either: the kernel is compiled once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import add_product, ceil_div, dot_precision, launch, strides


class Packing(NamedTuple):
    """For each piece its head, its first column in the head, its size, its accumulator and its place in that.

    `widths` are the accumulators' numbers of columns.
    """

    heads: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    chunks: tuple[int, ...]
    places: tuple[int, ...]
    widths: tuple[int, ...]


class Shape(NamedTuple):
    """Of a program. On sm_90 it serves accumulators of up to `most` columns, less 16 per norm, without spills."""

    rows: int
    block: int
    ahead: int
    warps: int
    most: int


# By preference. With more rows the heads are read less often, and of 4 warps two programs fit on an SM of sm_90.
SHAPES = (Shape(128, 32, 2, 4, 144), Shape(64, 64, 1, 4, 208), Shape(128, 32, 1, 8, 336), Shape(64, 32, 1, 4, 352))


def packed(columns: Sequence[int]) -> Packing:
    """Because pieces and accumulators are sorted by size, no piece crosses the end of an accumulator."""
    pieces = []
    for head, count in enumerate(columns):
        start = 0
        while start < count:
            size = 1 << min(8, (8 * ceil_div(count - start, 8)).bit_length() - 1)
            pieces.append((head, start, size))
            start += size
    pieces.sort(key=lambda piece: -piece[2])
    total = 16 * ceil_div(sum(size for _, _, size in pieces), 16)
    # Two accumulators at most: 128 columns take fewer instructions than 64 + 32 + 16.
    while total % 256 and (total % 256).bit_count() > 2 - (total > 256):
        total += 16
    widths = (256,) * (total // 256) + tuple(width for width in (128, 64, 32, 16) if total & width)
    chunks, places, end = [], [], 0
    for _, _, size in pieces:
        chunk = next(c for c in range(len(widths)) if end < sum(widths[: c + 1]))
        chunks.append(chunk)
        places.append(end - sum(widths[:chunk]))
        end += size
    heads, starts, sizes = zip(*pieces, strict=True)
    return Packing(heads, starts, sizes, tuple(chunks), tuple(places), widths)


def narrow_shape_of(hidden: Tensor, columns: Sequence[int], norms: int) -> Shape | None:
    """The shape that serves a call with hidden [B, T, Hp, Wp, D] and `norms` horizons with RMSNorm, or None."""
    height, width = hidden.shape[2:4]
    regular = height == 1 or width == 1 or hidden.stride(2) == width * hidden.stride(3)
    # The kernel reads features side by side and tokens at equal distances, and computes offsets in a tile with 32 bits.
    if hidden.element_size() != 2 or hidden.stride(4) != 1 or step_of(hidden) >= 2**24 or not regular:
        return None
    needed = sum(packed(columns).widths) + 16 * norms
    return next((shape for shape in SHAPES if needed <= shape.most and height * width >= shape.rows), None)


def step_of(hidden: Tensor) -> int:
    """The distance between tokens of a position, in elements."""
    return hidden.stride(2 if hidden.shape[3] == 1 else 3)


def launch_narrow(
    shape: Shape,
    hidden: Tensor,
    sums: Tensor,
    heads: Tensor,
    projected: Tensor,
    bias: Tensor | None,
    outputs: Sequence[Tensor],
    inverse_rms: Tensor | None,
    eps: float,
) -> None:
    """Writes the outputs and, unless it is None, inverse_rms [K, rows]. hidden is [B, T, Hp, Wp, D]."""
    batch, positions, height, width, depth = hidden.shape
    tokens, columns = height * width, tuple(output.shape[-1] for output in outputs)
    tiles, packing = ceil_div(tokens, shape.rows), packed(columns)
    launch(
        multi_horizon_linear_narrow, batch * positions * tiles, hidden.device,
        hidden, sums, heads, projected, bias, tuple(outputs), inverse_rms,
        positions, tokens, batch * positions * tokens, tiles, eps, strides(hidden, 5)[:2],
        COLUMNS=columns, FIRSTS=tuple(sum(columns[:i]) for i in range(len(columns) + 1)), HEADS=packing.heads,
        STARTS=packing.starts, SIZES=packing.sizes, CHUNKS=packing.chunks, PLACES=packing.places,
        WIDTHS=packing.widths, NORM=inverse_rms is not None, PRECISION=dot_precision(), DEPTH=depth,
        STEP=step_of(hidden), ROWS=shape.rows, BLOCK_D=shape.block,
        AHEAD=min(shape.ahead, ceil_div(depth, shape.block)), num_warps=shape.warps, num_stages=1,
        # Without a limit, ptxas aims at 32 registers on sm_80 with 272 columns, and spills 3 KB.
        maxnreg=255,
    )  # fmt: skip


@triton.jit
def load_states(pointers, start, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile of hidden from feature `start`, two features in an int32."""
    if DEPTH % BLOCK_D == 0:
        state = tl.load(pointers + start)
    else:
        state = tl.load(pointers + start, (start + tl.arange(0, BLOCK_D) < DEPTH)[None, :], 0)
    low, high = tl.split(tl.reshape(state.to(tl.int16, bitcast=True), [pointers.shape[0], BLOCK_D // 2, 2]))
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def halves_of(pairs, dtype: tl.constexpr):
    return pairs.to(tl.int16).to(dtype, bitcast=True), (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def widened_halves_of(pairs, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = halves_of(pairs, dtype)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def add_squares(total, tile):
    """total + tile^2, summed over runs of adjacent features."""
    if tile.shape[1] == total.shape[1]:
        return total + tile * tile
    else:
        low, high = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))
        return add_squares(add_squares(total, low), high)


@triton.jit
def add_tile(
    totals, squares, pairs, heads, masks, sums, start, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """totals and squares with the features from `start` added."""
    d = start + tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = heads[0].dtype.element_ty
    state_low, state_high = widened_halves_of(pairs, dtype)
    next_squares = ()
    for i in tl.static_range(len(squares)):
        if DEPTH % BLOCK_D == 0:
            added = tl.load(sums + i * DEPTH + d)
        else:
            added = tl.load(sums + i * DEPTH + d, d < DEPTH, 0)
        low, high = tl.split(tl.reshape(added, [BLOCK_D // 2, 2]))
        square = add_squares(squares[i], state_low + low[None, :])
        next_squares = next_squares + (add_squares(square, state_high + high[None, :]),)
    tiles = ()
    for c in tl.static_range(len(totals)):
        mask = masks[c]
        if DEPTH % BLOCK_D != 0:
            mask = mask & (d < DEPTH)[:, None]
        tiles = tiles + (tl.load(heads[c] + start, mask, 0),)
    low, high = halves_of(pairs, dtype)
    state = tl.reshape(tl.join(low, high), [pairs.shape[0], BLOCK_D])
    next_totals = ()
    for c in tl.static_range(len(totals)):
        next_totals = next_totals + (add_product(totals[c], state, tiles[c], PRECISION),)
    return next_totals, next_squares


@triton.jit
def part_of(total, WIDTH: tl.constexpr, PLACE: tl.constexpr, SIZE: tl.constexpr):
    """Columns PLACE ... PLACE + SIZE of `total`, where PLACE is a multiple of SIZE."""
    if WIDTH < 2 * SIZE:
        return total
    else:
        low, high = tl.split(tl.permute(tl.reshape(total, [total.shape[0], 2, WIDTH // 2]), [0, 2, 1]))
        if PLACE < WIDTH // 2:
            return part_of(low, WIDTH // 2, PLACE, SIZE)
        else:
            return part_of(high, WIDTH // 2, PLACE - WIDTH // 2, SIZE)


@triton.jit
def store_piece(output, total, factor, projected, bias, first_row, START: tl.constexpr, COLUMNS: tl.constexpr):
    n = START + tl.arange(0, total.shape[1])
    in_n = n < COLUMNS
    out = total + tl.load(projected + n, in_n, 0)[None, :]
    if factor is not None:
        out *= factor[:, None]
    if bias is not None:
        out += tl.load(bias + n, in_n, 0)[None, :]
    offsets = (tl.arange(0, total.shape[0]) * COLUMNS)[:, None] + n[None, :]
    tl.store(output + first_row * COLUMNS + offsets, out.to(output.dtype.element_ty), in_n[None, :])


@triton.jit
def multi_horizon_linear_narrow(
    hidden, sums, heads, projected, bias, outputs, inverse_rms, positions, tokens, rows, tiles, eps, hidden_strides,
    COLUMNS: tl.constexpr, FIRSTS: tl.constexpr, HEADS: tl.constexpr, STARTS: tl.constexpr, SIZES: tl.constexpr,
    CHUNKS: tl.constexpr, PLACES: tl.constexpr, WIDTHS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    DEPTH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(COLUMNS)
    LAST: tl.constexpr = (DEPTH - 1) // BLOCK_D * BLOCK_D
    program = tl.program_id(0)
    position = (program // tiles).to(tl.int64)
    first_token = tl.minimum(program % tiles * ROWS, tokens - ROWS)
    tile = hidden + position // positions * hidden_strides[0] + position % positions * hidden_strides[1]
    tile += first_token.to(tl.int64) * STEP
    tile = tile + (tl.arange(0, ROWS) * STEP)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    sums += position * (COUNT * DEPTH)

    squares = ()
    for _ in tl.static_range(COUNT if NORM else 0):
        squares = squares + (tl.zeros([ROWS, BLOCK_D // 8], tl.float32),)
    totals = ()
    pointers = ()
    masks = ()
    for c in tl.static_range(len(WIDTHS)):
        n = tl.arange(0, WIDTHS[c])
        column = tl.zeros_like(n)
        exists = n < 0
        for p in tl.static_range(len(HEADS)):
            if CHUNKS[p] == c:
                of_head = n - PLACES[p] + STARTS[p]
                in_piece = (n >= PLACES[p]) & (n < PLACES[p] + SIZES[p])
                column = tl.where(in_piece, FIRSTS[HEADS[p]] + of_head, column)
                exists = exists | (in_piece & (of_head < COLUMNS[HEADS[p]]))
        totals = totals + (tl.zeros([ROWS, n.shape[0]], tl.float32),)
        pointers = pointers + (heads + (column * DEPTH)[None, :] + tl.arange(0, BLOCK_D)[:, None],)
        masks = masks + (exists[None, :],)

    waiting = ()
    for a in tl.static_range(AHEAD):
        waiting = waiting + (load_states(tile, a * BLOCK_D, DEPTH, BLOCK_D),)
    for start in range(0, LAST - (AHEAD - 1) * BLOCK_D, BLOCK_D):
        requested = load_states(tile, start + AHEAD * BLOCK_D, DEPTH, BLOCK_D)
        totals, squares = add_tile(
            totals, squares, waiting[0], pointers, masks, sums, start, PRECISION, DEPTH, BLOCK_D
        )  # fmt: skip
        waiting = waiting[1:] + (requested,)
    for a in tl.static_range(AHEAD):
        totals, squares = add_tile(
            totals, squares, waiting[a], pointers, masks, sums, LAST - (AHEAD - 1 - a) * BLOCK_D, PRECISION, DEPTH,
            BLOCK_D,
        )  # fmt: skip

    first_row = position * tokens + first_token
    factors = ()
    for i in tl.static_range(COUNT if NORM else 0):
        factor = tl.rsqrt(tl.sum(squares[i], 1) * (1.0 / DEPTH) + eps)
        tl.store(inverse_rms + i * tl.cast(rows, tl.int64) + first_row + tl.arange(0, ROWS), factor)
        factors = factors + (factor,)
    projected += position * FIRSTS[COUNT]
    for p in tl.static_range(len(HEADS)):
        store_piece(
            outputs[HEADS[p]], part_of(totals[CHUNKS[p]], WIDTHS[CHUNKS[p]], PLACES[p], SIZES[p]),
            factors[HEADS[p]] if NORM else None, projected + FIRSTS[HEADS[p]],
            None if bias is None else bias + FIRSTS[HEADS[p]], first_row, STARTS[p], COLUMNS[HEADS[p]],
        )  # fmt: skip
