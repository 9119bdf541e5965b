"""The target ids of multi_horizon_linear_cross_entropy's rows, and the means of their losses, in Triton.

multi_horizon_linear_targets   Checks all token ids, writes the ids that each row of each horizon is trained on, and
                               counts rows and cells. Bytes: the tokens once per horizon and once more; 4 per target id.
multi_horizon_linear_sums      Sums the losses of each horizon and each consistency pair, a number per program.
multi_horizon_linear_means     One program adds these up and divides by the counts, so that the host reads nothing.

A call needs these three launches where torch needs about fifty small ones, each of 2 us, for the same few megabytes.
Programs of the first kernel are given to horizons one after the other, and add to the counts atomically: integers, so
the order does not matter. The sums are of floats: each program writes its own, and a second launch adds them in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm.token_targets import Pair, Targets, groups_of, teaches_known_ids
from ..ops import token_ids
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from .launch import ceil_div, launch, power_of_2, strides

# Ids of a program of the first kernel, losses of a step of the second, and its programs per horizon.
TILE_IDS = 1024
STEP_LOSSES = 1024
SUMS = 64


@triton.jit
def check_ids(
    tokens, steps, found, reported, block, count, vocabulary, ignore_index, frames, height, width, ids_per_token,
    CONTIGUOUS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the bad ids of a block of the flattened tokens to `found`, as ops.token_ids records them. The first program
    of a call to find one, for which `reported` is 0, writes the details of its first."""
    index = block * TILE + tl.arange(0, TILE)
    place = index
    if not CONTIGUOUS:
        rest = index // ids_per_token
        place = index % ids_per_token * steps[4] + rest % width * steps[3]
        rest = rest // width
        place += rest % height * steps[2]
        rest = rest // height
        place += rest % frames * steps[1] + rest // frames * steps[0]
    value = tl.load(tokens + place, index < count, 0).to(tl.int64)
    bad = (index < count) & ((value < 0) | (value >= vocabulary)) & (value != ignore_index)
    bad_count = tl.sum(bad.to(tl.int64), 0)
    if bad_count > 0:
        tl.atomic_add(found, bad_count)
        if tl.atomic_add(reported, 1) == 0:
            first = tl.min(tl.where(bad, index, count), 0)
            tl.store(found + 1, tl.sum(tl.where(index == first, value, 0), 0))
            tl.store(found + 2, first)
            tl.store(found + 3, vocabulary)


@triton.jit
def counts_at(
    segments, segment_strides, weights, weight_strides, b, n, mask, HORIZON: tl.constexpr, OFFSET: tl.constexpr
):
    """Where `mask`: whether horizon HORIZON counts at position n, whose frame n + OFFSET exists."""
    counts = mask
    if segments is not None:
        clip = segments + b * segment_strides[0]
        now = tl.load(clip + n * segment_strides[1], mask, 0)
        counts = counts & (now == tl.load(clip + (n + OFFSET) * segment_strides[1], mask, 0))
    if weights is not None:
        at = weights + b * weight_strides[0] + n * weight_strides[1] + HORIZON * weight_strides[2]
        counts = counts & (tl.load(at, mask, 0) > 0)
    return counts


