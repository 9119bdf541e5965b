"""The one place where kernels are launched, and what the launchers share.

All kernels run on a one-dimensional grid (axes y and z stop at 65,535) and compute offsets in 64 bits.
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

# In the interpreter tl.dot of bf16 gives garbage.
EMULATED = tl.constexpr(INTERPRETED)

# mfwm_kernels.launches sets this to see what would be launched: it is called in place of the launch.
instead: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None] | None = None


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """kernel[(programs,)](*args, **options) on `device`; nothing where there are no programs."""
    if programs == 0:
        return
    if programs >= 2**31:
        raise ValueError(f"the call needs {programs} programs of {kernel.__name__}, a launch has fewer than 2**31")

    if instead is not None:
        instead(kernel, programs, args, options)
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **options)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def strides(tensor: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides in elements; zeros for a tensor that is not there."""
    return (0,) * rank if tensor is None else tensor.stride()


def warps_of(elements: int, per_thread: int = 32) -> int:
    """Warps that leave each thread about `per_thread` elements of a tile."""
    return max(1, min(16, power_of_2(ceil_div(elements, 32 * per_thread))))


def dot_precision() -> str:
    """What a dot of fp32 may round its factors to: nothing, unless torch allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a @ b, in fp32."""
    if EMULATED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


def _mend_interpreter() -> None:
    """Loops with run-time bounds: Triton 3.6 makes an int of an array of one element, which numpy 2.4 refuses."""
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
    _mend_interpreter()

__all__ = ["add_product", "ceil_div", "dot_precision", "launch", "power_of_2", "strides", "triton", "warps_of"]
