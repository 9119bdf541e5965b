"""fan_out on the CPU, called by autograd.call: the window sums, then one pass over the hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import precision
from ..grad_monitor import write_gram
from ..native import Array, kernels, raw
from ..op import Gradients, Want
from ..ops.conditioning import conditioning_sums, gradients_of_sums, wants_sums
from ..ops.fan_out import Arguments
from .action_window_sum import gradients_of_sums as gradients_of_window
from .action_window_sum import window_sums


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    hidden = on_grid(args.hidden)
    batch, positions, height, width, depth = hidden.shape
    outputs = [hidden.new_empty(batch, positions, height // p, width // p, depth) for p in args.pool]
    sums = conditioning_sums(args, window_sums, precision(hidden.dtype))
    raw_outputs = [raw(output) for output in outputs]
    kernels.fan_out_forward(*leading(args, hidden, sums), raw_outputs, torch.get_num_threads())
    if args.hidden.dim() == 4:
        outputs = [output.squeeze(2) for output in outputs]
    return outputs, {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    hidden, count = on_grid(args.hidden), len(args.pool)
    sums = conditioning_sums(args, window_sums, precision(hidden.dtype))
    contiguous = torch.contiguous_format
    gradients: Gradients = {
        name: torch.empty_like(getattr(args, name), memory_format=contiguous) if want[name] else None
        for name in ("hidden", "norm_weight", "norm_bias")
    }
    hidden_gradient = None if gradients["hidden"] is None else on_grid(gradients["hidden"])
    sums_gradient = torch.empty_like(sums) if wants_sums(want) else None
    monitored = want["hidden"] and args.norms is not None
    gram = torch.empty(count, count, dtype=torch.float64, device=hidden.device) if monitored else None
    kernels.fan_out_backward(
        *leading(args, hidden, sums),
        [None if grad is None else raw(on_grid(grad)) for grad in upstream],
        torch.get_num_threads(),
        raw(hidden_gradient),
        raw(sums_gradient),
        raw(gradients["norm_weight"]),
        raw(gradients["norm_bias"]),
        raw(gram),
        [] if args.scale is None else args.scale.tolist(),
    )
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram, args.norms, args.cosines)

    if sums_gradient is not None:
        gradients |= gradients_of_sums(args, want, sums_gradient, gradients_of_window)
    return gradients


def on_grid(states: Tensor) -> Tensor:
    """[B, T, S, D] -> [B, T, 1, S, D]."""
    return states.unsqueeze(2) if states.dim() == 4 else states


def leading(
    args: Arguments, hidden: Tensor, sums: Tensor
) -> tuple[Array, Array, Array | None, Array | None, bool, list[int], float]:
    """The leading arguments of both kernels."""
    weight, bias = raw(args.norm_weight), raw(args.norm_bias)
    return raw(hidden), raw(sums), weight, bias, args.norm == "layer", args.pool, args.norm_eps
