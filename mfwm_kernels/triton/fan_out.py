"""fan_out in Triton, called by autograd.call: the window sums, then one pass over the hidden state for all K horizons.

A program has a block of one position's tokens, as wide as the least common multiple of the pools, and processes it in
tiles of complete rows: [cells of S x S tokens, D], with the tokens of a cell in Z-order. A pool that divides S is a sum
over neighbouring rows of the tile. Any other pool ("wide") is handled first, in a loop of its own that brings the
block's tokens into cache, so that hidden is read from memory only once.

forward   Bytes: hidden once, the K outputs, the window sums.
backward  Bytes: hidden once, the K gradients once, the gradient of hidden; and per program one row of D for each
          horizon's sums, norm weights and norm biases, which torch adds up in a fixed order. Gradients of wide cells go
          through a buffer of 1 / pool^2 the size of hidden.
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

# Elements per tile; for each S, the most elements of a cell of S x S tokens; elements per thread.
FORWARD = (8192, {4: 16384, 2: 16384, 1: math.inf}, 32)
BACKWARD = (1024, {4: 2048, 2: 4096, 1: math.inf}, 8)
# Tokens per program if a block is a single cell.
TOKENS_PER_PROGRAM = 64


@triton.jit
def token_positions(row, first, blocks_x, SIDE: tl.constexpr, S: tl.constexpr):
    """The position (y, x) in the token grid of row `row` of the tile whose first cell is `first`."""
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
    """[rows, D] in fp32: the tokens at (y, x) of `base`, with strides (batch, time, row, column, feature)."""
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
def centred(rows, in_d, depth):
    return tl.where(in_d[None, :], rows - (tl.sum(rows, 1) / depth)[:, None], 0)


@triton.jit
def normed(state, norm_weight, norm_bias, i, d, in_d, depth, eps, weight_strides, LAYER: tl.constexpr):
    weight = load_vector(norm_weight + i * weight_strides[0], d, in_d, weight_strides[1])
    if LAYER:
        state = centred(state, in_d, depth)
    state = state * tl.rsqrt(tl.sum(state * state, 1) / depth + eps)[:, None] * weight
    if norm_bias is not None:
        state += load_vector(norm_bias + i * depth, d, in_d, 1)
    return state


@triton.jit
def norm_gradient(state, gradient, weight, exists, in_d, depth, eps, LAYER: tl.constexpr):
    """The gradients of the state before its norm and, per row, of the norm weight."""
    if LAYER:
        state = centred(state, in_d, depth)
    r = tl.rsqrt(tl.sum(state * state, 1) / depth + eps)
    weighted = gradient * weight
    along = tl.sum(state * weighted, 1) / depth
    state_gradient = r[:, None] * weighted - state * (r * r * r * along)[:, None]
    if LAYER:
        state_gradient = centred(state_gradient, in_d, depth)
    weight_gradient = gradient * state * r[:, None]
    # Rows past the end are all zero, so their norm may be 0 / 0.
    return tl.where(exists[:, None], state_gradient, 0), tl.where(exists[:, None], weight_gradient, 0)


@triton.jit
def overlap(
    a, b, UNIT_A: tl.constexpr, UNIT_B: tl.constexpr, POOL_A: tl.constexpr, POOL_B: tl.constexpr
):  # fmt: skip
    """Products, not yet summed, of two horizons' gradients of the tokens, given for boxes of UNIT x UNIT tokens."""
    if UNIT_A > UNIT_B:
        return overlap(b, a, UNIT_B, UNIT_A, POOL_B, POOL_A)
    else:
        # Computed on the coarser boxes. Each finer one represents UNIT_A^2 tokens.
        boxes: tl.constexpr = UNIT_B // UNIT_A
        return fold(a, boxes * boxes) * b * ((UNIT_A * UNIT_A) / (POOL_A * POOL_A * POOL_B * POOL_B))


