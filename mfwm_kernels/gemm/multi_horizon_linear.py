"""The backward of multi_horizon_linear, and the concatenated heads, which its backends share.

With x_i = hidden + sums_i, r_i = rsqrt(mean(x_i^2) + eps), W_i' = W_i diag(norm_weight_i) and dout_i the gradient of
out_i, a row of the backward is

    P_i = r_i dout_i                                    one pass over rows, P = [P_1 ... P_K] is [rows, sum N_i]
    c_i = r_i^2 / D <dout_i, out_i - bias_i>            in the same pass, 0 without a norm
    d x_i = P_i W_i' - c_i x_i
    d hidden = sum_i d x_i = P W' - sum_i c_i x_i       one matrix product, then a pass in place
    d sums_i = d x_i summed over tokens                 in that pass, except (P_i summed over tokens) W_i'
    d W_i' = P_i^T x_i = P_i^T hidden + (P_i summed over tokens)^T sums_i       one matrix product P^T hidden
    d W_i = d W_i' diag(norm_weight_i),  d norm_weight_i = column sums of W_i d W_i'

A gradient monitor needs every d x_i separately: K matrix products and a pass instead of the one. Rows are processed in
chunks, so that no temporary is as large as hidden.
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
    """The functions of a backend that `backward` calls around its matrix products.

    window_sums, gradients_of_window   of the backend's action_window_sum
    product_dtype(dtype)               the dtype of the operands of matrix products
    scale(args, rows, upstream, outputs, bias, scaled, shares, scaled_sums)
        writes P to scaled and c to shares; adds P, summed over tokens, to scaled_sums
    combine(args, rows, product, shares, hidden_gradient, sums_gradient)
        writes product - sum_i c_i x_i to hidden_gradient; subtracts c_i x_i, summed over tokens, from sums_gradient
    monitor(args, rows, states, shares, hidden_gradient, sums_gradient, gram)
        reads P_i W_i' from states; writes hidden_gradient, adds to sums_gradient and gram
    """

    window_sums: Callable[..., Tensor]
    gradients_of_window: Callable[..., Gradients]
    product_dtype: Callable[[torch.dtype], torch.dtype]
    scale: Callable[..., None]
    combine: Callable[..., None]
    monitor: Callable[..., None]


class Rows(NamedTuple):
    """A chunk: rows [R, D] of hidden from row number `first`, the tokens per position, and all conditioning sums."""

    hidden: Tensor
    first: int
    tokens: int
    sums: Tensor


def shape_of(hidden: Tensor) -> tuple[int, int]:
    """(positions, tokens per position)."""
    return hidden.shape[0] * hidden.shape[1], math.prod(hidden.shape[2:-1])


def columns_of(args: Arguments) -> list[int]:
    return [weight.shape[0] for weight in args.weights]


def norm_weights_of(args: Arguments, dtype: torch.dtype) -> Tensor | None:
    """The norm weights of the rows of all heads: [D], or [sum N_i, D] if each horizon has its own."""
    if args.norm_weight is None or args.norm_weight.dim() == 1:
        return None if args.norm_weight is None else args.norm_weight.to(dtype)
    pairs = zip(args.norm_weight.to(dtype), columns_of(args), strict=True)
    return torch.cat([norm.expand(n, -1) for norm, n in pairs])


def heads_of(args: Arguments, dtype: torch.dtype) -> Tensor:
    """[sum N_i, D]: the concatenated heads, multiplied by their norm weights."""
    norm_weights, heads = norm_weights_of(args, dtype), torch.cat(args.weights).to(dtype)
    return heads if norm_weights is None else heads * norm_weights


def bias_of(args: Arguments, dtype: torch.dtype) -> Tensor | None:
    """[sum N_i]"""
    return torch.cat(args.biases).to(dtype) if args.biases else None


def projected_of(args: Arguments, sums: Tensor, heads: Tensor) -> Tensor:
    """[B * T, sum N_i]: each horizon's conditioning sums, of [B, T, K, D], times its head, in the sums' dtype."""
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
    needs_heads = any(want["weights"]) or want["norm_weight"]
    needs_sums = wants_sums(want)
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

    hidden_gradient = empty(*hidden.shape, dtype=hidden.dtype) if want["hidden"] else None
    sums_gradient = zeros(*sums.shape) if needs_sums else None
    heads_gradient = zeros(sum(columns), depth) if needs_heads else None
    scaled_sums = zeros(positions, sum(columns)) if needs_heads or needs_sums else None
    gram = zeros(count, count, dtype=torch.float64) if monitored else None

    copies = count if monitored else 0 if dtype == hidden.dtype else 2
    needs_any = want["hidden"] or needs_heads or needs_sums
    row_chunks = list(chunks(hidden, (sum(columns) + copies * depth) * dtype.itemsize)) if needs_any else []
    size = row_chunks[0][1] if row_chunks else 0
    scaled_all, shares_all = empty(size, sum(columns)), empty(size, count, dtype=computed)
    product_all = empty(size, depth) if want["hidden"] and not monitored and dtype != hidden.dtype else None
    states_all = [empty(size, depth) if monitored and grad is not None else None for grad in upstream]
    for first, last in row_chunks:
        chunk = Rows(rows_of(hidden, first, last), first, tokens, sums)
        output_gradients = [None if grad is None else rows_of(grad, first, last) for grad in upstream]
        scaled, shares = scaled_all[: last - first], shares_all[: last - first]
        chunk_outputs = [rows_of(output, first, last) for output in outputs]
        passes.scale(args, chunk, output_gradients, chunk_outputs, bias, scaled, shares, scaled_sums)
        if heads_gradient is not None:
            heads_gradient += scaled.t() @ chunk.hidden.to(dtype)
        target = None if hidden_gradient is None else rows_of(hidden_gradient, first, last)
        if monitored:
            states = [None if state is None else state[: last - first] for state in states_all]
            for p, head, state in zip(scaled.split(columns, 1), heads.split(columns), states, strict=True):
                if state is not None:
                    torch.mm(p, head, out=state)
            passes.monitor(args, chunk, states, shares, target, sums_gradient, gram)
        else:
            product = target if product_all is None else product_all[: last - first]
            if product is not None:
                torch.mm(scaled, heads, out=product)
            if args.norm_weight is not None and (target is not None or sums_gradient is not None):
                passes.combine(args, chunk, product, shares, target, sums_gradient)
            elif target is not None and product is not None and product is not target:
                target.copy_(product)

    per_horizon: list[tuple[Tensor, Tensor, Tensor]] = []
    if scaled_sums is not None:
        scaled_in_all, windows = scaled_sums.to(dtype).split(columns, 1), sums.flatten(0, 1).unbind(1)
        per_horizon = list(zip(scaled_in_all, heads.split(columns), windows, strict=True))
    gradients: Gradients = {"hidden": hidden_gradient}
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram, args.norms, args.cosines)
    if sums_gradient is not None:
        if not monitored:
            for horizon_gradient, (p, head, _) in zip(sums_gradient.flatten(0, 1).unbind(1), per_horizon, strict=True):
                horizon_gradient += p @ head
        gradients |= gradients_of_sums(args, want, sums_gradient, passes.gradients_of_window)
    if heads_gradient is not None:
        for head_gradient, (p, _, a) in zip(heads_gradient.split(columns), per_horizon, strict=True):
            head_gradient += p.t() @ a.to(dtype)
        norm_weights = norm_weights_of(args, computed)
        weight_gradients = (
            (heads_gradient if norm_weights is None else heads_gradient * norm_weights).to(hidden.dtype).split(columns)
        )
        gradients["weights"] = [
            w if wants else None for w, wants in zip(weight_gradients, want["weights"], strict=True)
        ]
        if want["norm_weight"]:
            assert args.norm_weight is not None
            products = torch.cat(args.weights) * heads_gradient
            parts = [products] if args.norm_weight.dim() == 1 else products.split(columns)
            norm_gradient = torch.stack([part.sum(0) for part in parts]).view(args.norm_weight.shape)
            gradients["norm_weight"] = norm_gradient.to(hidden.dtype)
    gradients["biases"] = [
        gradient_of_bias(bias, grad) if wants else None
        for wants, bias, grad in zip(want["biases"], args.biases, upstream, strict=False)
    ]
    return gradients


def gradient_of_bias(bias: Tensor, upstream: Tensor | None) -> Tensor:
    return torch.zeros_like(bias) if upstream is None else upstream.sum(tuple(range(upstream.dim() - 1)))
