"""Loads the compiled module mfwm_kernels._native, and describes tensors to it by pointer, sizes and strides."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import _native as kernels


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mfwm_kernels._native"), ""
    except ImportError as error:
        return None, f"the compiled module mfwm_kernels._native did not import: {error}"


# The module, or None and why it is absent.
module, absent = _load()
if not TYPE_CHECKING:
    # The same module, typed by _native.pyi, for code that runs only if the module is present.
    kernels = module

# Must equal DType in csrc/ops.h.
CODES = {
    torch.uint8: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float64: 4,
    torch.int32: 5,
    torch.int64: 6,
}

Array = tuple[int, int, Sequence[int], Sequence[int]]


@overload
def raw(tensor: Tensor) -> Array: ...
@overload
def raw(tensor: None) -> None: ...
@overload
def raw(tensor: Tensor | None) -> Array | None: ...
def raw(tensor: Tensor | None) -> Array | None:
    """(pointer, dtype code, sizes, strides), which csrc/bindings.cpp unpacks into an Array.

    The caller must keep `tensor` alive until the kernel returns.
    """
    if tensor is None:
        return None
    pointer = tensor.data_ptr()
    if pointer == 0 and tensor.numel() > 0:
        raise TypeError(f"a kernel cannot read a {type(tensor).__name__} without data")
    return pointer, CODES[tensor.dtype], tensor.shape, tensor.stride()
