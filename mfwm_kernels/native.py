"""Loads the compiled module mfwm_kernels._native, and describes tensors to it by pointer, sizes and strides."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import _native as kernels


STUB = Path(__file__).with_name("_native.pyi")


def _load() -> tuple[ModuleType | None, str]:
    try:
        found = importlib.import_module("mfwm_kernels._native")
    except ImportError as error:
        return None, f"the compiled module mfwm_kernels._native did not import: {error}"
    check_signatures(found, STUB)
    return found, ""


def check_signatures(found: ModuleType, stub: Path) -> None:
    """ImportError if a compiled module was built with other signatures than those of its stub.

    A module that an older build left behind would fail at its first call, with pybind11's list of types.
    """
    if not stub.exists():
        return
    built = getattr(found, "build_info", {}).get("signatures")
    if built != hashlib.sha256(stub.read_bytes()).hexdigest():
        raise ImportError(
            f"{found.__file__} was compiled from other sources than this version of mfwm_kernels. Build it again: in a "
            "checkout `python setup.py build_ext --inplace`, elsewhere `pip install --force-reinstall --no-deps "
            "mfwm-kernels`. Without that file, the ops run in plain PyTorch"
        )


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
