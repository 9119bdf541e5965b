"""multi_horizon_loss in Triton, called by autograd.call: one pass over frames computes losses and gradients.

multi_horizon_loss         One warp has some tiles (see frame_tiles.py) of frame m of one clip. Of each it computes the
                           pyramid in registers, compares it with the predictions of frame m made at m - k_i, compares
                           these with each other, and writes their gradients. Bytes: the video, the predictions and the
                           gradients, once each; a column of loss sums per program.
multi_horizon_loss_counts  With segments or position weights only: counts the elements that each term is a mean over.
multi_horizon_loss_finish  One program computes means and total from sums and counts, so that the host reads nothing.
multi_horizon_loss_scale   Multiplies gradients by the upstream gradient, read on the device; returns early if it is 1.

The second and third are in multi_horizon_loss_means.py.

A distribution's prediction is two views of one tensor: its means, in `preds`, and its log-scales, in `log_scales`.

If two factors do not divide one another (2 and 3), each needs a launch. The launches that a horizon needs add up its
gradient in fp32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import stored_dtype
from ..horizon_loss import gradients_of_weights, index_of
from ..op import Gradients, Want
from ..ops.loss_kinds import KIND_OF_MEANS, KINDS
from ..ops.multi_horizon_loss import Arguments
from .frame_tiles import (
    Run,
    Tiles,
    finer,
    frame_offset,
    inside_only,
    load_frame,
    load_planes,
    places,
    plus,
    pyramid_of,
    run_at,
    run_of,
    steps_of,
    store_planes,
    tiles_of,
    video_run_of,
    zeros,
)
from .frames import chains_of, needs_long
from .launch import ceil_div, launch, power_of_2, strides, widened
from .multi_horizon_loss_means import inverse_of, multi_horizon_loss_counts, multi_horizon_loss_finish
from .pointwise_losses import likelihood_and_gradients, loss_and_gradient

# A thread has 48 elements of a tile: fewer leave too much work per tile, more spill.
TILE_ELEMENTS = 1536
# An SM holds about 8 programs. With this many each SM gets 12 or more, of which the last ones run alone.
LEAST_PROGRAMS = 1536
MOST_TILES = 16
SCALE_BLOCK = 4096


class Chain(NamedTuple):
    """What a launch of multi_horizon_loss is compiled for, by horizon, by pair, and for all.

    horizons   numbers among all horizons of the call
    levels     of the pyramid
    loss_rows  the row of `partial` for the horizon's loss, -1 if another launch computes it
    added      whether another launch has written gradients, to which this one adds
    terms      of the rows of `partial`: a horizon, or the number of horizons plus a pair
    near, far  the sides of each pair, among the launch's horizons
    slots      places of the pairs' weights
    runs       Run as tuples, of the horizons and last of the video
    long       offsets in a frame may need 64 bits
    """

    horizons: tuple[int, ...]
    offsets: tuple[int, ...]
    levels: tuple[int, ...]
    patches: tuple[int, ...]
    kinds: tuple[str, ...]
    loss_rows: tuple[int, ...]
    added: tuple[bool, ...]
    terms: tuple[int, ...]
    near: tuple[int, ...]
    far: tuple[int, ...]
    pair_rows: tuple[int, ...]
    pair_kinds: tuple[str, ...]
    slots: tuple[int, ...]
    detach: str
    residual: bool
    tiles: Tiles
    runs: tuple[tuple[int, ...], ...]
    long: bool


@triton.jit
def multi_horizon_loss(
    preds, gradients, log_scales, scale_gradients, video, segments, position_weights, counts, inverses,
    weights, pair_weights, partial, sizes, numbers, all_strides, CHAIN: tl.constexpr,
):  # fmt: skip
    # Few arguments, because Triton takes 0.2 us for each argument of a launch, and 0.5 us for each constant.
    visited_frames, tiles, part_tiles, tiles_x, blocks, frames, positions, channels, cells_y, cells_x = sizes
    scale, shift, delta, eps, beta, motion_gain = numbers
    pred_strides, gradient_strides, video_strides, segment_strides, position_strides = all_strides
    HORIZONS: tl.constexpr = CHAIN.horizons
    OFFSETS: tl.constexpr = CHAIN.offsets
    LEVELS: tl.constexpr = CHAIN.levels
    PATCHES: tl.constexpr = CHAIN.patches
    KINDS: tl.constexpr = CHAIN.kinds
    LOSS_ROWS: tl.constexpr = CHAIN.loss_rows
    ADDED: tl.constexpr = CHAIN.added
    TERMS: tl.constexpr = CHAIN.terms
    NEAR: tl.constexpr = CHAIN.near
    FAR: tl.constexpr = CHAIN.far
    PAIR_ROWS: tl.constexpr = CHAIN.pair_rows
    PAIR_KINDS: tl.constexpr = CHAIN.pair_kinds
    SLOTS: tl.constexpr = CHAIN.slots
    DETACH: tl.constexpr = CHAIN.detach
    RESIDUAL: tl.constexpr = CHAIN.residual
    TILES: tl.constexpr = CHAIN.tiles
    RUNS: tl.constexpr = CHAIN.runs
    LONG: tl.constexpr = CHAIN.long
    COUNT: tl.constexpr = len(OFFSETS)
    TOP: tl.constexpr = len(TILES.true) - 1
    # Behind those of the horizons.
    VIDEO_RUN: tl.constexpr = run_at(RUNS, len(OFFSETS))
    # Integers are finite, so that a difference times 0 is 0.
    FINITE: tl.constexpr = video.dtype.element_ty.is_int()
    parts = tl.cdiv(tiles, part_tiles)
    program = tl.program_id(0)
    part = program % parts
    visited = program // parts
    b = (visited // visited_frames).to(tl.int64)
    m = OFFSETS[0] + visited % visited_frames
    video_steps = steps_of(
        video_strides, frames, channels, cells_y * TILES.true[0], cells_x * TILES.true[0], tl.constexpr(0)
    )
    clip_video = video + b * video_steps[0]

    # Which horizons have a position that predicts frame m, for which of them it counts, and what multiplies its loss.
    active = ()
    counted = ()
    loss_weights = ()
    factors = ()
    steps = ()
    gradient_steps = ()
    any_counts = m < 0
    for i in tl.static_range(COUNT):
        n = m - OFFSETS[i]
        has_position = (n >= 0) & (n < positions)
        counts_here = has_position & (m < frames)
        if segments is not None:
            clip = segments + b * segment_strides[0]
            then = tl.load(clip + n.to(tl.int64) * segment_strides[1], counts_here, 0)
            counts_here = counts_here & (then == tl.load(clip + m.to(tl.int64) * segment_strides[1], counts_here, 0))
        loss_weight = 1.0
        if position_weights is not None:
            row = position_weights + b * position_strides[0] + n.to(tl.int64) * position_strides[1]
            given = tl.load(row + tl.full([], HORIZONS[i], tl.int64) * position_strides[2], counts_here, 0)
            counts_here = counts_here & (given > 0)
            loss_weight = tl.where(counts_here, given, 0).to(tl.float32)
        factor = 0.0
        if LOSS_ROWS[i] >= 0:
            factor = tl.load(weights + HORIZONS[i]).to(tl.float32)
            factor *= inverse_of(counts, inverses, TERMS[LOSS_ROWS[i]]) * loss_weight
            factor = tl.where(counts_here, factor, 0)
        height, width = cells_y * TILES.true[LEVELS[i]], cells_x * TILES.true[LEVELS[i]]
        found = steps_of(pred_strides[i], positions, channels, height, width, PATCHES[i])
        if gradient_strides[i] is None:
            gradient_steps = gradient_steps + (found,)
        else:
            gradient_steps = gradient_steps + (gradient_strides[i],)
        steps = steps + (found,)
        active = active + (has_position,)
        counted = counted + (counts_here,)
        loss_weights = loss_weights + (loss_weight,)
        factors = factors + (factor,)
        any_counts = any_counts | counts_here
    pair_factors = ()
    for p in tl.static_range(len(NEAR)):
        factor = tl.load(pair_weights + SLOTS[p]).to(tl.float32) * inverse_of(counts, inverses, TERMS[PAIR_ROWS[p]])
        # Predictions that do not count are read as 0, so that a difference times 0 is 0.
        pair_factors = pair_factors + (tl.where(counted[NEAR[p]] & counted[FAR[p]], factor, 0),)

    # The losses of this program's elements, by row of `partial`: first those of horizons, then those of pairs.
    sums = ()
    for i in tl.static_range(COUNT):
        if LOSS_ROWS[i] >= 0:
            sums = sums + (zeros(TILES, LEVELS[i]),)
    for p in tl.static_range(len(NEAR)):
        sums = sums + (zeros(TILES, LEVELS[FAR[p]]),)

    for tile in range(part * part_tiles, tl.minimum(part * part_tiles + part_tiles, tiles)):
        first_c = tile % blocks * (TILES.channels * TILES.planes)
        first_x = tile // blocks % tiles_x * TILES.cells_x
        first_y = tile // blocks // tiles_x * TILES.cells_y
        offsets, pixels = places(
            first_y, first_x, first_c, cells_y, cells_x, channels, video_steps, TILES, 0, VIDEO_RUN, 0, LONG
        )
        pyramid = pyramid_of(
            load_frame(
                clip_video + m.to(tl.int64) * video_steps[1], offsets, pixels, any_counts, channels,
                video_steps, scale, shift, TILES, VIDEO_RUN,
            ),
            TILES, 0,
        )  # fmt: skip

        # The predictions of frame m, and their means at coarser levels.
        predictions = ()
        scales = ()
        motions = ()
        everywhere = ()
        masks = ()
        for i in tl.static_range(COUNT):
            where, mask = places(
                first_y, first_x, first_c, cells_y, cells_x, channels, steps[i], TILES, LEVELS[i],
                run_at(RUNS, i), PATCHES[i], LONG,
            )  # fmt: skip
            frame = frame_offset(b, m - OFFSETS[i], steps[i], run_at(RUNS, i))
            prediction = load_planes(
                preds[i] + frame, where, mask & counted[i], channels, steps[i],
                TILES, LEVELS[i], run_at(RUNS, i), PATCHES[i],
            )  # fmt: skip
            log_scale = ()
            if log_scales[i] is not None:
                log_scale = load_planes(
                    log_scales[i] + frame, where, mask & counted[i], channels, steps[i],
                    TILES, LEVELS[i], run_at(RUNS, i), PATCHES[i],
                )  # fmt: skip
            motion = ()
            if RESIDUAL or motion_gain is not None:
                current = pyramid_of(
                    load_frame(
                        clip_video + (m - OFFSETS[i]).to(tl.int64) * video_steps[1], offsets, pixels, counted[i],
                        channels, video_steps, scale, shift, TILES, VIDEO_RUN,
                    ),
                    TILES, 0,
                )[LEVELS[i]]  # fmt: skip
                if motion_gain is not None:
                    for k in tl.static_range(len(current)):
                        moved = tl.abs(pyramid[LEVELS[i]][k] - current[k])
                        motion = motion + (1 + motion_gain * (moved if FINITE else tl.where(counted[i], moved, 0)),)
                if RESIDUAL:
                    prediction = plus(prediction, current, 1.0)
            everywhere = everywhere + (where,)
            masks = masks + (mask,)
            scales = scales + (log_scale,)
            motions = motions + (motion,)
            predictions = predictions + (pyramid_of(prediction, TILES, LEVELS[i]),)

        # The losses of pairs, and their gradients by the far side.
        pair_sums = ()
        slopes = ()
        for p in tl.static_range(len(NEAR)):
            total = sums[PAIR_ROWS[p]]
            slope = ()
            for k in tl.static_range(len(predictions[FAR[p]][LEVELS[FAR[p]]])):
                difference = predictions[FAR[p]][LEVELS[FAR[p]]][k] - predictions[NEAR[p]][LEVELS[FAR[p]]][k]
                loss, gradient = loss_and_gradient(difference, pair_factors[p], delta, eps, tl.constexpr(PAIR_KINDS[p]))
                total += inside_only(loss, masks[FAR[p]], TILES)
                slope = slope + (gradient,)
            pair_sums = pair_sums + (total,)
            slopes = slopes + (slope,)

        new_sums = ()
        for i in tl.static_range(COUNT):
            gradient_planes = ()
            scale_planes = ()
            if LOSS_ROWS[i] >= 0:
                total = sums[LOSS_ROWS[i]]
                for k in tl.static_range(len(pyramid[LEVELS[i]])):
                    difference = predictions[i][LEVELS[i]][k] - pyramid[LEVELS[i]][k]
                    if not FINITE:
                        # Frame m may be NaN where this horizon does not count.
                        difference = tl.where(counted[i], difference, 0)
                    if log_scales[i] is None:
                        loss, gradient = loss_and_gradient(difference, factors[i], delta, eps, tl.constexpr(KINDS[i]))
                    else:
                        loss, gradient, scale_gradient = likelihood_and_gradients(
                            difference, scales[i][k], factors[i], beta, tl.constexpr(KINDS[i])
                        )
                        if motion_gain is not None:
                            scale_gradient *= motions[i][k]
                        scale_planes = scale_planes + (scale_gradient,)
                    if motion_gain is not None:
                        loss *= motions[i][k]
                        gradient *= motions[i][k]
                    total += inside_only(loss, masks[i], TILES)
                    gradient_planes = gradient_planes + (gradient,)
                new_sums = new_sums + (total,)
            # What pairs add: walk down from the coarsest level, and spread each value over its box.
            of_pairs = ()
            for level in tl.static_range(TOP, LEVELS[i] - 1, -1):
                for p in tl.static_range(len(NEAR)):
                    if (NEAR[p] == i) and (DETACH != "near") and (LEVELS[FAR[p]] == level):
                        of_pairs = plus(of_pairs, slopes[p], -((TILES.true[level] / TILES.true[LEVELS[i]]) ** 2))
                if level > LEVELS[i]:
                    of_pairs = finer(of_pairs, TILES, level)
            for p in tl.static_range(len(NEAR)):
                if (FAR[p] == i) and (DETACH != "far"):
                    of_pairs = plus(of_pairs, slopes[p], 1.0)
            gradient_planes = plus(gradient_planes, of_pairs, 1.0)
            if gradients[i] is not None:
                where = everywhere[i]
                if gradient_strides[i] is not None:
                    where, _ = places(
                        first_y, first_x, first_c, cells_y, cells_x, channels, gradient_steps[i], TILES, LEVELS[i],
                        run_at(RUNS, i), PATCHES[i], LONG,
                    )  # fmt: skip
                frame = frame_offset(b, m - OFFSETS[i], gradient_steps[i], run_at(RUNS, i))
                mask = masks[i] & active[i]
                if ADDED[i]:
                    before = load_planes(
                        gradients[i] + frame, where, mask, channels, gradient_steps[i],
                        TILES, LEVELS[i], run_at(RUNS, i), PATCHES[i],
                    )  # fmt: skip
                    gradient_planes = plus(before, gradient_planes, 1.0)
                if len(gradient_planes) == 0:
                    for _ in tl.static_range(len(predictions[i][LEVELS[i]])):
                        gradient_planes = gradient_planes + (zeros(TILES, LEVELS[i]),)
                store_planes(
                    gradients[i] + frame, gradient_planes, where, mask, channels, gradient_steps[i],
                    TILES, LEVELS[i], run_at(RUNS, i), PATCHES[i],
                )  # fmt: skip
                if scale_gradients[i] is not None:
                    store_planes(
                        scale_gradients[i] + frame, scale_planes, where, mask, channels, gradient_steps[i],
                        TILES, LEVELS[i], run_at(RUNS, i), PATCHES[i],
                    )  # fmt: skip
        sums = new_sums + pair_sums

    for row in tl.static_range(len(sums)):
        total = tl.sum(tl.sum(tl.sum(sums[row], 2), 1), 0)
        for i in tl.static_range(COUNT):
            if LOSS_ROWS[i] == row:
                total = tl.where(counted[i], total * loss_weights[i], 0)
        for p in tl.static_range(len(NEAR)):
            if PAIR_ROWS[p] == row:
                total = tl.where(counted[NEAR[p]] & counted[FAR[p]], total, 0)
        tl.store(partial + row * tl.num_programs(0).to(tl.int64) + program, total)


@triton.jit
def multi_horizon_loss_scale(tensors, upstream, sizes, firsts, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        for i in tl.static_range(len(tensors)):
            # A block is of one tensor.
            first = (program - firsts[i]).to(tl.int64) * BLOCK
            if (first >= 0) & (first < sizes[i]):
                pointers = tensors[i] + first + tl.arange(0, BLOCK)
                if first + BLOCK <= sizes[i]:
                    scaled = widened(tl.load(pointers)) * factor
                    tl.store(pointers, scaled.to(tensors[i].dtype.element_ty))
                else:
                    exists = tl.arange(0, BLOCK) < sizes[i] - first
                    scaled = widened(tl.load(pointers, exists)) * factor
                    tl.store(pointers, scaled.to(tensors[i].dtype.element_ty), exists)


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
    indices = [index_of(pair, shape) for pair in pairs]
    slots = tuple(index[0] if len(shape) == 1 else index[0] * count + index[1] for index in indices)
    weights = args.horizon_weights.contiguous()
    pair_weights = None if args.consistency_weights is None else args.consistency_weights.contiguous()
    args = args._replace(horizon_weights=weights, consistency_weights=pair_weights)

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
    partials, horizons_done = [], set()
    for members, horizons in zip(chains, horizons_of_chains, strict=True):
        added = tuple(i in horizons_done for i in horizons)
        partials.append(_launch_chain(args, members, horizons, pairs, gradients, added, counts, inverses, slots))
        horizons_done.update(horizons)

    total = torch.empty((), dtype=torch.float32, device=device)
    means = torch.empty(count, dtype=torch.float32, device=device)
    counts_out = torch.empty(count, dtype=torch.int64, device=device)
    consistency = torch.empty(shape, dtype=torch.float32, device=device)
    consistency_counts = torch.empty(shape, dtype=torch.int64, device=device)
    launch(
        multi_horizon_loss_finish, 1, device,
        tuple(partials), tuple(partial.shape[1] for partial in partials), counts, inverses, tuple(numbers),
        weights, pair_weights, total, means, counts_out, consistency, consistency_counts, consistency.numel(),
        COUNT=count, CHAINS=tuple(tuple(members) for members in chains), SLOTS=slots,
        ROWS=power_of_2(max(map(len, chains))), BLOCK=1024, SIZE=power_of_2(consistency.numel()), num_warps=8,
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
    slots: tuple[int, ...],
) -> Tensor:
    """Launch the terms `members` of `horizons`, whose factors form a chain, and return [terms, programs] loss sums."""
    video, count = args.video, len(args.preds)
    batch, frames, channels, height, width = video.shape
    positions = args.preds[0].shape[1]
    kinds = [KINDS[args.kinds[i]] for i in horizons]
    loss_rows = tuple(members.index(i) if i in members else -1 for i in horizons)
    features = 2 if args.patch_sizes is None else 3
    preds, log_scales = parts_of([args.preds[i] for i in horizons], kinds, loss_rows, features)
    chain_gradients, scale_gradients = parts_of([gradients[i] for i in horizons], kinds, loss_rows, features)
    patches = [args.patch_sizes[i] if args.patch_sizes else 0 for i in horizons]
    tile_elements, warps = tile_size_of(args, kinds, has_scales=any(t is not None for t in log_scales))
    factors = [args.factors[i] for i in horizons]
    tiles, along = tiles_of(video, factors, patches if args.patch_sizes else None, tile_elements)
    of_frame = math.prod(along)
    levels = [tiles.level(args.factors[i]) for i in horizons]
    # Predictions of frames past the end of the video only receive a zero gradient.
    first = args.offsets[horizons[0]]
    last = positions + args.offsets[horizons[-1]]
    visited_frames = max(0, (last if any(g is not None for g in chain_gradients) else min(last, frames)) - first)
    visits = batch * visited_frames if positions else 0
    part_tiles = min(MOST_TILES, ceil_div(of_frame, ceil_div(LEAST_PROGRAMS, max(1, visits))))
    programs = visits * ceil_div(of_frame, part_tiles)
    partial = torch.empty(len(members), programs, dtype=torch.float32, device=video.device)
    rows = tuple(row for row, t in enumerate(members) if t >= count)
    near = tuple(horizons.index(pairs[members[row] - count][0]) for row in rows)
    far = tuple(horizons.index(pairs[members[row] - count][1]) for row in rows)
    pair_kinds = tuple(KIND_OF_MEANS.get(kinds[j], kinds[j]) for j in far)
    runs = [Run(1)] * len(horizons)
    if args.patch_sizes is not None:
        moved = zip(levels, patches, preds, chain_gradients, strict=True)
        runs = [run_of(tiles, level, patch, *tensors) for level, patch, *tensors in moved]
    all_runs = tuple(dataclasses.astuple(run) for run in (*runs, video_run_of(tiles)))
    is_identity = args.scale == 1 and args.shift == 0
    computed = {*pair_kinds, *(kind for kind, row in zip(kinds, loss_rows, strict=True) if row >= 0)}
    launch(
        multi_horizon_loss, programs, video.device,
        preds, chain_gradients, log_scales, scale_gradients, video, args.segment_ids, args.position_weights,
        counts, inverses, args.horizon_weights, args.consistency_weights, partial,
        (
            visited_frames, of_frame, part_tiles, along[1], along[2], frames, positions, channels,
            height // tiles.factors[-1], width // tiles.factors[-1],
        ),
        (
            None if is_identity else args.scale, None if is_identity else args.shift,
            args.delta if "huber" in computed else None, args.eps if "charbonnier" in computed else None,
            args.beta if "gaussian" in computed else None, args.motion_gain or None,
        ),
        (
            tuple(strides_unless_contiguous(pred) for pred in preds),
            tuple(
                None if gradient is None or gradient.stride() == pred.stride() else gradient.stride()
                for gradient, pred in zip(chain_gradients, preds, strict=True)
            ),
            strides_unless_contiguous(video),
            strides(args.segment_ids, 2) if args.segment_ids is not None else None,
            strides(args.position_weights, 3) if args.position_weights is not None else None,
        ),
        CHAIN=Chain(
            horizons=tuple(horizons), offsets=tuple(args.offsets[i] for i in horizons), levels=tuple(levels),
            patches=tuple(patches), kinds=tuple(kinds), loss_rows=loss_rows, added=added, terms=tuple(members),
            near=near, far=far, pair_rows=rows, pair_kinds=pair_kinds,
            slots=tuple(slots[t - count] for t in members if t >= count),
            detach=args.detach, residual=args.residual, tiles=tiles, runs=all_runs,
            long=needs_long(video, *preds, *chain_gradients),
        ),
        num_warps=warps,
        # ptxas spills 16 bytes to stay below a limit of 128 that it chooses. 255 leave room for as many warps as 180.
        maxnreg=255,
    )  # fmt: skip
    return partial


def tile_size_of(args: Arguments, kinds: list[str], has_scales: bool) -> tuple[int, int]:
    """The elements of a tile and its warps, so few of the one and so many of the other that registers suffice."""
    reads_present, is_wide = bool(args.residual or args.motion_gain), args.preds[0].element_size() > 2
    # Many predictions need registers, and so do frames n and log-scales, in fp32 or beside losses other than mse more.
    halvings = (len(kinds) > 4) + reads_present + has_scales
    if is_wide:
        halvings += reads_present or has_scales
    else:
        halvings += reads_present and not has_scales and set(kinds) != {"mse"}
    return TILE_ELEMENTS >> halvings, 2 if has_scales and not is_wide else 1


def strides_unless_contiguous(tensor: Tensor) -> tuple[int, ...] | None:
    """None spares the launch the strides of most tensors."""
    return None if tensor.is_contiguous() else tensor.stride()


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
