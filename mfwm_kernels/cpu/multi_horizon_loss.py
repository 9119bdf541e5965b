"""multi_horizon_loss on the CPU: losses and gradients in one pass, made in the forward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import DETACH, gradients_of_weights
from ..ops.multi_horizon_loss import KINDS, Arguments
from ..registry import stored_dtype
from . import kernels, precision, raw


def forward(args: Arguments, wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    count = len(args.preds)
    gradients = [
        torch.empty_like(pred, dtype=stored_dtype(pred)) if want else None
        for pred, want in zip(args.preds, wanted[:count], strict=True)
    ]
    consistency = args.consistency_weights
    shape = (count,) if consistency is None else tuple(consistency.shape)
    pairs = zip(args.pairs[::2], args.pairs[1::2], strict=True)
    places = [i * count + j if len(shape) == 2 else j for i, j in pairs]
    # Of numbers, lists: to read or to set one element of a tensor is a call of its own.
    entries = [] if consistency is None else consistency.flatten().tolist()
    total, per_horizon, counts, agreement, agreement_counts = kernels.multi_horizon_loss(
        [raw(pred) for pred in args.preds],
        [raw(gradient) for gradient in gradients],
        raw(args.video),
        raw(args.segment_ids),
        args.weights.tolist(),
        [entries[place] for place in places],
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
    means, mean_counts = [0.0] * math.prod(shape), [0] * math.prod(shape)
    for place, mean, number in zip(places, agreement, agreement_counts, strict=True):
        means[place], mean_counts[place] = mean, number
    out = precision(args.preds[0].dtype)
    outputs = [
        torch.tensor(total, dtype=out),
        torch.tensor(per_horizon, dtype=out),
        torch.tensor(counts),
        torch.tensor(means, dtype=out).view(shape),
        torch.tensor(mean_counts).view(shape),
    ]
    extras = [gradient for gradient in gradients if gradient is not None]
    if any(wanted[count:]):
        exact = torch.tensor(per_horizon, dtype=torch.float64), torch.tensor(means, dtype=torch.float64).view(shape)
        extras += gradients_of_weights(args.weights, consistency, wanted[count:], *exact)
    return outputs, extras
