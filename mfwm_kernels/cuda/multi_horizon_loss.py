"""multi_horizon_loss in CUDA C++: losses and gradients in one pass, made in the forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu import raw
from ..losses import DETACH, gradients_of_weights
from ..ops.multi_horizon_loss import KINDS, Arguments
from ..registry import stored_dtype
from . import launch

# Blocks of the loss kernel, each with a row of sums: several waves on any GPU, and little to add up at the end.
BLOCKS = 2048


def forward(args: Arguments, wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    device, count = args.video.device, len(args.preds)
    gradients = [
        torch.empty_like(pred, dtype=stored_dtype(pred)) if want else None
        for pred, want in zip(args.preds, wanted[:count], strict=True)
    ]
    terms = count + len(args.pairs) // 2
    term_counts = None if args.segment_ids is None else torch.empty(terms, dtype=torch.int64, device=device)
    shape = (count,) if args.consistency_weights is None else tuple(args.consistency_weights.shape)
    total, means, agreement = (torch.empty(size, device=device) for size in ((), (count,), shape))
    counts, agreement_counts = (torch.empty(size, dtype=torch.int64, device=device) for size in ((count,), shape))
    outputs = [total, means, counts, agreement, agreement_counts]
    launch(
        "cuda_multi_horizon_loss", device,
        [raw(pred) for pred in args.preds], [raw(gradient) for gradient in gradients],
        raw(args.video), raw(args.segment_ids), args.offsets, args.factors, args.pairs, args.patch_sizes or [],
        KINDS.index(args.kind), 0 if args.detach == "none" else DETACH.index(args.detach), args.residual,
        args.scale, args.shift, args.delta, args.eps,
        raw(args.weights), raw(args.consistency_weights), raw(term_counts),
        raw(torch.empty(terms, BLOCKS, device=device)), [raw(output) for output in outputs],
    )  # fmt: skip
    extras = [gradient for gradient in gradients if gradient is not None]
    extras += gradients_of_weights(args.weights, args.consistency_weights, wanted[count:], means, agreement)
    return outputs, extras


def scale(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """gradients *= upstream, in place; they are dense, as `forward` made them."""
    launch("cuda_multi_horizon_loss_scale", upstream.device, [raw(g) for g in gradients], raw(upstream))
    return gradients
