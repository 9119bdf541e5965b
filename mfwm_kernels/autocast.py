"""What autocast means for the ops around a matrix product: their floating tensors are cast as F.linear's are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cast(tensor: Any, device: torch.device) -> Any:
    """`tensor` in autocast's dtype where autocast is on for this device; fp64 and non-tensors stay as they are."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    if not torch.is_autocast_enabled(device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device.type))
