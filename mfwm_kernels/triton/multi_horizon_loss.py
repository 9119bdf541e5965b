"""multi_horizon_loss in Triton, called by autograd.call: one pass over frames computes losses and gradients.

multi_horizon_loss         A program has a tile (see frames.py; about 4096 pixels) of frame m of one clip. It computes
                           the pyramid in registers, compares it with the predictions of frame m made at m - k_i,
                           compares these with each other, and writes their gradients. Bytes: the video, the predictions
                           and the gradients, once each; a column of loss sums per program.
multi_horizon_loss_counts  With segments or position weights only: counts the elements that each term is a mean over.
multi_horizon_loss_finish  One program computes means and total from sums and counts, so that the host reads nothing.
multi_horizon_loss_scale   Multiplies gradients by the upstream gradient, read on the device; returns early if it is 1.

A distribution's prediction is two views of one tensor: its means, in `preds`, and its log-scales, in `log_scales`.

If two factors do not divide one another (2 and 3), each needs a launch. The launches that a horizon needs add up its
gradient in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import stored_dtype
from ..horizon_loss import gradients_of_weights, index_of
from ..op import Gradients, Want
from ..ops.multi_horizon_loss import KIND_OF_MEANS, KINDS, LOG_SCALE_LIMIT, Arguments
from .frames import (
    average,
    axis,
    chains_of,
    channels_innermost,
    frame_offsets,
    inside,
    load_frame,
    needs_long,
    repeated,
    tiling_of,
)
from .launch import ceil_div, launch, power_of_2, strides, warps_of

TILE_ELEMENTS = 4096
SCALE_BLOCK = 4096
LIMIT = tl.constexpr(LOG_SCALE_LIMIT)


@triton.jit
def sign(difference):
    # Otherwise the difference is 0, or NaN, which must propagate.
    return tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))


@triton.jit
def loss_and_slope(difference, mask, delta, eps, KIND: tl.constexpr):
    """The loss of each element and its derivative, both 0 outside the mask."""
    size = tl.abs(difference)
    if KIND == "mse":
        loss = difference * difference
        slope = 2 * difference
    elif KIND == "l1":
        loss = size
        slope = sign(difference)
    elif KIND == "huber":
        loss = tl.where(size > delta, delta * (size - 0.5 * delta), 0.5 * difference * difference)
        slope = tl.where(difference > delta, delta, tl.where(difference < -delta, -delta, difference))
    else:
        loss = tl.sqrt(difference * difference + eps * eps)
        slope = difference / loss
    return tl.where(mask, loss, 0), tl.where(mask, slope, 0)


@triton.jit
def likelihood_and_slopes(difference, log_scale, mask, beta, KIND: tl.constexpr):
    """The negative log-likelihood of each element and its derivatives by mean and log-scale, all 0 outside the mask."""
    # Comparisons with NaN are false, so that it propagates.
    s = tl.where(log_scale > LIMIT, LIMIT, tl.where(log_scale < -LIMIT, -LIMIT, log_scale))
    inverse = tl.exp(-s)
    if KIND == "gaussian":
        factor = tl.exp(beta * s)
        square = difference * difference * inverse
        loss = 0.5 * (s + square) * factor
        slope = difference * inverse * factor
        scale_slope = 0.5 * (1 - square) * factor
    else:
        size = tl.abs(difference) * inverse
        loss = s + size
        slope = sign(difference) * inverse
        scale_slope = 1 - size
    scale_slope = tl.where(mask & (tl.abs(log_scale) <= LIMIT), scale_slope, 0)
    return tl.where(mask, loss, 0), tl.where(mask, slope, 0), scale_slope


@triton.jit
def inverse_of(counts, inverses, term):
    """1 / count of a term, or 0 if the count is 0. The count is on the device, if it depends on values there."""
    if counts is None:
        return inverses[term]
    else:
        count = tl.load(counts + term)
        return tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float32), 0.0)


@triton.jit
def multi_horizon_loss(
    preds, gradients, log_scales, scale_gradients, video, segments, position_weights, counts, inverses,
    weights, pair_weights, partial,
    programs, visited_frames, first_frame, frames, positions, channels, width,
    cells_y, cells_x, tiles_y, tiles_x, channel_blocks, scale, shift, delta, eps,
    pred_strides, gradient_strides, video_strides, segment_strides, weight_stride, pair_offsets,
    position_strides, motion_gain, beta,
    OFFSETS: tl.constexpr, LEVELS: tl.constexpr, PATCHES: tl.constexpr, HORIZONS: tl.constexpr, LOSS_ROWS: tl.constexpr,
    ADDED: tl.constexpr, TERMS: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, PAIR_ROWS: tl.constexpr,
    PADDED: tl.constexpr, RATIOS: tl.constexpr, KINDS: tl.constexpr, PAIR_KINDS: tl.constexpr, DETACH: tl.constexpr,
    RESIDUAL: tl.constexpr, TRUE: tl.constexpr, PADS: tl.constexpr,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, CHANNELS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(OFFSETS)
    program = tl.program_id(0).to(tl.int64)
    c = (program % channel_blocks * CHANNELS).to(tl.int32) + tl.arange(0, CHANNELS)
    tile = program // channel_blocks
    first_x = (tile % tiles_x * CELLS_X).to(tl.int32)
    first_y = (tile // tiles_x % tiles_y * CELLS_Y).to(tl.int32)
    visited = tile // (tiles_x * tiles_y)
    b, m = visited // visited_frames, first_frame + visited % visited_frames

    # Which horizons have a position that predicts frame m, for which of them it counts, and its weight.
    active = ()
    counted = ()
    weights_here = ()
    any_counts = m < 0
    for i in tl.static_range(COUNT):
        n = m - OFFSETS[i]
        has_position = (n >= 0) & (n < positions)
        counts_here = has_position & (m < frames)
        if segments is not None:
            clip = segments + b * segment_strides[0]
            then = tl.load(clip + n * segment_strides[1], counts_here, 0)
            counts_here = counts_here & (then == tl.load(clip + m * segment_strides[1], counts_here, 0))
        if position_weights is not None:
            clip_weights = position_weights + b * position_strides[0]
            row = clip_weights + n * position_strides[1] + tl.full([], HORIZONS[i], tl.int64) * position_strides[2]
            weight_here = tl.load(row, counts_here, 0)
            counts_here = counts_here & (weight_here > 0)
            weights_here = weights_here + (tl.where(counts_here, weight_here, 0).to(tl.float32),)
        active = active + (has_position,)
        counted = counted + (counts_here,)
        any_counts = any_counts | counts_here

    y, in_y = axis(first_y, cells_y, CELLS_Y, TRUE, PADS, 0)
    x, in_x = axis(first_x, cells_x, CELLS_X, TRUE, PADS, 0)
    pixels = inside(in_y, in_x, c < channels)
    pixel_offsets = frame_offsets(y, x, c, channels, width, video_strides, 0, LONG)
    clip_video = video + b * video_strides[0]
    # The pyramid of frame m, level by level.
    values = load_frame(clip_video + m * video_strides[1], pixel_offsets, pixels & any_counts, scale, shift)
    pyramid = (values,)
    for level in tl.static_range(1, len(TRUE)):
        values = average(values, PADS[level - 1] // PADS[level], TRUE[level - 1] // TRUE[level])
        pyramid = pyramid + (values,)

    # The predictions of frame m.
    masks = ()
    predictions = ()
    scales = ()
    motions = ()
    for i in tl.static_range(COUNT):
        y, in_y = axis(first_y, cells_y, CELLS_Y, TRUE, PADS, LEVELS[i])
        x, in_x = axis(first_x, cells_x, CELLS_X, TRUE, PADS, LEVELS[i])
        mask = inside(in_y, in_x, c < channels)
        n = m - OFFSETS[i]
        narrow = width // (TRUE[0] // TRUE[LEVELS[i]])
        offsets = frame_offsets(y, x, c, channels, narrow, pred_strides[i], PATCHES[i], LONG)
        pred_base = preds[i] + b * pred_strides[i][0] + n * pred_strides[i][1]
        prediction = tl.load(pred_base + offsets, mask & counted[i], 0).to(tl.float32)
        # Unused without a distribution: a tuple of tensors cannot contain None.
        log_scale = prediction
        if log_scales[i] is not None:
            scale_base = log_scales[i] + b * pred_strides[i][0] + n * pred_strides[i][1]
            log_scale = tl.load(scale_base + offsets, mask & counted[i], 0).to(tl.float32)
        if RESIDUAL or motion_gain is not None:
            current = clip_video + n * video_strides[1]
            values = load_frame(current, pixel_offsets, pixels & counted[i], scale, shift)
            values = average(values, PADS[0] // PADS[LEVELS[i]], TRUE[0] // TRUE[LEVELS[i]])
            if RESIDUAL:
                prediction += values
            if motion_gain is not None:
                # Frame m may be NaN where this horizon does not count.
                moved = tl.where(mask & counted[i], tl.abs(pyramid[LEVELS[i]] - values), 0)
                motions = motions + (1 + motion_gain * moved,)
        scales = scales + (log_scale,)
        masks = masks + (mask,)
        predictions = predictions + (prediction,)

    # Losses and gradients. Each pair is computed twice, once per side's gradient; the far side also sums its loss.
    for i in tl.static_range(COUNT):
        gradient = tl.zeros(predictions[i].shape, tl.float32)
        if LOSS_ROWS[i] >= 0:
            weight = tl.load(weights + HORIZONS[i] * weight_stride).to(tl.float32)
            difference = predictions[i] - pyramid[LEVELS[i]]
            mask = masks[i] & counted[i]
            if log_scales[i] is None:
                loss, slope = loss_and_slope(difference, mask, delta, eps, tl.constexpr(KINDS[i]))
            else:
                loss, slope, scale_slope = likelihood_and_slopes(
                    difference, scales[i], mask, beta, tl.constexpr(KINDS[i])
                )
            if motion_gain is not None:
                loss *= motions[i]
                slope *= motions[i]
                if log_scales[i] is not None:
                    scale_slope *= motions[i]
            factor = weight * inverse_of(counts, inverses, TERMS[LOSS_ROWS[i]])
            if position_weights is not None:
                factor *= weights_here[i]
            gradient += slope * factor
            loss_sum = partial + LOSS_ROWS[i] * programs + program
            total = tl.sum(tl.sum(tl.sum(loss, 2), 1), 0)
            if position_weights is not None:
                total *= weights_here[i]
            tl.store(loss_sum, total)
        for p in tl.static_range(len(NEAR)):
            if (NEAR[p] == i) or (FAR[p] == i):
                weight = tl.load(pair_weights + pair_offsets[p]).to(tl.float32)
                weight = weight * inverse_of(counts, inverses, TERMS[PAIR_ROWS[p]])
                difference = predictions[FAR[p]] - average(predictions[NEAR[p]], PADDED[p], RATIOS[p])
                both = masks[FAR[p]] & (counted[NEAR[p]] & counted[FAR[p]])
                loss, slope = loss_and_slope(difference, both, delta, eps, tl.constexpr(PAIR_KINDS[p]))
                if FAR[p] == i:
                    tl.store(partial + PAIR_ROWS[p] * programs + program, tl.sum(tl.sum(tl.sum(loss, 2), 1), 0))
                    if DETACH != "far":
                        gradient += slope * weight
                elif DETACH != "near":
                    gradient -= repeated(slope * (weight * (1.0 / (RATIOS[p] * RATIOS[p]))), PADDED[p])
        if gradients[i] is not None:
            y, in_y = axis(first_y, cells_y, CELLS_Y, TRUE, PADS, LEVELS[i])
            x, in_x = axis(first_x, cells_x, CELLS_X, TRUE, PADS, LEVELS[i])
            narrow = width // (TRUE[0] // TRUE[LEVELS[i]])
            steps = gradient_strides[i]
            offsets = frame_offsets(y, x, c, channels, narrow, steps, PATCHES[i], LONG)
            gradient_base = gradients[i] + b * steps[0] + (m - OFFSETS[i]) * steps[1]
            write_mask = masks[i] & active[i]
            if ADDED[i]:
                gradient += tl.load(gradient_base + offsets, write_mask, 0)
            tl.store(gradient_base + offsets, gradient.to(gradients[i].dtype.element_ty), write_mask)
            if scale_gradients[i] is not None:
                scale_base = scale_gradients[i] + b * steps[0] + (m - OFFSETS[i]) * steps[1]
                scale_gradient = scale_slope * factor
                tl.store(scale_base + offsets, scale_gradient.to(gradients[i].dtype.element_ty), write_mask)


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
    sums, counts, inverses, numbers, weights, pair_weights, weight_stride, pair_offsets, pair_slots,
    total_out, means_out, counts_out, consistency_out, consistency_counts_out, consistency_size,
    COUNT: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = 0.0
    slot = tl.arange(0, BLOCK)
    consistency = tl.zeros([BLOCK], tl.float32)
    consistency_counts = tl.zeros([BLOCK], tl.int64)
    for term in tl.static_range(len(SOURCES)):
        mean = tl.load(sums + SOURCES[term]) * inverse_of(counts, inverses, term)
        if counts is not None:
            number = tl.load(counts + term)
        else:
            number = numbers[term]
        if term < COUNT:
            weight = tl.load(weights + term * weight_stride).to(tl.float32)
            tl.store(means_out + term, mean)
            tl.store(counts_out + term, number)
        else:
            weight = tl.load(pair_weights + pair_offsets[term - COUNT]).to(tl.float32)
            here = slot == pair_slots[term - COUNT]
            consistency = tl.where(here, mean, consistency)
            consistency_counts = tl.where(here, number, consistency_counts)
        total += weight * mean
    tl.store(total_out, total)
    tl.store(consistency_out + slot, consistency, slot < consistency_size)
    tl.store(consistency_counts_out + slot, consistency_counts, slot < consistency_size)


@triton.jit
def multi_horizon_loss_scale(tensors, upstream, sizes, firsts, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        for i in tl.static_range(len(tensors)):
            element = (program - firsts[i]) * BLOCK + tl.arange(0, BLOCK)
            mask = (element >= 0) & (element < sizes[i])
            values = tl.load(tensors[i] + element, mask, 0)
            tl.store(tensors[i] + element, (values.to(tl.float32) * factor).to(values.dtype), mask)


def scale(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """gradients *= upstream, in place. They are dense, as `forward` allocates them."""
    firsts, programs = [], 0
    for gradient in gradients:
        firsts.append(programs)
        programs += ceil_div(gradient.numel(), SCALE_BLOCK)
    launch(
        multi_horizon_loss_scale, programs, upstream.device,
        tuple(gradients), upstream, tuple(g.numel() for g in gradients), tuple(firsts),
        BLOCK=SCALE_BLOCK, num_warps=8,
    )  # fmt: skip
    return gradients


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    video, device, count = args.video, args.video.device, len(args.preds)
    batch, frames = video.shape[:2]
    positions = args.preds[0].shape[1]
    pairs = list(zip(args.pairs[::2], args.pairs[1::2], strict=True))

    # A term is the loss of a horizon or of a pair. (apart, ahead) are those of multi_horizon_loss_counts.
    spans = [(0, k) for k in args.offsets] + [(args.offsets[j] - args.offsets[i], args.offsets[j]) for i, j in pairs]
    near, far = [*range(count), *(i for i, _ in pairs)], [*range(count), *(j for _, j in pairs)]
    elements = [video.shape[2] * (video.shape[3] // args.factors[i]) * (video.shape[4] // args.factors[i]) for i in far]
    counts, numbers = None, [0] * len(spans)
    if args.segment_ids is None and args.position_weights is None:
        numbers = [
            batch * max(0, min(positions - apart, frames - ahead)) * size
            for (apart, ahead), size in zip(spans, elements, strict=True)
        ]
    else:
        counts = torch.empty(len(spans), dtype=torch.int64, device=device)
        launch(
            multi_horizon_loss_counts, len(spans), device,
            args.segment_ids, args.position_weights, counts, batch * positions, positions, frames, tuple(elements),
            strides(args.segment_ids, 2), strides(args.position_weights, 3), NEAR=tuple(near), FAR=tuple(far),
            APART=tuple(apart for apart, _ in spans), AHEAD=tuple(ahead for _, ahead in spans), BLOCK=1024,
        )  # fmt: skip
    inverses = tuple(1 / number if number else 0.0 for number in numbers)

    shape = (count,) if args.consistency_weights is None else tuple(args.consistency_weights.shape)
    pair_offsets, pair_slots = (), ()
    if args.consistency_weights is not None:
        indices = [index_of(pair, shape) for pair in pairs]
        steps = args.consistency_weights.stride()
        pair_offsets = tuple(sum(k * step for k, step in zip(index, steps, strict=True)) for index in indices)
        pair_slots = tuple(index[0] if len(shape) == 1 else index[0] * count + index[1] for index in indices)

    factors_of_terms = [[f] for f in args.factors] + [[args.factors[i], args.factors[j]] for i, j in pairs]
    chains = chains_of(factors_of_terms)
    horizons_of_chains = [
        sorted({e for t in members for e in ([t] if t < count else pairs[t - count])}) for members in chains
    ]
    shared = {i for i in range(count) if sum(i in horizons for horizons in horizons_of_chains) > 1}
    gradients = [
        torch.empty_like(pred, dtype=torch.float32 if i in shared else stored_dtype(pred)) if want["preds"][i] else None
        for i, pred in enumerate(args.preds)
    ]
    sources = [0] * len(spans)
    sums, rows_done, horizons_done = [], 0, set()
    for members, horizons in zip(chains, horizons_of_chains, strict=True):
        added = tuple(i in horizons_done for i in horizons)
        sums.append(_launch_chain(args, members, horizons, pairs, gradients, added, counts, inverses, pair_offsets))
        for row, term in enumerate(members):
            sources[term] = rows_done + row
        rows_done += len(members)
        horizons_done.update(horizons)

    total = torch.empty((), dtype=torch.float32, device=device)
    means = torch.empty(count, dtype=torch.float32, device=device)
    counts_out = torch.empty(count, dtype=torch.int64, device=device)
    consistency = torch.empty(shape, dtype=torch.float32, device=device)
    consistency_counts = torch.empty(shape, dtype=torch.int64, device=device)
    launch(
        multi_horizon_loss_finish, 1, device,
        sums[0] if len(sums) == 1 else torch.cat(sums), counts, inverses, tuple(numbers),
        args.horizon_weights, args.consistency_weights, args.horizon_weights.stride(0), pair_offsets, pair_slots,
        total, means, counts_out, consistency, consistency_counts, consistency.numel(),
        COUNT=count, SOURCES=tuple(sources), BLOCK=power_of_2(consistency.numel()), num_warps=1,
    )  # fmt: skip
    stored = [None if g is None else g.to(stored_dtype(p)) for g, p in zip(gradients, args.preds, strict=True)]
    outputs = [total, means, counts_out, consistency, consistency_counts]
    return outputs, {"preds": stored, **gradients_of_weights(args, want, means, consistency)}


def _launch_chain(
    args: Arguments,
    members: list[int],
    horizons: list[int],
    pairs: list[tuple[int, int]],
    gradients: list[Tensor | None],
    added: tuple[bool, ...],
    counts: Tensor | None,
    inverses: tuple[float, ...],
    pair_offsets: tuple[int, ...],
) -> Tensor:
    """Launch the terms `members` of `horizons`, whose factors form a chain, and return a loss sum for each term."""
    video, count = args.video, len(args.preds)
    batch, frames, channels, height, width = video.shape
    positions = args.preds[0].shape[1]
    kinds = [KINDS[args.kinds[i]] for i in horizons]
    loss_rows = tuple(members.index(i) if i in members else -1 for i in horizons)
    features = 2 if args.patch_sizes is None else 3
    preds, log_scales = parts_of([args.preds[i] for i in horizons], kinds, loss_rows, features)
    chain_gradients, scale_gradients = parts_of([gradients[i] for i in horizons], kinds, loss_rows, features)
    # With five horizons, pyramids and predictions of eight elements per thread need too many registers.
    target, per_thread, registers = TILE_ELEMENTS, 8 if len(horizons) <= 4 else 2, None
    if args.motion_gain or any(log_scale is not None for log_scale in log_scales):
        # Each horizon has a tile of log-scales or of motion in registers as well.
        target, per_thread = TILE_ELEMENTS // 2, min(4, per_thread)
        # On sm_100, ptxas spills 8 bytes to stay below limits of 40 and 64 registers that it chooses.
        registers = 128
    tiling = tiling_of(video, [args.factors[i] for i in horizons], channels_innermost(video, args.patch_sizes), target)
    # Predictions of frames past the end of the video only receive a zero gradient.
    first = args.offsets[horizons[0]]
    last = positions + args.offsets[horizons[-1]]
    visited_frames = max(0, (last if any(g is not None for g in chain_gradients) else min(last, frames)) - first)
    programs = batch * visited_frames * tiling.tiles if positions else 0
    partial = torch.empty(len(members), programs, dtype=torch.float32, device=video.device)
    levels = [tiling.level(args.factors[i]) for i in horizons]
    rows = tuple(row for row, t in enumerate(members) if t >= count)
    near = tuple(horizons.index(pairs[members[row] - count][0]) for row in rows)
    far = tuple(horizons.index(pairs[members[row] - count][1]) for row in rows)
    steps = [(levels[i], levels[j]) for i, j in zip(near, far, strict=True)]
    rank = 5 if args.patch_sizes is None else 4
    launch(
        multi_horizon_loss, programs, video.device,
        preds, chain_gradients, log_scales, scale_gradients, video, args.segment_ids, args.position_weights,
        counts, inverses, args.horizon_weights, args.consistency_weights, partial,
        programs, visited_frames, first, frames, positions, channels, width,
        height // tiling.factors[-1], width // tiling.factors[-1],
        tiling.tiles_y, tiling.tiles_x, tiling.channel_blocks, args.scale, args.shift, args.delta, args.eps,
        tuple(strides(p, rank) for p in preds), tuple(strides(g, rank) for g in chain_gradients),
        strides(video, 5), strides(args.segment_ids, 2), args.horizon_weights.stride(0),
        tuple(pair_offsets[t - count] for t in members if t >= count),
        strides(args.position_weights, 3), args.motion_gain or None, args.beta,
        OFFSETS=tuple(args.offsets[i] for i in horizons),
        LEVELS=tuple(levels),
        PATCHES=tuple(args.patch_sizes[i] if args.patch_sizes else 0 for i in horizons),
        HORIZONS=tuple(horizons),
        LOSS_ROWS=loss_rows, ADDED=added, TERMS=tuple(members), NEAR=near, FAR=far, PAIR_ROWS=rows,
        PADDED=tuple(tiling.pads[i] // tiling.pads[j] for i, j in steps),
        RATIOS=tuple(tiling.true[i] // tiling.true[j] for i, j in steps),
        KINDS=tuple(kinds), PAIR_KINDS=tuple(KIND_OF_MEANS.get(kinds[j], kinds[j]) for j in far),
        DETACH=args.detach, RESIDUAL=args.residual, TRUE=tiling.true, PADS=tiling.pads,
        CELLS_Y=tiling.cells_y, CELLS_X=tiling.cells_x, CHANNELS=tiling.channels,
        LONG=needs_long(video, *preds, *chain_gradients), num_warps=warps_of(tiling.elements, per_thread),
        maxnreg=registers,
    )  # fmt: skip
    return partial.sum(1)


def parts_of(
    tensors: list[Tensor | None], kinds: list[str], loss_rows: tuple[int, ...], dim: int
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Views of the means, and of the log-scales of the distributions whose loss has a row, None for the others."""
    means, log_scales = [], []
    for tensor, kind, row in zip(tensors, kinds, loss_rows, strict=True):
        both = tensor is not None and kind in KIND_OF_MEANS
        mean, log_scale = tensor.chunk(2, dim) if both else (tensor, None)
        means.append(mean)
        log_scales.append(log_scale if row >= 0 else None)
    return tuple(means), tuple(log_scales)
