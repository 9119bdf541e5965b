"""The compiled module mfwm_kernels._native, and tensors as the pointers, sizes and strides that csrc/ takes."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mfwm_kernels._native"), ""
    except ImportError as error:
        return None, f"the compiled module mfwm_kernels._native did not import: {error}"


# The module, or None and why it is absent. `kernels` is the same for code that runs only where it is present.
module, absent = _load()
kernels: Any = module

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

Array = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def raw(tensor: Tensor | None) -> Array | None:
    """(pointer, dtype code, sizes, strides), which csrc/bindings.cpp unpacks into an Array.

    The caller keeps `tensor` alive until the kernel returns.
    """
    if tensor is None:
        return None
    pointer = tensor.data_ptr()
    if pointer == 0 and tensor.numel() > 0:
        raise TypeError(f"a kernel cannot read a {type(tensor).__name__} without data")
    return pointer, CODES[tensor.dtype], tensor.shape, tensor.stride()
