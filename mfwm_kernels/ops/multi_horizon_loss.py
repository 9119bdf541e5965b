"""multi_horizon_loss: all losses of K predictions in one pass over the video, the predictions and their gradients.

per_horizon_i  = mean over valid (b, n) of l(preds[i][b, n] - avg_pool(video[b, n + k_i], f_i))
consistency_ij = mean over valid (b, n) of l(preds[j][b, n] - avg_pool(preds[i][b, n + k_j - k_i], f_j / f_i)),  i < j
total          = sum_i horizon_weights[i] * per_horizon_i + sum_ij consistency_weights[i, j] * consistency_ij
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..dtypes import autocasts, follow, stored_dtype
from ..horizon_loss import DETACH, HorizonLoss, check_consistency, check_horizon_weights, index_of, nan_if_invalid
from ..horizons import Horizons, check_horizons, valid_at
from ..native import Array, raw
from ..op import Backend, Cost, Op, Want, register
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

KINDS = ("mse", "l1", "huber", "charbonnier")


class Arguments(NamedTuple):
    preds: list[Tensor]
    video: Tensor
    horizon_weights: Tensor
    consistency_weights: Tensor | None
    segment_ids: Tensor | None
    offsets: list[int]
    factors: list[int]
    pairs: list[int]
    patch_sizes: list[int] | None
    kind: str
    detach: str
    residual: bool
    scale: float
    shift: float
    delta: float
    eps: float


def multi_horizon_loss(
    preds: Sequence[Tensor],
    video: Tensor,
    horizons: Horizons,
    *,
    kind: str = "mse",
    horizon_weights: Tensor | Sequence[float] | None = None,
    consistency_weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
    detach: str | None = "near",
    patch_sizes: Sequence[int] | None = None,
    residual: bool = False,
    scale: float | None = None,
    shift: float | None = None,
    segment_ids: Tensor | None = None,
    delta: float = 1.0,
    eps: float = 1e-3,
) -> HorizonLoss:
    """Losses of K predictions against the frames that they predict, and against each other.

    Equivalent, if every position counts (T_v >= T + offsets[-1], one segment) and kind is "mse", to
    `sum(w * F.mse_loss(pred, avg_pool(scale * video + shift, f)[:, k : k + T]) for w, pred, k, f in
    zip(horizon_weights, preds, offsets, factors))` plus, for each pair i < j with a consistency weight c,
    `c * F.mse_loss(preds[j][:, : T - d], avg_pool(preds[i], f_j // f_i)[:, d:])`, d = k_j - k_i. A horizon counts at
    position n if n + k_i < T_v and, with segment_ids, both frames are in one segment. Each mean is over the positions
    that count; if none does, loss and gradient are 0. Differences and sums are computed in fp32 (fp64 for fp64).

    Args:
        preds: K tensors [B, T, C, H / f_i, W / f_i], or tokens [B, T, S_i, P_i * P_i * C] with patch_sizes; fp32, bf16,
            fp16 or fp64, any strides.
        video: [B, T_v, C, H, W] with T_v >= T, uint8 or floating, any strides. It must not require grad.
        horizons: offsets in frames, factors by which the targets are smaller than the video.
        kind: of the difference d: "mse" d^2, "l1" |d|, "huber" as F.huber_loss with `delta`, "charbonnier"
            sqrt(d^2 + eps^2).
        horizon_weights: [K] tensor (fp32 or fp64, differentiable) or list; ones by default.
        consistency_weights: [K], for the pairs (0, j) (entry 0 is unused), or [K, K], for any pair [i, j] with i < j.
            f_j must be a multiple of f_i unless the weight is 0. A tensor that cannot be read up front (on a GPU, in
            torch.compile) makes the total NaN if it breaks that rule.
        detach: "near": side i of a consistency pair gets no gradient; "far": side j gets none; None: both learn.
        patch_sizes: K integers; if given, preds are in the token layout of video_pyramid.
        residual: the prediction is preds[i][:, n] + avg_pool(scale * video[:, n] + shift, f_i), so preds are changes.
        scale, shift: of the video's normalisation, as in video_pyramid.
        segment_ids: [B, T_v] int32 or int64, the episode of each frame.
        delta, eps: of "huber" and "charbonnier", in units of the normalised video.

    Returns:
        HorizonLoss with counts in elements; fp32 (fp64 for fp64 predictions). Differentiable with respect to preds and
        tensors of weights, through total alone.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: "Multi-Frame Prediction for World Models" (cascade targets, consistency); Charbonnier et al., ICIP 1994.
    """
    check_horizons(horizons)
    count = len(horizons)
    check.tensor("video", video, 5, VIDEO)
    check.non_zero_sizes("video", video)
    if video.requires_grad and torch.is_grad_enabled():
        raise ValueError("video must not require grad: targets are constants; pass video.detach()")
    patch_sizes = check_patch_sizes(patch_sizes, count)
    check_divisible(video, horizons.factors, patch_sizes)
    preds = check.tensors("preds", preds, count, 5 if patch_sizes is None else 4)
    if autocasts(video.device):
        preds = [follow(pred, preds[0]) for pred in preds]
    positions = preds[0].shape[1]
    for i, pred in enumerate(preds):
        expected = list(output_shape(video, horizons.factors[i], None if patch_sizes is None else patch_sizes[i]))
        expected[1] = positions
        meaning = "[B, T, C, H / f, W / f]" if patch_sizes is None else "[B, T, S, P * P * C]"
        check.shape(f"preds[{i}]", pred, expected, meaning)
        check.like(f"preds[{i}]", pred, "preds[0]", preds[0])
    check.same_device("video", video, "preds[0]", preds[0])
    if video.shape[1] < positions:
        raise ValueError(
            f"video must have at least as many frames as preds have positions: T_v = {video.shape[1]}, T = {positions}"
        )
    segment_ids = check.segments(segment_ids, video.shape[0], video.shape[1], "T_v", "video", video)
    scale, shift = check_normalisation(video, scale, shift)
    consistency, pairs, undivided = check_consistency(consistency_weights, horizons, video)
    args = Arguments(
        preds=preds,
        video=video,
        horizon_weights=check_horizon_weights(horizon_weights, count, video),
        consistency_weights=consistency,
        segment_ids=segment_ids,
        offsets=list(horizons.offsets),
        factors=list(horizons.factors),
        pairs=pairs,
        patch_sizes=patch_sizes,
        scale=scale,
        shift=shift,
        **check_options(kind=kind, detach=detach, residual=residual, delta=delta, eps=eps),
    )
    return nan_if_invalid(HorizonLoss(*call(OP, args)), consistency, undivided)


def check_options(*, kind: str, detach: str | None, residual: bool, delta: float, eps: float) -> dict[str, Any]:
    """The fields of Arguments that depend on no tensor."""
    return {
        "kind": check.choice("kind", kind, KINDS),
        "detach": check.choice("detach", detach, DETACH) or "none",
        "residual": check.flag("residual", residual),
        "delta": check.number("delta", delta, above=0),
        "eps": check.number("eps", eps, above=0),
    }


def reference(args: Arguments) -> tuple[Tensor, ...]:
    preds, offsets, factors = args.preds, args.offsets, args.factors
    batch, frames, channels, height, width = args.video.shape
    positions, device = preds[0].shape[1], args.video.device
    target = normalise(args.video, args.scale, args.shift, preds[0].dtype)
    computed = target.dtype

    predictions, valid, losses, counts = [], [], [], []
    for i, (offset, factor) in enumerate(zip(offsets, factors, strict=True)):
        prediction = preds[i].to(computed)
        if args.patch_sizes is not None:
            prediction = unpatchify(prediction, args.patch_sizes[i], channels, height // factor, width // factor)
        pyramid = box_average(target, factor)
        if args.residual:
            prediction = prediction + pyramid[:, :positions]
        predictions.append(prediction)
        valid.append(valid_at(offset, positions, frames, args.segment_ids, batch, device))
        inside = max(0, min(positions, frames - offset))
        difference = prediction[:, :inside] - pyramid[:, offset : offset + inside]
        mean, count = mean_loss(difference, valid[i][:, :inside], args)
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
        mean, count = mean_loss(far[:, :inside] - near, both, args)
        assert args.consistency_weights is not None
        index = index_of((i, j), shape)
        total = total + args.consistency_weights[index].to(computed) * mean
        consistency[index], consistency_counts[index] = mean.detach(), count
    # An fp64 video is computed in fp64 even with fp32 predictions, whose precision the results have.
    out = torch.promote_types(preds[0].dtype, torch.float32)
    return total.to(out), torch.stack(losses).to(out), torch.stack(counts), consistency.to(out), consistency_counts


def pointwise_loss(difference: Tensor, args: Arguments) -> Tensor:
    if args.kind == "mse":
        return difference.square()
    if args.kind == "l1":
        return difference.abs()
    if args.kind == "huber":
        return F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=args.delta)
    return (difference.square() + args.eps**2).sqrt()


def mean_loss(difference: Tensor, valid: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    """The mean loss of [B, N, C, h, w] over the positions that are `valid` [B, N] (0 if none is), and its count.

    The difference is masked before the loss too, or a NaN that does not count would reach the gradient as 0 * NaN.
    """
    elements = difference.shape[2] * difference.shape[3] * difference.shape[4]
    mask = valid[:, :, None, None, None]
    count = valid.sum() * elements
    loss = pointwise_loss(torch.where(mask, difference, 0), args)
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
    list[Array], list[Array | None], Array, Array | None, Array, Array | None,
    list[int], list[int], list[int], list[int], int, int, bool, LossNumbers, list[Array],
]:  # fmt: skip
    """The arguments that csrc/bindings.cpp unpacks into a MultiHorizonLoss (csrc/ops.h)."""
    return (
        [raw(pred) for pred in args.preds],
        [raw(gradient) for gradient in gradients],
        raw(args.video),
        raw(args.segment_ids),
        raw(args.horizon_weights),
        raw(args.consistency_weights),
        args.offsets,
        args.factors,
        args.pairs,
        args.patch_sizes or [],
        KINDS.index(args.kind),
        0 if args.detach == "none" else DETACH.index(args.detach),
        args.residual,
        {"scale": args.scale, "shift": args.shift, "delta": args.delta, "eps": args.eps},
        [raw(output) for output in outputs],
    )


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def bytes_(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)

    def inputs(video: Tensor, horizons: Horizons, positions: int, patch_sizes: tuple[int, ...] | None = None) -> Any:
        preds = []
        for i, factor in enumerate(horizons.factors):
            shape = list(output_shape(video, factor, None if patch_sizes is None else patch_sizes[i]))
            shape[1] = positions
            preds.append(normal(*shape))
        tokens = {} if patch_sizes is None else {"patch_sizes": patch_sizes}
        return {"preds": preds, "video": video, "horizons": horizons, **tokens}

    cascade = Horizons.cascade(4)
    segments = torch.tensor([[0] * 4 + [1] * 8, [5] * 12], device=device)
    yield inputs(bytes_(2, 12, 3, 16, 24), cascade, 12)
    yield {
        **inputs(bytes_(2, 12, 8, 16, 3).permute(0, 1, 4, 2, 3), cascade, 10),
        "horizon_weights": torch.tensor([1.0, 0.5, 0.25, 0.125], device=device), "segment_ids": segments,
        "consistency_weights": torch.tensor([0.0, 0.3, 0.2, 0.1], device=device), "residual": True, "detach": None,
    }  # fmt: skip
    yield {
        **inputs(normal(2, 12, 1, 18, 12), Horizons((0, 1, 3), (1, 3, 3)), 12, (2, 1, 2)),
        "kind": "huber", "delta": 0.7, "consistency_weights": [[0, 0.5, 0.25], [0, 0, 1.5], [0, 0, 0]],
        "detach": "near", "segment_ids": segments.int(),
    }  # fmt: skip
    yield {
        **inputs(bytes_(2, 12, 3, 16, 8), cascade, 12, (4, 4, 2, 1)), "kind": "charbonnier", "eps": 0.1,
        "consistency_weights": [0, 1, 0, 0.5], "detach": "far", "horizon_weights": [1, 2, 0, 0.5], "residual": True,
    }  # fmt: skip
    multi = inputs(normal(1, 6, 16, 8, 8), Horizons.multi_resolution(), 5)
    yield {**multi, "preds": [torch.stack([p, p], -1)[..., 0] for p in multi["preds"]], "kind": "l1",
           "consistency_weights": [0, 1, 1, 0.5, 0.25], "detach": None}  # fmt: skip
    # Dense with channels innermost, because gradients then have the same strides.
    thwc = inputs(bytes_(2, 3, 8, 8, 3).permute(0, 1, 4, 2, 3), Horizons((1, 2), (1, 2)), 3)
    yield {**thwc, "preds": [p.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for p in thwc["preds"]],
           "consistency_weights": torch.tensor([[0.0, 0.5], [0.0, 0.0]], device=device).T.contiguous().T,
           "detach": None}  # fmt: skip
    # Shorter than the longest offset, so the last horizon counts nowhere.
    yield {**inputs(bytes_(1, 5, 3, 8, 8), cascade, 5), "consistency_weights": [0.0, 1.0, 1.0, 1.0]}
    yield inputs(bytes_(0, 4, 3, 8, 8), cascade, 4)
    yield inputs(bytes_(2, 3, 3, 8, 8), cascade, 0)


def variants(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def with_all(size: str, kind: str) -> dict[str, Any]:
        kwargs = OP.bench[size](dtype, device)
        segment_ids = torch.empty(kwargs["video"].shape[:2], dtype=torch.int64, device=device)
        return {**kwargs, "kind": kind, "residual": True, "segment_ids": segment_ids}

    for kind in KINDS:
        yield with_all("genie", kind)
    yield with_all("latents", "l1")
    tokens = with_all("pixels", "huber")
    yield tokens
    shapes = [output_shape(tokens["video"], factor, None) for factor in tokens["horizons"].factors]
    images = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    yield {**tokens, "preds": images, "patch_sizes": None}


def cost(kwargs: dict[str, Any]) -> Cost:
    video, preds = kwargs["video"], kwargs["preds"]
    elements = sum(pred.numel() for pred in preds)
    # The video and the predictions are read once, the gradients written once.
    moved = video.numel() * video.element_size() + 2 * elements * preds[0].element_size()
    return Cost(moved, (2 + len(preds)) * video.numel() + 8 * elements)


def refused_by_cuda(args: Arguments) -> str:
    if args.video.dtype == torch.float64:
        return "video is float64"
    return f"it serves 16 horizons, these are {len(args.preds)}" if len(args.preds) > 16 else ""


def _bench(
    batch: int, time: int, channels: int, size: int, factors: tuple[int, ...], patch: int | None, latents: bool = False
) -> Any:
    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        shape = (batch, time, channels, size, size)
        video = torch.randn(shape, device=device).to(dtype) if latents else torch.randint(
            0, 256, shape, device=device, dtype=torch.uint8
        )  # fmt: skip
        horizons = Horizons((1, 2, 4, 8), factors)
        preds = [torch.randn(output_shape(video, f, patch), device=device).to(dtype) for f in factors]
        weights = [0.0, 0.1, 0.1, 0.1]
        kwargs = {"preds": preds, "video": video, "horizons": horizons, "consistency_weights": weights, "detach": None}
        return kwargs if patch is None else {**kwargs, "patch_sizes": (patch,) * len(factors)}

    return make


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
        bench={
            "cpu": _bench(8, 24, 3, 128, (1, 2, 4, 8), None),
            "genie": _bench(36, 16, 3, 64, (1, 2, 4, 4), 4),
            "pixels": _bench(32, 24, 3, 256, (1, 2, 4, 8), 8),
            "latents": _bench(16, 32, 16, 32, (1, 2, 2, 2), 2, latents=True),
        },
        backends={
            "cpu": Backend(kernels=("multi_horizon_loss",), dtypes=check.FLOATING),
            "triton": Backend(
                kernels=(
                    "multi_horizon_loss",
                    "multi_horizon_loss_counts",
                    "multi_horizon_loss_finish",
                    "multi_horizon_loss_scale",
                ),
                refuses=lambda args: "video is float64" if args.video.dtype == torch.float64 else "",
            ),
            "cuda": Backend(kernels=("multi_horizon_loss", "multi_horizon_loss_scale"), refuses=refused_by_cuda),
        },
        gradients_in_forward=True,
    )
)
