"""fan_out on the CPU: the window sums first, then one pass over the hidden state."""

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
    outputs_raw = [raw(output) for output in outputs]
    kernels.fan_out_forward(*conditioned(args, hidden, sums), outputs_raw, torch.get_num_threads())
    if args.hidden.dim() == 4:
        outputs = [output.squeeze(2) for output in outputs]
    return outputs, {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    hidden = on_grid(args.hidden)
    count, depth = len(args.pool), hidden.shape[-1]
    computed = precision(hidden.dtype)
    sums = conditioning_sums(args, window_sums, computed)
    of_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if want["hidden"] else None
    of_sums = torch.empty_like(sums) if wants_sums(want) else None
    of_norm = torch.empty(count, depth, dtype=torch.float64, device=hidden.device) if want["norm_weight"] else None
    monitored = want["hidden"] and args.norms is not None
    gram = torch.empty(count, count, dtype=torch.float64, device=hidden.device) if monitored else None
    kernels.fan_out_backward(
        *conditioned(args, hidden, sums),
        [None if grad is None else raw(on_grid(grad)) for grad in upstream],
        torch.get_num_threads(),
        raw(of_hidden),
        raw(of_sums),
        raw(of_norm),
        raw(gram),
        [] if args.scale is None else args.scale.tolist(),
    )
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram, args.norms, args.cosines)

    gradients: Gradients = {}
    if of_hidden is not None:
        gradients["hidden"] = of_hidden.view(args.hidden.shape)
    if of_norm is not None:
        assert args.norm_weight is not None
        total = of_norm.sum(0) if args.norm_weight.dim() == 1 else of_norm
        gradients["norm_weight"] = total.to(args.norm_weight.dtype)
    if of_sums is not None:
        gradients |= gradients_of_sums(args, want, of_sums, gradients_of_window)
    return gradients


def on_grid(states: Tensor) -> Tensor:
    """[B, T, S, D] -> [B, T, 1, S, D]."""
    return states.unsqueeze(2) if states.dim() == 4 else states


def conditioned(args: Arguments, hidden: Tensor, sums: Tensor) -> tuple[Array, Array, Array | None, list[int], float]:
    """The arguments that both kernels begin with."""
    norm_weight = None if args.norm_weight is None else args.norm_weight.expand(len(args.pool), -1)
    return raw(hidden), raw(sums), raw(norm_weight), args.pool, args.norm_eps
