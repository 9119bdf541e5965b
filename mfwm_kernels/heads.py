"""What the backends of multi_horizon_linear share: rows in chunks, heads side by side, and the backward.

With x_i = hidden + sums_i, r_i = rsqrt(mean(x_i^2) + eps) and W_i' = W_i diag(norm_weight_i), a row of the backward is

    P_i = r_i dout_i                                    a pass, side by side: [rows, sum N_i]
    G_i = P_i W_i'                                      K matrix products
    d x_i = G_i - x_i r_i^2 mean(x_i G_i)               a pass; d hidden sums it over i, d sums_i over tokens
    d W_i' = P_i^T x_i = P_i^T hidden + (P_i summed over tokens)^T sums_i      one product with all P_i side by side
    d W_i = d W_i' diag(norm_weight_i),  d norm_weight_i = column sums of W_i d W_i'

G_i and P_i exist for a chunk of rows at a time: nothing here is as large as hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .monitor import write_gram
from .ops.action_window_sum import Arguments as WindowArguments
from .ops.multi_horizon_linear import OP, Arguments
from .registry import gradients_by_field


class Passes(NamedTuple):
    """What a backend brings to `backward`.

    window_sums, gradients_of_sums   of its action_window_sum
    scale(args, rows, upstream, columns, scaled, scales, scaled_sums)
        scaled = r_i upstream_i side by side, scales = r_i; adds `scaled` over tokens to scaled_sums
    combine(args, rows, states, scales, of_hidden, of_sums, gram)
        from states = G_i: writes of_hidden, adds to of_sums and gram
    product_dtype(dtype)             what matrix products take
    chunk_of(rows, horizons)         rows in a chunk
    """

    window_sums: Callable[..., Tensor]
    gradients_of_sums: Callable[..., list[Tensor]]
    scale: Callable[..., None]
    combine: Callable[..., None]
    product_dtype: Callable[[torch.dtype], torch.dtype]
    chunk_of: Callable[[int, int], int]


class Rows(NamedTuple):
    """A chunk of rows: [R, D] of hidden from row `first`, `tokens` rows to a position, and all window sums."""

    hidden: Tensor
    first: int
    tokens: int
    sums: Tensor


def shape_of(hidden: Tensor) -> tuple[int, int]:
    """(positions, tokens per position)."""
    return hidden.shape[0] * hidden.shape[1], math.prod(hidden.shape[2:-1])


def chunks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def rows_of(states: Tensor, first: int, last: int) -> Tensor:
    """Rows first .. last of [..., D]; a copy only where the strides have no other way."""
    try:
        return states.view(-1, states.shape[-1])[first:last]
    except RuntimeError:
        place = torch.arange(first, last, device=states.device)
        return states[torch.unravel_index(place, states.shape[:-1])]


def window_of(args: Arguments) -> WindowArguments:
    return WindowArguments(args.actions, args.lag_weight, args.segment_ids, args.offsets, args.window_start)


def columns_of(args: Arguments) -> list[int]:
    return [weight.shape[0] for weight in args.weights]


def norms_of(args: Arguments, dtype: torch.dtype) -> list[Tensor] | None:
    """The K norm weights."""
    if args.norm_weight is None:
        return None
    return list(args.norm_weight.to(dtype).expand(len(args.offsets), -1))


def heads_of(args: Arguments, computed: torch.dtype, dtype: torch.dtype) -> Tensor:
    """[sum N_i, D]: the heads with their norm weights multiplied in, one below the other."""
    norms = norms_of(args, computed)
    if norms is None:
        return torch.cat(args.weights).to(dtype)
    return torch.cat([w.to(computed) * g for w, g in zip(args.weights, norms, strict=True)]).to(dtype)


def bias_of(args: Arguments, dtype: torch.dtype) -> Tensor | None:
    """[sum N_i]"""
    return torch.cat(args.biases).to(dtype) if args.biases else None


def projected_of(args: Arguments, sums: Tensor, heads: Tensor) -> Tensor:
    """[B * T, sum N_i]: the window sums [B, T, K, D] of each horizon through its head, in the sums' dtype."""
    parts = [
        a.to(heads.dtype) @ head.t()
        for a, head in zip(sums.flatten(0, 1).unbind(1), heads.split(columns_of(args)), strict=True)
    ]
    return torch.cat(parts, 1).to(sums.dtype)


