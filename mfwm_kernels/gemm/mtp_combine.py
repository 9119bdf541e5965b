"""What the backends of mtp_combine share: the halves in the weight's order, and the backward.

With X the two states over their root mean squares, side by side, and W' = W diag(norm weights):

    out = X W'^T,  d X = dout W',  d W' = dout^T X
    d W = d W' diag(norm weights),  d norm weights = column sums of W d W'

X and d X exist for a chunk of rows at a time.
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
    """What a backend brings to `backward`.

    product_dtype(dtype)                  what matrix products take
    norm(states, joined, eps)             joined = X, from rows [R, D] of both states
    gradient(states, joined, eps, to)     from joined = d X: the gradient of each state whose entry of `to` is not None
    """

    product_dtype: Callable[[torch.dtype], torch.dtype]
    norm: Callable[..., None]
    gradient: Callable[..., None]


def ordered(args: Arguments, hidden: Any, embedding: Any) -> list[Any]:
    """The two in the order of the weight's halves."""
    return [hidden, embedding] if args.order == "hidden_first" else [embedding, hidden]


def norms_of(args: Arguments, dtype: torch.dtype) -> Tensor:
    """[2 D]"""
    return torch.cat(ordered(args, args.hidden_norm_weight, args.embedding_norm_weight)).to(dtype)


def backward(args: Arguments, want: Want, upstream: Tensor, passes: Passes) -> Gradients:
    hidden, (columns, depth) = args.hidden, args.weight.shape
    computed = torch.promote_types(hidden.dtype, torch.float32)
    dtype = passes.product_dtype(hidden.dtype)
    norms = norms_of(args, computed)
    weight = (args.weight.to(computed) * norms).to(dtype)

    def empty(*shape: int, dtype: torch.dtype = hidden.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    of_hidden = empty(*hidden.shape) if want["hidden"] else None
    of_embedding = empty(*hidden.shape) if want["embedding"] else None
    wants_states = of_hidden is not None or of_embedding is not None
    wants_weight = want["weight"] or want["hidden_norm_weight"] or want["embedding_norm_weight"]
    of_weight = torch.zeros(columns, depth, dtype=computed, device=hidden.device)
    pieces = list(chunks(hidden, (depth + (0 if dtype == hidden.dtype else columns)) * dtype.itemsize))
    joined_all = empty(pieces[0][1] if pieces else 0, depth, dtype=dtype)
    for first, last in pieces:
        joined = joined_all[: last - first]
        states = [rows_of(state, first, last) for state in ordered(args, hidden, args.embedding)]
        of_out = rows_of(upstream, first, last).to(dtype)
        if wants_weight:
            passes.norm(states, joined, args.norm_eps)
            of_weight += of_out.t() @ joined
        if wants_states:
            torch.mm(of_out, weight, out=joined)
            to = [None if g is None else rows_of(g, first, last) for g in ordered(args, of_hidden, of_embedding)]
            passes.gradient(states, joined, args.norm_eps, to)
    of_norms = (args.weight * of_weight).sum(0).to(hidden.dtype).chunk(2)
    of_hidden_norm, of_embedding_norm = ordered(args, *of_norms)
    return {
        "hidden": of_hidden,
        "embedding": of_embedding,
        "weight": (of_weight * norms).to(hidden.dtype) if want["weight"] else None,
        "hidden_norm_weight": of_hidden_norm,
        "embedding_norm_weight": of_embedding_norm,
    }
