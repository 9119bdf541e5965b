"""What autocast means: ops around a matrix product cast as F.linear does, the others keep their first input's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def enabled(device: torch.device) -> bool:
    """Whether autocast is on; there is none for tensors without storage."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def cast(tensor: Any, device: torch.device) -> Any:
    """`tensor` in autocast's dtype where autocast is on for this device; fp64 and non-tensors stay as they are."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    if not enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device.type))


def follow(tensor: Any, leader: Any) -> Any:
    """`tensor` in the dtype of `leader` where autocast is on: parameters are fp32 there, activations are not."""
    both = isinstance(tensor, Tensor) and isinstance(leader, Tensor)
    if not both or not (tensor.is_floating_point() and leader.is_floating_point()):
        return tensor
    return tensor.to(leader.dtype) if enabled(leader.device) else tensor
