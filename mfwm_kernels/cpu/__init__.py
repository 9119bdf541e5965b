"""Launchers of the C++ kernels in csrc/cpu: checked arguments -> pointers, sizes and strides.

The kernels read inputs of any strides in place. They run on torch's number of threads.
"""

from __future__ import annotations

import os
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
    pointer = tensor.data_ptr()
    if pointer == 0 and tensor.numel() > 0:
        raise TypeError(f"a kernel cannot read a {type(tensor).__name__} without data")
    return pointer, CODES[tensor.dtype], tensor.shape, tensor.stride()


def precision(*dtypes: torch.dtype) -> torch.dtype:
    """What a kernel computes in: fp64 where any of its floating tensors is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands of a matrix product: bf16 where the CPU multiplies it in hardware, fp32 for fp16.

    Without such instructions bf16 products are many times slower than fp32 ones. So are fp16 products on most machines,
    and their range is too small for states that are not normed yet. MFWM_CPU_PRODUCTS=bf16 or fp32 overrides what the
    CPU reports.
    """
    if dtype == torch.bfloat16 and not _MULTIPLIES_BF16:
        return torch.float32
    return torch.float32 if dtype == torch.float16 else dtype


def _multiplies_bf16() -> bool:
    chosen = os.environ.get("MFWM_CPU_PRODUCTS") or "auto"
    if chosen not in ("auto", "bf16", "fp32"):
        raise ValueError(f"MFWM_CPU_PRODUCTS must be one of auto, bf16, fp32; got {chosen!r}")
    if chosen != "auto":
        return chosen == "bf16"
    # Private torch functions that some versions lack; if none exists, assume that bf16 is fast.
    supported = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    known = [is_supported() for is_supported in supported if is_supported is not None]
    return not known or any(known)


_MULTIPLIES_BF16 = _multiplies_bf16()