@triton.jit
def write_targets(
    tokens, token_mask, segments, position_weights, ids, weights, counted, known, counts,
    token_strides, mask_strides, segment_strides, position_strides,
    block, rows, inside, frames, height, width, ids_per_token, vocabulary, ignore_index,
    HORIZON: tl.constexpr, COUNT: tl.constexpr, OFFSET: tl.constexpr, FACTOR: tl.constexpr,
    ROWS: tl.constexpr, PER_TOKEN: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The targets of a block of the rows of one horizon, to which the pointers to ids, weights and counted belong."""
    row = block * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    x, rest = row % (width // FACTOR), row // (width // FACTOR)
    y, rest = rest % (height // FACTOR), rest // (height // FACTOR)
    n, b = rest % inside, rest // inside
    has_target = in_rows & (n < frames - OFFSET)
    counts_here = counts_at(
        segments, segment_strides, position_weights, position_strides, b, n, has_target, HORIZON, OFFSET
    )
    if weights is not None:
        at = position_weights + b * position_strides[0] + n * position_strides[1] + HORIZON * position_strides[2]
        weight = tl.load(at, in_rows, 0).to(tl.float32)

    # Each cell has FACTOR * FACTOR ids: [ROWS, PER_TOKEN, PADDED].
    f, s = tl.arange(0, PER_TOKEN)[None, :, None], tl.arange(0, PADDED)[None, None, :]
    in_cell = (f < ids_per_token) & (s < FACTOR * FACTOR)
    has_id = has_target[:, None, None] & in_cell
    b, frame = b[:, None, None], (n + OFFSET)[:, None, None]
    y, x = y[:, None, None] * FACTOR + s // FACTOR, x[:, None, None] * FACTOR + s % FACTOR
    at = b * token_strides[0] + frame * token_strides[1] + y * token_strides[2] + x * token_strides[3]
    id = tl.load(tokens + (at + f * token_strides[4]), has_id, -1).to(tl.int64)
    id = tl.where((id >= 0) & (id < vocabulary) & (id != ignore_index), id, -1).to(tl.int32)
    place = row[:, None, None] * (ids_per_token * FACTOR * FACTOR) + f * (FACTOR * FACTOR) + s
    if token_mask is not None and OFFSET == 0:
        at = b * mask_strides[0] + frame * mask_strides[1] + y * mask_strides[2] + x * mask_strides[3]
        is_trained = tl.load(token_mask + (at + f * 0), has_id, 0) != 0
        if known is not None and HORIZON == 0:
            tl.store(known + place, tl.where(is_trained, -1, id), in_rows[:, None, None] & in_cell)
        id = tl.where(is_trained, id, -1)
    id = tl.where(counts_here[:, None, None], id, -1)
    tl.store(ids + place, id, in_rows[:, None, None] & in_cell)

    cell_counts = tl.max((id >= 0).to(tl.int32), 2)
    row_counts = tl.max(cell_counts, 1)
    tl.atomic_add(counts + HORIZON, tl.sum(row_counts, 0).to(tl.int64))
    tl.atomic_add(counts + COUNT + HORIZON, tl.sum(tl.sum(cell_counts, 1), 0).to(tl.int64))
    if counted is not None:
        tl.store(counted + row, row_counts != 0, in_rows)
    if weights is not None:
        f = tl.arange(0, PER_TOKEN)[None, :]
        at = weights + row[:, None] * ids_per_token + f
        tl.store(at, tl.broadcast_to(weight[:, None], at.shape), in_rows[:, None] & (f < ids_per_token))


@triton.jit
def multi_horizon_linear_targets(
    tokens, token_mask, segments, position_weights, ids, weights, counted, known, counts, found,
    token_strides, mask_strides, segment_strides, position_strides,
    batch, positions, frames, height, width, ids_per_token, vocabulary, ignore_index,
    OFFSETS: tl.constexpr, FACTORS: tl.constexpr, FIRST_OFFSETS: tl.constexpr, PREDICTS: tl.constexpr,
    CONTIGUOUS: tl.constexpr, TILE: tl.constexpr, PER_TOKEN: tl.constexpr, PADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(OFFSETS)
    block = tl.program_id(0).to(tl.int64)
    clips = tl.cast(batch, tl.int64)
    tokens_count = clips * frames * height * width * ids_per_token
    blocks = tl.cdiv(tokens_count, TILE)
    if block < blocks:
        check_ids(
            tokens, token_strides, found, counts + 2 * COUNT, block, tokens_count, vocabulary, ignore_index,
            frames, height, width, ids_per_token, CONTIGUOUS, TILE,
        )  # fmt: skip
    for i in tl.static_range(COUNT):
        block -= blocks
        # Positions past the end have no target, but logits, which only predictions need, and horizons that share them.
        inside = positions if PREDICTS else tl.maximum(tl.minimum(positions, frames - FIRST_OFFSETS[i]), 0)
        rows = clips * inside * (height // FACTORS[i]) * (width // FACTORS[i])
        blocks = tl.cdiv(rows, ROWS[i])
        if (block >= 0) & (block < blocks):
            write_targets(
                tokens, token_mask, segments, position_weights, ids, weights, counted, known, counts,
                token_strides, mask_strides, segment_strides, position_strides,
                block, rows, inside, frames, height, width, ids_per_token, vocabulary, ignore_index,
                i, COUNT, OFFSETS[i], FACTORS[i], ROWS[i], PER_TOKEN, PADS[i],
            )  # fmt: skip
        ids += rows * ids_per_token * (FACTORS[i] * FACTORS[i])
        if counted is not None:
            counted += rows
        if weights is not None:
            weights += rows * ids_per_token


@triton.jit
def multi_horizon_linear_sums(
    losses, weights, hits, sums, hit_sums, starts, COUNT: tl.constexpr, SUMS: tl.constexpr, STEP: tl.constexpr
):
    """Program i * SUMS + p: the p-th part of the sum of term i, a horizon if i < COUNT, else a pair."""
    term, part = tl.program_id(0) // SUMS, tl.program_id(0) % SUMS
    first, last = starts[0], starts[1]
    for i in tl.static_range(1, len(starts) - 1):
        first = tl.where(term == i, starts[i], first)
        last = tl.where(term == i, starts[i + 1], last)
    loss = tl.zeros([STEP], tl.float64)
    hit = tl.zeros([STEP], tl.int64)
    is_horizon = term < COUNT
    for step in range(first + part * STEP, last, SUMS * STEP):
        cell = step + tl.arange(0, STEP)
        here = tl.load(losses + cell, cell < last, 0)
        if weights is not None:
            here *= tl.load(weights + cell, (cell < last) & is_horizon, 1)
        loss += here
        if hits is not None:
            hit += tl.load(hits + cell, (cell < last) & is_horizon, 0)
    tl.store(sums + tl.program_id(0), tl.sum(loss, 0))
    if hits is not None:
        tl.store(hit_sums + tl.program_id(0), tl.sum(hit, 0))


@triton.jit
def multi_horizon_linear_means(
    sums, hit_sums, cells, terms, pair_cells, horizon_weights, horizon_stride, pair_weights, pair_stride,
    total, per_horizon, consistency, consistency_counts, accuracy,
    COUNT: tl.constexpr, FAR: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    weighted = tl.cast(0, tl.float64)
    part = tl.arange(0, SUMS)
    for i in range(COUNT):
        mean = tl.sum(tl.load(sums + i * SUMS + part), 0) / tl.maximum(tl.load(cells + i), 1)
        tl.store(per_horizon + i, mean.to(tl.float32))
        weighted += tl.load(horizon_weights + i * horizon_stride).to(tl.float32) * mean
        tl.store(consistency + i, 0.0)
        tl.store(consistency_counts + i, 0)
        if accuracy is not None:
            hits = tl.sum(tl.load(hit_sums + i * SUMS + part), 0).to(tl.float32)
            tl.store(accuracy + i, hits / tl.maximum(tl.load(terms + i), 1).to(tl.float32))
    # One thread stores these zeros and what replaces some of them.
    for p in tl.static_range(len(FAR)):
        count = tl.load(pair_cells + p)
        mean = tl.sum(tl.load(sums + (COUNT + p) * SUMS + part), 0) / tl.maximum(count, 1)
        tl.store(consistency + FAR[p], mean.to(tl.float32))
        tl.store(consistency_counts + FAR[p], count)
        if count > 0:
            weighted += tl.load(pair_weights + FAR[p] * pair_stride).to(tl.float32) * mean
    tl.store(total, weighted.to(tl.float32))


@dataclass(frozen=True)
class TokenTargets(Targets):
    """Targets whose place in `ids` follows from the number of the cross-entropy. These are horizon after horizon, those
    of horizons that share logits apart: each has as many as its leader.

    ids       the ids of each cross-entropy, concatenated, int32; -1 for excluded ids
    weights   the position weight of each cross-entropy, or None
    starts    the first cross-entropy of each horizon, and one past the last
    shifts    horizon i's cross-entropy c has the f * f ids from c * f * f + shifts[i] on
    cells_at  the first of the R * F cells of each horizon, its leader's
    """

    ids: Tensor
    weights: Tensor | None
    starts: tuple[int, ...]
    shifts: tuple[int, ...]
    cells_at: tuple[int, ...]


def targets_of(args: Arguments) -> TokenTargets:
    tokens, device, count = args.tokens, args.tokens.device, len(args.inputs)
    if tokens.dim() == 4:
        tokens = tokens.unsqueeze(-1)
    batch, frames, height, width, per_token = tokens.shape
    positions = args.inputs[0].shape[1]
    first_offsets = [args.offsets[leader] for leader in args.leaders]
    rows = [max(0, min(positions, frames - offset)) for offset in first_offsets]
    if args.return_predictions:
        rows = [positions] * count
    sizes = [batch * n * (height // f) * (width // f) for n, f in zip(rows, args.factors, strict=True)]
    starts = [0, *itertools.accumulate(size * per_token for size in sizes)]
    first_ids = [0, *itertools.accumulate(s * per_token * f * f for s, f in zip(sizes, args.factors, strict=True))]
    shifts = [first - start * f * f for first, start, f in zip(first_ids, starts, args.factors, strict=False)]

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    ids = empty(first_ids[-1], dtype=torch.int32)
    weights = None if args.position_weights is None else empty(starts[-1], dtype=torch.float32)
    excluded = (args.segment_ids, args.token_mask, args.position_weights)
    excludes = args.return_predictions or any(tensor is not None for tensor in excluded)
    counted = empty(sum(sizes), dtype=torch.bool) if excludes else None
    known = None
    if teaches_known_ids(args):
        known = empty(args.inputs[0].shape[:-1].numel(), per_token, args.factors[0] ** 2, dtype=torch.int32)
    counts = torch.zeros(2 * count + 1, dtype=torch.int64, device=device)
    vocabulary = args.weight[0].shape[0] // per_token
    pads = tuple(power_of_2(f * f) for f in args.factors)
    tiles = tuple(max(1, TILE_IDS // pad // power_of_2(per_token)) for pad in pads)
    with token_ids.recording(args.tokens, vocabulary, args.ignore_index) as found:
        launch(
            multi_horizon_linear_targets, ceil_div(tokens.numel(), TILE_IDS) + sum(map(ceil_div, sizes, tiles)), device,
            tokens, args.token_mask, args.segment_ids, args.position_weights, ids, weights, counted, known, counts,
            found, tokens.stride(), strides(args.token_mask, 4), strides(args.segment_ids, 2),
            strides(args.position_weights, 3), batch, positions, frames, height, width, per_token, vocabulary,
            args.ignore_index,
            OFFSETS=tuple(args.offsets), FACTORS=tuple(args.factors), FIRST_OFFSETS=tuple(first_offsets),
            PREDICTS=args.return_predictions,
            CONTIGUOUS=tokens.is_contiguous(), TILE=TILE_IDS, PER_TOKEN=power_of_2(per_token), PADS=pads, ROWS=tiles,
            num_warps=4,
        )  # fmt: skip
    if counted is not None and any(leader != i for i, leader in enumerate(args.leaders)):
        counted = of_leaders(args, counted.split_with_sizes(sizes))
    leads = [leader == i for i, leader in enumerate(args.leaders)]
    own_sizes = [size if lead else 0 for size, lead in zip(sizes, leads, strict=True)]
    firsts = [0, *itertools.accumulate(size * per_token for size in own_sizes)]
    return TokenTargets(
        [n if lead else 0 for n, lead in zip(rows, leads, strict=True)], own_sizes, starts[-1],
        counts[:count], counts[count : 2 * count], counted, known,
        ids=ids, weights=weights, starts=tuple(starts), shifts=tuple(shifts),
        cells_at=tuple(firsts[leader] for leader in args.leaders),
    )  # fmt: skip


def of_leaders(args: Arguments, counted: Sequence[Tensor]) -> Tensor:
    """[R]: the rows that count for any of the horizons that share their logits, given those of each horizon."""
    groups = groups_of(args).values()
    return torch.cat([torch.stack([counted[i] for i in group]).any(0) for group in groups])


def means(
    args: Arguments, targets: TokenTargets, pairs: list[Pair], losses: Tensor, hits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See gemm.multi_horizon_linear_cross_entropy.Passes."""
    count, device = len(args.inputs), losses.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    starts = [*targets.starts]
    for pair in pairs:
        starts.append(starts[-1] + pair.far.shape[0] * args.ids_per_token)
    sums = empty((count + len(pairs)) * SUMS, dtype=torch.float64)
    hit_sums = None if hits is None else empty(sums.shape[0], dtype=torch.int64)
    launch(
        multi_horizon_linear_sums, sums.shape[0], device,
        losses, targets.weights, hits, sums, hit_sums, tuple(starts),
        COUNT=count, SUMS=SUMS, STEP=STEP_LOSSES, num_warps=4,
    )  # fmt: skip
    total, per_horizon, consistency = empty(), empty(count), empty(count)
    consistency_counts = empty(count, dtype=torch.int64)
    accuracy = None if hits is None else empty(count)
    pair_weights = args.consistency_weights
    launch(
        multi_horizon_linear_means, 1, device,
        sums, hit_sums, targets.cells, targets.terms, pairs[0].cells if pairs else None, args.horizon_weights,
        args.horizon_weights.stride(0), pair_weights, 0 if pair_weights is None else pair_weights.stride(0),
        total, per_horizon, consistency, consistency_counts, accuracy,
        COUNT=count, FAR=tuple(pair.horizons[1] for pair in pairs), SUMS=SUMS, num_warps=1,
    )  # fmt: skip
    return total, per_horizon, consistency, consistency_counts, accuracy