@triton.jit
def fan_out_forward(
    hidden, sums, norm_weight, norm_bias, outputs, positions, height, width, depth, cells, chunk, chunks, eps,
    hidden_strides, weight_strides, LAYER: tl.constexpr,
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
            top, left = token_positions(0, first, blocks_x, SIDE, S)
            for cell in range(0, (SIDE // POOLS[i]) * (SIDE // POOLS[i])):
                y, x = top + cell // (SIDE // POOLS[i]) * POOLS[i], left + cell % (SIDE // POOLS[i]) * POOLS[i]
                state = wide_mean(base, y, x, d, in_d, hidden_strides, POOLS[i], ROWS, BLOCK_D) + added
                if norm_weight is not None:
                    state = normed(state, norm_weight, norm_bias, HORIZONS[i], d, in_d, depth, eps, weight_strides,
                                   LAYER)  # fmt: skip
                row = (position * (height // POOLS[i]) + y // POOLS[i]) * (width // POOLS[i]) + x // POOLS[i]
                tl.store(outputs[i] + row * depth + d[None, :], state.to(outputs[i].dtype.element_ty), in_d[None, :])
    for start in range(first, last, CELLS):
        row = tl.arange(0, ROWS)
        y, x = token_positions(row, start, blocks_x, SIDE, S)
        tokens = load_rows(base, y, x, d, start + row // (S * S) < last, in_d, hidden_strides)
        for i in tl.static_range(len(POOLS)):
            if S % POOLS[i] == 0:
                unit = tl.arange(0, ROWS // (POOLS[i] * POOLS[i])) * (POOLS[i] * POOLS[i])
                y, x = token_positions(unit, start, blocks_x, SIDE, S)
                state = fold(tokens, POOLS[i] * POOLS[i]) * (1.0 / (POOLS[i] * POOLS[i]))
                state += load_vector(sums + (position * len(POOLS) + HORIZONS[i]) * depth, d, in_d, 1)
                if norm_weight is not None:
                    state = normed(state, norm_weight, norm_bias, HORIZONS[i], d, in_d, depth, eps, weight_strides,
                                   LAYER)  # fmt: skip
                at = (position * (height // POOLS[i]) + y // POOLS[i]) * (width // POOLS[i]) + x // POOLS[i]
                mask = (start + unit // (S * S) < last)[:, None] & in_d[None, :]
                tl.store(outputs[i] + (at * depth)[:, None] + d[None, :], state.to(outputs[i].dtype.element_ty), mask)


@triton.jit
def fan_out_backward(
    hidden, sums, norm_weight, gradients, scale, hidden_gradient, cell_gradients, sums_partial, norm_partial,
    bias_partial, gram, positions, height, width, depth, cells, chunk, chunks, eps,
    hidden_strides, weight_strides, gradient_strides, LAYER: tl.constexpr,
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

    # Store the gradients of wide cells, for the loop over tokens below.
    sums_totals = ()
    norm_totals = ()
    bias_totals = ()
    for i in tl.static_range(COUNT):
        sums_total = tl.zeros([BLOCK_D], tl.float32)
        norm_total = tl.zeros([BLOCK_D], tl.float32)
        bias_total = tl.zeros([BLOCK_D], tl.float32)
        if gradients[i] is not None:
            if S % POOLS[i] != 0:
                added = load_vector(sums + (position * COUNT + HORIZONS[i]) * depth, d, in_d, 1)
                top, left = token_positions(0, first, blocks_x, SIDE, S)
                upstream = gradients[i] + b * gradient_strides[i][0] + n * gradient_strides[i][1]
                for cell in range(0, (SIDE // POOLS[i]) * (SIDE // POOLS[i])):
                    y, x = top + cell // (SIDE // POOLS[i]) * POOLS[i], left + cell % (SIDE // POOLS[i]) * POOLS[i]
                    at = tl.zeros([1], tl.int32)
                    cell_y, cell_x = at + y // POOLS[i], at + x // POOLS[i]
                    state_gradient = load_rows(upstream, cell_y, cell_x, d, one, in_d, gradient_strides[i])
                    if bias_partial is not None:
                        bias_total += tl.sum(state_gradient, 0)
                    if norm_weight is not None:
                        weight = load_vector(norm_weight + HORIZONS[i] * weight_strides[0], d, in_d, weight_strides[1])
                        state = wide_mean(base, y, x, d, in_d, hidden_strides, POOLS[i], ROWS, BLOCK_D) + added
                        state_gradient, weight_gradient = norm_gradient(
                            state, state_gradient, weight, one, in_d, depth, eps, LAYER
                        )
                        norm_total += tl.sum(weight_gradient, 0)
                    sums_total += tl.sum(state_gradient, 0)
                    row = (position * (height // POOLS[i]) + y // POOLS[i]) * (width // POOLS[i]) + x // POOLS[i]
                    tl.store(cell_gradients[i] + row * depth + d[None, :], state_gradient, in_d[None, :])
        if S % POOLS[i] != 0:
            # Store them here, because carrying them through the loop below would cost registers.
            store_row(sums_partial, program * COUNT + HORIZONS[i], sums_total, d, in_d, depth)
            store_row(norm_partial, program * COUNT + HORIZONS[i], norm_total, d, in_d, depth)
            store_row(bias_partial, program * COUNT + HORIZONS[i], bias_total, d, in_d, depth)
        sums_totals = sums_totals + (tl.zeros([BLOCK_D], tl.float32),)
        norm_totals = norm_totals + (tl.zeros([BLOCK_D], tl.float32),)
        bias_totals = bias_totals + (tl.zeros([BLOCK_D], tl.float32),)
    # Other threads of the program read the cell gradients below.
    tl.debug_barrier()

    products = ()
    for _ in tl.static_range(COUNT * COUNT):
        products = products + (tl.zeros([BLOCK_D], tl.float32),)
    for start in range(first, last, CELLS):
        if norm_weight is not None:
            row = tl.arange(0, ROWS)
            y, x = token_positions(row, start, blocks_x, SIDE, S)
            tokens = load_rows(base, y, x, d, start + row // (S * S) < last, in_d, hidden_strides)
        # From coarse boxes to fine ones, so that the largest tile, single tokens' gradient, is live only at the end.
        total = tl.zeros([ROWS // (S * S), BLOCK_D], tl.float32)
        new_sums = ()
        new_norms = ()
        new_biases = ()
        state_gradients = ()
        for i in tl.static_range(COUNT):
            sums_total = sums_totals[i]
            norm_total = norm_totals[i]
            bias_total = bias_totals[i]
            state_gradient = tl.zeros([ROWS // (UNITS[i] * UNITS[i]), BLOCK_D], tl.float32)
            if gradients[i] is not None:
                unit = tl.arange(0, ROWS // (UNITS[i] * UNITS[i])) * (UNITS[i] * UNITS[i])
                unit_y, unit_x = token_positions(unit, start, blocks_x, SIDE, S)
                unit_exists = start + unit // (S * S) < last
                if S % POOLS[i] == 0:
                    upstream = gradients[i] + b * gradient_strides[i][0] + n * gradient_strides[i][1]
                    state_gradient = load_rows(
                        upstream, unit_y // POOLS[i], unit_x // POOLS[i], d, unit_exists, in_d, gradient_strides[i]
                    )
                    if bias_partial is not None:
                        bias_total += tl.sum(state_gradient, 0)
                    if norm_weight is not None:
                        weight = load_vector(norm_weight + HORIZONS[i] * weight_strides[0], d, in_d, weight_strides[1])
                        state = fold(tokens, POOLS[i] * POOLS[i]) * (1.0 / (POOLS[i] * POOLS[i]))
                        state += load_vector(sums + (position * COUNT + HORIZONS[i]) * depth, d, in_d, 1)
                        state_gradient, weight_gradient = norm_gradient(
                            state, state_gradient, weight, unit_exists, in_d, depth, eps, LAYER
                        )
                        if norm_partial is not None:
                            norm_total += tl.sum(weight_gradient, 0)
                    if sums_partial is not None:
                        sums_total += tl.sum(state_gradient, 0)
                elif hidden_gradient is not None:
                    at = position * (height // POOLS[i]) + unit_y // POOLS[i]
                    at = at * (width // POOLS[i]) + unit_x // POOLS[i]
                    mask = unit_exists[:, None] & in_d[None, :]
                    state_gradient = tl.load(cell_gradients[i] + (at * depth)[:, None] + d[None, :], mask, 0)
            total = unfold(total, COARSER[i] * COARSER[i])
            if hidden_gradient is not None:
                share = 1.0 / (POOLS[i] * POOLS[i])
                if scale is not None:
                    share = tl.load(scale + HORIZONS[i]).to(tl.float32) * share
                total += state_gradient * share
            state_gradients = state_gradients + (state_gradient,)
            new_sums = new_sums + (sums_total,)
            new_norms = new_norms + (norm_total,)
            new_biases = new_biases + (bias_total,)
        sums_totals = new_sums
        norm_totals = new_norms
        bias_totals = new_biases
        total = unfold(total, UNITS[COUNT - 1] * UNITS[COUNT - 1])
        if hidden_gradient is not None:
            row = tl.arange(0, ROWS)
            y, x = token_positions(row, start, blocks_x, SIDE, S)
            at = ((position * height + y) * width + x) * depth
            mask = (start + row // (S * S) < last)[:, None] & in_d[None, :]
            tl.store(hidden_gradient + at[:, None] + d[None, :], total.to(hidden_gradient.dtype.element_ty), mask)
        if gram is not None:
            new_products = ()
            for i in tl.static_range(COUNT):
                for j in tl.static_range(COUNT):
                    product = products[i * COUNT + j]
                    if j >= i:
                        if (gradients[i] is not None) and (gradients[j] is not None):
                            product += tl.sum(
                                overlap(state_gradients[i], state_gradients[j], UNITS[i], UNITS[j], POOLS[i], POOLS[j]),
                                0,
                            )
                    new_products = new_products + (product,)
            products = new_products

    for i in tl.static_range(COUNT):
        if S % POOLS[i] == 0:
            store_row(sums_partial, program * COUNT + HORIZONS[i], sums_totals[i], d, in_d, depth)
            store_row(norm_partial, program * COUNT + HORIZONS[i], norm_totals[i], d, in_d, depth)
            store_row(bias_partial, program * COUNT + HORIZONS[i], bias_totals[i], d, in_d, depth)
        if gram is not None:
            for j in tl.static_range(i, COUNT):
                product = tl.sum(products[i * COUNT + j], 0)
                tl.store(gram + (program * COUNT + HORIZONS[i]) * COUNT + HORIZONS[j], product)
                tl.store(gram + (program * COUNT + HORIZONS[j]) * COUNT + HORIZONS[i], product)


class Plan(NamedTuple):
    """How a position's tokens are assigned to programs and tiles: see the top of the file.

    order: the horizons from coarse boxes to fine ones.
    units: in that order, the side of the boxes on which a horizon's gradient is constant.
    vector: consecutive elements of a row per thread. Few enough that a row spans all threads, so that each thread has
        the same columns of every row, and sums over rows need no shared memory.
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
    """A plan with tiles of about `tile` elements, or more if a single cell is larger."""
    height, width, depth = hidden.shape[2:]
    side, block = math.lcm(*pools), power_of_2(depth)
    s = next(s for s, limit in largest.items() if side % s == 0 and s * s * block <= limit)
    total = height * width // s**2
    # One program handles a whole block of cells, because a wide cell spans several of them.
    chunk = (side // s) ** 2 if side > s else max(1, TOKENS_PER_PROGRAM // s**2)
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
    norm_weight, norm_bias = by_horizon(args, args.norm_weight), by_horizon(args, args.norm_bias)
    if norm_bias is not None:
        # Strides would take registers that the tile needs.
        norm_bias = norm_bias.contiguous()
    plan = plan_of(hidden, args.pool, *FORWARD)
    launch(
        fan_out_forward, batch * positions * plan.chunks, hidden.device,
        hidden, sums, norm_weight, norm_bias, tuple(outputs[i] for i in plan.order),
        positions, height, width, depth, plan.total, plan.chunk, plan.chunks, args.norm_eps,
        strides(hidden, 5), strides(norm_weight, 2), LAYER=args.norm == "layer",
        HORIZONS=tuple(plan.order), POOLS=tuple(args.pool[i] for i in plan.order),
        SIDE=plan.side, S=plan.s, CELLS=plan.cells, BLOCK_D=plan.block_d,
        VECTOR=plan.vector, num_warps=plan.warps,
        # With a bias in fp32, ptxas spills 8 bytes to stay below a limit that it chooses.
        maxnreg=255 if norm_bias is not None and hidden.dtype == torch.float32 else None,
    )  # fmt: skip
    return [output.squeeze(2) for output in outputs] if args.hidden.dim() == 4 else outputs, {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    hidden = on_grid(args.hidden)
    batch, positions, height, width, depth = hidden.shape
    device, count = hidden.device, len(args.pool)
    sums = conditioning_sums(args, window_sums, torch.float32)
    norm_weight = by_horizon(args, args.norm_weight)
    plan = plan_of(hidden, args.pool, *BACKWARD)
    ordered = [None if upstream[i] is None else on_grid(upstream[i]) for i in plan.order]
    programs = batch * positions * plan.chunks
    hidden_gradient = torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if want["hidden"] else None
    cell_gradients = [
        None
        if plan.s % p == 0
        else torch.empty(batch, positions, height // p, width // p, depth, dtype=torch.float32, device=device)
        for p in (args.pool[i] for i in plan.order)
    ]
    sums_partial = torch.empty(programs, count, depth, dtype=torch.float32, device=device) if wants_sums(want) else None
    norm_partials = {
        name: torch.empty(programs, count, depth, dtype=torch.float32, device=device) if want[name] else None
        for name in ("norm_weight", "norm_bias")
    }
    monitored = want["hidden"] and args.norms is not None
    gram = torch.empty(programs, count, count, dtype=torch.float32, device=device) if monitored else None
    # If a row does not span all threads, its sums need more registers than two programs per SM leave. So do LayerNorm's
    # further sums beside a monitor's products, or where one warp has whole rows.
    layer = args.norm == "layer"
    is_large = plan.block_d < 32 * plan.warps or (layer and (monitored or plan.warps == 1))
    registers = 255 if is_large else 128
    launch(
        fan_out_backward, programs, device,
        hidden, sums, norm_weight, tuple(ordered), None if args.scale is None else args.scale.contiguous(),
        hidden_gradient, tuple(cell_gradients), sums_partial, *norm_partials.values(), gram,
        positions, height, width, depth, plan.total, plan.chunk, plan.chunks, args.norm_eps,
        strides(hidden, 5), strides(norm_weight, 2), tuple(strides(grad, 5) for grad in ordered),
        LAYER=layer,
        HORIZONS=tuple(plan.order), POOLS=tuple(args.pool[i] for i in plan.order), UNITS=tuple(plan.units),
        COARSER=tuple(high // low for high, low in zip([plan.s, *plan.units], plan.units, strict=False)),
        SIDE=plan.side, S=plan.s, CELLS=plan.cells, BLOCK_D=plan.block_d,
        VECTOR=plan.vector, num_warps=plan.warps, maxnreg=registers,
    )  # fmt: skip
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram.sum(0, dtype=torch.float64), args.norms, args.cosines)

    gradients: Gradients = {}
    if hidden_gradient is not None:
        gradients["hidden"] = hidden_gradient.view(args.hidden.shape)
    for name, partial in norm_partials.items():
        if partial is not None:
            axes = (0, 1) if getattr(args, name).dim() == 1 else (0,)
            gradients[name] = partial.sum(axes).to(hidden.dtype)
    if sums_partial is not None:
        sums_gradient = sums_partial.view(batch, positions, plan.chunks, count, depth).sum(2)
        gradients |= gradients_of_sums(args, want, sums_gradient, gradients_of_window)
    return gradients


def on_grid(states: Tensor) -> Tensor:
    """[B, T, S, D] -> [B, T, 1, S, D]."""
    return states.unsqueeze(2) if states.dim() == 4 else states


def by_horizon(args: Arguments, parameter: Tensor | None) -> Tensor | None:
    """The norm's weight or bias as [K, D]; [D] is expanded without a copy."""
    return None if parameter is None else parameter.expand(len(args.pool), -1)
