"""Launches every Triton kernel, and holds what the launchers share.

All kernels use a one-dimensional grid, because axes y and z are limited to 65,535, and compute offsets in 64 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED

# Triton's interpreter computes tl.dot of bf16 wrongly.
IN_INTERPRETER = tl.constexpr(INTERPRETED)

# mfwm_kernels.launches sets this to record launches: it is called instead of launching.
recorder: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None] | None = None

# The architecture of launches without a GPU; mfwm_kernels.aot sets it.
recorded_architecture = 90


def architecture_of(device: torch.device) -> int:
    """80 for compute capability 8.0, 90 for 9.0."""
    if device.type != "cuda":
        return recorded_architecture
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """kernel[(programs,)](*args, **options) on `device`; does nothing for 0 programs."""
    if programs == 0:
        return
    if programs >= 2**31:
        raise ValueError(f"the call needs {programs} programs of {kernel.__name__}, a launch has fewer than 2**31")
    if recorder is not None:
        recorder(kernel, programs, args, options)
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **options)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def strides(tensor: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides in elements; zeros for None."""
    return (0,) * rank if tensor is None else tensor.stride()


def warps_of(elements: int, per_thread: int = 32) -> int:
    """The number of warps that gives each thread about `per_thread` elements of a tile."""
    return max(1, min(16, power_of_2(ceil_div(elements, 32 * per_thread))))


def dot_precision() -> str:
    """The precision of a dot's fp32 operands: unrounded, unless torch allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a @ b, in fp32."""
    if IN_INTERPRETER:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def widened(tile):
    """The tile in fp32."""
    if IN_INTERPRETER or tile.dtype != tl.bfloat16:
        return tile.to(tl.float32)
    else:
        # 2 instructions for 2 elements, where the compiler needs 3.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [tile], tl.float32, True, 2
        )


def _patch_interpreter() -> None:
    """Make loops with run-time bounds work: Triton 3.6 converts a one-element array to int, which numpy 2.4 rejects."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        index = lambda self: int(self.handle.data.item())  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch


if INTERPRETED:
    _patch_interpreter()

__all__ = [
    "add_product",
    "ceil_div",
    "dot_precision",
    "launch",
    "power_of_2",
    "strides",
    "triton",
    "warps_of",
    "widened",
]
