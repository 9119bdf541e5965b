"""fan_out in Triton: the window sums first, then one pass over the hidden state for all K horizons.

A program has a block of one position's tokens, as wide as the least common multiple of the pools, and goes through it
in tiles of whole rows: [cells of S x S tokens, D], tokens in Z-order within a cell. A pool that
divides S is a sum over neighbouring rows of the tile. Any other pool ("wide") has a loop of its own before, which
leaves the block's tokens in cache, so that memory sees hidden once.

forward   bytes: hidden once, the K outputs, the window sums.
backward  bytes: hidden once, the K gradients once, d hidden; and per program one row of D for each horizon's sums and
          norm weights, added afterwards in a fixed order. Gradients at wide cells go through a buffer of 1 / pool^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grad_monitor import write_gram
from ..op import Gradients, Want
from ..ops.conditioning import conditioning_sums, gradients_of_sums, wants_sums
from ..ops.fan_out import Arguments
from .action_window_sum import gradients_of_sums as gradients_of_window
from .action_window_sum import window_sums
from .launch import ceil_div, launch, power_of_2, strides, warps_of

# Elements of a tile; S and the largest cell of S x S tokens, in elements; elements per thread.
FORWARD = (8192, {4: 16384, 2: 16384, 1: math.inf}, 32)
BACKWARD = (1024, {4: 2048, 2: 4096, 1: math.inf}, 8)
# Tokens that a program takes where no block says how many.
TOKENS = 64


@triton.jit
def places(row, first, blocks_x, SIDE: tl.constexpr, S: tl.constexpr):
    """Row and column in the token grid of the tile's row `row`, where the tile begins with the cell `first`."""
    per_side: tl.constexpr = SIDE // S
    cell = first + row // (S * S)
    block, inner = cell // (per_side * per_side), cell % (per_side * per_side)
    y = block // blocks_x * SIDE + inner // per_side * S
    x = block % blocks_x * SIDE + inner % per_side * S
    token = row % (S * S)
    if S == 4:
        y += token // 8 * 2 + token % 4 // 2
        x += token // 4 % 2 * 2 + token % 2
    elif S == 2:
        y += token // 2
        x += token % 2
    return y, x


@triton.jit
def load_rows(base, y, x, d, exists, in_d, steps):
    """[rows, D] in fp32 from `base`, whose strides are (batch, time, row, column, feature)."""
    offsets = (y.to(tl.int64) * steps[2] + x.to(tl.int64) * steps[3])[:, None] + (d.to(tl.int64) * steps[4])[None, :]
    return tl.load(base + offsets, exists[:, None] & in_d[None, :], 0).to(tl.float32)


