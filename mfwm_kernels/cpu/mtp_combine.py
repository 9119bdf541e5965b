"""mtp_combine on the CPU, called by autograd.call: passes over rows around torch's matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import product_dtype
from ..gemm import mtp_combine as around_products
from ..gemm.mtp_combine import Passes
from ..native import kernels, raw
from ..op import Gradients, Want
from ..ops.mtp_combine import Arguments


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return [around_products.forward(args, PASSES)], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    (out_gradient,) = upstream
    assert out_gradient is not None
    return around_products.backward(args, want, out_gradient, PASSES)


def norm(states: Sequence[Tensor], joined: Tensor, eps: float) -> None:
    kernels.mtp_combine_norm([raw(state) for state in states], raw(joined), eps, torch.get_num_threads())


def gradient(states: Sequence[Tensor], joined: Tensor, eps: float, gradients: Sequence[Tensor | None]) -> None:
    leading = [raw(state) for state in states], raw(joined), eps, torch.get_num_threads()
    kernels.mtp_combine_gradient(*leading, [raw(gradient) for gradient in gradients])


PASSES = Passes(product_dtype, norm, gradient)
