"""multi_horizon_linear_cross_entropy in Triton, called by autograd.call; torch computes the matrix products.

multi_horizon_linear_cross_entropy   A program computes the losses of a few rows of logits, and overwrites the
                                     logits with their gradients. Rows that registers hold are read once, others twice.
multi_horizon_linear_normalisers     log(sum(exp(logits))) of each row, for the next kernel.
multi_horizon_linear_consistency     A program has a far row and the near rows that its cell covers. Bytes: the logits
                                     of both once, near ones that learn twice; the gradients.

The kernel gathers the logits at target ids before it overwrites the row, and stores their gradients after the row's. So
it never compares the elements of a row with the ids of its cell, of which a far cell has many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm.multi_horizon_linear_cross_entropy import Bias, Passes
from ..gemm.multi_horizon_linear_cross_entropy import forward as shared_forward
from ..op import Gradients, Want
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from . import multi_horizon_loss
from .launch import ceil_div, launch, power_of_2

CHUNK_BYTES = 512 * 2**20

scale = multi_horizon_loss.scale

# The longest row that the registers of 16 warps hold, and the block size for longer rows.
LONGEST = 16384
LOOPED = 4096


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), in fp32."""
    z = x.to(tl.float32)
    if SOFTCAP:
        z = z / softcap
        square = z * z
        # An odd polynomial near 0, where 1 - 2 / (exp(2 z) + 1) would lose digits to cancellation.
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
    """The gradient of the logits, given the gradient of the capped logits z."""
    if SOFTCAP:
        gradient = gradient * (1 - (z / softcap) * (z / softcap))
    return gradient


@triton.jit
def load_biased(logits, start, biases, bias_start, column, mask):
    """[ROWS, BLOCK] logits plus biases, in fp32 where there are any."""
    z = tl.load(logits + start[:, None] + column[None, :], mask, 0)
    if biases is not None:
        z = z.to(tl.float32) + tl.load(biases + bias_start[:, None] + column[None, :], mask, 0)
    return z


@triton.jit
def load_row(logits, start, biases, bias_start, column, in_rows, vocabulary, softcap, SOFTCAP: tl.constexpr):
    """[ROWS, BLOCK] capped logits, -inf past the end."""
    mask = in_rows[:, None] & (column < vocabulary)[None, :]
    z = load_biased(logits, start, biases, bias_start, column, mask)
    return tl.where(mask, capped(z, softcap, SOFTCAP), float("-inf"))


@triton.jit
def first_largest(z, column, mask):
    """The largest of each row of z [ROWS, BLOCK] where `mask`, and its first column, which is one of `column` even if
    some of z are NaN."""
    z = tl.where(mask, z.to(tl.float32), float("-inf"))
    largest = tl.max(z, 1)
    return largest, tl.min(tl.where(z < largest[:, None], 2**31 - 1, column[None, :]), 1)


