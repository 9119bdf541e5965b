"""Matrix products into a given tensor, and those that are added to a total in fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

# Whether torch adds a product of bf16 matrices to an fp32 matrix on a GPU: versions from 2.8 on have the overload of
# addmm, but before 2.10 it refuses an fp32 matrix to add to.
ADDS_IN_FP32 = torch.__version__ >= "2.10"


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, for `left` [R, D] or [clips, R, D], in the dtype of `out`: that of the operands, or fp32.

    `out=` keeps autocast from casting the product.
    """
    batched = left.dim() == 3
    right = right.expand(left.shape[0], -1, -1) if batched else right
    if out.dtype == left.dtype:
        return torch.bmm(left, right, out=out) if batched else torch.mm(left, right, out=out)
    if left.device.type == "cpu":
        # Of Triton's interpreter: torch has no such product here.
        return out.copy_(left.to(out.dtype) @ right.to(out.dtype))
    if batched:
        return torch.bmm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`, in place; a new tensor if `total` is None."""
    if left.dtype == dtype:
        # `out=` keeps autocast from casting the product.
        if total is None:
            return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))
        return torch.addmm(total, left, right, out=total)
    if ADDS_IN_FP32 and left.device.type != "cpu":
        # The product is added in registers: one of its own would be written in 16 bits and read.
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    product = torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))
    return product.to(dtype) if total is None else total.add_(product)
