"""From sums of losses to means: the small kernels around the one of multi_horizon_loss.py, which launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from .frame_tiles import entry


@triton.jit
def inverse_of(counts, inverses, term):
    """1 / count of a term, or 0 if the count is 0. The count is on the device, if it depends on values there."""
    if counts is None:
        return inverses[term]
    else:
        count = tl.load(counts + term)
        return tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float32), 0.0)


@triton.jit
def multi_horizon_loss_counts(
    segments, position_weights, counts, rows, positions, frames, elements, segment_strides, position_strides,
    NEAR: tl.constexpr, FAR: tl.constexpr, APART: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    term = tl.program_id(0)
    # Horizon i counts at n with frame n + k_i. A pair's far side is at position n, its near side at n + apart.
    apart, ahead, size = 0, 0, tl.zeros([], tl.int64)
    near, far = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for i in tl.static_range(len(APART)):
        apart = tl.where(term == i, APART[i], apart)
        ahead = tl.where(term == i, AHEAD[i], ahead)
        size = tl.where(term == i, elements[i], size)
        near = tl.where(term == i, NEAR[i], near)
        far = tl.where(term == i, FAR[i], far)
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, rows, BLOCK):
        row = tl.arange(0, BLOCK).to(tl.int64) + start
        b, n = row // positions, row % positions
        valid = (row < rows) & (n + apart < positions) & (n + ahead < frames)
        if segments is not None:
            clip = segments + b * segment_strides[0]
            target = tl.load(clip + (n + ahead) * segment_strides[1], valid, 0)
            valid = valid & (tl.load(clip + n * segment_strides[1], valid, 0) == target)
            valid = valid & (tl.load(clip + (n + apart) * segment_strides[1], valid, 0) == target)
        if position_weights is not None:
            clip_weights = position_weights + b * position_strides[0]
            far_weights = clip_weights + n * position_strides[1] + far * position_strides[2]
            near_weights = clip_weights + (n + apart) * position_strides[1] + near * position_strides[2]
            valid = valid & (tl.load(far_weights, valid, 0) > 0)
            valid = valid & (tl.load(near_weights, valid, 0) > 0)
        total += valid.to(tl.int64)
    tl.store(counts + term, tl.sum(total, 0) * size)


@triton.jit
def multi_horizon_loss_finish(
    partials, programs, counts, inverses, numbers, weights, pair_weights,
    total_out, means_out, counts_out, consistency_out, consistency_counts_out, consistency_size,
    COUNT: tl.constexpr, CHAINS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    total = 0.0
    row = tl.arange(0, ROWS)
    for chain in tl.static_range(len(CHAINS)):
        # The rows of `partial` are the terms of the chain.
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, programs[chain], BLOCK):
            program = start + tl.arange(0, BLOCK)
            places = row.to(tl.int64)[:, None] * programs[chain] + program[None, :]
            exists = (row < len(CHAINS[chain]))[:, None] & (program < programs[chain])[None, :]
            sums += tl.load(partials[chain] + places, exists, 0)
        sums_of_rows = tl.sum(sums, 1)
        for r in tl.static_range(len(CHAINS[chain])):
            total += finished(
                tl.sum(tl.where(row == r, sums_of_rows, 0), 0), counts, inverses, numbers, weights, pair_weights,
                means_out, counts_out, consistency_out, consistency_counts_out, entry(entry(CHAINS, chain), r),
                COUNT, SLOTS,
            )  # fmt: skip
    tl.store(total_out, total)
    # Entries without a pair.
    slot = tl.arange(0, SIZE)
    is_empty = slot < consistency_size
    for p in tl.static_range(len(SLOTS)):
        is_empty = is_empty & (slot != SLOTS[p])
    tl.store(consistency_out + slot, tl.zeros([SIZE], tl.float32), is_empty)
    tl.store(consistency_counts_out + slot, tl.zeros([SIZE], tl.int64), is_empty)


@triton.jit
def finished(
    loss, counts, inverses, numbers, weights, pair_weights, means_out, counts_out, consistency_out,
    consistency_counts_out, TERM: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Store the mean and the count of a term, and return what it adds to the total."""
    mean = loss * inverse_of(counts, inverses, TERM)
    if counts is not None:
        number = tl.load(counts + TERM)
    else:
        number = numbers[TERM]
    if TERM < COUNT:
        tl.store(means_out + TERM, mean)
        tl.store(counts_out + TERM, number)
        return tl.load(weights + TERM).to(tl.float32) * mean
    else:
        tl.store(consistency_out + SLOTS[TERM - COUNT], mean)
        tl.store(consistency_counts_out + SLOTS[TERM - COUNT], number)
        return tl.load(pair_weights + SLOTS[TERM - COUNT]).to(tl.float32) * mean
