"""multi_horizon_linear on the CPU, called by autograd.call: torch's matrix products and passes over chunks of rows, or,
for a small call, one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import precision, product_dtype
from ..gemm.multi_horizon_linear import (
    Passes,
    Rows,
    bias_of,
    columns_of,
    head_sums_of,
    heads_of,
    parts_of,
    projected_of,
    shape_of,
    sums_of,
)
from ..gemm.multi_horizon_linear import backward as shared_backward
from ..gemm.rows import chunks, rows_of
from ..native import Array, kernels, raw
from ..op import Gradients, Want
from ..ops.multi_horizon_linear import Arguments, statistics_of
from .action_window_sum import gradients_of_sums as gradients_of_window
from .action_window_sum import window_sums
from .small import is_small


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    hidden, columns = args.hidden, columns_of(args)
    if is_small_call(args):
        outputs = [hidden.new_empty((*hidden.shape[:-1], n)) for n in columns]
        kernels.multi_horizon_linear_small_forward(*parameters_of(args), list(map(raw, outputs)))
        # The backward of a small call reads no statistics.
        return [*outputs, statistics_of(args).zero_()], {}
    _, tokens = shape_of(hidden)
    computed, dtype = precision(hidden.dtype), product_dtype(hidden.dtype)
    outputs = [torch.empty(*hidden.shape[:-1], n, dtype=hidden.dtype, device=hidden.device) for n in columns]
    sums = sums_of(args, window_sums, computed)
    heads, bias = heads_of(args, dtype), bias_of(args, computed)
    projected, head_sums = projected_of(args, sums, heads), head_sums_of(args, heads, computed)
    copies = 0 if dtype == hidden.dtype else 1
    row_chunks = list(chunks(hidden, (sum(columns) + copies * hidden.shape[-1]) * dtype.itemsize))
    size = row_chunks[0][1] if row_chunks else 0
    product = torch.empty(size, sum(columns), dtype=dtype, device=hidden.device)
    statistics = statistics_of(args)
    for first, last in row_chunks:
        rows = Rows(rows_of(hidden, first, last), first, tokens, sums, *parts_of(args, statistics[:, first:last]))
        torch.mm(rows.hidden.to(dtype), heads.t(), out=product[: last - first])
        targets = [rows_of(output, first, last) for output in outputs]
        kernels.multi_horizon_linear_forward(
            *leading(args, rows),
            raw(product[: last - first]),
            raw(projected),
            raw(head_sums),
            raw(bias),
            [raw(target) for target in targets],
        )
    return [*outputs, statistics], {}


def backward(args: Arguments, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Gradients:
    if not is_small_call(args):
        return shared_backward(args, want, upstream, outputs, PASSES)
    gradients: Gradients = {name: gradient_like(getattr(args, name), wanted) for name, wanted in want.items()}
    kernels.multi_horizon_linear_small_backward(
        *parameters_of(args), list(map(raw, upstream)),
        raw(gradients["hidden"]), raw(gradients["actions"]), raw(gradients["lag_weight"]), raw(gradients["condition"]),
        raw(gradients["norm_weight"]), raw(gradients["norm_bias"]),
        list(map(raw, gradients["weights"])), list(map(raw, gradients["biases"])),
    )  # fmt: skip
    return gradients


def is_small_call(args: Arguments) -> bool:
    depth = args.hidden.shape[-1]
    return args.norms is None and is_small(args.hidden.numel() // depth, sum(columns_of(args)), depth)


def parameters_of(
    args: Arguments,
) -> tuple[
    Array, Array | None, Array | None, Array | None, Array | None, Array | None, Array | None,
    bool, float, list[int], int, list[Array], list[Array],
]:  # fmt: skip
    """The leading arguments of the kernels of small calls."""
    return (raw(args.hidden), raw(args.actions), raw(args.lag_weight), raw(args.segment_ids), raw(args.condition),
            raw(args.norm_weight), raw(args.norm_bias), args.norm == "layer", args.norm_eps, args.offsets,
            args.window_start, list(map(raw, args.weights)), list(map(raw, args.biases)))  # fmt: skip


def gradient_like(field: Any, wanted: Any) -> Any:
    """An empty tensor like a field of the arguments, or a list of them; None where it is not wanted."""
    if type(field) is list:
        return [torch.empty_like(tensor) if wants else None for tensor, wants in zip(field, wanted, strict=True)]
    return torch.empty_like(field) if wanted else None


def leading(args: Arguments, rows: Rows) -> tuple[Array, Array, Array | None, Array | None, int, int, float, int]:
    """The leading arguments of all kernels."""
    return (raw(rows.hidden), raw(rows.sums.flatten(0, 1)), raw(rows.inverse_rms), raw(rows.means), rows.first,
            rows.tokens, args.norm_eps, torch.get_num_threads())  # fmt: skip


def scale(
    args: Arguments,
    rows: Rows,
    upstream: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    bias: Tensor | None,
    scaled: Tensor,
    shares: Tensor,
    scaled_sums: Tensor | None,
) -> None:
    kernels.multi_horizon_linear_scale(
        *leading(args, rows), [raw(grad) for grad in upstream], [raw(output) for output in outputs], raw(bias),
        raw(scaled), raw(shares), raw(scaled_sums),
    )  # fmt: skip


def combine(
    args: Arguments,
    rows: Rows,
    product: Tensor | None,
    shares: Tensor,
    hidden_gradient: Tensor | None,
    sums_gradient: Tensor | None,
) -> None:
    window_gradients = None if sums_gradient is None else sums_gradient.flatten(0, 1)
    kernels.multi_horizon_linear_combine(
        *leading(args, rows), raw(product), raw(shares), raw(hidden_gradient), raw(window_gradients)
    )  # fmt: skip


def monitor(
    args: Arguments,
    rows: Rows,
    states: Sequence[Tensor | None],
    shares: Tensor,
    hidden_gradient: Tensor,
    sums_gradient: Tensor | None,
    gram: Tensor,
) -> None:
    weights = [] if args.scale is None else args.scale.tolist()
    window_gradients = None if sums_gradient is None else sums_gradient.flatten(0, 1)
    kernels.multi_horizon_linear_monitor(
        *leading(args, rows), [raw(state) for state in states], raw(shares), weights,
        raw(hidden_gradient), raw(window_gradients), raw(gram),
    )  # fmt: skip


PASSES = Passes(window_sums, gradients_of_window, product_dtype, scale, combine, monitor)
