"""multi_horizon_loss in CUDA C++, called by autograd.call: losses and gradients in one pass, in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..horizon_loss import gradients_of_weights
from ..native import raw
from ..op import Gradients, Want
from ..ops.multi_horizon_loss import Arguments, empty_gradients, fake, native_arguments
from . import launch

# Thread blocks of the loss kernel, each with a row of sums. They are the three that each of an H200's 132 SMs has room
# for: all run at once, each goes over several tiles, and little time goes into setting them up and adding up the rows.
BLOCKS = 396


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    device = args.video.device
    pred_gradients = empty_gradients(args, want)
    terms = len(args.preds) + len(args.pairs) // 2
    counted_on_device = args.segment_ids is not None or args.position_weights is not None
    term_counts = torch.empty(terms, dtype=torch.int64, device=device) if counted_on_device else None
    outputs = fake(args)
    scratch = torch.empty(terms, BLOCKS, dtype=torch.float32, device=device)
    arguments = native_arguments(args, pred_gradients, outputs)
    launch("cuda_multi_horizon_loss", device, *arguments, raw(term_counts), raw(scratch))
    return outputs, {"preds": pred_gradients, **gradients_of_weights(args, want, outputs[1], outputs[3])}


def scale(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """gradients *= upstream, in place. They are dense, as `forward` allocates them."""
    launch("cuda_multi_horizon_loss_scale", upstream.device, [raw(g) for g in gradients], raw(upstream))
    return gradients
