"""mtp_combine on the CPU, called by autograd.call: passes over rows around torch's matrix products, or, for a small
call, one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import product_dtype
from ..gemm import mtp_combine as around_products
from ..gemm.mtp_combine import Passes, ordered
from ..native import Array, kernels, raw
from ..op import Gradients, Want
from ..ops.mtp_combine import Arguments
from .small import is_small


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    if not is_small_call(args):
        return [around_products.forward(args, PASSES)], {}
    out = args.hidden.new_empty((*args.hidden.shape[:-1], args.weight.shape[0]))
    kernels.mtp_combine_small_forward(*parameters_of(args), raw(out), args.norm_eps)
    return [out], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    (out_gradient,) = upstream
    assert out_gradient is not None
    if not is_small_call(args):
        return around_products.backward(args, want, out_gradient, PASSES)
    gradients: Gradients = {
        name: torch.empty_like(getattr(args, name)) if wanted else None for name, wanted in want.items()
    }
    hidden, embedding, weight, *norms = map(raw, gradients.values())
    kernels.mtp_combine_small_backward(
        *parameters_of(args), raw(out_gradient), args.norm_eps, ordered(args, hidden, embedding),
        ordered(args, *norms), weight,
    )  # fmt: skip
    return gradients


def is_small_call(args: Arguments) -> bool:
    columns, depth = args.weight.shape
    # A kernel takes at most 5 dimensions.
    return args.hidden.dim() <= 5 and is_small(args.hidden.numel() * 2 // depth, columns, depth)


def parameters_of(args: Arguments) -> tuple[list[Array], list[Array], Array]:
    """The states and norm weights in the order of the weight's halves, and the weight."""
    states = ordered(args, raw(args.hidden), raw(args.embedding))
    return states, ordered(args, raw(args.hidden_norm_weight), raw(args.embedding_norm_weight)), raw(args.weight)


def norm(states: Sequence[Tensor], joined: Tensor, eps: float) -> None:
    kernels.mtp_combine_norm([raw(state) for state in states], raw(joined), eps, torch.get_num_threads())


def gradient(states: Sequence[Tensor], joined: Tensor, eps: float, gradients: Sequence[Tensor | None]) -> None:
    leading = [raw(state) for state in states], raw(joined), eps, torch.get_num_threads()
    kernels.mtp_combine_gradient(*leading, [raw(gradient) for gradient in gradients])


PASSES = Passes(product_dtype, norm, gradient)
