"""Dtype rules: autocast, the precision of sums, stored gradients, and the operands of matrix products.

Under autocast, ops built around a matrix product cast as F.linear does; the others keep the dtype of their first input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this device; torch has none for "meta"."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def cast(tensor: Any, device: torch.device) -> Any:
    """`tensor` in autocast's dtype if autocast is on for this device; fp64 and non-tensors are returned unchanged."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    if not autocasts(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device.type))


def cast_all(tensors: Sequence[Any], device: torch.device) -> Sequence[Any]:
    """`cast` of each. Asking torch about autocast takes a microsecond, so this asks once."""
    return [cast(tensor, device) for tensor in tensors] if autocasts(device) else tensors


def follow(tensor: Any, leader: Any) -> Any:
    """`tensor` in the dtype of `leader` if autocast is on, because then parameters are fp32 and activations are not."""
    both = isinstance(tensor, Tensor) and isinstance(leader, Tensor)
    if not both or not (tensor.is_floating_point() and leader.is_floating_point()):
        return tensor
    return tensor.to(leader.dtype) if autocasts(leader.device) else tensor


def precision(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which sums are computed: fp64 if any of these dtypes is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def stored_dtype(leaf: Tensor) -> torch.dtype:
    """The dtype in which a gradient from the forward is stored until the backward scales it.

    fp16 leaves get fp32: the gradient of a mean over more than 65,536 elements is subnormal in fp16 before a loss scale
    raises it.
    """
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands of a matrix product on the CPU: fp32 for fp16, and for bf16 unless multiplies_bf16().

    fp16 products are slow on most machines too, and fp16 has too small a range for states that are not normed yet.
    """
    if dtype == torch.bfloat16 and not _MULTIPLIES_BF16:
        return torch.float32
    return torch.float32 if dtype == torch.float16 else dtype


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; if not, fp32 products are many times faster.

    MFWM_CPU_PRODUCTS=bf16 or fp32, read when the package is imported, overrides what the CPU reports.
    """
    return _MULTIPLIES_BF16


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
