"""The backward pass of fan_out; triton/fan_out.py launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from .fan_out_tiles import (
    cell_position,
    centred,
    load_tile,
    load_vector,
    only,
    row_sum,
    sum_of_rows,
    wide_sum,
    widened,
)


@triton.jit
def load_near(base, y, x, dy, dx, d, in_d, steps, FULL: tl.constexpr):
    """The tokens (dy, dx) off (y, x), in fp32. One pointer for (y, x) serves all offsets."""
    at = (y.to(tl.int64) * steps[2] + x.to(tl.int64) * steps[3])[:, None, None]
    pointers = base + at + d.to(tl.int64) * steps[4]
    return widened(
        load_tile(pointers + (dy * tl.cast(steps[2], tl.int64) + dx * tl.cast(steps[3], tl.int64)), in_d, FULL)
    )


@triton.jit
def load_gradient(gradient, position, positions, y, x, dy, dx, d, in_d, steps, FULL: tl.constexpr):
    base = gradient + position // positions * steps[0] + position % positions * steps[1]
    return load_near(base, y, x, dy, dx, d, in_d, steps, FULL)


@triton.jit
def through_norm(
    gradient, total, sums, norm_weight, i, d, in_d, depth, eps, weight_strides, LAYER: tl.constexpr,
    POOL: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The gradients of horizon i's states before the norm and, per row, of the norm weight."""
    if norm_weight is None:
        return gradient, gradient
    else:
        per_depth = 1.0 / depth
        state = total * (1.0 / (POOL * POOL)) + load_vector(sums + i * depth, d, in_d, 1, FULL)
        weight = load_vector(norm_weight + i * weight_strides[0], d, in_d, weight_strides[1], FULL)
        if LAYER:
            state = centred(state, in_d, per_depth, FULL)
        r = tl.rsqrt(row_sum(state * state) * per_depth + eps)
        weighted = gradient * weight
        along = row_sum(state * weighted) * per_depth
        state_gradient = weighted * r - state * (r * r * r * along)
        if LAYER:
            state_gradient = centred(state_gradient, in_d, per_depth, FULL)
        return state_gradient, gradient * state * r


@triton.jit
def added(totals, INDEX: tl.constexpr, value):
    """`totals` with `value` added to one entry."""
    result = ()
    for j in tl.static_range(len(totals)):
        result = result + (totals[j] + value if j == INDEX else totals[j],)
    return result


@triton.jit
def share_of(scale, i, POOL: tl.constexpr):
    """By which a horizon's state gradient enters that of its tokens."""
    if scale is None:
        return 1.0 / (POOL * POOL)
    else:
        return tl.load(scale + i).to(tl.float32) * (1.0 / (POOL * POOL))


@triton.jit
def multiplied(products, state_gradients, state_gradient, J: tl.constexpr, UNIT: tl.constexpr, POOLS: tl.constexpr):
    """Adds horizon J's products with the horizons before it and with itself, for a box of UNIT x UNIT tokens."""
    COUNT: tl.constexpr = len(POOLS)
    result = ()
    for i in tl.static_range(COUNT):
        for j in tl.static_range(COUNT):
            product = products[i * COUNT + j]
            if j == J and i <= J:
                other = state_gradient if i == J else state_gradients[i]
                share = UNIT * UNIT / (POOLS[i] * POOLS[i] * POOLS[J] * POOLS[J])
                product += tl.sum(other * state_gradient, 1) * share
            result = result + (product,)
    return result


@triton.jit
def store_total(pointer, row, total, d, in_d, depth):
    """Stores the sum of the rows of a tile."""
    if pointer is not None:
        alone = (tl.arange(0, d.shape[0]) == 0)[:, None, None]
        tl.store(pointer + row * depth + d, sum_of_rows(total), alone & in_d)


