"""multi_horizon_loss on the CPU, called by autograd.call: losses and gradients in one pass, in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import scale_in_place
from ..horizon_loss import gradients_of_weights
from ..native import kernels
from ..op import Gradients, Want
from ..ops.multi_horizon_loss import Arguments, empty_gradients, fake, native_arguments

scale = scale_in_place


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    pred_gradients = empty_gradients(args, want)
    outputs = fake(args)
    # Means are gradients of the weights too. Those may be fp64, so write fp64 means if their gradients are needed.
    needs_weights = want["horizon_weights"] or want["consistency_weights"]
    written = [o.double() if needs_weights and o.is_floating_point() else o for o in outputs]
    kernels.multi_horizon_loss(*native_arguments(args, pred_gradients, written), torch.get_num_threads())
    gradients: Gradients = {"preds": pred_gradients}
    if needs_weights:
        gradients |= gradients_of_weights(args, want, written[1], written[3])
        outputs = [exact.to(output.dtype) for exact, output in zip(written, outputs, strict=True)]
    return outputs, gradients
