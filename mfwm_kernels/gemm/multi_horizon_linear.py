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

The forward returns the rows' r_i as statistics, behind its outputs.

LayerNorm is the same formula on centred rows: x_i less its mean, which is (hidden less its mean m) plus centred sums.

    out_i = r_i x_i W_i'^T + bias_i + W_i norm_bias_i                           the latter two are one bias from here on
    W_i' is centred in fp32, so that x_i W_i'^T = hidden W_i'^T + sums_i W_i'^T, in one product as before
    d W_i' = P_i^T x_i = P_i^T hidden, centred, + ...                           the mean of P_i^T hidden is P_i^T m
    d norm_bias_i = (dout_i summed over rows) W_i;  d W_i gets their outer product with norm_bias_i too

Rounding W_i' to bf16 leaves row sums s_i, which means of 20 to 40 deviations turn into an error of 1.5% of out_i; the
forward subtracts m s_i. P_i^T hidden is rounded to bf16 too, by 4% of d W_i at these means, so the product itself
subtracts P_i^T m.

A gradient monitor needs every d x_i separately: K matrix products and a pass instead of the one. Rows are processed in
chunks, so that no temporary is as large as hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..grad_monitor import write_gram
from ..op import Gradients, Want
from ..ops.conditioning import conditioning_sums, gradients_of_sums, wants_sums
from ..ops.multi_horizon_linear import Arguments
from .products import add_product
from .rows import chunks, rows_of


class Rows(NamedTuple):
    """A chunk: rows [R, D] of hidden from row number `first`, the tokens per position, all conditioning sums, and the
    rows' statistics: r [K, R] with a norm, and with LayerNorm the means m [R] of hidden; else None."""

    hidden: Tensor
    first: int
    tokens: int
    sums: Tensor
    inverse_rms: Tensor | None
    means: Tensor | None


def shape_of(hidden: Tensor) -> tuple[int, int]:
    """(positions, tokens per position)."""
    return hidden.shape[0] * hidden.shape[1], math.prod(hidden.shape[2:-1])


def columns_of(args: Arguments) -> list[int]:
    return [weight.shape[0] for weight in args.weights]


def is_layer(args: Arguments) -> bool:
    return args.norm_weight is not None and args.norm == "layer"


def centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)


