"""multi_horizon_linear_cross_entropy in Triton, called by autograd.call; torch computes the matrix products.

multi_horizon_linear_cross_entropy   A program computes the losses of a row of logits, or of a few short rows, and
                                     overwrites the logits with their gradients. Bytes: each row once in, once out; rows
                                     that registers do not hold are read twice.

A row belongs to one warp, up to 2048 logits, so that its reductions are shuffles and wait for no other warp; 32
programs of one warp on an SM have 64 KB of rows in flight. The row is requested first, before what depends on memory
twice: the ids of its cell, and the logits at these.

Horizons that share logits are entries of a row, each with a loss: the row is read and written once for all of them. A
program then has one row, and its entries have the ids' second dimension.

The kernel gathers the logits at target ids before it overwrites the row, and stores their gradients after the row's. So
it never compares the elements of a row with the ids of its cell, of which a far cell has many. Each lane has an id: a
near row, with one, costs what a far row with 32 costs.

Longer rows have a warp per 2048 logits, or four that loop. Each thread of these keeps a maximum and a sum of its own
columns, which it rescales as the maximum grows, so that warps meet at the end of the row only. The second read goes
backwards, because the row's end is still in cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm.multi_horizon_linear_cross_entropy import Passes
from ..gemm.multi_horizon_linear_cross_entropy import forward as shared_forward
from ..gemm.products import ADDS_IN_FP32
from ..gemm.token_targets import groups_of
from ..op import Gradients, Want
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from . import multi_horizon_loss
from .launch import ceil_div, launch, power_of_2
from .logits import (
    LOG2_E,
    capped,
    each,
    load_biased,
    load_row,
    power,
    statistics_of_long_row,
    through_cap,
    tile_of,
)
from .token_consistency import consistency, pairs
from .token_targets import TokenTargets, means, targets_of

CHUNK_BYTES = 512 * 2**20

scale = multi_horizon_loss.scale


@triton.jit
def first_largest(z, column, mask, AXIS: tl.constexpr):
    """The largest of each row of z where `mask`, and its first column, which is one of `column` even if some of z are
    NaN."""
    z = tl.where(mask, z.to(tl.float32), float("-inf"))
    largest = tl.max(z, AXIS)
    place = largest if AXIS == 0 else largest[:, None]
    return largest, tl.min(tl.where(z < place, 2**31 - 1, column), AXIS)


@triton.jit
def shares_of(target, entry_shares, ids, first_id, square, ENTRIES: tl.constexpr):
    """For each target id of a row, the sum of the shares of all its occurrences, in any entry."""
    entry = tl.arange(0, ENTRIES)
    share = tl.zeros(target.shape, tl.float32)
    for e in tl.static_range(ENTRIES):
        of_entry = tl.sum(tl.where(entry == e, entry_shares, 0.0), 0)
        first_of_entry = tl.sum(tl.where(entry == e, first_id, 0), 0)
        for j in range(0, square):
            share += tl.where(target == tl.load(ids + first_of_entry + j), of_entry, 0.0)
    return share


@triton.jit
def entries_of(
    cell, starts, places, shifts, SQUARES: tl.constexpr, MEMBERS: tl.constexpr, SHARING: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Of a cell's entries, the horizons that share its logits: the first horizon, how many ids each has, the horizons,
    their cross-entropies, the first of their ids, and which entries there are. The others repeat the first."""
    entry = tl.arange(0, ENTRIES)
    leader = tl.cast(MEMBERS[0], tl.int32)
    square = tl.cast(SQUARES[0], tl.int32)
    sharing = tl.cast(SHARING[0], tl.int32)
    horizon = tl.zeros([ENTRIES], tl.int32)
    place = tl.zeros([ENTRIES], tl.int64)
    first_id = tl.zeros([ENTRIES], tl.int64)
    for i in tl.static_range(len(SQUARES)):
        reached = cell >= starts[i]
        leader = tl.where(reached, MEMBERS[i * ENTRIES], leader)
        square = tl.where(reached, SQUARES[i], square)
        sharing = tl.where(reached, SHARING[i], sharing)
        for e in tl.static_range(ENTRIES):
            here = reached & (entry == e)
            member_place = cell + places[i * ENTRIES + e]
            horizon = tl.where(here, MEMBERS[i * ENTRIES + e], horizon)
            place = tl.where(here, member_place, place)
            first_id = tl.where(here, member_place * SQUARES[i] + shifts[i * ENTRIES + e], first_id)
    return leader, square, horizon, place, first_id, entry < sharing


