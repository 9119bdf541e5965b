"""multi_horizon_loss in CUDA C++: losses and gradients in one pass, made in the forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu import raw
from ..cpu.multi_horizon_loss import described
from ..losses import gradients_of_weights
from ..ops.multi_horizon_loss import Arguments, fake
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
    outputs = fake(args)
    scratch = torch.empty(terms, BLOCKS, dtype=torch.float32, device=device)
    launch("cuda_multi_horizon_loss", device, *described(args, gradients, outputs), raw(term_counts), raw(scratch))
    extras = [gradient for gradient in gradients if gradient is not None]
    extras += gradients_of_weights(
        args.horizon_weights, args.consistency_weights, wanted[count:], outputs[1], outputs[3]
    )
    return outputs, extras


def scale(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """gradients *= upstream, in place; they are dense, as `forward` made them."""
    launch("cuda_multi_horizon_loss_scale", upstream.device, [raw(g) for g in gradients], raw(upstream))
    return gradients
