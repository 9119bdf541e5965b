"""multi_horizon_loss: all losses of K predictions in one pass over the video, the predictions and their gradients.

per_horizon_i  = mean over valid (b, n) of l_i(preds[i][b, n] - avg_pool(video[b, n + k_i], f_i))
consistency_ij = mean over valid (b, n) of l_j(preds[j][b, n] - avg_pool(preds[i][b, n + k_j - k_i], f_j / f_i)), i < j
total          = sum_i horizon_weights[i] * per_horizon_i + sum_ij consistency_weights[i, j] * consistency_ij

l_i is a function of the difference, or the negative log-likelihood of a distribution with predicted mean and scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..dtypes import autocasts, follow, stored_dtype
from ..horizon_loss import (
    DETACH,
    HorizonLoss,
    check_consistency,
    check_horizon_weights,
    check_position_weights,
    index_of,
    nan_if_invalid,
    warn_of_horizons_that_never_count,
)
from ..horizons import Horizons, check_horizons, valid_at
from ..native import Array, raw
from ..op import Backend, Cost, Op, Want, register
from .loss_kinds import DISTRIBUTIONS, KIND_OF_MEANS, KINDS, pointwise_loss
from .multi_horizon_loss_samples import BENCH, samples, variants
from .video_pyramid import (
    VIDEO,
    box_average,
    check_divisible,
    check_normalisation,
    check_patch_sizes,
    normalise,
    output_shape,
    unpatchify,
)

if TYPE_CHECKING:
    from .._native import LossNumbers


class Arguments(NamedTuple):
    preds: list[Tensor]
    video: Tensor
    horizon_weights: Tensor
    consistency_weights: Tensor | None
    segment_ids: Tensor | None
    position_weights: Tensor | None
    offsets: list[int]
    factors: list[int]
    pairs: list[int]
    patch_sizes: list[int] | None
    kinds: list[int]
    detach: str
    residual: bool
    motion_gain: float
    beta: float
    scale: float
    shift: float
    delta: float
    eps: float


def multi_horizon_loss(
    preds: Sequence[Tensor],
    video: Tensor,
    horizons: Horizons,
    *,
    kind: str | Sequence[str] = "mse",
    horizon_weights: Tensor | Sequence[float] | None = None,
    consistency_weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
    detach: str | None = "near",
    patch_sizes: Sequence[int] | None = None,
    residual: bool = False,
    motion_gain: float = 0.0,
    beta: float = 0.0,
    scale: float | None = None,
    shift: float | None = None,
    segment_ids: Tensor | None = None,
    position_weights: Tensor | None = None,
    grid: Sequence[int] | None = None,
    delta: float = 1.0,
    eps: float = 1e-3,
) -> HorizonLoss:
    """Losses of K predictions against the frames that they predict, and against each other.

    Equivalent, if every position counts (T_v >= T + offsets[-1], one segment) and kind is "mse", to:

        frames = [avg_pool(scale * video + shift, f)[:, k : k + T] for k, f in zip(offsets, factors)]
        total = sum(w * F.mse_loss(pred, frame) for w, pred, frame in zip(horizon_weights, preds, frames))
        for i, j in pairs:  # i < j: two predictions of one frame, the nearer of which is made `lag` frames later
            lag, ratio = offsets[j] - offsets[i], factors[j] // factors[i]
            near = avg_pool(preds[i], ratio)[:, lag:].detach()
            total = total + consistency_weights[i, j] * F.mse_loss(preds[j][:, : T - lag], near)

    where `avg_pool(x, f)` is the mean over f x f pixels. A horizon counts at position n if n + k_i < T_v and, with
    segment_ids, both frames are in one segment. Each mean is over the positions that count; if none does, loss and
    gradient are 0. Differences and sums are computed in fp32 (fp64 for fp64).

    Args:
        preds: K tensors [B, T, C, H / f_i, W / f_i], or tokens [B, T, S_i, P_i * P_i * C] with patch_sizes, or
            [B, T, S / f_i^2, C] with grid; fp32, bf16, fp16 or fp64, any strides. Where the kind is a distribution they
            have twice the channels: first all means, then as many log-scales s, which are clamped to [-10, 10] (no
            gradient beyond). In tokens P_i * P_i * C means come first.
        video: [B, T_v, C, H, W] with T_v >= T, or [B, T_v, S, C] with grid; uint8 or floating, any strides. It must not
            require grad.
        horizons: offsets in frames, factors by which the targets are smaller than the video.
        kind: one for all horizons, or K of them. Of the difference d: "mse" d^2, "l1" |d|, "huber" as F.huber_loss
            with `delta`, "charbonnier" sqrt(d^2 + eps^2). Negative log-likelihoods, up to a constant: "gaussian"
            (s + d^2 exp(-s)) / 2, s the log-variance, times exp(beta s), which gets no gradient; "laplace"
            s + |d| exp(-s). A consistency pair uses the kind of its far side, between means: mse for "gaussian", l1 for
            "laplace".
        horizon_weights: [K] tensor (fp32 or fp64, differentiable) or list; ones by default.
        consistency_weights: [K], for the pairs (0, j) (entry 0 is unused), or [K, K], for any pair [i, j] with i < j.
            f_j must be a multiple of f_i unless the weight is 0. A tensor that cannot be read up front (on a GPU, in
            torch.compile) makes the total NaN if it breaks that rule.
        detach: "near": side i of a consistency pair gets no gradient; "far": side j gets none; None: both learn.
        patch_sizes: K integers; if given, preds are in the token layout of video_pyramid.
        residual: the prediction (a distribution's mean) is preds[i][:, n] + avg_pool(scale * video[:, n] + shift, f_i),
            so preds are changes.
        motion_gain: g: every element of a horizon's loss is weighted by 1 + g |down(frame n + k_i) - down(frame n)|,
            down(x) = avg_pool(scale * x + shift, f_i). What moves counts for more; the mean is still over the number of
            elements. Consistency is not weighted.
        beta: of "gaussian": 0 is the likelihood; 1 weighs the mean's gradient as mse does.
        scale, shift: of the video's normalisation, as in video_pyramid.
        segment_ids: [B, T_v] int32 or int64, the episode of each frame.
        position_weights: [B, T] or [B, T, K], fp32 or fp64, finite and >= 0, without gradient. It multiplies the losses
            of the predictions made at n; those of weight 0 do not count, and each mean is over what counts. A
            consistency pair counts where both of its predictions do, and is not multiplied. Values that cannot be read
            up front (on a GPU, in torch.compile) make the total NaN if they break that rule.
        grid: (Hp, Wp), for features or latents in the layout [B, T_v, S, C], S = Hp * Wp in row order. Not with
            patch_sizes.
        delta, eps: of "huber" and "charbonnier", in units of the normalised video.

    Returns:
        HorizonLoss with counts in elements; fp32 (fp64 for fp64 predictions). Differentiable with respect to preds and
        tensors of weights, through total alone.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: "Multi-Frame Prediction for World Models" (cascade targets, consistency); Charbonnier et al., ICIP 1994;
    beta: Seitzer et al., arXiv 2203.09168; weights for what moves, there relative to the mean change: LTD, arXiv
    2601.20504.
    """
    check_horizons(horizons)
    count = len(horizons)
    options = check_options(
        count, kind=kind, detach=detach, residual=residual, motion_gain=motion_gain, beta=beta, delta=delta, eps=eps
    )
    if grid is None:
        check.tensor("video", video, 5, "[B, T_v, C, H, W]", VIDEO)
    else:
        check.tensor("video", video, 4, "[B, T_v, S, C] with grid", VIDEO)
    check.non_zero_sizes("video", video)
    if grid is not None:
        check_no_patches(patch_sizes)
        video = images(video, check.grid(grid, "video", video))
    if video.requires_grad and torch.is_grad_enabled():
        raise ValueError("video must not require grad: targets are constants; pass video.detach()")
    patch_sizes = check_patch_sizes(patch_sizes, count)
    check_divisible(video, horizons.factors, patch_sizes)
    letters = "[B, T, C, H / f, W / f]" if patch_sizes is None else "[B, T, S, P * P * C]"
    letters = letters if grid is None else "[B, T, S / f^2, C]"
    preds = check.tensors("preds", preds, count, 5 if patch_sizes is None and grid is None else 4, letters)
    if autocasts(video.device):
        preds = [follow(pred, preds[0]) for pred in preds]
    positions = preds[0].shape[1]
    kinds = options["kinds"]
    are_distributions = max(kinds) >= DISTRIBUTIONS[0]
    for i, pred in enumerate(preds):
        expected = list(output_shape(video, horizons.factors[i], None if patch_sizes is None else patch_sizes[i]))
        expected[1] = positions
        if grid is not None:
            expected[2:] = [expected[3] * expected[4], expected[2]]
        meaning = letters
        if are_distributions and kinds[i] in DISTRIBUTIONS:
            expected[2 if len(expected) == 5 else 3] *= 2
            meaning = letters.replace("C", "2 * C")
        check.shape(f"preds[{i}]", pred, expected, meaning)
        check.like(f"preds[{i}]", pred, "preds[0]", preds[0])
    if grid is not None:
        preds = [
            images(pred, (video.shape[3] // factor, video.shape[4] // factor))
            for pred, factor in zip(preds, horizons.factors, strict=True)
        ]
    check.same_device("video", video, "preds[0]", preds[0])
    if video.shape[1] < positions:
        raise ValueError(
            f"video must have at least as many frames as preds have positions: T_v = {video.shape[1]}, T = {positions}"
        )
    segment_ids = check.segments(segment_ids, video.shape[0], video.shape[1], "T_v", "video", video)
    scale, shift = check_normalisation(video, scale, shift)
    unread = None
    if position_weights is not None:
        position_weights, unread = check_position_weights(position_weights, video.shape[0], positions, count, video)
    if video.shape[1] <= horizons.offsets[-1]:
        warn_of_horizons_that_never_count(horizons, positions, video.shape[1], "video")
    consistency, pairs, undivided = check_consistency(consistency_weights, horizons, video)
    args = Arguments(
        preds=preds,
        video=video,
        horizon_weights=check_horizon_weights(horizon_weights, count, video),
        consistency_weights=consistency,
        segment_ids=segment_ids,
        position_weights=position_weights,
        offsets=list(horizons.offsets),
        factors=list(horizons.factors),
        pairs=pairs,
        patch_sizes=patch_sizes,
        scale=scale,
        shift=shift,
        **options,
    )
    total, means, counts, consistencies, pair_counts = call(OP, args)
    loss = HorizonLoss(total, means, counts, consistencies, pair_counts)
    return nan_if_invalid(loss, consistency, undivided, unread)


def check_options(
    count: int,
    *,
    kind: str | Sequence[str],
    detach: str | None,
    residual: bool,
    motion_gain: float,
    beta: float,
    delta: float,
    eps: float,
) -> dict[str, Any]:
    """The fields of Arguments that depend on no tensor, for `count` horizons."""
    if isinstance(kind, str):
        kinds = [KINDS.index(check.choice("kind", kind, KINDS))] * count
    elif isinstance(kind, (list, tuple)):
        if len(kind) != count:
            raise ValueError(f"kind must be a string or have one entry per horizon, {count}; got {len(kind)}")
        kinds = [KINDS.index(check.choice(f"kind[{i}]", entry, KINDS)) for i, entry in enumerate(kind)]
    else:
        raise TypeError(f"kind must be a string or a list of strings, got {type(kind).__name__}")
    return {
        "kinds": kinds,
        "detach": check.choice("detach", detach, DETACH) or "none",
        "residual": check.flag("residual", residual),
        "motion_gain": check.number("motion_gain", motion_gain, least=0),
        "beta": check.number("beta", beta, least=0),
        "delta": check.number("delta", delta, above=0),
        "eps": check.number("eps", eps, above=0),
    }


def check_no_patches(patch_sizes: Sequence[int] | None) -> None:
    if patch_sizes is not None:
        raise ValueError(f"patch_sizes must be None with grid, whose tokens are pixels; got {patch_sizes!r}")


def images(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, T, S, C] in row order as a view [B, T, C, Hp, Wp]."""
    return tokens.unflatten(2, grid).permute(0, 1, 4, 2, 3)


def reference(args: Arguments) -> tuple[Tensor, ...]:
    preds, offsets, factors = args.preds, args.offsets, args.factors
    batch, frames, channels, height, width = args.video.shape
    positions, device = preds[0].shape[1], args.video.device
    target = normalise(args.video, args.scale, args.shift, preds[0].dtype)
    computed = target.dtype

    predictions, valid, losses, counts = [], [], [], []
    for i, (offset, factor) in enumerate(zip(offsets, factors, strict=True)):
        kind = KINDS[args.kinds[i]]
        parts = preds[i].to(computed).chunk(2 if kind in KIND_OF_MEANS else 1, 2 if args.patch_sizes is None else 3)
        if args.patch_sizes is not None:
            size = (args.patch_sizes[i], channels, height // factor, width // factor)
            parts = tuple(unpatchify(part, *size) for part in parts)
        prediction = parts[0]
        pyramid = box_average(target, factor)
        if args.residual:
            prediction = prediction + pyramid[:, :positions]
        predictions.append(prediction)
        counted = valid_at(offset, positions, frames, args.segment_ids, batch, device)
        if args.position_weights is not None:
            counted = counted & (args.position_weights[:, :, i] > 0)
        valid.append(counted)
        inside = max(0, min(positions, frames - offset))
        later = pyramid[:, offset : offset + inside]
        weight = 1 + args.motion_gain * (later - pyramid[:, :inside]).abs() if args.motion_gain else None
        if args.position_weights is not None:
            of_position = args.position_weights[:, :inside, i, None, None, None].to(computed)
            weight = of_position if weight is None else weight * of_position
        log_scale = parts[1][:, :inside] if len(parts) == 2 else None
        mean, count = mean_loss(kind, prediction[:, :inside] - later, log_scale, weight, counted[:, :inside], args)
        losses.append(mean)
        counts.append(count)

    shape = (len(preds),) if args.consistency_weights is None else args.consistency_weights.shape
    consistency = torch.zeros(shape, dtype=computed, device=device)
    consistency_counts = torch.zeros(shape, dtype=torch.int64, device=device)
    total = (args.horizon_weights.to(computed) * torch.stack(losses)).sum()
    for i, j in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        apart = offsets[j] - offsets[i]
        inside = max(0, positions - apart)
        near = predictions[i].detach() if args.detach == "near" else predictions[i]
        far = predictions[j].detach() if args.detach == "far" else predictions[j]
        near = box_average(near[:, apart:], factors[j] // factors[i])
        both = valid[j][:, :inside] & valid[i][:, apart:]
        kind = KINDS[args.kinds[j]]
        mean, count = mean_loss(KIND_OF_MEANS.get(kind, kind), far[:, :inside] - near, None, None, both, args)
        assert args.consistency_weights is not None
        index = index_of((i, j), shape)
        total = total + args.consistency_weights[index].to(computed) * mean
        consistency[index], consistency_counts[index] = mean.detach(), count
    # An fp64 video is computed in fp64 even with fp32 predictions, whose precision the results have.
    out = torch.promote_types(preds[0].dtype, torch.float32)
    return total.to(out), torch.stack(losses).to(out), torch.stack(counts), consistency.to(out), consistency_counts


def mean_loss(
    kind: str, difference: Tensor, log_scale: Tensor | None, weight: Tensor | None, valid: Tensor, args: Arguments
) -> tuple[Tensor, Tensor]:
    """The mean of weight * loss of [B, N, C, h, w] over the positions that are `valid` [B, N] (0 if none is), and its
    count.

    The inputs are masked before the loss too, or a NaN that does not count would reach the gradient as 0 * NaN.
    """
    elements = difference.shape[2] * difference.shape[3] * difference.shape[4]
    mask = valid[:, :, None, None, None]
    count = valid.sum() * elements
    log_scale = None if log_scale is None else torch.where(mask, log_scale, 0)
    difference = torch.where(mask, difference, 0)
    loss = pointwise_loss(kind, difference, log_scale, beta=args.beta, delta=args.delta, eps=args.eps)
    loss = loss if weight is None else loss * weight
    return torch.where(mask, loss, 0).sum() / count.clamp_min(1), count


def fake(args: Arguments) -> list[Tensor]:
    first, count = args.preds[0], len(args.preds)
    out = torch.promote_types(first.dtype, torch.float32)
    shape = (count,) if args.consistency_weights is None else tuple(args.consistency_weights.shape)
    return [
        first.new_empty((), dtype=out),
        first.new_empty(count, dtype=out),
        first.new_empty(count, dtype=torch.int64),
        first.new_empty(shape, dtype=out),
        first.new_empty(shape, dtype=torch.int64),
    ]


def empty_gradients(args: Arguments, want: Want) -> list[Tensor | None]:
    """Empty tensors for the needed gradients of the predictions, None for the others."""
    return [
        torch.empty_like(pred, dtype=stored_dtype(pred)) if wants else None
        for pred, wants in zip(args.preds, want["preds"], strict=True)
    ]


def native_arguments(
    args: Arguments, gradients: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> tuple[
    list[Array], list[Array | None], Array, Array | None, Array | None, Array, Array | None,
    list[int], list[int], list[int], list[int], list[int], int, bool, LossNumbers, list[Array],
]:  # fmt: skip
    """The arguments that csrc/bindings.cpp unpacks into a MultiHorizonLoss (csrc/ops.h)."""
    return (
        [raw(pred) for pred in args.preds],
        [raw(gradient) for gradient in gradients],
        raw(args.video),
        raw(args.segment_ids),
        raw(args.position_weights),
        raw(args.horizon_weights),
        raw(args.consistency_weights),
        args.offsets,
        args.factors,
        args.pairs,
        args.patch_sizes or [],
        args.kinds,
        0 if args.detach == "none" else DETACH.index(args.detach),
        args.residual,
        {
            "motion_gain": args.motion_gain,
            "beta": args.beta,
            "scale": args.scale,
            "shift": args.shift,
            "delta": args.delta,
            "eps": args.eps,
        },
        [raw(output) for output in outputs],
    )


def cost(kwargs: dict[str, Any]) -> Cost:
    video, preds = kwargs["video"], kwargs["preds"]
    elements = sum(pred.numel() for pred in preds)
    # The video and the predictions are read once, the gradients written once.
    moved = video.numel() * video.element_size() + 2 * elements * preds[0].element_size()
    return Cost(moved, (2 + len(preds)) * video.numel() + 8 * elements)


def refused_by_triton(args: Arguments) -> str:
    return "video is float64" if args.video.dtype == torch.float64 else ""


def refused_by_cuda(args: Arguments) -> str:
    refused = f"it serves 16 horizons, these are {len(args.preds)}" if len(args.preds) > 16 else ""
    return refused_by_triton(args) or refused


OP = register(
    Op(
        name="multi_horizon_loss",
        arguments=Arguments,
        differentiable=("preds", "horizon_weights", "consistency_weights"),
        reference=reference,
        fake=fake,
        public=multi_horizon_loss,
        samples=samples,
        variants=variants,
        cost=cost,
        bench=BENCH,
        backends={
            "cpu": Backend(kernels=("multi_horizon_loss",), dtypes=check.FLOATING),
            "triton": Backend(
                kernels=(
                    "multi_horizon_loss",
                    "multi_horizon_loss_counts",
                    "multi_horizon_loss_finish",
                    "multi_horizon_loss_scale",
                ),
                refuses=refused_by_triton,
            ),
            "cuda": Backend(kernels=("multi_horizon_loss", "multi_horizon_loss_scale"), refuses=refused_by_cuda),
        },
        gradients_in_forward=True,
    )
)
