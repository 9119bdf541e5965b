"""The backward of mtp_combine, and the order of the weight's halves, which its backends share.

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
from .rows import chunks, rows_of


class Passes(NamedTuple):
    """The functions of a backend that `backward` calls around its matrix products.

    product_dtype(dtype)                      the dtype of the operands of matrix products
    norm(states, joined, eps)                 writes X to joined, from rows [R, D] of both states
    gradient(states, joined, eps, gradients)  reads d X from joined; writes the gradients of the states, except None
    """

    product_dtype: Callable[[torch.dtype], torch.dtype]
    norm: Callable[..., None]
    gradient: Callable[..., None]


def ordered(args: Arguments, hidden: Any, embedding: Any) -> list[Any]:
    """Both arguments, in the order of the weight's halves."""
    return [hidden, embedding] if args.order == "hidden_first" else [embedding, hidden]


def norm_weights_of(args: Arguments, dtype: torch.dtype) -> Tensor:
    """[2 D]: both norm weights, in the order of the weight's halves."""
    return torch.cat(ordered(args, args.hidden_norm_weight, args.embedding_norm_weight)).to(dtype)


def backward(args: Arguments, want: Want, upstream: Tensor, passes: Passes) -> Gradients:
    hidden, (columns, depth) = args.hidden, args.weight.shape
    computed = torch.promote_types(hidden.dtype, torch.float32)
    dtype = passes.product_dtype(hidden.dtype)
    norm_weights = norm_weights_of(args, computed)
    weight = (args.weight.to(computed) * norm_weights).to(dtype)

    def empty(*shape: int, dtype: torch.dtype = hidden.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    hidden_gradient = empty(*hidden.shape) if want["hidden"] else None
    embedding_gradient = empty(*hidden.shape) if want["embedding"] else None
    needs_states = hidden_gradient is not None or embedding_gradient is not None
    needs_weight = want["weight"] or want["hidden_norm_weight"] or want["embedding_norm_weight"]
    weight_gradient = torch.zeros(columns, depth, dtype=computed, device=hidden.device)
    row_chunks = list(chunks(hidden, (depth + (0 if dtype == hidden.dtype else columns)) * dtype.itemsize))
    joined_all = empty(row_chunks[0][1] if row_chunks else 0, depth, dtype=dtype)
    for first, last in row_chunks:
        joined = joined_all[: last - first]
        states = [rows_of(state, first, last) for state in ordered(args, hidden, args.embedding)]
        out_gradient = rows_of(upstream, first, last).to(dtype)
        if needs_weight:
            passes.norm(states, joined, args.norm_eps)
            weight_gradient += out_gradient.t() @ joined
        if needs_states:
            torch.mm(out_gradient, weight, out=joined)
            targets = [
                None if g is None else rows_of(g, first, last)
                for g in ordered(args, hidden_gradient, embedding_gradient)
            ]
            passes.gradient(states, joined, args.norm_eps, targets)
    norm_gradients = (args.weight * weight_gradient).sum(0).to(hidden.dtype).chunk(2)
    hidden_norm_gradient, embedding_norm_gradient = ordered(args, *norm_gradients)
    return {
        "hidden": hidden_gradient,
        "embedding": embedding_gradient,
        "weight": (weight_gradient * norm_weights).to(hidden.dtype) if want["weight"] else None,
        "hidden_norm_weight": hidden_norm_gradient,
        "embedding_norm_weight": embedding_norm_gradient,
    }
