"""multi_horizon_loss on the CPU: losses and gradients in one pass, made in the forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import DETACH, gradients_of_weights
from ..ops.multi_horizon_loss import KINDS, Arguments, fake
from ..registry import stored_dtype
from . import kernels, raw


def forward(args: Arguments, wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    count = len(args.preds)
    gradients = [
        torch.empty_like(pred, dtype=stored_dtype(pred)) if want else None
        for pred, want in zip(args.preds, wanted[:count], strict=True)
    ]
    outputs = fake(args)
    learnt = any(wanted[count:])
    written = [o.double() if learnt and o.is_floating_point() else o for o in outputs]
    kernels.multi_horizon_loss(*described(args, gradients, written), torch.get_num_threads())
    extras = [gradient for gradient in gradients if gradient is not None]
    if learnt:
        extras += gradients_of_weights(
            args.horizon_weights, args.consistency_weights, wanted[count:], written[1], written[3]
        )
        outputs = [exact.to(output.dtype) for exact, output in zip(written, outputs, strict=True)]
    return outputs, extras


def described(args: Arguments, gradients: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> tuple[object, ...]:
    """What csrc/bindings.cpp makes a MultiHorizonLoss of; the outputs are in the order of the reference's."""
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
        args.scale,
        args.shift,
        args.delta,
        args.eps,
        [raw(output) for output in outputs],
    )
