"""What the backends of multi_horizon_linear share: rows in chunks, heads side by side, and the backward.

With x_i = hidden + sums_i, r_i = rsqrt(mean(x_i^2) + eps), W_i' = W_i diag(norm_weight_i) and dout_i the gradient of
out_i, a row of the backward is

    P_i = r_i dout_i                                    a pass, side by side: P is [rows, sum N_i]
    c_i = r_i^2 / D <dout_i, out_i - bias_i>            in that pass, 0 without a norm
    d x_i = P_i W_i' - c_i x_i
    d hidden = sum_i d x_i = P W' - sum_i c_i x_i       one matrix product, then a pass in place
    d sums_i = d x_i summed over tokens                 in that pass, but for (P_i summed over tokens) W_i'
    d W_i' = P_i^T x_i = P_i^T hidden + (P_i summed over tokens)^T sums_i       one matrix product P^T hidden
    d W_i = d W_i' diag(norm_weight_i),  d norm_weight_i = column sums of W_i d W_i'

A monitor needs each d x_i by itself: K matrix products and a pass instead of the one. Rows are taken in chunks, so that
nothing here is as large as hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..grad_monitor import write_gram
from ..op import Gradients, Want
from ..ops.conditioning import conditioning_sums, gradients_of_sums, wants_sums
from ..ops.multi_horizon_linear import Arguments
from .rows import chunks, rows_of


class Passes(NamedTuple):
    """What a backend brings to `backward`.

    window_sums, gradients_of_window   of its action_window_sum
    product_dtype(dtype)               what matrix products take
    scale(args, rows, upstream, outputs, bias, scaled, shares, scaled_sums)
        scaled = P, shares = c; adds P over tokens to scaled_sums
    combine(args, rows, product, shares, of_hidden, of_sums)
        of_hidden = product - sum_i c_i x_i; subtracts c_i x_i over tokens from of_sums
    monitor(args, rows, states, shares, of_hidden, of_sums, gram)
        from states = P_i W_i': writes of_hidden, adds to of_sums and gram
    """

    window_sums: Callable[..., Tensor]
    gradients_of_window: Callable[..., Gradients]
    product_dtype: Callable[[torch.dtype], torch.dtype]
    scale: Callable[..., None]
    combine: Callable[..., None]
    monitor: Callable[..., None]


class Rows(NamedTuple):
    """A chunk of rows: [R, D] of hidden from row `first`, `tokens` rows to a position, and all window sums."""

    hidden: Tensor
    first: int
    tokens: int
    sums: Tensor


def shape_of(hidden: Tensor) -> tuple[int, int]:
    """(positions, tokens per position)."""
    return hidden.shape[0] * hidden.shape[1], math.prod(hidden.shape[2:-1])


def columns_of(args: Arguments) -> list[int]:
    return [weight.shape[0] for weight in args.weights]


def norms_of(args: Arguments, dtype: torch.dtype) -> Tensor | None:
    """The norm weight of each of all heads' rows: [D], or [sum N_i, D] where horizons differ."""
    if args.norm_weight is None or args.norm_weight.dim() == 1:
        return None if args.norm_weight is None else args.norm_weight.to(dtype)
    pairs = zip(args.norm_weight.to(dtype), columns_of(args), strict=True)
    return torch.cat([norm.expand(n, -1) for norm, n in pairs])


def heads_of(args: Arguments, dtype: torch.dtype) -> Tensor:
    """[sum N_i, D]: the heads with their norm weights multiplied in, one below the other."""
    norms, heads = norms_of(args, dtype), torch.cat(args.weights).to(dtype)
    return heads if norms is None else heads * norms


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


