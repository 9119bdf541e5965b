"""mtp_combine around torch's matrix products, which its backends share.

With X the concatenation of the two states, each over its root mean square, and W' = W diag(norm weights):

    out = X W'^T,  d X = dout W',  d W' = dout^T X
    d W = d W' diag(norm weights),  d norm weights = column sums of W d W'

X and d X exist for only one chunk of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..op import Gradients, Want
from ..ops.mtp_combine import Arguments
from .products import add_product
from .rows import chunks, rows_of


def finish(args: Arguments, norm_weights: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the weight and of the norm weights [2 D], given d W'."""
    norm_gradient = (args.weight * gradient).sum(0)
    return (gradient * norm_weights).to(args.weight.dtype), norm_gradient.to(args.weight.dtype)


class Passes(NamedTuple):
    """The functions of a backend around its matrix products.

    product_dtype(dtype)                      the dtype of the operands of matrix products
    norm(states, joined, eps)                 writes X to joined, from rows [R, D] of both states
    gradient(states, joined, eps, gradients)  reads d X from joined; writes the gradients of the states, except None
    finish                                    replaces the function above
    """

    product_dtype: Callable[[torch.dtype], torch.dtype]
    norm: Callable[..., None]
    gradient: Callable[..., None]
    finish: Callable[[Arguments, Tensor, Tensor], tuple[Tensor, Tensor]] = finish


def ordered(args: Arguments, hidden: Any, embedding: Any) -> list[Any]:
    """Both arguments, in the order of the weight's halves."""
    return [hidden, embedding] if args.order == "hidden_first" else [embedding, hidden]


def weights_of(args: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both norm weights [2 D], in the order of the weight's halves, and W' [N, 2 D]."""
    norm_weights = torch.cat(ordered(args, args.hidden_norm_weight, args.embedding_norm_weight)).to(dtype)
    return norm_weights, args.weight.to(dtype) * norm_weights


def forward(args: Arguments, passes: Passes) -> Tensor:
    hidden, dtype = args.hidden, passes.product_dtype(args.hidden.dtype)
    _, weight = weights_of(args, dtype)
    out = torch.empty(*hidden.shape[:-1], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    row_chunks, joined_all = chunks_of(args, dtype)
    for first, last in row_chunks:
        joined, target = joined_all[: last - first], rows_of(out, first, last)
        states = [rows_of(state, first, last) for state in ordered(args, hidden, args.embedding)]
        passes.norm(states, joined, args.norm_eps)
        if dtype == hidden.dtype:
            torch.mm(joined, weight.t(), out=target)
        else:
            target.copy_(joined @ weight.t())
    return out


def backward(args: Arguments, want: Want, upstream: Tensor, passes: Passes) -> Gradients:
    hidden, computed = args.hidden, torch.promote_types(args.hidden.dtype, torch.float32)
    dtype = passes.product_dtype(hidden.dtype)
    norm_weights, weight = weights_of(args, dtype)
    hidden_gradient, embedding_gradient = (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if want[name] else None
        for name in ("hidden", "embedding")
    )
    needs_states = want["hidden"] or want["embedding"]
    needs_weight = want["weight"] or want["hidden_norm_weight"] or want["embedding_norm_weight"]
    weight_gradient = None
    row_chunks, joined_all = chunks_of(args, dtype)
    for first, last in row_chunks:
        joined = joined_all[: last - first]
        states = [rows_of(state, first, last) for state in ordered(args, hidden, args.embedding)]
        out_gradient = rows_of(upstream, first, last).to(dtype)
        if needs_weight:
            passes.norm(states, joined, args.norm_eps)
            weight_gradient = add_product(weight_gradient, out_gradient.t(), joined, computed)
        if needs_states:
            torch.mm(out_gradient, weight, out=joined)
            targets = [
                None if g is None else rows_of(g, first, last)
                for g in ordered(args, hidden_gradient, embedding_gradient)
            ]
            passes.gradient(states, joined, args.norm_eps, targets)
    gradients: Gradients = {"hidden": hidden_gradient, "embedding": embedding_gradient}
    if needs_weight:
        if weight_gradient is None:
            weight_gradient = torch.zeros(weight.shape, dtype=computed, device=hidden.device)
        gradients["weight"], norm_gradient = passes.finish(args, norm_weights, weight_gradient)
        norm_gradients = ordered(args, *norm_gradient.chunk(2))
        gradients["hidden_norm_weight"], gradients["embedding_norm_weight"] = norm_gradients
    return gradients


def chunks_of(args: Arguments, dtype: torch.dtype) -> tuple[list[tuple[int, int]], Tensor]:
    """The chunks of rows, and a buffer for X of each."""
    hidden, (columns, depth) = args.hidden, args.weight.shape
    found = list(chunks(hidden, (depth + (0 if dtype == hidden.dtype else columns)) * dtype.itemsize))
    return found, torch.empty(found[0][1] if found else 0, depth, dtype=dtype, device=hidden.device)
