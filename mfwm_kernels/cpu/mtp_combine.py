"""mtp_combine on the CPU, called by autograd.call: chunks of normed, concatenated rows, and torch's matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import precision, product_dtype
from ..gemm.mtp_combine import Passes, norm_weights_of, ordered
from ..gemm.mtp_combine import backward as shared_backward
from ..gemm.rows import chunks, rows_of
from ..native import kernels, raw
from ..op import Gradients, Want
from ..ops.mtp_combine import Arguments


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    hidden, (columns, depth) = args.hidden, args.weight.shape
    computed, dtype = precision(hidden.dtype), product_dtype(hidden.dtype)
    weight = (args.weight.to(computed) * norm_weights_of(args, computed)).to(dtype)
    out = torch.empty(*hidden.shape[:-1], columns, dtype=hidden.dtype, device=hidden.device)
    row_chunks = list(chunks(hidden, (depth + (0 if dtype == hidden.dtype else columns)) * dtype.itemsize))
    joined_all = torch.empty(row_chunks[0][1] if row_chunks else 0, depth, dtype=dtype, device=hidden.device)
    for first, last in row_chunks:
        joined, target = joined_all[: last - first], rows_of(out, first, last)
        norm([rows_of(state, first, last) for state in ordered(args, hidden, args.embedding)], joined, args.norm_eps)
        if dtype == hidden.dtype:
            torch.mm(joined, weight.t(), out=target)
        else:
            target.copy_(joined @ weight.t())
    return [out], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    (out_gradient,) = upstream
    assert out_gradient is not None
    return shared_backward(args, want, out_gradient, PASSES)


def norm(states: Sequence[Tensor], joined: Tensor, eps: float) -> None:
    kernels.mtp_combine_norm([raw(state) for state in states], raw(joined), eps, torch.get_num_threads())


def gradient(states: Sequence[Tensor], joined: Tensor, eps: float, gradients: Sequence[Tensor | None]) -> None:
    leading = [raw(state) for state in states], raw(joined), eps, torch.get_num_threads()
    kernels.mtp_combine_gradient(*leading, [raw(gradient) for gradient in gradients])


PASSES = Passes(product_dtype, norm, gradient)
