"""action_window_sum on the CPU, called by autograd.call; fan_out and multi_horizon_linear call `window_sums`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import kernels, raw
from ..op import Gradients, Want
from ..ops.action_window_sum import Arguments


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return [window_sums(args, args.actions.shape[1], args.actions.dtype)], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    (gradient,) = upstream
    assert gradient is not None
    return gradients_of_sums(args, want, gradient)


def window_sums(args: Arguments, positions: int, dtype: torch.dtype) -> Tensor:
    """[B, positions, K, D]: the sums at the first `positions` positions."""
    batch, _, width = args.actions.shape
    sums = torch.empty(batch, positions, len(args.offsets), width, dtype=dtype, device=args.actions.device)
    kernels.action_window_sum_forward(
        raw(args.actions),
        raw(args.lag_weight),
        raw(args.segment_ids),
        args.offsets,
        args.window_start,
        raw(sums),
        torch.get_num_threads(),
    )
    return sums


def gradients_of_sums(args: Arguments, want: Want, gradient: Tensor) -> Gradients:
    """The needed gradients of actions and lag_weight, given the gradient of the sums [B, N, K, D]."""
    gradients: Gradients = {}
    for name in ("actions", "lag_weight"):
        if want[name]:
            gradients[name] = torch.empty_like(getattr(args, name), memory_format=torch.contiguous_format)
    kernels.action_window_sum_backward(
        raw(args.actions),
        raw(args.lag_weight),
        raw(args.segment_ids),
        args.offsets,
        args.window_start,
        raw(gradient),
        torch.get_num_threads(),
        raw(gradients.get("actions")),
        raw(gradients.get("lag_weight")),
    )
    return gradients
