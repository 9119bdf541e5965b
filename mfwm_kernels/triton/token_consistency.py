"""Consistency pairs of multi_horizon_linear_cross_entropy in Triton.

multi_horizon_linear_normalisers   log(sum(exp(logits))) of each row, for the next kernel.
multi_horizon_linear_consistency   A program has a far row and the near rows that its cell covers. Bytes: the logits of
                                   both once, near ones that learn twice; the gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.multi_horizon_linear_cross_entropy import Arguments
from .launch import ceil_div, launch, power_of_2
from .logits import capped, load_row, through_cap

# The most columns that a program of each kernel reads at a time.
LOOPED = 4096
LONGEST_PAIR = 2048


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
        mask = in_rows[:, None] & (v < vocabulary)[None, :]
        z = load_row(logits, start[:, None], bias, bias_start[:, None], v, mask, softcap, SOFTCAP)
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


def tile_of(vocabulary: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, warps) of a tile of 2048 elements, or of one longer row; at most 32 elements per thread."""
    block = min(LOOPED, max(16, power_of_2(vocabulary)))
    rows = max(1, 2048 // block)
    return rows, block, max(4, min(16, rows * block // 512))


def normalisers_of(args: Arguments, logits: Tensor, bias: Tensor | None) -> Tensor:
    """The normalisers [rows * F] of logits [rows, F * V] plus their bias [F * V]."""
    rows, vocabulary = logits.shape[0] * args.ids_per_token, logits.shape[1] // args.ids_per_token
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    tile_rows, block, warps = tile_of(vocabulary)
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
    longest = LONGEST_PAIR if near_bias is None and known is None else LONGEST_PAIR // 4
    launch(
        multi_horizon_linear_consistency, cells * args.ids_per_token, far.device,
        near, far, near_bias, far_bias, near_sums, far_sums, dots, counted, known, scale, losses,
        args.ids_per_token, near.shape[0] // cells, vocabulary, args.softcap,
        KNOWN=0 if known is None else known.shape[2], SOFTCAP=args.softcap > 0,
        LEARNS_NEAR=learns_near, LEARNS_FAR=learns_far,
        BLOCK=min(longest, LOOPED, max(16, power_of_2(vocabulary))), num_warps=4,
    )  # fmt: skip