@triton.jit
def multi_horizon_linear_cross_entropy(
    logits, biases, ids, weights, horizon_weights, weight_stride, cells, losses, hits, predictions, scale,
    first, rows, vocabulary, ids_per_token, bias_step, smoothing, z_loss, softcap, starts, places, shifts,
    SQUARES: tl.constexpr, MEMBERS: tl.constexpr, SHARING: tl.constexpr, ENTRIES: tl.constexpr,
    SOFTCAP: tl.constexpr, SMOOTHS: tl.constexpr, LEARNS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr,
    VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    AXIS: tl.constexpr = 0 if ROWS == 1 else 1
    # A program has the cross-entropies of ROWS rows, or of the ENTRIES horizons that share one row.
    EACH: tl.constexpr = ROWS * ENTRIES
    ID_AXIS: tl.constexpr = 0 if EACH == 1 else 1
    row = tl.program_id(0).to(tl.int64)
    if ROWS > 1:
        row = row * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    start = each(row * vocabulary, ROWS)
    column = tl.arange(0, BLOCK)

    # The cell's horizons, and where their ids are.
    cell = first + row
    if ENTRIES == 1:
        leader = (row * 0).to(tl.int32)
        square = leader + SQUARES[0]
        first_id = cell * SQUARES[0] + shifts[0]
        for i in tl.static_range(1, len(SQUARES)):
            reached = cell >= starts[i]
            leader = tl.where(reached, i, leader)
            square = tl.where(reached, SQUARES[i], square)
            first_id = tl.where(reached, cell * SQUARES[i] + shifts[i], first_id)
        horizon, place, given = leader, cell, in_rows
    else:
        leader, square, horizon, place, first_id, given = entries_of(
            cell, starts, places, shifts, SQUARES, MEMBERS, SHARING, ENTRIES
        )
    bias_start = start
    if biases is not None:
        bias_start = each((leader * bias_step + cell % ids_per_token) * vocabulary, ROWS)

    if ONE_BLOCK:
        mask = None if FULL else each(in_rows, ROWS) & (column < vocabulary)
        z = load_row(logits, start, biases, bias_start, column, mask, softcap, SOFTCAP)

    k = tl.arange(0, IDS)
    target = tl.load(ids + (each(first_id, EACH) + k), each(given, EACH) & (k < each(square, ROWS)), -1)
    is_target = target >= 0
    # Count in fp32: LLVM turns an integer sum of booleans into a popcount, which ends up in local memory.
    target_count = tl.sum(tl.where(is_target, 1.0, 0.0), ID_AXIS)
    counted = target_count > 0
    target_z = capped(load_biased(logits, start, biases, bias_start, target, is_target), softcap, SOFTCAP)
    # How often each target id occurs in its cell.
    times = tl.where(is_target, 1.0, 0.0)
    if IDS > 1:
        times = tl.zeros_like(times)
        for j in range(0, square if ROWS == 1 else tl.max(square, 0)):
            other = tl.load(ids + first_id + j, given & (j < square), -1)
            times += tl.where(target == each(other, EACH), 1.0, 0.0)
        times = tl.where(is_target, times, 0.0)

    if predictions is not None:
        # Of every row, whether it counts or not.
        predicted_z = tl.where(in_rows, float("-inf"), 0.0)
        predicted = leader * 0
        for begin in range(0, vocabulary, BLOCK):
            v = begin + column
            in_row = each(in_rows, ROWS) & (v < vocabulary)
            here, predicted_here = first_largest(
                load_biased(logits, start, biases, bias_start, v, in_row), v, in_row, AXIS
            )
            predicted = tl.where(here > predicted_z, predicted_here, predicted)
            predicted_z = tl.maximum(predicted_z, here)
        tl.store(predictions + cell, predicted, in_rows)
    if ONE_BLOCK:
        largest = tl.max(z, AXIS)
        powers = power(z * LOG2_E - each(largest * LOG2_E, ROWS))
        total = tl.sum(powers, AXIS)
        if SMOOTHS:
            z_sum = tl.sum(z if FULL else tl.where(mask, z, 0.0), AXIS)
        if hits is not None:
            argmax = tl.min(tl.where(z == each(largest, ROWS), column, vocabulary), AXIS)
    else:
        largest, total, z_sum, argmax = statistics_of_long_row(
            logits, start, biases, bias_start, vocabulary, softcap, SOFTCAP, SMOOTHS, hits is not None, FULL, BLOCK,
            VECTOR, LANES,
        )  # fmt: skip
    top = largest * LOG2_E
    # Rows whose cell does not count may be NaN.
    log_sum = largest + tl.log(total)
    target_share = 1.0 / tl.maximum(target_count, 1.0)
    loss = (1 - smoothing) * (log_sum - tl.sum(tl.where(is_target, target_z, 0.0), ID_AXIS) * target_share)
    if SMOOTHS:
        loss += smoothing * (log_sum - z_sum / vocabulary)
    loss += z_loss * log_sum * log_sum
    tl.store(losses + place, tl.where(counted, loss, 0.0), given)
    if hits is not None:
        frequent = tl.max(times, ID_AXIS)
        label = tl.min(tl.where(is_target & (times == each(frequent, EACH)), target, vocabulary), ID_AXIS)
        tl.store(hits + place, (counted & (label == argmax)).to(tl.int32), given)

    if LEARNS:
        factor = tl.load(horizon_weights + horizon * weight_stride).to(tl.float32)
        if weights is not None:
            factor *= tl.load(weights + place, given, 0)
        factor /= tl.maximum(tl.load(cells + horizon), 1).to(tl.float32)
        if scale is not None:
            factor *= tl.load(scale)
        if ENTRIES == 1:
            row_factor, learns = factor, each(counted, ROWS)
        else:
            factor = tl.where(counted, factor, 0.0)
            row_factor, learns = tl.sum(factor, 0), tl.max(counted.to(tl.int32), 0) != 0
        # The gradient of a logit is slope * power - shift.
        slope = each(row_factor * (1 + 2 * z_loss * log_sum) / total, ROWS)
        shift = each(row_factor * smoothing / vocabulary, ROWS)
        top = each(top, ROWS)
        # All threads must have read the row before it is overwritten.
        tl.debug_barrier()
        if ONE_BLOCK:
            gradient = powers * slope - shift if SMOOTHS else powers * slope
            gradient = through_cap(gradient, z, softcap, SOFTCAP).to(logits.dtype.element_ty)
            in_row = each(in_rows, ROWS) if FULL else mask
            tl.store(logits + (start + column), gradient, in_row & learns)
            tl.store(logits + (start + column), tl.zeros_like(gradient), in_row & (learns == 0))
        else:
            for begin in range(tl.cdiv(vocabulary, BLOCK) * BLOCK - BLOCK, -BLOCK, -BLOCK):
                v = begin + column
                mask = None if FULL else v < vocabulary
                z = load_row(logits, start, biases, bias_start, v, mask, softcap, SOFTCAP)
                gradient = power(z * LOG2_E - top) * slope
                gradient = gradient - shift if SMOOTHS else gradient
                gradient = tl.where(learns, through_cap(gradient, z, softcap, SOFTCAP), 0.0)
                tl.store(logits + (start + v), gradient.to(logits.dtype.element_ty), mask)
        tl.debug_barrier()
        share = factor * (1 - smoothing) * target_share
        share = times * each(share, ROWS) if ENTRIES == 1 else shares_of(target, share, ids, first_id, square, ENTRIES)
        gradient = power(target_z * LOG2_E - top) * slope - shift - share
        gradient = through_cap(gradient, target_z, softcap, SOFTCAP)
        # Duplicate ids store the same value.
        tl.store(logits + (start + target), gradient.to(logits.dtype.element_ty), is_target)


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return shared_forward(args, want, PASSES)


def cross_entropy(
    args: Arguments,
    logits: Tensor,
    targets: TokenTargets,
    first: int,
    biases: Tensor | None,
    losses: Tensor,
    hits: Tensor | None,
    predictions: Tensor | None,
    learns: bool,
    scale: Tensor | None,
) -> None:
    rows, vocabulary = logits.shape
    ids = power_of_2(max(args.factors) ** 2)
    groups = groups_of(args)
    entries = power_of_2(max(map(len, groups.values())))
    tile = tile_of(vocabulary, logits.itemsize, ids * entries, 1 if entries > 1 else 8)
    # Entries past those of a group repeat its leader, and do not count.
    members = [group[e] if e < len(group) else i for i, group in groups.items() for e in range(entries)]
    shares = entries > 1
    launch(
        multi_horizon_linear_cross_entropy, ceil_div(rows, tile["ROWS"]), logits.device,
        logits, biases, targets.ids, targets.weights, args.horizon_weights, args.horizon_weights.stride(0),
        targets.cells, losses, hits, predictions, scale, first, rows, vocabulary, args.ids_per_token,
        0 if len(args.biases) == 1 else args.ids_per_token, args.label_smoothing, args.z_loss, args.softcap,
        tuple(targets.cells_at[i] for i in groups),
        tuple(targets.starts[i] - targets.cells_at[i] for i in members) if shares else None,
        tuple(targets.shifts[i] for i in members),
        SQUARES=tuple(args.factors[i] ** 2 for i in groups), MEMBERS=tuple(members) if shares else None,
        SHARING=tuple(map(len, groups.values())) if shares else None, ENTRIES=entries, SOFTCAP=args.softcap > 0,
        SMOOTHS=args.label_smoothing > 0, LEARNS=learns, IDS=ids, **tile,
        # With predictions or shared logits, ptxas spills up to 16 bytes (sm_80, sm_90) to stay below a limit that it
        # chooses.
        maxnreg=None if predictions is None and not shares else 255 if tile["ONE_BLOCK"] else 128,
    )  # fmt: skip


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 needs products that are stored in fp32, which torch has from the version on that adds in fp32."""
    return torch.float32 if dtype == torch.float16 and not ADDS_IN_FP32 else dtype


PASSES = Passes(
    chunk_bytes=CHUNK_BYTES,
    product_dtype=product_dtype,
    drops=False,
    batched=True,
    add=Tensor.add_,
    column_sums=lambda rows: rows.sum(0, dtype=torch.float32),
    targets=targets_of,
    cross_entropy=cross_entropy,
    pairs=pairs,
    consistency=consistency,
    means=means,
)