def sums_of(args: Arguments, window_sums: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    """The conditioning sums [B, T, K, D], centred for LayerNorm."""
    sums = conditioning_sums(args, window_sums, dtype)
    return centred(sums) if is_layer(args) else sums


def of_heads(args: Arguments, parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The norm's weight or bias for the rows of all heads: [D], or [sum N_i, D] if each horizon has its own."""
    if parameter is None or parameter.dim() == 1:
        return None if parameter is None else parameter.to(dtype)
    pairs = zip(parameter.to(dtype), columns_of(args), strict=True)
    return torch.cat([row.expand(n, -1) for row, n in pairs])


def heads_of(args: Arguments, dtype: torch.dtype) -> Tensor:
    """[sum N_i, D]: the concatenated heads, multiplied by their norm weights, and centred for LayerNorm."""
    layer = is_layer(args)
    wide = torch.promote_types(dtype, torch.float32) if layer else dtype
    heads, norm_weights = torch.cat(args.weights).to(wide), of_heads(args, args.norm_weight, wide)
    if norm_weights is not None:
        heads = heads * norm_weights
    return centred(heads).to(dtype) if layer else heads


def head_sums_of(args: Arguments, heads: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[sum N_i], for LayerNorm: what rounding has left of the sums of the centred heads' rows."""
    return heads.sum(1, dtype=dtype) if is_layer(args) else None


def bias_of(args: Arguments, dtype: torch.dtype) -> Tensor | None:
    """[sum N_i]: the heads' biases, and the norm's bias times the heads."""
    bias, norm_bias = torch.cat(args.biases).to(dtype) if args.biases else None, of_heads(args, args.norm_bias, dtype)
    if norm_bias is None:
        return bias
    projected = (torch.cat(args.weights).to(dtype) * norm_bias).sum(1)
    return projected if bias is None else projected + bias


def projected_of(args: Arguments, sums: Tensor, heads: Tensor) -> Tensor:
    """[B * T, sum N_i]: each horizon's conditioning sums, of [B, T, K, D], times its head, in the sums' dtype."""
    windows = sums.flatten(0, 1).to(heads.dtype).unbind(1)
    pairs = zip(windows, heads.split_with_sizes(columns_of(args)), strict=True)
    return torch.cat([a @ head.t() for a, head in pairs], 1).to(sums.dtype)


def heads_and_bias(args: Arguments, dtype: torch.dtype, computed: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return heads_of(args, dtype), bias_of(args, computed)


def finish_sums(args: Arguments, scaled_sums: Tensor, heads: Tensor, sums: Tensor, sums_gradient: Tensor) -> None:
    """Add (P_i summed over tokens) W_i' to the gradient of the sums."""
    parts = zip(sums_gradient.flatten(0, 1).unbind(1), of_horizons(args, scaled_sums, heads), strict=True)
    for gradient, (p, head) in parts:
        add_product(gradient, p, head, gradient.dtype)


def of_horizons(args: Arguments, scaled_sums: Tensor, heads: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per horizon P_i summed over tokens, in the dtype of the heads, and W_i'."""
    columns = columns_of(args)
    scaled = scaled_sums[:, : sum(columns)].to(heads.dtype)
    return list(zip(scaled.split_with_sizes(columns, 1), heads.split_with_sizes(columns), strict=True))


def finish_heads(
    args: Arguments,
    want: Want,
    scaled_sums: Tensor,
    heads: Tensor,
    sums: Tensor,
    heads_gradient: Tensor,
    totals: Tensor | None,
) -> Gradients:
    """The gradients of weights and norm_weight, given P^T hidden [sum N_i, D], which it overwrites, and with a norm
    bias the sums of the columns of all dout_i, [sum N_i, 1]."""
    columns, computed = columns_of(args), heads_gradient.dtype
    windows = sums.flatten(0, 1).unbind(1)
    parts = zip(heads_gradient.split_with_sizes(columns), of_horizons(args, scaled_sums, heads), windows, strict=True)
    for gradient, (p, head), window in parts:
        add_product(gradient, p.t(), window.to(head.dtype), computed)
    if is_layer(args):
        heads_gradient = centred(heads_gradient)
    norm_weights, norm_bias = (of_heads(args, p, computed) for p in (args.norm_weight, args.norm_bias))
    weights_gradient = heads_gradient if norm_weights is None else heads_gradient * norm_weights
    if totals is not None and norm_bias is not None:
        weights_gradient = weights_gradient + totals * norm_bias
    wanted = zip(weights_gradient.to(args.hidden.dtype).split_with_sizes(columns), want["weights"], strict=True)
    gradients: Gradients = {"weights": [weight if wants else None for weight, wants in wanted]}
    if want["norm_weight"]:
        assert args.norm_weight is not None
        gradients["norm_weight"] = norm_gradient_of(args, args.norm_weight, heads_gradient)
    return gradients


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
    fused_width(args, monitored)
        the columns that `scaled` needs for `products`: those of P, zeros, and last the K shares times D; None where
        torch's products serve
    products(args, rows, scaled, shares, heads, hidden_gradient, needs_heads, heads_gradient, sums_gradient)
        both matrix products and what combine does; reads the sum of a row's shares from `shares`; returns P^T hidden,
        added to heads_gradient unless that is None. It leaves D c_i hidden, summed over tokens, in sums_gradient
    whole_positions
        a chunk has all rows of its positions, and all that the functions add to slices of those positions replaces
        their contents instead
    heads_and_bias, finish_sums, finish_heads   replace the functions above of the same names
    """

    window_sums: Callable[..., Tensor]
    gradients_of_window: Callable[..., Gradients]
    product_dtype: Callable[[torch.dtype], torch.dtype]
    scale: Callable[..., None]
    combine: Callable[..., None]
    monitor: Callable[..., None]
    fused_width: Callable[[Arguments, bool], int | None] = lambda args, monitored: None
    products: Callable[..., Tensor | None] | None = None
    whole_positions: bool = False
    heads_and_bias: Callable[..., tuple[Tensor, Tensor | None]] = heads_and_bias
    finish_sums: Callable[..., None] = finish_sums
    finish_heads: Callable[..., Gradients] = finish_heads


def backward(
    args: Arguments,
    want: Want,
    upstream: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    passes: Passes,
) -> Gradients:
    *outputs, statistics = outputs
    needs_heads = any(want["weights"]) or want["norm_weight"]
    needs_totals = args.norm_bias is not None and (any(want["weights"]) or want["norm_bias"])
    needs_sums = wants_sums(want)
    monitored = want["hidden"] and args.norms is not None
    hidden, columns = args.hidden, columns_of(args)
    positions, tokens = shape_of(hidden)
    count, depth = len(columns), hidden.shape[-1]
    computed = torch.promote_types(hidden.dtype, torch.float32)
    dtype = passes.product_dtype(hidden.dtype)
    sums = sums_of(args, passes.window_sums, computed)
    heads, bias = passes.heads_and_bias(args, dtype, computed)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    def zeros(*shape: int, dtype: torch.dtype = computed) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=hidden.device)

    by_position = partial(empty, dtype=computed) if passes.whole_positions else zeros
    hidden_gradient = empty(*hidden.shape, dtype=hidden.dtype) if want["hidden"] else None
    sums_gradient = by_position(*sums.shape) if needs_sums else None
    heads_gradient = None
    fused_width = passes.fused_width(args, monitored)
    width = sum(columns) if fused_width is None else fused_width
    scaled_sums = by_position(positions, width) if needs_heads or needs_sums else None
    gram = zeros(count, count, dtype=torch.float64) if monitored else None

    copies = count if monitored else 0 if dtype == hidden.dtype else 2
    needs_any = want["hidden"] or needs_heads or needs_sums
    row_bytes = (width + copies * depth) * dtype.itemsize
    row_chunks = list(chunks(hidden, row_bytes, tokens if passes.whole_positions else 1)) if needs_any else []
    size = row_chunks[0][1] if row_chunks else 0
    scaled_all = empty(size, width)
    shares_all = empty(size, count if fused_width is None else 1, dtype=computed)
    product_all = empty(size, depth) if want["hidden"] and not monitored and dtype != hidden.dtype else None
    states_all = [empty(size, depth) if monitored and grad is not None else None for grad in upstream]
    for first, last in row_chunks:
        chunk = Rows(rows_of(hidden, first, last), first, tokens, sums, *parts_of(args, statistics[:, first:last]))
        output_gradients = [None if grad is None else rows_of(grad, first, last) for grad in upstream]
        scaled, shares = scaled_all[: last - first], shares_all[: last - first]
        chunk_outputs = [rows_of(output, first, last) for output in outputs]
        in_scale = scaled_sums if fused_width is None else None
        passes.scale(args, chunk, output_gradients, chunk_outputs, bias, scaled, shares, in_scale)
        target = None if hidden_gradient is None else rows_of(hidden_gradient, first, last)
        if fused_width is not None:
            assert passes.products is not None
            if scaled_sums is not None:
                of_positions = scaled_sums[first // tokens : last // tokens]
                torch.sum(scaled.view(-1, tokens, width), 1, dtype=computed, out=of_positions)
            heads_gradient = passes.products(
                args, chunk, scaled, shares, heads, target, needs_heads, heads_gradient, sums_gradient
            )
            continue
        if needs_heads and chunk.means is None:
            heads_gradient = add_product(heads_gradient, scaled.t(), chunk.hidden.to(dtype), computed)
        elif needs_heads and chunk.means is not None:
            along = (scaled.t() @ chunk.means.to(dtype)).unsqueeze(1)
            added = torch.addmm(along, scaled.t(), chunk.hidden.to(dtype), beta=-1)
            heads_gradient = added.to(computed) if heads_gradient is None else heads_gradient.add_(added)
        if monitored:
            states = [None if state is None else state[: last - first] for state in states_all]
            parts = zip(scaled.split_with_sizes(columns, 1), heads.split_with_sizes(columns), states, strict=True)
            for p, head, state in parts:
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

    gradients: Gradients = {"hidden": hidden_gradient}
    if gram is not None:
        assert args.norms is not None and args.cosines is not None
        write_gram(gram, args.norms, args.cosines)
    if sums_gradient is not None:
        assert scaled_sums is not None
        if not monitored:
            passes.finish_sums(args, scaled_sums, heads, sums, sums_gradient)
        gradients |= gradients_of_sums(args, want, sums_gradient, passes.gradients_of_window)
    totals = None
    if needs_totals:
        pairs = zip(args.weights, upstream, strict=True)
        totals = torch.cat([totals_of(weight[:, 0], grad, computed) for weight, grad in pairs]).unsqueeze(1)
    if needs_heads:
        assert scaled_sums is not None
        if heads_gradient is None:
            heads_gradient = zeros(sum(columns), depth)
        gradients |= passes.finish_heads(args, want, scaled_sums, heads, sums, heads_gradient, totals)
    if want["norm_bias"]:
        assert args.norm_bias is not None and totals is not None
        gradients["norm_bias"] = norm_gradient_of(args, args.norm_bias, totals)
    gradients["biases"] = [
        totals_of(bias, grad, hidden.dtype) if wants else None
        for wants, bias, grad in zip(want["biases"], args.biases, upstream, strict=False)
    ]
    return gradients


def parts_of(args: Arguments, statistics: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(r [K, R], m [R]) of the statistics; each None without the norm that needs it."""
    if args.norm_weight is None:
        return None, None
    count = len(args.offsets)
    return statistics[:count], statistics[count] if is_layer(args) else None


def norm_gradient_of(args: Arguments, parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the norm's weight or bias: column sums of W times `gradient`, which is [sum N_i, D or 1]."""
    products = torch.cat(args.weights) * gradient
    parts = [products] if parameter.dim() == 1 else products.split_with_sizes(columns_of(args))
    return torch.stack([part.sum(0) for part in parts]).view(parameter.shape).to(parameter.dtype)


def totals_of(bias: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sums of the columns of a head's upstream gradient: the gradient of its bias."""
    if upstream is None:
        return torch.zeros_like(bias, dtype=dtype)
    return upstream.sum(tuple(range(upstream.dim() - 1)), dtype=dtype)