@triton.jit
def fold(rows, COUNT: tl.constexpr):
    """Sums of COUNT neighbouring rows."""
    if COUNT == 1:
        return rows
    else:
        return tl.sum(tl.reshape(rows, [rows.shape[0] // COUNT, COUNT, rows.shape[1]]), 1)


@triton.jit
def unfold(rows, COUNT: tl.constexpr):
    """Each row COUNT times."""
    if COUNT == 1:
        return rows
    else:
        shape: tl.constexpr = [rows.shape[0], COUNT, rows.shape[1]]
        return tl.reshape(tl.broadcast_to(rows[:, None, :], shape), [rows.shape[0] * COUNT, rows.shape[1]])


@triton.jit
def wide_mean(base, top, left, d, in_d, steps, POOL: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[1, D]: the mean of the POOL x POOL tokens at (top, left)."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, POOL * POOL, ROWS):
        token = start + tl.arange(0, ROWS)
        tokens = load_rows(base, top + token // POOL, left + token % POOL, d, token < POOL * POOL, in_d, steps)
        total += tl.sum(tokens, 0)
    return (total * (1.0 / (POOL * POOL)))[None, :]


@triton.jit
def load_vector(pointer, d, in_d, step):
    return tl.load(pointer + d.to(tl.int64) * step, in_d, 0).to(tl.float32)[None, :]


@triton.jit
def store_row(pointer, row, values, d, in_d, depth):
    if pointer is not None:
        tl.store(pointer + row * depth + d, values, in_d)


@triton.jit
def normed(state, weight, depth, eps):
    return state * tl.rsqrt(tl.sum(state * state, 1) / depth + eps)[:, None] * weight


@triton.jit
def norm_gradient(state, gradient, weight, exists, depth, eps):
    """Gradients of the state and, per row, of the weight."""
    r = tl.rsqrt(tl.sum(state * state, 1) / depth + eps)
    weighted = gradient * weight
    along = tl.sum(state * weighted, 1) / depth
    of_state = r[:, None] * weighted - state * (r * r * r * along)[:, None]
    of_weight = gradient * state * r[:, None]
    # Rows that are not there may be 0 / 0.
    return tl.where(exists[:, None], of_state, 0), tl.where(exists[:, None], of_weight, 0)


@triton.jit
def overlap(
    a, b, UNIT_A: tl.constexpr, UNIT_B: tl.constexpr, POOL_A: tl.constexpr, POOL_B: tl.constexpr
):  # fmt: skip
    """Products of two horizons' gradients at the tokens, given on boxes of UNIT x UNIT tokens, not yet summed."""
    if UNIT_A > UNIT_B:
        return overlap(b, a, UNIT_B, UNIT_A, POOL_B, POOL_A)
    else:
        # On the coarser boxes; each of the finer ones stands for UNIT_A^2 tokens.
        boxes: tl.constexpr = UNIT_B // UNIT_A
        return fold(a, boxes * boxes) * b * ((UNIT_A * UNIT_A) / (POOL_A * POOL_A * POOL_B * POOL_B))


@triton.jit
def fan_out_forward(
    hidden, sums, norm_weight, outputs, positions, height, width, depth, cells, chunk, chunks, eps,
    hidden_strides, norm_strides,
    HORIZONS: tl.constexpr, POOLS: tl.constexpr, SIDE: tl.constexpr, S: tl.constexpr,
    CELLS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = CELLS * S * S
    program = tl.program_id(0).to(tl.int64)
    position = program // chunks
    first = (program % chunks * chunk).to(tl.int32)
    last = tl.minimum(first + chunk, cells)
    d = tl.max_contiguous(tl.arange(0, BLOCK_D), VECTOR)
    in_d = d < depth
    base = hidden + position // positions * hidden_strides[0] + position % positions * hidden_strides[1]
    blocks_x = width // SIDE
    for i in tl.static_range(len(POOLS)):
        if S % POOLS[i] != 0:
            added = load_vector(sums + (position * len(POOLS) + HORIZONS[i]) * depth, d, in_d, 1)
            top, left = places(0, first, blocks_x, SIDE, S)
            for cell in range(0, (SIDE // POOLS[i]) * (SIDE // POOLS[i])):
                y, x = top + cell // (SIDE // POOLS[i]) * POOLS[i], left + cell % (SIDE // POOLS[i]) * POOLS[i]
                state = wide_mean(base, y, x, d, in_d, hidden_strides, POOLS[i], ROWS, BLOCK_D) + added
                if norm_weight is not None:
                    weight = load_vector(norm_weight + HORIZONS[i] * norm_strides[0], d, in_d, norm_strides[1])
                    state = normed(state, weight, depth, eps)
                row = (position * (height // POOLS[i]) + y // POOLS[i]) * (width // POOLS[i]) + x // POOLS[i]
                tl.store(outputs[i] + row * depth + d[None, :], state.to(outputs[i].dtype.element_ty), in_d[None, :])
    for start in range(first, last, CELLS):
        row = tl.arange(0, ROWS)
        y, x = places(row, start, blocks_x, SIDE, S)
        tokens = load_rows(base, y, x, d, start + row // (S * S) < last, in_d, hidden_strides)
        for i in tl.static_range(len(POOLS)):
            if S % POOLS[i] == 0:
                unit = tl.arange(0, ROWS // (POOLS[i] * POOLS[i])) * (POOLS[i] * POOLS[i])
                y, x = places(unit, start, blocks_x, SIDE, S)
                state = fold(tokens, POOLS[i] * POOLS[i]) * (1.0 / (POOLS[i] * POOLS[i]))
                state += load_vector(sums + (position * len(POOLS) + HORIZONS[i]) * depth, d, in_d, 1)
                if norm_weight is not None:
                    weight = load_vector(norm_weight + HORIZONS[i] * norm_strides[0], d, in_d, norm_strides[1])
                    state = normed(state, weight, depth, eps)
                at = (position * (height // POOLS[i]) + y // POOLS[i]) * (width // POOLS[i]) + x // POOLS[i]
                mask = (start + unit // (S * S) < last)[:, None] & in_d[None, :]
                tl.store(outputs[i] + (at * depth)[:, None] + d[None, :], state.to(outputs[i].dtype.element_ty), mask)


@triton.jit
def fan_out_backward(
    hidden, sums, norm_weight, gradients, scale, of_hidden, of_cells, of_sums, of_norm, gram,
    positions, height, width, depth, cells, chunk, chunks, eps,
    hidden_strides, norm_strides, gradient_strides,
    HORIZONS: tl.constexpr, POOLS: tl.constexpr, UNITS: tl.constexpr, COARSER: tl.constexpr,
    SIDE: tl.constexpr, S: tl.constexpr, CELLS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = CELLS * S * S
    COUNT: tl.constexpr = len(POOLS)
    program = tl.program_id(0).to(tl.int64)
    position = program // chunks
    b, n = position // positions, position % positions
    first = (program % chunks * chunk).to(tl.int32)
    last = tl.minimum(first + chunk, cells)
    d = tl.max_contiguous(tl.arange(0, BLOCK_D), VECTOR)
    in_d = d < depth
    base = hidden + b * hidden_strides[0] + n * hidden_strides[1]
    blocks_x = width // SIDE
    one = tl.arange(0, 1) == 0

    # Wide cells: their gradients, kept for the tokens below them.
    sums_totals = ()
    norm_totals = ()
    for i in tl.static_range(COUNT):
        sums_total = tl.zeros([BLOCK_D], tl.float32)
        norm_total = tl.zeros([BLOCK_D], tl.float32)
        if gradients[i] is not None:
            if S % POOLS[i] != 0:
                added = load_vector(sums + (position * COUNT + HORIZONS[i]) * depth, d, in_d, 1)
                top, left = places(0, first, blocks_x, SIDE, S)
                upstream = gradients[i] + b * gradient_strides[i][0] + n * gradient_strides[i][1]
                for cell in range(0, (SIDE // POOLS[i]) * (SIDE // POOLS[i])):
                    y, x = top + cell // (SIDE // POOLS[i]) * POOLS[i], left + cell % (SIDE // POOLS[i]) * POOLS[i]
                    at = tl.zeros([1], tl.int32)
                    cell_y, cell_x = at + y // POOLS[i], at + x // POOLS[i]
                    of_state = load_rows(upstream, cell_y, cell_x, d, one, in_d, gradient_strides[i])
                    if norm_weight is not None:
                        weight = load_vector(norm_weight + HORIZONS[i] * norm_strides[0], d, in_d, norm_strides[1])
                        state = wide_mean(base, y, x, d, in_d, hidden_strides, POOLS[i], ROWS, BLOCK_D) + added
                        of_state, of_weight = norm_gradient(state, of_state, weight, one, depth, eps)
                        norm_total += tl.sum(of_weight, 0)
                    sums_total += tl.sum(of_state, 0)
                    row = (position * (height // POOLS[i]) + y // POOLS[i]) * (width // POOLS[i]) + x // POOLS[i]
                    tl.store(of_cells[i] + row * depth + d[None, :], of_state, in_d[None, :])
        if S % POOLS[i] != 0:
            # Stored here: carried through the loop below they would cost registers.
            store_row(of_sums, program * COUNT + HORIZONS[i], sums_total, d, in_d, depth)
            store_row(of_norm, program * COUNT + HORIZONS[i], norm_total, d, in_d, depth)
        sums_totals = sums_totals + (tl.zeros([BLOCK_D], tl.float32),)
        norm_totals = norm_totals + (tl.zeros([BLOCK_D], tl.float32),)
    # Below, other threads of the program read them.
    tl.debug_barrier()

    products = ()
    for _ in tl.static_range(COUNT * COUNT):
        products = products + (tl.zeros([BLOCK_D], tl.float32),)
    for start in range(first, last, CELLS):
        if norm_weight is not None:
            row = tl.arange(0, ROWS)
            y, x = places(row, start, blocks_x, SIDE, S)
            tokens = load_rows(base, y, x, d, start + row // (S * S) < last, in_d, hidden_strides)
        # From coarse boxes to fine ones, so that the gradient of single tokens is the last to take registers.
        total = tl.zeros([ROWS // (S * S), BLOCK_D], tl.float32)
        new_sums = ()
        new_norms = ()
        of_states = ()
        for i in tl.static_range(COUNT):
            sums_total = sums_totals[i]
            norm_total = norm_totals[i]
            of_state = tl.zeros([ROWS // (UNITS[i] * UNITS[i]), BLOCK_D], tl.float32)
            if gradients[i] is not None:
                unit = tl.arange(0, ROWS // (UNITS[i] * UNITS[i])) * (UNITS[i] * UNITS[i])
                unit_y, unit_x = places(unit, start, blocks_x, SIDE, S)
                unit_exists = start + unit // (S * S) < last
                if S % POOLS[i] == 0:
                    upstream = gradients[i] + b * gradient_strides[i][0] + n * gradient_strides[i][1]
                    of_state = load_rows(
                        upstream, unit_y // POOLS[i], unit_x // POOLS[i], d, unit_exists, in_d, gradient_strides[i]
                    )
                    if norm_weight is not None:
                        weight = load_vector(norm_weight + HORIZONS[i] * norm_strides[0], d, in_d, norm_strides[1])
                        state = fold(tokens, POOLS[i] * POOLS[i]) * (1.0 / (POOLS[i] * POOLS[i]))
                        state += load_vector(sums + (position * COUNT + HORIZONS[i]) * depth, d, in_d, 1)
                        of_state, of_weight = norm_gradient(state, of_state, weight, unit_exists, depth, eps)
                        if of_norm is not None:
                            norm_total += tl.sum(of_weight, 0)
                    if of_sums is not None:
                        sums_total += tl.sum(of_state, 0)
                elif of_hidden is not None:
                    at = position * (height // POOLS[i]) + unit_y // POOLS[i]
                    at = at * (width // POOLS[i]) + unit_x // POOLS[i]
                    mask = unit_exists[:, None] & in_d[None, :]
                    of_state = tl.load(of_cells[i] + (at * depth)[:, None] + d[None, :], mask, 0)
            total = unfold(total, COARSER[i] * COARSER[i])
            if of_hidden is not None:
                share = 1.0 / (POOLS[i] * POOLS[i])
                if scale is not None:
                    share = tl.load(scale + HORIZONS[i]).to(tl.float32) * share
                total += of_state * share
            of_states = of_states + (of_state,)
            new_sums = new_sums + (sums_total,)
            new_norms = new_norms + (norm_total,)
        sums_totals = new_sums
        norm_totals = new_norms
        total = unfold(total, UNITS[COUNT - 1] * UNITS[COUNT - 1])
        if of_hidden is not None:
            row = tl.arange(0, ROWS)
            y, x = places(row, start, blocks_x, SIDE, S)
            at = ((position * height + y) * width + x) * depth
            mask = (start + row // (S * S) < last)[:, None] & in_d[None, :]
            tl.store(of_hidden + at[:, None] + d[None, :], total.to(of_hidden.dtype.element_ty), mask)
        if gram is not None:
            new_products = ()
            for i in tl.static_range(COUNT):
                for j in tl.static_range(COUNT):
                    product = products[i * COUNT + j]
                    if j >= i:
                        if (gradients[i] is not None) and (gradients[j] is not None):
                            product += tl.sum(
                                overlap(of_states[i], of_states[j], UNITS[i], UNITS[j], POOLS[i], POOLS[j]), 0
                            )
                    new_products = new_products + (product,)
            products = new_products

    for i in tl.static_range(COUNT):
        if S % POOLS[i] == 0:
            store_row(of_sums, program * COUNT + HORIZONS[i], sums_totals[i], d, in_d, depth)
            store_row(of_norm, program * COUNT + HORIZONS[i], norm_totals[i], d, in_d, depth)
        if gram is not None:
            for j in tl.static_range(i, COUNT):
                product = tl.sum(products[i * COUNT + j], 0)
                tl.store(gram + (program * COUNT + HORIZONS[i]) * COUNT + HORIZONS[j], product)
                tl.store(gram + (program * COUNT + HORIZONS[j]) * COUNT + HORIZONS[i], product)


class Plan(NamedTuple):
    """How a position's tokens are dealt out: see the top of the file.

    order: the horizons from coarse boxes to fine ones; units: what a horizon's gradient is constant on, in that order.
    vector: how much of D a thread takes at a time. So few that a row spans all threads and each thread has the same
        columns of every row: sums over rows then stay within a thread, without shared memory.
    """

    order: list[int]
    units: list[int]
    side: int
    s: int
    cells: int
    block_d: int
    total: int
    chunk: int
    chunks: int
    vector: int
    warps: int


def plan_of(hidden: Tensor, pools: Sequence[int], tile: int, largest: Mapping[int, float], per_thread: int) -> Plan:
    """Tiles of about `tile` elements; a single cell may be more."""
    height, width, depth = hidden.shape[2:]
    side, block = math.lcm(*pools), power_of_2(depth)
    s = next(s for s, limit in largest.items() if side % s == 0 and s * s * block <= limit)
    total = height * width // s**2
    # A block of several cells is one program's, because its wide cells are.
    chunk = (side // s) ** 2 if side > s else max(1, TOKENS // s**2)
    cells = min(power_of_2(min(chunk, total)), max(1, tile // (s * s * block)))
    order = sorted(range(len(pools)), key=lambda i: -math.gcd(pools[i], s))
    units = [math.gcd(pools[i], s) for i in order]
    warps = warps_of(cells * s * s * block, per_thread)
    vector = max(1, min(8, block // (32 * warps)))
    return Plan(order, units, side, s, cells, block, total, chunk, ceil_div(total, chunk), vector, warps)


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    hidden = on_grid(args.hidden)
    batch, positions, height, width, depth = hidden.shape
    outputs = [
        torch.empty(batch, positions, height // p, width // p, depth, dtype=hidden.dtype, device=hidden.device)
        for p in args.pool
    ]
    sums = conditioning_sums(args, window_sums, torch.float32)
    norm_weight = norm_of(args)
    plan = plan_of(hidden, args.pool, *FORWARD)
    launch(
        fan_out_forward, batch * positions * plan.chunks, hidden.device,
        hidden, sums, norm_weight, tuple(outputs[i] for i in plan.order),
        positions, height, width, depth, plan.total, plan.chunk, plan.chunks, args.norm_eps,
        strides(hidden, 5), strides(norm_weight, 2),
        HORIZONS=tuple(plan.order), POOLS=tuple(args.pool[i] for i in plan.order),
        SIDE=plan.side, S=plan.s, CELLS=plan.cells, BLOCK_D=plan.block_d,
        VECTOR=plan.vector, num_warps=plan.warps,
    )  # fmt: skip
    return [output.squeeze(2) for output in outputs] if args.hidden.dim() == 4 else outputs, {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    hidden = on_grid(args.hidden)
    batch, positions, height, width, depth = hidden.shape
    device, count = hidden.device, len(args.pool)
    sums = conditioning_sums(args, window_sums, torch.float32)
    norm_weight = norm_of(args)
    plan = plan_of(hidden, args.pool, *BACKWARD)
    ordered = [None if upstream[i] is None else on_grid(upstream[i]) for i in plan.order]
    programs = batch * positions * plan.chunks
    of_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if want["hidden"] else None
    of_cells = [
        None
        if plan.s % p == 0
        else torch.empty(batch, positions, height // p, width // p, depth, dtype=torch.float32, device=device)
        for p in (args.pool[i] for i in plan.order)
    ]
    of_sums = torch.empty(programs, count, depth, dtype=torch.float32, device=device) if wants_sums(want) else None
    of_norm = torch.empty(programs, count, depth, dtype=torch.float32, device=device) if want["norm_weight"] else None
    monitored = want["hidden"] and args.norms is not None
    gram = torch.empty(programs, count, count, dtype=torch.float32, device=device) if monitored else None
    # Where a row does not span all threads, its sums take more registers than two programs on an SM leave.
    registers = 128 if plan.block_d >= 32 * plan.warps else 255
    launch(
        fan_out_backward, programs, device,
        hidden, sums, norm_weight, tuple(ordered), args.scale, of_hidden, tuple(of_cells), of_sums, of_norm, gram,
        positions, height, width, depth, plan.total, plan.chunk, plan.chunks, args.norm_eps,
        strides(hidden, 5), strides(norm_weight, 2), tuple(strides(grad, 5) for grad in ordered),
        HORIZONS=tuple(plan.order), POOLS=tuple(args.pool[i] for i in plan.order), UNITS=tuple(plan.units),
        COARSER=tuple(high // low for high, low in zip([plan.s, *plan.units], plan.units, strict=False)),
        SIDE=plan.side, S=plan.s, CELLS=plan.cells, BLOCK_D=plan.block_d,
        VECTOR=plan.vector, num_warps=plan.warps, maxnreg=registers,
    )  # fmt: skip
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram.sum(0, dtype=torch.float64), args.norms, args.cosines)

    gradients: Gradients = {}
    if of_hidden is not None:
        gradients["hidden"] = of_hidden.view(args.hidden.shape)
    if of_norm is not None:
        assert args.norm_weight is not None
        axes = (0, 1) if args.norm_weight.dim() == 1 else (0,)
        gradients["norm_weight"] = of_norm.sum(axes).to(args.norm_weight.dtype)
    if of_sums is not None:
        of_position = of_sums.view(batch, positions, plan.chunks, count, depth).sum(2)
        gradients |= gradients_of_sums(args, want, of_position, gradients_of_window)
    return gradients


def on_grid(states: Tensor) -> Tensor:
    """[B, T, S, D] -> [B, T, 1, S, D]."""
    return states.unsqueeze(2) if states.dim() == 4 else states


def norm_of(args: Arguments) -> Tensor | None:
    """[K, D], a [D] weight repeated without a copy."""
    return None if args.norm_weight is None else args.norm_weight.expand(len(args.pool), -1)