@triton.jit
def multi_horizon_linear_cross_entropy(
    logits, biases, bias_rows, ids, starts, scales, losses, hits, predictions, rows, vocabulary, smoothing, z_loss,
    softcap,
    SOFTCAP: tl.constexpr, LEARNS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    start = row * vocabulary
    k = tl.arange(0, IDS)
    first_id = tl.load(starts + row, in_rows, 0)
    ids_count = (tl.load(starts + row + 1, in_rows, 0) - first_id).to(tl.int32)
    target = tl.load(ids + first_id[:, None] + k[None, :], k[None, :] < ids_count[:, None], -1)
    is_target = target >= 0
    # Count in fp32: LLVM turns an integer sum of booleans into a popcount, which ends up in local memory.
    target_count = tl.sum(tl.where(is_target, 1.0, 0.0), 1)
    counted = target_count > 0
    target_logits = logits + start[:, None] + target
    target_z = tl.load(target_logits, is_target, 0)
    bias_start = start
    if biases is not None:
        bias_start = tl.load(bias_rows + row, in_rows, 0).to(tl.int64) * vocabulary
        target_z = target_z.to(tl.float32) + tl.load(biases + bias_start[:, None] + target, is_target, 0)
    target_z = capped(target_z, softcap, SOFTCAP)
    # How often each target id occurs in its cell.
    times = tl.zeros([ROWS, IDS], tl.float32)
    for j in range(0, tl.max(ids_count, 0)):
        other = tl.load(ids + first_id + j, j < ids_count, -1)
        times += tl.where(target == other[:, None], 1.0, 0.0)
    times = tl.where(is_target, times, 0.0)

    column = tl.arange(0, BLOCK)
    if predictions is not None:
        # Of every row, whether it counts or not.
        predicted_z = tl.full([ROWS], float("-inf"), tl.float32)
        predicted = tl.zeros([ROWS], tl.int32)
        for first in range(0, vocabulary, BLOCK):
            v = first + column
            mask = in_rows[:, None] & (v < vocabulary)[None, :]
            z = load_biased(logits, start, biases, bias_start, v, mask)
            here, predicted_here = first_largest(z, v, mask)
            predicted = tl.where(here > predicted_z, predicted_here, predicted)
            predicted_z = tl.maximum(predicted_z, here)
        tl.store(predictions + row, predicted, in_rows)
    if ONE_BLOCK:
        z = load_row(logits, start, biases, bias_start, column, counted, vocabulary, softcap, SOFTCAP)
        # Rows that do not count contain only -inf.
        largest = tl.where(counted, tl.max(z, 1), 0.0)
        powers = tl.exp(z - largest[:, None])
        total = tl.sum(powers, 1)
        z_sum = tl.sum(tl.where(z == float("-inf"), 0.0, z), 1)
        argmax = tl.min(tl.where(z == largest[:, None], column[None, :], vocabulary), 1)
    else:
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        z_sum = tl.zeros([ROWS], tl.float32)
        argmax = tl.zeros([ROWS], tl.int32)
        for first in range(0, vocabulary, BLOCK):
            z = load_row(logits, start, biases, bias_start, first + column, counted, vocabulary, softcap, SOFTCAP)
            here = tl.where(counted, tl.max(z, 1), 0.0)
            argmax_here = tl.min(tl.where(z == here[:, None], first + column[None, :], vocabulary), 1)
            argmax = tl.where(here > largest, argmax_here, argmax)
            most = tl.maximum(largest, here, propagate_nan=tl.PropagateNan.ALL)
            total = total * tl.exp(largest - most) + tl.sum(tl.exp(z - most[:, None]), 1)
            z_sum += tl.sum(tl.where(z == float("-inf"), 0.0, z), 1)
            largest = most
    total = tl.where(counted, total, 1.0)
    log_sum = largest + tl.log(total)
    target_share = 1.0 / tl.maximum(target_count, 1.0)
    loss = (1 - smoothing) * (log_sum - tl.sum(tl.where(is_target, target_z, 0.0), 1) * target_share)
    loss += smoothing * (log_sum - z_sum / vocabulary) + z_loss * log_sum * log_sum
    tl.store(losses + row, tl.where(counted, loss, 0.0), in_rows)
    if hits is not None:
        frequent = tl.max(times, 1)
        candidates = is_target & (times == frequent[:, None])
        label = tl.min(tl.where(candidates, target, vocabulary), 1)
        tl.store(hits + row, (counted & (label == argmax)).to(tl.int32), in_rows)

    if LEARNS:
        factor = tl.load(scales + row, in_rows, 0)
        slope = factor * (1 + 2 * z_loss * log_sum)
        shift = factor * smoothing / vocabulary
        # All threads must have read the row before it is overwritten.
        tl.debug_barrier()
        if ONE_BLOCK:
            gradient = through_cap(powers * (slope / total)[:, None] - shift[:, None], z, softcap, SOFTCAP)
            gradient = tl.where(counted[:, None], gradient, 0.0).to(logits.dtype.element_ty)
            tl.store(
                logits + start[:, None] + column[None, :], gradient, in_rows[:, None] & (column < vocabulary)[None, :]
            )
        else:
            for first in range(0, vocabulary, BLOCK):
                v = first + column
                z = load_row(logits, start, biases, bias_start, v, counted, vocabulary, softcap, SOFTCAP)
                gradient = tl.exp(z - log_sum[:, None]) * slope[:, None] - shift[:, None]
                gradient = through_cap(gradient, z, softcap, SOFTCAP)
                gradient = tl.where(counted[:, None], gradient, 0.0).to(logits.dtype.element_ty)
                tl.store(logits + start[:, None] + v[None, :], gradient, in_rows[:, None] & (v < vocabulary)[None, :])
        tl.debug_barrier()
        share = times * (factor * (1 - smoothing) * target_share)[:, None]
        gradient = tl.exp(target_z - log_sum[:, None]) * slope[:, None] - shift[:, None] - share
        gradient = through_cap(gradient, target_z, softcap, SOFTCAP)
        # Duplicate ids store the same value.
        tl.store(target_logits, gradient.to(logits.dtype.element_ty), is_target)


@triton.jit
def multi_horizon_linear_normalisers(
    logits, bias, out, rows, ids_per_token, vocabulary, softcap,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    largest = tl.where(in_rows, float("-inf"), 0.0)
    total = tl.zeros([ROWS], tl.float32)
    start, bias_start = row * vocabulary, row % ids_per_token * vocabulary
    for first in range(0, vocabulary, BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = load_row(logits, start, bias, bias_start, v, in_rows, vocabulary, softcap, SOFTCAP)
        most = tl.maximum(largest, tl.max(z, 1), propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(largest - most) + tl.sum(tl.exp(z - most[:, None]), 1)
        largest = most
    tl.store(out + row, largest + tl.log(tl.where(in_rows, total, 1.0)), in_rows)


@triton.jit
def capped_row(row, bias, bias_start, column, mask, softcap, SOFTCAP: tl.constexpr):
    """Columns of a row of logits, plus their bias if there is one, capped."""
    z = tl.load(row + column, mask, 0)
    if bias is not None:
        z = z.to(tl.float32) + tl.load(bias + bias_start + column, mask, 0)
    return capped(z, softcap, SOFTCAP)


@triton.jit
def multi_horizon_linear_consistency(
    near, far, near_bias, far_bias, near_normalisers, far_normalisers, dots, counted, known, scale, losses,
    ids_per_token, covered, vocabulary, softcap,
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
    factor = tl.load(scale).to(tl.float32)
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
                dot += tl.where(mask, tl.exp(z - normaliser) * q, 0.0)
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
            p = tl.exp(z - tl.load(near_normalisers + row)) * near_share
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
            gradient = through_cap((tl.exp(log_q) - teacher) * factor, far_z, softcap, SOFTCAP)
            gradient = tl.where(mask, gradient, 0.0)
            tl.store(far + far_start + v, gradient.to(far.dtype.element_ty), in_row)
    tl.store(losses + program, tl.sum(loss, 0))


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return shared_forward(args, want, PASSES)


def tile_of(vocabulary: int, longest: int, ids: int = 1) -> tuple[int, int, int]:
    """(ROWS, BLOCK, warps) of a tile of 2048 elements, or of one longer row; at most 32 elements per thread.

    The ids of its rows form another tile, at most half as large, because several arrays of that shape are live at once.
    """
    block = min(longest, max(16, power_of_2(vocabulary)))
    rows = max(1, min(2048 // block, 1024 // ids))
    return rows, block, max(4, min(16, rows * block // 512))


def cross_entropy(
    args: Arguments,
    logits: Tensor,
    bias: Bias | None,
    ids: Tensor,
    starts: Tensor,
    scales: Tensor,
    losses: Tensor,
    hits: Tensor | None,
    predictions: Tensor | None,
    learns: bool,
) -> None:
    rows, vocabulary = logits.shape
    biases, bias_rows = (None, None) if bias is None else bias
    one_block = power_of_2(vocabulary) <= LONGEST
    # At least 2: with 1 id, ptxas spills 8 bytes (fp32 rows longer than LONGEST, sm_90 and sm_100).
    most_ids = max(2, power_of_2(max(args.factors) ** 2))
    # Half a tile with predictions: else ptxas spills 16 bytes (in fp32, long rows on sm_80 and 5 ids on sm_100)
    looped = LOOPED if predictions is None else LOOPED // 2
    tile_rows, block, warps = tile_of(vocabulary, LONGEST if one_block else looped, most_ids)
    if predictions is not None:
        tile_rows = max(1, tile_rows // 4)
    launch(
        multi_horizon_linear_cross_entropy, ceil_div(rows, tile_rows), logits.device,
        logits, biases, bias_rows, ids, starts, scales, losses, hits, predictions, rows, vocabulary,
        args.label_smoothing, args.z_loss, args.softcap,
        SOFTCAP=args.softcap > 0, LEARNS=learns, ONE_BLOCK=one_block,
        ROWS=tile_rows, BLOCK=block, IDS=most_ids, num_warps=warps,
        # With predictions, ptxas spills 8 bytes on sm_100 to stay below a limit that it chooses.
        maxnreg=None if predictions is None else 128,
    )  # fmt: skip


def normalisers_of(args: Arguments, logits: Tensor, bias: Tensor | None) -> Tensor:
    """The normalisers [rows * F] of logits [rows, F * V] plus their bias [F * V]."""
    rows, vocabulary = logits.shape[0] * args.ids_per_token, logits.shape[1] // args.ids_per_token
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    tile_rows, block, warps = tile_of(vocabulary, LOOPED)
    launch(
        multi_horizon_linear_normalisers, ceil_div(rows, tile_rows), logits.device,
        logits, bias, out, rows, args.ids_per_token, vocabulary, args.softcap,
        SOFTCAP=args.softcap > 0, ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def consistency(
    args: Arguments,
    near: Tensor,
    far: Tensor,
    near_bias: Tensor | None,
    far_bias: Tensor | None,
    counted: Tensor | None,
    known: Tensor | None,
    scale: Tensor,
    losses: Tensor,
    learns_near: bool,
    learns_far: bool,
) -> None:
    cells, vocabulary = far.shape[0], far.shape[1] // args.ids_per_token
    near_sums, far_sums = normalisers_of(args, near, near_bias), normalisers_of(args, far, far_bias)
    dots = torch.empty_like(near_sums) if learns_near else None
    # Shorter with a bias or known ids: else ptxas spills 8 to 16 bytes (fp32, 2048 on sm_80, 1024 on sm_100).
    longest = 2048 if near_bias is None and known is None else 512
    launch(
        multi_horizon_linear_consistency, cells * args.ids_per_token, far.device,
        near, far, near_bias, far_bias, near_sums, far_sums, dots, counted, known, scale, losses,
        args.ids_per_token, near.shape[0] // cells, vocabulary, args.softcap,
        KNOWN=0 if known is None else known.shape[2], SOFTCAP=args.softcap > 0,
        LEARNS_NEAR=learns_near, LEARNS_FAR=learns_far,
        BLOCK=min(longest, LOOPED, max(16, power_of_2(vocabulary))), num_warps=4,
    )  # fmt: skip


PASSES = Passes(
    chunk_bytes=CHUNK_BYTES,
    product_dtype=lambda dtype: dtype if dtype == torch.bfloat16 else torch.float32,
    drops=False,
    batched=True,
    add=Tensor.add_,
    column_sums=lambda rows: rows.sum(0, dtype=torch.float32),
    cross_entropy=cross_entropy,
    consistency=consistency,
)
