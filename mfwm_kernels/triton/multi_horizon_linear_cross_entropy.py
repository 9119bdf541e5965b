"""multi_horizon_linear_cross_entropy in Triton: torch's matrix products, and passes over chunks of logits between them.

multi_horizon_linear_cross_entropy   A program has a few rows of logits: their losses, and over them their gradients.
                                     Rows that fit in registers are read and written once, longer ones read twice.
multi_horizon_linear_normalisers     log(sum(exp(logits))) of rows, for the next.
multi_horizon_linear_consistency     A program has a far row and the near rows that its cell covers. Bytes: the logits
                                     of both once, near ones that learn twice; the gradients.

The gradient at an asked id is made from its logit, gathered before the row is overwritten, and stored after the row:
so no element of a row is compared with the ids of its cell, of which a far cell has many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm.multi_horizon_linear_cross_entropy import Passes
from ..gemm.multi_horizon_linear_cross_entropy import forward as shared_forward
from ..op import Gradients, Want
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from . import multi_horizon_loss
from .launch import ceil_div, launch, power_of_2

CHUNK_BYTES = 512 * 2**20

scale = multi_horizon_loss.scale

# The longest row that is held in registers, by 16 warps; and how much of longer ones at a time.
LONGEST = 16384
LOOPED = 4096


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), in fp32."""
    z = x.to(tl.float32)
    if SOFTCAP:
        z = z / softcap
        square = z * z
        # An odd polynomial near 0, where 1 - 2 / (exp(2 z) + 1) would cancel.
        p = -5.70498872745e-3 * square + 2.06390887954e-2
        p = p * square - 5.37397155531e-2
        p = p * square + 1.33314422036e-1
        p = p * square - 3.33332819422e-1
        e = tl.exp(-2 * tl.abs(z))
        large = (1 - e) / (1 + e)
        large = tl.where(z < 0, -large, large)
        z = softcap * tl.where(tl.abs(z) < 0.625, z + z * square * p, large)
    return z


@triton.jit
def through_cap(gradient, z, softcap, SOFTCAP: tl.constexpr):
    """The gradient at capped logits z -> at the logits."""
    if SOFTCAP:
        gradient = gradient * (1 - (z / softcap) * (z / softcap))
    return gradient


@triton.jit
def load_row(logits, start, column, in_rows, vocabulary, softcap, SOFTCAP: tl.constexpr):
    """[ROWS, BLOCK] capped logits, -inf past the end."""
    mask = in_rows[:, None] & (column < vocabulary)[None, :]
    z = tl.load(logits + start[:, None] + column[None, :], mask, 0)
    return tl.where(mask, capped(z, softcap, SOFTCAP), float("-inf"))