def backward(
    args: Arguments,
    want: Want,
    upstream: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    passes: Passes,
) -> Gradients:
    wants_heads = any(want["weights"]) or want["norm_weight"]
    of_sums_needed = wants_sums(want)
    monitored = want["hidden"] and args.norms is not None
    hidden, columns = args.hidden, columns_of(args)
    positions, tokens = shape_of(hidden)
    count, depth = len(columns), hidden.shape[-1]
    computed = torch.promote_types(hidden.dtype, torch.float32)
    dtype = passes.product_dtype(hidden.dtype)
    sums = conditioning_sums(args, passes.window_sums, computed)
    heads, bias = heads_of(args, dtype), bias_of(args, computed)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    def zeros(*shape: int, dtype: torch.dtype = computed) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=hidden.device)

    of_hidden = empty(*hidden.shape, dtype=hidden.dtype) if want["hidden"] else None
    of_sums = zeros(*sums.shape) if of_sums_needed else None
    of_heads = zeros(sum(columns), depth) if wants_heads else None
    scaled_sums = zeros(positions, sum(columns)) if wants_heads or of_sums_needed else None
    gram = zeros(count, count, dtype=torch.float64) if monitored else None

    copies = count if monitored else 0 if dtype == hidden.dtype else 2
    wants_any = want["hidden"] or wants_heads or of_sums_needed
    pieces = list(chunks(hidden, (sum(columns) + copies * depth) * dtype.itemsize)) if wants_any else []
    size = pieces[0][1] if pieces else 0
    scaled_all, shares_all = empty(size, sum(columns)), empty(size, count, dtype=computed)
    product_all = empty(size, depth) if want["hidden"] and not monitored and dtype != hidden.dtype else None
    states_all = [empty(size, depth) if monitored and grad is not None else None for grad in upstream]
    for first, last in pieces:
        chunk = Rows(rows_of(hidden, first, last), first, tokens, sums)
        of_outputs = [None if grad is None else rows_of(grad, first, last) for grad in upstream]
        scaled, shares = scaled_all[: last - first], shares_all[: last - first]
        computed_before = [rows_of(output, first, last) for output in outputs]
        passes.scale(args, chunk, of_outputs, computed_before, bias, scaled, shares, scaled_sums)
        if of_heads is not None:
            of_heads += scaled.t() @ chunk.hidden.to(dtype)
        to = None if of_hidden is None else rows_of(of_hidden, first, last)
        if monitored:
            states = [None if state is None else state[: last - first] for state in states_all]
            for p, head, state in zip(scaled.split(columns, 1), heads.split(columns), states, strict=True):
                if state is not None:
                    torch.mm(p, head, out=state)
            passes.monitor(args, chunk, states, shares, to, of_sums, gram)
        else:
            product = to if product_all is None else product_all[: last - first]
            if product is not None:
                torch.mm(scaled, heads, out=product)
            if args.norm_weight is not None and (to is not None or of_sums is not None):
                passes.combine(args, chunk, product, shares, to, of_sums)
            elif to is not None and product is not None and product is not to:
                to.copy_(product)

    per_horizon: list[tuple[Tensor, Tensor, Tensor]] = []
    if scaled_sums is not None:
        scaled_in_all, windows = scaled_sums.to(dtype).split(columns, 1), sums.flatten(0, 1).unbind(1)
        per_horizon = list(zip(scaled_in_all, heads.split(columns), windows, strict=True))
    gradients: Gradients = {"hidden": of_hidden}
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram, args.norms, args.cosines)
    if of_sums is not None:
        if not monitored:
            for of_sum, (p, head, _) in zip(of_sums.flatten(0, 1).unbind(1), per_horizon, strict=True):
                of_sum += p @ head
        gradients |= gradients_of_sums(args, want, of_sums, passes.gradients_of_window)
    if of_heads is not None:
        for of_head, (p, _, a) in zip(of_heads.split(columns), per_horizon, strict=True):
            of_head += p.t() @ a.to(dtype)
        norms = norms_of(args, computed)
        of_weights = (of_heads if norms is None else of_heads * norms).to(hidden.dtype).split(columns)
        gradients["weights"] = [w if wants else None for w, wants in zip(of_weights, want["weights"], strict=True)]
        if want["norm_weight"]:
            assert args.norm_weight is not None
            products = torch.cat(args.weights) * of_heads
            parts = [products] if args.norm_weight.dim() == 1 else products.split(columns)
            of_norm = torch.stack([part.sum(0) for part in parts]).view(args.norm_weight.shape)
            gradients["norm_weight"] = of_norm.to(hidden.dtype)
    gradients["biases"] = [
        gradient_of_bias(bias, grad) if wants else None
        for wants, bias, grad in zip(want["biases"], args.biases, upstream, strict=False)
    ]
    return gradients


def gradient_of_bias(bias: Tensor, upstream: Tensor | None) -> Tensor:
    return torch.zeros_like(bias) if upstream is None else upstream.sum(tuple(range(upstream.dim() - 1)))
