"""Consistency pairs of multi_horizon_linear_cross_entropy in Triton.

multi_horizon_linear_pairs         The numbers of the far and near rows of all pairs, which of them count, and how
                                   many. Bytes: 8 per row.
multi_horizon_linear_normalisers   log(sum(exp(logits))) of each row, for the next kernel.
multi_horizon_linear_consistency   A program has a far row and the near rows that its cell covers. Bytes: the logits of
                                   both once, near ones that learn twice; the gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm.token_targets import Pair, pairs_of
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from .launch import ceil_div, launch, power_of_2, strides
from .logits import LOG2_E, capped, each, load_row, power, statistics_of_long_row, through_cap, tile_of
from .token_targets import counts_at

# The most columns of a pair that a program reads at a time, and the near rows that it numbers.
LONGEST_PAIR = 2048
NUMBERED = 512


@triton.jit
def multi_horizon_linear_pairs(
    fars, nears, counteds, counts, segments, position_weights, segment_strides, position_strides,
    batch, positions, frames, height, width,
    NEAR: tl.constexpr, FAR: tl.constexpr, NEAR_OFFSETS: tl.constexpr, FAR_OFFSETS: tl.constexpr,
    FAR_FACTORS: tl.constexpr, RATIOS: tl.constexpr, PADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    for p in tl.static_range(len(FAR)):
        h, w = height // FAR_FACTORS[p], width // FAR_FACTORS[p]
        inside = tl.minimum(positions - (FAR_OFFSETS[p] - NEAR_OFFSETS[p]), frames - FAR_OFFSETS[p])
        inside = tl.maximum(inside, 0)
        rows = tl.cast(batch, tl.int64) * inside * h * w
        if (block >= 0) & (block < tl.cdiv(rows, ROWS[p])):
            write_pair(
                fars[p], nears[p], counteds[p], counts + p, segments, segment_strides, position_weights,
                position_strides, block, rows, inside, positions, h, w,
                NEAR[p], FAR[p], NEAR_OFFSETS[p], FAR_OFFSETS[p], RATIOS[p], PADS[p], ROWS[p],
            )  # fmt: skip
        block -= tl.cdiv(rows, ROWS[p])


@triton.jit
def write_pair(
    far, near, counted, count, segments, segment_strides, weights, weight_strides,
    block, rows, inside, positions, h, w,
    NEAR: tl.constexpr, FAR: tl.constexpr, NEAR_OFFSET: tl.constexpr, FAR_OFFSET: tl.constexpr,
    RATIO: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    APART: tl.constexpr = FAR_OFFSET - NEAR_OFFSET
    row = block * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    x, rest = row % w, row // w
    y, rest = rest % h, rest // h
    n, b = rest % inside, rest // inside
    tl.store(far + row, ((b * positions + n) * h + y) * w + x, in_rows)
    s = tl.arange(0, PADDED)[None, :]
    near_y, near_x = y[:, None] * RATIO + s // RATIO, x[:, None] * RATIO + s % RATIO
    number = ((b * positions + n + APART)[:, None] * (h * RATIO) + near_y) * (w * RATIO) + near_x
    tl.store(near + (row[:, None] * (RATIO * RATIO) + s), number, in_rows[:, None] & (s < RATIO * RATIO))
    both = counts_at(segments, segment_strides, weights, weight_strides, b, n, in_rows, FAR, FAR_OFFSET)
    both = counts_at(segments, segment_strides, weights, weight_strides, b, n + APART, both, NEAR, NEAR_OFFSET)
    tl.atomic_add(count, tl.sum(both.to(tl.int64), 0))
    if counted is not None:
        tl.store(counted + row, both, in_rows)


@triton.jit
def multi_horizon_linear_normalisers(
    logits, bias, out, rows, ids_per_token, vocabulary, softcap,
    SOFTCAP: tl.constexpr, ONE_BLOCK: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = 0 if ROWS == 1 else 1
    row = tl.program_id(0).to(tl.int64)
    if ROWS > 1:
        row = row * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    start, bias_start = each(row * vocabulary, ROWS), each(row % ids_per_token * vocabulary, ROWS)
    if ONE_BLOCK:
        column = tl.arange(0, BLOCK)
        mask = None if FULL else each(in_rows, ROWS) & (column < vocabulary)
        z = load_row(logits, start, bias, bias_start, column, mask, softcap, SOFTCAP)
        largest = tl.max(z, AXIS)
        total = tl.sum(power(z * LOG2_E - each(largest * LOG2_E, ROWS)), AXIS)
    else:
        largest, total, _, _ = statistics_of_long_row(
            logits, start, bias, bias_start, vocabulary, softcap, SOFTCAP, False, False, FULL, BLOCK, VECTOR, LANES
        )
    tl.store(out + row, largest + tl.log(total), in_rows)


@triton.jit
def capped_row(row, bias, bias_start, column, mask, softcap, SOFTCAP: tl.constexpr):
    """Columns of a row of logits, plus their bias if there is one, capped."""
    z = tl.load(row + column, mask, 0)
    if bias is not None:
        z = z.to(tl.float32) + tl.load(bias + bias_start + column, mask, 0)
    return capped(z, softcap, SOFTCAP)


@triton.jit
def multi_horizon_linear_consistency(
    near, far, near_bias, far_bias, near_normalisers, far_normalisers, dots, counted, known, pair_weight, cells, losses,
    scale, ids_per_token, covered, vocabulary, softcap,
    KNOWN: tl.constexpr, SOFTCAP: tl.constexpr, LEARNS_NEAR: tl.constexpr, LEARNS_FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cell, f = program // ids_per_token, program % ids_per_token
    counts = cell >= 0
    if counted is not None:
        counts = tl.load(counted + cell) != 0
    near_row = cell * covered * ids_per_token + f
    far_start = program * vocabulary
    bias_start = f * vocabulary
    far_sum = tl.load(far_normalisers + program)
    factor = tl.load(pair_weight).to(tl.float32) / tl.maximum(tl.load(cells), 1).to(tl.float32)
    if scale is not None:
        factor *= tl.load(scale)
    near_share = 1.0 / covered
    column = tl.arange(0, BLOCK)

    # The teacher's gradient is g = -log q, so a near logit's gradient is p (g - <p, g>) / covered, times the share of
    # the near distribution that known ids leave.
    if LEARNS_NEAR:
        for s in range(0, covered):
            row = near_row + s * ids_per_token
            normaliser = tl.load(near_normalisers + row)
            dot = tl.zeros([BLOCK], tl.float32)
            for first in range(0, vocabulary, BLOCK):
                v = first + column
                mask = (v < vocabulary) & counts
                z = capped_row(near + row * vocabulary, near_bias, bias_start, v, mask, softcap, SOFTCAP)
                q = capped_row(far + far_start, far_bias, bias_start, v, mask, softcap, SOFTCAP) - far_sum
                dot += tl.where(mask, power((z - normaliser) * LOG2_E) * q, 0.0)
            tl.store(dots + row, tl.sum(dot, 0))
        tl.debug_barrier()

    loss = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        v = first + column
        in_row = v < vocabulary
        mask = in_row & counts
        far_z = capped_row(far + far_start, far_bias, bias_start, v, mask, softcap, SOFTCAP)
        log_q = far_z - far_sum
        teacher = tl.zeros([BLOCK], tl.float32)
        for s in range(0, covered):
            row = near_row + s * ids_per_token
            z = capped_row(near + row * vocabulary, near_bias, bias_start, v, mask, softcap, SOFTCAP)
            p = power((z - tl.load(near_normalisers + row)) * LOG2_E) * near_share
            if KNOWN > 0:
                unknown = 0.0
                for u in range(0, KNOWN):
                    known_id = tl.load(known + row * KNOWN + u)
                    unknown += tl.where(known_id < 0, 1.0 / KNOWN, 0.0)
                    teacher += tl.where(v == known_id, near_share / KNOWN, 0.0)
                p *= unknown
            teacher += p
            if LEARNS_NEAR:
                gradient = p * (tl.load(dots + row) - log_q) * factor
                gradient = tl.where(mask, through_cap(gradient, z, softcap, SOFTCAP), 0.0)
                tl.store(near + row * vocabulary + v, gradient.to(near.dtype.element_ty), in_row)
        loss -= tl.where(mask, teacher * log_q, 0.0)
        if LEARNS_FAR:
            gradient = through_cap((power(log_q * LOG2_E) - teacher) * factor, far_z, softcap, SOFTCAP)
            gradient = tl.where(mask, gradient, 0.0)
            tl.store(far + far_start + v, gradient.to(far.dtype.element_ty), in_row)
    tl.store(losses + program, tl.sum(loss, 0))


def pairs(args: Arguments) -> list[Pair]:
    """The pairs with all their rows, because finding those that count would wait for the device."""
    horizons, device = pairs_of(args), args.tokens.device
    if not horizons:
        return []
    batch, frames, height, width = args.tokens.shape[:4]
    positions = args.inputs[0].shape[1]
    excludes = args.segment_ids is not None or args.position_weights is not None
    counts = torch.zeros(len(horizons), dtype=torch.int64, device=device)
    found = []
    for p, (i, j) in enumerate(horizons):
        inside = max(0, min(positions - args.offsets[j] + args.offsets[i], frames - args.offsets[j]))
        rows = batch * inside * (height // args.factors[j]) * (width // args.factors[j])
        far = torch.empty(rows, dtype=torch.int64, device=device)
        near = torch.empty(rows, (args.factors[j] // args.factors[i]) ** 2, dtype=torch.int64, device=device)
        counted = torch.empty(rows, dtype=torch.bool, device=device) if excludes else None
        found.append(Pair((i, j), far, near, counted, counts[p]))
    pads = tuple(power_of_2(pair.near.shape[1]) for pair in found)
    tiles = tuple(max(1, NUMBERED // pad) for pad in pads)
    launch(
        multi_horizon_linear_pairs,
        sum(ceil_div(pair.far.shape[0], tile) for pair, tile in zip(found, tiles, strict=True)), device,
        tuple(pair.far for pair in found), tuple(pair.near for pair in found), tuple(pair.counted for pair in found),
        counts, args.segment_ids, args.position_weights, strides(args.segment_ids, 2),
        strides(args.position_weights, 3), batch, positions, frames, height, width,
        NEAR=tuple(i for i, _ in horizons), FAR=tuple(j for _, j in horizons),
        NEAR_OFFSETS=tuple(args.offsets[i] for i, _ in horizons),
        FAR_OFFSETS=tuple(args.offsets[j] for _, j in horizons),
        FAR_FACTORS=tuple(args.factors[j] for _, j in horizons),
        RATIOS=tuple(args.factors[j] // args.factors[i] for i, j in horizons),
        PADS=pads, ROWS=tiles, num_warps=4,
    )  # fmt: skip
    return found


def normalisers_of(args: Arguments, logits: Tensor, bias: Tensor | None) -> Tensor:
    """The normalisers [rows * F] of logits [rows, F * V] plus their bias [F * V]."""
    rows, vocabulary = logits.shape[0] * args.ids_per_token, logits.shape[1] // args.ids_per_token
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    tile = tile_of(vocabulary, logits.itemsize)
    launch(
        multi_horizon_linear_normalisers, ceil_div(rows, tile["ROWS"]), logits.device,
        logits, bias, out, rows, args.ids_per_token, vocabulary, args.softcap,
        SOFTCAP=args.softcap > 0, **tile,
    )  # fmt: skip
    return out


def consistency(
    args: Arguments,
    pair: Pair,
    near: Tensor,
    far: Tensor,
    near_bias: Tensor | None,
    far_bias: Tensor | None,
    counted: Tensor | None,
    known: Tensor | None,
    losses: Tensor,
    learns_near: bool,
    learns_far: bool,
    scale: Tensor | None,
) -> None:
    assert args.consistency_weights is not None
    cells, vocabulary = far.shape[0], far.shape[1] // args.ids_per_token
    near_sums, far_sums = normalisers_of(args, near, near_bias), normalisers_of(args, far, far_bias)
    dots = torch.empty_like(near_sums) if learns_near else None
    # Shorter with a bias or known ids: else ptxas spills 8 to 16 bytes (fp32, 2048 on sm_80, 1024 on sm_100).
    longest = LONGEST_PAIR if near_bias is None and known is None else LONGEST_PAIR // 4
    launch(
        multi_horizon_linear_consistency, cells * args.ids_per_token, far.device,
        near, far, near_bias, far_bias, near_sums, far_sums, dots, counted, known,
        args.consistency_weights[pair.horizons[1]], pair.cells, losses, scale,
        args.ids_per_token, near.shape[0] // cells, vocabulary, args.softcap,
        KNOWN=0 if known is None else known.shape[2], SOFTCAP=args.softcap > 0,
        LEARNS_NEAR=learns_near, LEARNS_FAR=learns_far,
        BLOCK=min(longest, max(16, power_of_2(vocabulary))), num_warps=4,
    )  # fmt: skip
