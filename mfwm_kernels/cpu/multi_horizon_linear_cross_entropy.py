"""multi_horizon_linear_cross_entropy on the CPU, called by autograd.call.

Torch computes the matrix products, and one kernel passes over each chunk of logits. One kernel computes a small call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import scale_in_place
from ..dtypes import precision, product_dtype, stored_dtype
from ..gemm.multi_horizon_linear_cross_entropy import Passes
from ..gemm.multi_horizon_linear_cross_entropy import forward as shared_forward
from ..gemm.token_targets import ListedTargets, Pair, listed_pairs, listed_targets, means
from ..horizon_loss import gradients_of_weights
from ..native import kernels, raw
from ..op import Gradients, Want
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from ..ops.token_ids import checked_ids
from .small import is_small

CHUNK_BYTES = 64 * 2**20

scale = scale_in_place


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return small_forward(args, want) if is_small_call(args) else shared_forward(args, want, PASSES)


def is_small_call(args: Arguments) -> bool:
    """Whether one kernel computes the call: few multiplications, and none of the options that it does not have."""
    columns, depth = args.weight[0].shape
    rows = sum(states.numel() for states in args.inputs) // depth
    has_options = args.pairs or args.chunk_size or args.return_predictions
    shares = args.leaders != list(range(len(args.inputs)))
    return not has_options and not shares and is_small(rows, columns, depth)


def small_forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    first, count = args.inputs[0], len(args.inputs)
    computed = precision(first.dtype)
    counts, consistency_counts = (first.new_empty(count, dtype=torch.int64) for _ in range(2))
    total = first.new_empty((), dtype=computed)
    per_horizon, consistency = (first.new_empty(count, dtype=computed) for _ in range(2))
    accuracy = first.new_empty(count, dtype=computed) if args.return_accuracy else None
    gradients: Gradients = {
        name: [
            torch.empty_like(tensor, dtype=stored_dtype(tensor)) if wants else None
            for tensor, wants in zip(getattr(args, name), want[name], strict=True)
        ]
        for name in ("inputs", "weight", "biases")
    }
    learns = any(gradient is not None for each in gradients.values() for gradient in each)
    outputs = [total, per_horizon, counts, consistency, consistency_counts]
    mask = None if args.token_mask is None else args.token_mask.view(torch.uint8)
    are_ids_in_range = kernels.multi_horizon_linear_cross_entropy_small(
        list(map(raw, args.inputs)), list(map(raw, args.weight)), list(map(raw, args.biases)), raw(args.tokens),
        raw(args.horizon_weights), raw(args.segment_ids), raw(mask), raw(args.position_weights), args.offsets,
        args.factors, args.ignore_index, args.label_smoothing, args.z_loss, args.softcap, learns,
        [*map(raw, outputs), raw(accuracy)], list(map(raw, gradients["inputs"])), list(map(raw, gradients["weight"])),
        list(map(raw, gradients["biases"])),
    )  # fmt: skip
    if not are_ids_in_range:
        # This raises the error that names the id.
        checked_ids(args.tokens, args.weight[0].shape[0] // args.ids_per_token, args.ignore_index)
    gradients |= gradients_of_weights(args, want, per_horizon, consistency)
    return [*outputs, *([] if accuracy is None else [accuracy])], gradients


def add(total: Tensor, product: Tensor) -> None:
    kernels.multi_horizon_linear_add(raw(total), raw(product), torch.get_num_threads())


def column_sums(rows: Tensor) -> Tensor:
    computed = torch.promote_types(rows.dtype, torch.float32)
    if rows.dtype == computed:
        return rows.sum(0)
    # torch converts all that it sums at a time to the dtype of the sum. Pieces of 2^17 elements stay in cache.
    total = torch.zeros(rows.shape[1], dtype=computed)
    for piece in rows.split(max(1, 2**17 // rows.shape[1])):
        total += piece.sum(0, dtype=computed)
    return total


def targets_of(args: Arguments) -> ListedTargets:
    return listed_targets(args, drops=not args.return_predictions)


def cross_entropy(
    args: Arguments,
    logits: Tensor,
    targets: ListedTargets,
    first: int,
    biases: Tensor | None,
    losses: Tensor,
    hits: Tensor | None,
    predictions: Tensor | None,
    learns: bool,
    scale: Tensor | None,
) -> None:
    assert scale is None
    last = first + logits.shape[0]
    entries = targets.entries
    bias_rows = None if targets.bias_rows is None else targets.bias_rows[first:last]
    predictions = None if predictions is None else predictions[first:last]
    first, last = first * entries, last * entries
    hits = None if hits is None else hits[first:last]
    kernels.multi_horizon_linear_cross_entropy(
        raw(logits), raw(biases), raw(bias_rows), raw(targets.ids), raw(targets.starts[first : last + 1]),
        raw(targets.scales[first:last]), raw(losses[first:last]), raw(hits), raw(predictions), entries,
        args.label_smoothing, args.z_loss, args.softcap, learns, torch.get_num_threads(),
    )  # fmt: skip


def consistency(
    args: Arguments,
    pair: Pair,
    near: Tensor,
    far: Tensor,
    near_bias: Tensor | None,
    far_bias: Tensor | None,
    counted: Tensor | None,
    known: Tensor | None,
    losses: Tensor,
    learns_near: bool,
    learns_far: bool,
    scale: Tensor | None,
) -> None:
    assert counted is None and scale is None and args.consistency_weights is not None
    factor = args.consistency_weights[pair.horizons[1]].to(losses.dtype) / pair.cells.clamp_min(1)
    kernels.multi_horizon_linear_consistency(
        raw(near), raw(far), raw(near_bias), raw(far_bias), raw(known), raw(losses), args.ids_per_token, args.softcap,
        factor.item(), learns_near, learns_far, torch.get_num_threads(),
    )  # fmt: skip


PASSES = Passes(
    chunk_bytes=CHUNK_BYTES,
    product_dtype=product_dtype,
    drops=True,
    batched=False,
    add=add,
    column_sums=column_sums,
    targets=targets_of,
    cross_entropy=cross_entropy,
    pairs=listed_pairs,
    consistency=consistency,
    means=means,
)
