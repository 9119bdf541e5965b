"""Launchers of the C++ kernels in csrc/cpu: checked arguments -> pointers, sizes and strides.

The kernels read inputs of any strides in place. They run on torch's number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import native

# As DType in csrc/ops.h.
CODES = {
    torch.uint8: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float64: 4,
    torch.int32: 5,
    torch.int64: 6,
}

kernels: Any = native


def raw(tensor: Tensor | None) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    """What csrc/bindings.cpp makes an Array of. The caller keeps `tensor` alive until the kernel returns."""
    if tensor is None:
        return None
    return tensor.data_ptr(), CODES[tensor.dtype], tuple(tensor.shape), tensor.stride()


def precision(*dtypes: torch.dtype) -> torch.dtype:
    """What a kernel computes in: fp64 where any of its floating tensors is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
