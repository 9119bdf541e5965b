"""action_window_sum on the CPU; fan_out takes its sums from here too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.action_window_sum import Arguments
from . import kernels, raw


def forward(args: Arguments, wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    return [window_sums(args, args.actions.shape[1], args.actions.dtype)], []


def backward(args: Arguments, wanted: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor]:
    (gradient,) = grads
    assert gradient is not None
    return gradients_of_sums(args, wanted, gradient)


def window_sums(args: Arguments, positions: int, dtype: torch.dtype) -> Tensor:
    """[B, positions, K, D]: the sums at the first positions."""
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


def gradients_of_sums(args: Arguments, wanted: Sequence[bool], gradient: Tensor) -> list[Tensor]:
    """The gradients of those of (actions, lag_weight) that are wanted, from the sums' gradient [B, N, K, D]."""
    leaves = [args.actions] if args.lag_weight is None else [args.actions, args.lag_weight]
    made = [
        torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if want else None
        for leaf, want in zip(leaves, wanted, strict=True)
    ]
    kernels.action_window_sum_backward(
        raw(args.actions),
        raw(args.lag_weight),
        raw(args.segment_ids),
        args.offsets,
        args.window_start,
        raw(gradient),
        torch.get_num_threads(),
        raw(made[0]),
        raw(made[1]) if len(made) > 1 else None,
    )
    return [tensor for tensor in made if tensor is not None]
