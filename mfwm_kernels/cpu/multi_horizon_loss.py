"""multi_horizon_loss on the CPU: losses and gradients in one pass, made in the forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import DETACH, gradients_of_weights, place_of
from ..ops.multi_horizon_loss import KINDS, Arguments
from ..registry import stored_dtype
from . import kernels, precision, raw


def forward(args: Arguments, wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    count = len(args.preds)
    gradients = [
        torch.empty_like(pred, dtype=stored_dtype(pred)) if want else None
        for pred, want in zip(args.preds, wanted[:count], strict=True)
    ]
    shape = (count,) if args.consistency_weights is None else tuple(args.consistency_weights.shape)
    places = [place_of(pair, shape) for pair in zip(args.pairs[::2], args.pairs[1::2], strict=True)]
    pair_weights = [] if args.consistency_weights is None else [args.consistency_weights[p].item() for p in places]
    total, per_horizon, counts, agreement, agreement_counts = kernels.multi_horizon_loss(
        [raw(pred) for pred in args.preds],
        [raw(gradient) for gradient in gradients],
        raw(args.video),
        raw(args.segment_ids),
        args.weights.tolist(),
        pair_weights,
        args.offsets,
        args.factors,
        args.pairs,
        args.patch_sizes or [],
        KINDS.index(args.kind),
        0 if args.detach == "none" else DETACH.index(args.detach),
        args.residual,
        args.scale,
        args.shift,
        args.delta,
        args.eps,
        torch.get_num_threads(),
    )
    means = torch.zeros(shape, dtype=torch.float64)
    mean_counts = torch.zeros(shape, dtype=torch.int64)
    for place, mean, number in zip(places, agreement, agreement_counts, strict=True):
        means[place], mean_counts[place] = mean, number
    horizon_means = torch.tensor(per_horizon, dtype=torch.float64)
    out = precision(args.preds[0].dtype)
    outputs = [
        torch.tensor(total, dtype=out),
        horizon_means.to(out),
        torch.tensor(counts, dtype=torch.int64),
        means.to(out),
        mean_counts,
    ]
    extras = [gradient for gradient in gradients if gradient is not None]
    extras += gradients_of_weights(args.weights, args.consistency_weights, wanted[count:], horizon_means, means)
    return outputs, extras