@triton.jit
def multi_horizon_linear_cross_entropy(
    logits, ids, starts, scales, losses, hits, rows, vocabulary, smoothing, z_loss, softcap,
    SOFTCAP: tl.constexpr, LEARNS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    start = row * vocabulary
    place = tl.arange(0, IDS)
    first_id = tl.load(starts + row, in_rows, 0)
    ids_count = (tl.load(starts + row + 1, in_rows, 0) - first_id).to(tl.int32)
    asked = tl.load(ids + first_id[:, None] + place[None, :], place[None, :] < ids_count[:, None], -1)
    is_kept = asked >= 0
    # Counted as floats: of a sum of bits LLVM makes a population count, and of that local memory.
    kept = tl.sum(tl.where(is_kept, 1.0, 0.0), 1)
    counted = kept > 0
    at_asked = logits + start[:, None] + asked
    asked_z = capped(tl.load(at_asked, is_kept, 0), softcap, SOFTCAP)
    # How often each id stands in its cell.
    times = tl.zeros([ROWS, IDS], tl.float32)
    for j in range(0, tl.max(ids_count, 0)):
        other = tl.load(ids + first_id + j, j < ids_count, -1)
        times += tl.where(asked == other[:, None], 1.0, 0.0)
    times = tl.where(is_kept, times, 0.0)

    column = tl.arange(0, BLOCK)
    if WHOLE:
        z = load_row(logits, start, column, counted, vocabulary, softcap, SOFTCAP)
        # Rows that do not count are all -inf.
        largest = tl.where(counted, tl.max(z, 1), 0.0)
        powers = tl.exp(z - largest[:, None])
        total = tl.sum(powers, 1)
        z_sum = tl.sum(tl.where(z == float("-inf"), 0.0, z), 1)
        found = tl.min(tl.where(z == largest[:, None], column[None, :], vocabulary), 1)
    else:
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        z_sum = tl.zeros([ROWS], tl.float32)
        found = tl.zeros([ROWS], tl.int32)
        for first in range(0, vocabulary, BLOCK):
            z = load_row(logits, start, first + column, counted, vocabulary, softcap, SOFTCAP)
            here = tl.where(counted, tl.max(z, 1), 0.0)
            place_here = tl.min(tl.where(z == here[:, None], first + column[None, :], vocabulary), 1)
            found = tl.where(here > largest, place_here, found)
            most = tl.maximum(largest, here, propagate_nan=tl.PropagateNan.ALL)
            total = total * tl.exp(largest - most) + tl.sum(tl.exp(z - most[:, None]), 1)
            z_sum += tl.sum(tl.where(z == float("-inf"), 0.0, z), 1)
            largest = most
    total = tl.where(counted, total, 1.0)
    log_sum = largest + tl.log(total)
    each = 1.0 / tl.maximum(kept, 1.0)
    loss = (1 - smoothing) * (log_sum - tl.sum(tl.where(is_kept, asked_z, 0.0), 1) * each)
    loss += smoothing * (log_sum - z_sum / vocabulary) + z_loss * log_sum * log_sum
    tl.store(losses + row, tl.where(counted, loss, 0.0), in_rows)
    if hits is not None:
        frequent = tl.max(times, 1)
        candidates = is_kept & (times == frequent[:, None])
        wanted = tl.min(tl.where(candidates, asked, vocabulary), 1)
        tl.store(hits + row, (counted & (wanted == found)).to(tl.int32), in_rows)

    if LEARNS:
        factor = tl.load(scales + row, in_rows, 0)
        slope = factor * (1 + 2 * z_loss * log_sum)
        shift = factor * smoothing / vocabulary
        # All reads of what is overwritten come first.
        tl.debug_barrier()
        if WHOLE:
            gradient = through_cap(powers * (slope / total)[:, None] - shift[:, None], z, softcap, SOFTCAP)
            gradient = tl.where(counted[:, None], gradient, 0.0).to(logits.dtype.element_ty)
            tl.store(
                logits + start[:, None] + column[None, :], gradient, in_rows[:, None] & (column < vocabulary)[None, :]
            )
        else:
            for first in range(0, vocabulary, BLOCK):
                v = first + column
                z = load_row(logits, start, v, counted, vocabulary, softcap, SOFTCAP)
                gradient = tl.exp(z - log_sum[:, None]) * slope[:, None] - shift[:, None]
                gradient = through_cap(gradient, z, softcap, SOFTCAP)
                gradient = tl.where(counted[:, None], gradient, 0.0).to(logits.dtype.element_ty)
                tl.store(logits + start[:, None] + v[None, :], gradient, in_rows[:, None] & (v < vocabulary)[None, :])
        tl.debug_barrier()
        share = times * (factor * (1 - smoothing) * each)[:, None]
        gradient = tl.exp(asked_z - log_sum[:, None]) * slope[:, None] - shift[:, None] - share
        gradient = through_cap(gradient, asked_z, softcap, SOFTCAP)
        # Equal ids store equal values.
        tl.store(at_asked, gradient.to(logits.dtype.element_ty), is_kept)


@triton.jit
def multi_horizon_linear_normalisers(
    logits, out, rows, vocabulary, softcap, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    largest = tl.where(in_rows, float("-inf"), 0.0)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        z = load_row(logits, row * vocabulary, first + tl.arange(0, BLOCK), in_rows, vocabulary, softcap, SOFTCAP)
        most = tl.maximum(largest, tl.max(z, 1), propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(largest - most) + tl.sum(tl.exp(z - most[:, None]), 1)
        largest = most
    tl.store(out + row, largest + tl.log(tl.where(in_rows, total, 1.0)), in_rows)


@triton.jit
def multi_horizon_linear_consistency(
    near, far, near_normalisers, far_normalisers, dots, counted, scale, losses, groups, covered, vocabulary, softcap,
    SOFTCAP: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cell, group = program // groups, program % groups
    counts = cell >= 0
    if counted is not None:
        counts = tl.load(counted + cell) != 0
    near_row = cell * covered * groups + group
    far_start = program * vocabulary
    far_sum = tl.load(far_normalisers + program)
    factor = tl.load(scale).to(tl.float32)
    each = 1.0 / covered
    column = tl.arange(0, BLOCK)

    # With g = -log q the gradient at the teacher, that at a near logit is p (g - <p, g>) / covered.
    if NEAR:
        for s in range(0, covered):
            row = near_row + s * groups
            normaliser = tl.load(near_normalisers + row)
            dot = tl.zeros([BLOCK], tl.float32)
            for first in range(0, vocabulary, BLOCK):
                v = first + column
                mask = (v < vocabulary) & counts
                z = capped(tl.load(near + row * vocabulary + v, mask, 0), softcap, SOFTCAP)
                q = capped(tl.load(far + far_start + v, mask, 0), softcap, SOFTCAP) - far_sum
                dot += tl.where(mask, tl.exp(z - normaliser) * q, 0.0)
            tl.store(dots + row, tl.sum(dot, 0))
        tl.debug_barrier()

    loss = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        v = first + column
        in_row = v < vocabulary
        mask = in_row & counts
        far_z = capped(tl.load(far + far_start + v, mask, 0), softcap, SOFTCAP)
        log_q = far_z - far_sum
        teacher = tl.zeros([BLOCK], tl.float32)
        for s in range(0, covered):
            row = near_row + s * groups
            z = capped(tl.load(near + row * vocabulary + v, mask, 0), softcap, SOFTCAP)
            p = tl.exp(z - tl.load(near_normalisers + row)) * each
            teacher += p
            if NEAR:
                gradient = p * (tl.load(dots + row) - log_q) * factor
                gradient = tl.where(mask, through_cap(gradient, z, softcap, SOFTCAP), 0.0)
                tl.store(near + row * vocabulary + v, gradient.to(near.dtype.element_ty), in_row)
        loss -= tl.where(mask, teacher * log_q, 0.0)
        if FAR:
            gradient = through_cap((tl.exp(log_q) - teacher) * factor, far_z, softcap, SOFTCAP)
            gradient = tl.where(mask, gradient, 0.0)
            tl.store(far + far_start + v, gradient.to(far.dtype.element_ty), in_row)
    tl.store(losses + program, tl.sum(loss, 0))


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return shared_forward(args, want, PASSES)


def tile_of(vocabulary: int, longest: int, ids: int = 1) -> tuple[int, int, int]:
    """(ROWS, BLOCK, warps) of a tile of 2048 elements, or of a longer row; at most 32 elements a thread.

    The ids of its rows are a tile of their own, half as large at most: several arrays of them are alive at once.
    """
    block = min(longest, max(16, power_of_2(vocabulary)))
    rows = max(1, min(2048 // block, 1024 // ids))
    return rows, block, max(4, min(16, rows * block // 512))


def cross_entropy(
    args: Arguments,
    logits: Tensor,
    ids: Tensor,
    starts: Tensor,
    scales: Tensor,
    losses: Tensor,
    hits: Tensor | None,
    learns: bool,
) -> None:
    rows, vocabulary = logits.shape
    whole = power_of_2(vocabulary) <= LONGEST
    # Of a single id ptxas makes 8 bytes of local memory (fp32 rows in pieces, sm_90 and sm_100).
    most_ids = max(2, power_of_2(max(args.factors) ** 2))
    tile_rows, block, warps = tile_of(vocabulary, LONGEST if whole else LOOPED, most_ids)
    launch(
        multi_horizon_linear_cross_entropy, ceil_div(rows, tile_rows), logits.device,
        logits, ids, starts, scales, losses, hits, rows, vocabulary,
        args.label_smoothing, args.z_loss, args.softcap,
        SOFTCAP=args.softcap > 0, LEARNS=learns, WHOLE=whole,
        ROWS=tile_rows, BLOCK=block, IDS=most_ids, num_warps=warps,
    )  # fmt: skip


def normalisers_of(args: Arguments, logits: Tensor) -> Tensor:
    """[rows * F] of logits [rows, F * V]."""
    rows, vocabulary = logits.shape[0] * args.ids_per_token, logits.shape[1] // args.ids_per_token
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    tile_rows, block, warps = tile_of(vocabulary, LOOPED)
    launch(
        multi_horizon_linear_normalisers, ceil_div(rows, tile_rows), logits.device,
        logits, out, rows, vocabulary, args.softcap,
        SOFTCAP=args.softcap > 0, ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def consistency(
    args: Arguments,
    near: Tensor,
    far: Tensor,
    counted: Tensor | None,
    scale: Tensor,
    losses: Tensor,
    learns_near: bool,
    learns_far: bool,
) -> None:
    cells, vocabulary = far.shape[0], far.shape[1] // args.ids_per_token
    near_sums, far_sums = normalisers_of(args, near), normalisers_of(args, far)
    launch(
        multi_horizon_linear_consistency, cells * args.ids_per_token, far.device,
        near, far, near_sums, far_sums, torch.empty_like(near_sums) if learns_near else None, counted, scale, losses,
        args.ids_per_token, near.shape[0] // cells, vocabulary, args.softcap,
        SOFTCAP=args.softcap > 0, NEAR=learns_near, FAR=learns_far,
        BLOCK=min(2048, LOOPED, max(16, power_of_2(vocabulary))), num_warps=4,
    )  # fmt: skip


PASSES = Passes(
    chunk_bytes=CHUNK_BYTES,
    product_dtype=lambda dtype: dtype if dtype == torch.bfloat16 else torch.float32,
    drops=False,
    batched=True,
    add=Tensor.add_,
    cross_entropy=cross_entropy,
    consistency=consistency,
)