def backward(args: Arguments, wanted: Sequence[bool], grads: Sequence[Tensor | None], passes: Passes) -> list[Tensor]:
    want: dict[str, Any] = {"norm_weight": False, "lag_weight": False, **gradients_by_field(OP, args, wanted)}  # type: ignore[arg-type]
    hidden, columns = args.hidden, columns_of(args)
    positions, tokens = shape_of(hidden)
    count, depth, rows = len(columns), hidden.shape[-1], positions * tokens
    computed = torch.promote_types(hidden.dtype, torch.float32)
    dtype = passes.product_dtype(hidden.dtype)
    sums = passes.window_sums(window_of(args), hidden.shape[1], computed)
    heads = heads_of(args, computed, dtype)

    def zeros(wanted: bool, *shape: int, dtype: torch.dtype = computed) -> Tensor | None:
        return torch.zeros(shape, dtype=dtype, device=hidden.device) if wanted else None

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    wants_sums, wants_heads = want["actions"] or want["lag_weight"], any(want["weights"]) or want["norm_weight"]
    of_hidden = empty(*hidden.shape, dtype=hidden.dtype) if want["hidden"] else None
    of_sums = zeros(wants_sums, *sums.shape)
    of_heads = zeros(wants_heads, sum(columns), depth)
    scaled_sums = zeros(wants_heads, positions, sum(columns))
    gram = zeros(want["hidden"] and args.norms is not None, count, count, dtype=torch.float64)

    if of_hidden is not None or of_sums is not None or of_heads is not None:
        size = min(rows, passes.chunk_of(rows, count))
        scaled_all, scales_all = empty(size, sum(columns)), empty(size, count, dtype=computed)
        wants_states = of_hidden is not None or of_sums is not None
        states_all = [None if g is None or not wants_states else empty(size, depth) for g in grads]
        for first, last in chunks(rows, max(1, size)):
            chunk = Rows(rows_of(hidden, first, last), first, tokens, sums)
            upstream = [None if grad is None else rows_of(grad, first, last) for grad in grads]
            scaled, scales = scaled_all[: last - first], scales_all[: last - first]
            passes.scale(args, chunk, upstream, columns, scaled, scales, scaled_sums)
            if of_heads is not None:
                of_heads += scaled.t() @ chunk.hidden.to(dtype)
            if wants_states:
                states = [None if state is None else state[: last - first] for state in states_all]
                for p, head, state in zip(scaled.split(columns, 1), heads.split(columns), states, strict=True):
                    if state is not None:
                        torch.mm(p, head, out=state)
                to = None if of_hidden is None else rows_of(of_hidden, first, last)
                passes.combine(args, chunk, states, scales, to, of_sums, gram)

    made: dict[str, list[Tensor | None]] = {name: [] for name in OP.differentiable}
    made["hidden"] = [of_hidden]
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram, args.norms, args.cosines)
    if of_sums is not None:
        flags = [want[name] for name in ("actions", "lag_weight") if getattr(args, name) is not None]
        given = iter(passes.gradients_of_sums(window_of(args), flags, of_sums))
        made["actions"] = [next(given) if want["actions"] else None]
        made["lag_weight"] = [next(given) if want["lag_weight"] else None]
    if of_heads is not None:
        assert scaled_sums is not None
        pieces = of_heads.split(columns), scaled_sums.to(dtype).split(columns, 1), sums.flatten(0, 1).unbind(1)
        for of_head, p, a in zip(*pieces, strict=True):
            of_head += p.t() @ a.to(dtype)
        norms = norms_of(args, computed)
        for i, of_head in enumerate(of_heads.split(columns)):
            if want["weights"][i]:
                weighted = of_head if norms is None else of_head * norms[i]
                made["weights"].append(weighted.to(hidden.dtype))
        if want["norm_weight"]:
            assert args.norm_weight is not None
            products = args.weights, of_heads.split(columns)
            of_norm = torch.stack([(w * of_head).sum(0) for w, of_head in zip(*products, strict=True)])
            of_norm = of_norm.sum(0) if args.norm_weight.dim() == 1 else of_norm
            made["norm_weight"] = [of_norm.to(hidden.dtype)]
    for wants, bias, grad in zip(want["biases"], args.biases, grads, strict=False):
        if wants:
            made["biases"].append(torch.zeros_like(bias) if grad is None else grad.sum(tuple(range(grad.dim() - 1))))
    return [tensor for name in OP.differentiable for tensor in made[name] if tensor is not None]
