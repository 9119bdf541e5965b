"""mtp_combine on the CPU: the normed states of a chunk of rows side by side, and torch's matrix product of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.mtp_combine import Arguments
from ..products.mtp_combine import Passes, norms_of, ordered
from ..products.mtp_combine import backward as shared_backward
from ..products.rows import chunks, rows_of
from . import kernels, precision, product_dtype, raw


def forward(args: Arguments, wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    hidden, (columns, depth) = args.hidden, args.weight.shape
    computed, dtype = precision(hidden.dtype), product_dtype(hidden.dtype)
    weight = (args.weight.to(computed) * norms_of(args, computed)).to(dtype)
    out = torch.empty(*hidden.shape[:-1], columns, dtype=hidden.dtype, device=hidden.device)
    pieces = list(chunks(hidden, (depth + (0 if dtype == hidden.dtype else columns)) * dtype.itemsize))
    joined_all = torch.empty(pieces[0][1] if pieces else 0, depth, dtype=dtype, device=hidden.device)
    for first, last in pieces:
        joined, to = joined_all[: last - first], rows_of(out, first, last)
        norm([rows_of(state, first, last) for state in ordered(args, hidden, args.embedding)], joined, args.norm_eps)
        if dtype == hidden.dtype:
            torch.mm(joined, weight.t(), out=to)
        else:
            to.copy_(joined @ weight.t())
    return [out], []


def backward(args: Arguments, wanted: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor]:
    (grad,) = grads
    assert grad is not None
    return shared_backward(args, wanted, grad, PASSES)


def norm(states: Sequence[Tensor], joined: Tensor, eps: float) -> None:
    kernels.mtp_combine_norm([raw(state) for state in states], raw(joined), eps, torch.get_num_threads())


def gradient(states: Sequence[Tensor], joined: Tensor, eps: float, to: Sequence[Tensor | None]) -> None:
    given = [raw(state) for state in states], raw(joined), eps, torch.get_num_threads()
    kernels.mtp_combine_gradient(*given, [raw(of_state) for of_state in to])


PASSES = Passes(product_dtype, norm, gradient)