@triton.jit
def fan_out_backward(
    hidden, sums, norm_weight, gradients, scale, hidden_gradient, cell_gradients, sums_partial, norm_partial,
    bias_partial, gram, positions, height, width, depth, cells, chunk, chunks, eps,
    hidden_strides, weight_strides, gradient_strides, LAYER: tl.constexpr,
    HORIZONS: tl.constexpr, POOLS: tl.constexpr, UNITS: tl.constexpr, NORMS: tl.constexpr, BIASES: tl.constexpr,
    SIDE: tl.constexpr, S: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    LANES: tl.constexpr, FULL: tl.constexpr, EXACT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    QUADS: tl.constexpr = 4 if S == 4 else 1
    CELLS: tl.constexpr = 4 * ROWS if S == 1 else ROWS
    COUNT: tl.constexpr = len(POOLS)
    # The pool that is handled with a tile, because the tile has all of its tokens.
    WHOLE: tl.constexpr = SIDE if S == 4 and TILES == 1 else 0
    program = tl.program_id(0)
    position = (program // chunks).to(tl.int64)
    first = program % chunks * chunk
    program = program.to(tl.int64)
    last = tl.minimum(first + chunk, cells)
    d = tl.arange(0, CHUNKS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    d = tl.broadcast_to(d, [ROWS, CHUNKS, LANES])
    in_d = d < depth
    base = hidden + position // positions * hidden_strides[0] + position % positions * hidden_strides[1]
    sums += position * COUNT * depth
    blocks_x = width // SIDE
    alone = tl.arange(0, ROWS) == 0
    zero = tl.zeros(d.shape, tl.float32)

    sums_totals = ()
    norm_totals = ()
    bias_totals = ()
    products = ()
    for _ in tl.static_range(COUNT):
        sums_totals = sums_totals + (zero,)
    for _ in tl.static_range(NORMS):
        norm_totals = norm_totals + (zero,)
    for _ in tl.static_range(BIASES):
        bias_totals = bias_totals + (zero,)
    for _ in tl.static_range(COUNT * COUNT):
        products = products + (tl.zeros([ROWS, LANES], tl.float32),)

    # Store the gradients of wide cells, for the loop over tokens below.
    top, left, _ = cell_position(first, first + 1, blocks_x, SIDE, S, ROWS)
    for i in tl.static_range(COUNT):
        if S % POOLS[i] != 0 and POOLS[i] != WHOLE:
            sums_total = zero
            norm_total = zero
            bias_total = zero
            if gradients[i] is not None:
                for cell in range(0, (SIDE // POOLS[i]) * (SIDE // POOLS[i])):
                    y, x = top + cell // (SIDE // POOLS[i]) * POOLS[i], left + cell % (SIDE // POOLS[i]) * POOLS[i]
                    gradient = load_gradient(
                        gradients[i], position, positions, y // POOLS[i], x // POOLS[i], 0, 0,
                        d, in_d, gradient_strides[i], FULL,
                    )  # fmt: skip
                    total = zero
                    if norm_weight is not None:
                        total = wide_sum(base, y, x, d, in_d, hidden_strides, POOLS[i], FULL)
                    state_gradient, weight_gradient = through_norm(
                        gradient, total, sums, norm_weight, HORIZONS[i], d, in_d, depth, eps, weight_strides, LAYER,
                        POOLS[i], FULL,
                    )  # fmt: skip
                    sums_total += only(state_gradient, alone, False)
                    norm_total += only(weight_gradient, alone, False)
                    bias_total += only(gradient, alone, False)
                    at = (position * (height // POOLS[i]) + y // POOLS[i]) * (width // POOLS[i]) + x // POOLS[i]
                    tl.store(cell_gradients[i] + (at * depth)[:, None, None] + d, state_gradient,
                             alone[:, None, None] & in_d)  # fmt: skip
            # Stored here, because carrying it through the loop below would cost registers.
            store_total(sums_partial, program * COUNT + HORIZONS[i], sums_total, d, in_d, depth)
            norm_totals = added(norm_totals, HORIZONS[i] % NORMS, norm_total)
            bias_totals = added(bias_totals, HORIZONS[i] % BIASES, bias_total)
            # Other threads of the program read the cell gradients below.
            tl.debug_barrier()

    for tile in range(0, TILES):
        start = first + tile * CELLS
        cell_y, cell_x, cell_exists = cell_position(start, last, blocks_x, SIDE, S, ROWS)
        # First the sums over tokens that pooled states need, and the sums over these states: the accumulators of
        # pooled horizons and of tokens are not live at the same time.
        cell_total = zero
        for quad in range(0, QUADS if S > 1 else 0):
            y, x = cell_y + quad // 2 * 2, cell_x + quad % 2 * 2
            quad_total = zero
            if norm_weight is not None:
                for t in tl.static_range(4):
                    dy, dx = quad // 2 * 2 + t // 2, quad % 2 * 2 + t % 2
                    quad_total += load_near(base, cell_y, cell_x, dy, dx, d, in_d, hidden_strides, FULL)
                cell_total += quad_total
            for i in tl.static_range(COUNT):
                if POOLS[i] == 2 and gradients[i] is not None:
                    # quad // 4 is 0. It keeps the loads of vectors in the loop, in which they need fewer registers.
                    gradient = load_gradient(
                        gradients[i], position, positions, cell_y // 2, cell_x // 2, quad // 2, quad % 2,
                        d, in_d, gradient_strides[i], FULL,
                    )  # fmt: skip
                    state_gradient, weight_gradient = through_norm(
                        gradient, quad_total, sums, norm_weight, HORIZONS[i] + quad // 4, d, in_d, depth, eps,
                        weight_strides, LAYER, 2, FULL,
                    )  # fmt: skip
                    sums_totals = added(sums_totals, i, only(state_gradient, cell_exists, EXACT))
                    norm_totals = added(norm_totals, HORIZONS[i] % NORMS, only(weight_gradient, cell_exists, EXACT))
                    bias_totals = added(bias_totals, HORIZONS[i] % BIASES, only(gradient, cell_exists, EXACT))
        cell_gradient = zero
        cells_known = ()
        for i in tl.static_range(COUNT):
            state_gradient = zero
            if UNITS[i] == 4 and gradients[i] is not None:
                if POOLS[i] == 4:
                    gradient = load_gradient(
                        gradients[i], position, positions, cell_y // 4, cell_x // 4, 0, 0,
                        d, in_d, gradient_strides[i], FULL,
                    )  # fmt: skip
                    state_gradient, weight_gradient = through_norm(
                        gradient, cell_total, sums, norm_weight, HORIZONS[i], d, in_d, depth, eps, weight_strides,
                        LAYER, 4, FULL,
                    )  # fmt: skip
                    state_gradient = only(state_gradient, cell_exists, EXACT)
                    sums_totals = added(sums_totals, i, state_gradient)
                    norm_totals = added(norm_totals, HORIZONS[i] % NORMS, only(weight_gradient, cell_exists, EXACT))
                    bias_totals = added(bias_totals, HORIZONS[i] % BIASES, only(gradient, cell_exists, EXACT))
                elif POOLS[i] == WHOLE:
                    gradient = load_gradient(
                        gradients[i], position, positions, top // SIDE, left // SIDE, 0, 0,
                        d, in_d, gradient_strides[i], FULL,
                    )  # fmt: skip
                    state_gradient, weight_gradient = through_norm(
                        gradient, sum_of_rows(only(cell_total, cell_exists, EXACT)), sums, norm_weight, HORIZONS[i], d,
                        in_d, depth, eps, weight_strides, LAYER, SIDE, FULL,
                    )  # fmt: skip
                    sums_totals = added(sums_totals, i, only(state_gradient, alone, False))
                    norm_totals = added(norm_totals, HORIZONS[i] % NORMS, only(weight_gradient, alone, False))
                    bias_totals = added(bias_totals, HORIZONS[i] % BIASES, only(gradient, alone, False))
                    state_gradient = only(state_gradient, cell_exists, EXACT)
                else:
                    at = (position * (height // POOLS[i]) + cell_y // POOLS[i]) * (width // POOLS[i])
                    at = ((at + cell_x // POOLS[i]) * depth)[:, None, None] + d
                    state_gradient = only(load_tile(cell_gradients[i] + at, in_d, FULL), cell_exists, EXACT)
                cell_gradient += state_gradient * share_of(scale, HORIZONS[i], POOLS[i])
                if gram is not None:
                    products = multiplied(products, cells_known, state_gradient, i, 4, POOLS)
            cells_known = cells_known + (state_gradient,)
        if TILES == 1:
            # Stored here, because carrying them through the loop below would cost registers.
            for i in tl.static_range(COUNT):
                if POOLS[i] > 1 and (S % POOLS[i] == 0 or POOLS[i] == WHOLE):
                    store_total(sums_partial, program * COUNT + HORIZONS[i], sums_totals[i], d, in_d, depth)

        for quad in range(0, QUADS):
            y, x = cell_y + quad // 2 * 2, cell_x + quad % 2 * 2
            box_gradient = cell_gradient
            known = ()
            quad_total = zero
            if S > 1 and norm_weight is not None:
                for t in tl.static_range(4):
                    dy, dx = quad // 2 * 2 + t // 2, quad % 2 * 2 + t % 2
                    quad_total += load_near(base, cell_y, cell_x, dy, dx, d, in_d, hidden_strides, FULL)
            for i in tl.static_range(COUNT):
                state_gradient = cells_known[i]
                if UNITS[i] == 2 and gradients[i] is not None:
                    if POOLS[i] == 2:
                        gradient = load_gradient(
                            gradients[i], position, positions, cell_y // 2, cell_x // 2, quad // 2, quad % 2,
                            d, in_d, gradient_strides[i], FULL,
                        )  # fmt: skip
                        state_gradient, weight_gradient = through_norm(
                            gradient, quad_total, sums, norm_weight, HORIZONS[i], d, in_d, depth, eps, weight_strides,
                            LAYER, 2, FULL,
                        )  # fmt: skip
                        state_gradient = only(state_gradient, cell_exists, EXACT)
                    else:
                        at = (position * (height // POOLS[i]) + y // POOLS[i]) * (width // POOLS[i])
                        at = ((at + x // POOLS[i]) * depth)[:, None, None] + d
                        state_gradient = only(load_tile(cell_gradients[i] + at, in_d, FULL), cell_exists, EXACT)
                    box_gradient += state_gradient * share_of(scale, HORIZONS[i], POOLS[i])
                    if gram is not None:
                        products = multiplied(products, known, state_gradient, i, 2, POOLS)
                known = known + (state_gradient,)
            for t in tl.range(0, 4, loop_unroll_factor=UNROLL):
                token_y, token_x, exists = cell_y, cell_x, cell_exists
                if S == 1:
                    token_y, token_x, exists = cell_position(start + t * ROWS, last, blocks_x, SIDE, S, ROWS)
                dy, dx = quad // 2 * 2 + (t // 2 if S > 1 else 0), quad % 2 * 2 + (t % 2 if S > 1 else 0)
                token = zero
                if norm_weight is not None:
                    token = load_near(base, token_y, token_x, dy, dx, d, in_d, hidden_strides, FULL)
                token_gradient = box_gradient
                tokens_known = ()
                for i in tl.static_range(COUNT):
                    state_gradient = known[i]
                    if UNITS[i] == 1 and gradients[i] is not None:
                        if POOLS[i] == 1:
                            gradient = load_gradient(
                                gradients[i], position, positions, token_y, token_x, dy, dx,
                                d, in_d, gradient_strides[i], FULL,
                            )  # fmt: skip
                            state_gradient, weight_gradient = through_norm(
                                gradient, token, sums, norm_weight, HORIZONS[i], d, in_d, depth, eps, weight_strides,
                                LAYER, 1, FULL,
                            )  # fmt: skip
                            state_gradient = only(state_gradient, exists, EXACT)
                            sums_totals = added(sums_totals, i, state_gradient)
                            norm_totals = added(norm_totals, HORIZONS[i] % NORMS, only(weight_gradient, exists, EXACT))
                            bias_totals = added(bias_totals, HORIZONS[i] % BIASES, only(gradient, exists, EXACT))
                        else:
                            at = (position * (height // POOLS[i]) + (token_y + dy) // POOLS[i]) * (width // POOLS[i])
                            at = ((at + (token_x + dx) // POOLS[i]) * depth)[:, None, None] + d
                            state_gradient = only(load_tile(cell_gradients[i] + at, in_d, FULL), exists, EXACT)
                        token_gradient += state_gradient * share_of(scale, HORIZONS[i], POOLS[i])
                        if gram is not None:
                            products = multiplied(products, tokens_known, state_gradient, i, 1, POOLS)
                    tokens_known = tokens_known + (state_gradient,)
                if hidden_gradient is not None:
                    at = (((position * height + token_y) * width + token_x) * depth)[:, None, None] + d
                    at += (dy * tl.cast(width, tl.int64) + dx) * depth
                    mask = exists[:, None, None] if FULL else exists[:, None, None] & in_d
                    tl.store(hidden_gradient + at, token_gradient.to(hidden_gradient.dtype.element_ty), mask)

    for i in tl.static_range(COUNT):
        if S % POOLS[i] == 0 and (POOLS[i] == 1 or TILES > 1):
            store_total(sums_partial, program * COUNT + HORIZONS[i], sums_totals[i], d, in_d, depth)
        if gram is not None:
            for j in tl.static_range(i, COUNT):
                product = tl.sum(tl.sum(products[i * COUNT + j], 1), 0)
                tl.store(gram + (program * COUNT + HORIZONS[i]) * COUNT + HORIZONS[j], product)
                tl.store(gram + (program * COUNT + HORIZONS[j]) * COUNT + HORIZONS[i], product)
    for i in tl.static_range(NORMS):
        store_total(norm_partial, program * NORMS + i, norm_totals[i], d, in_d, depth)
    for i in tl.static_range(BIASES):
        store_total(bias_partial, program * BIASES + i, bias_totals[i], d, in_d, depth)
