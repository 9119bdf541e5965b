"""multi_horizon_linear_cross_entropy on the CPU, called by autograd.call.

Torch computes the matrix products, and one kernel passes over each chunk of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import scale_in_place
from ..dtypes import product_dtype
from ..gemm.multi_horizon_linear_cross_entropy import Passes
from ..gemm.multi_horizon_linear_cross_entropy import forward as shared_forward
from ..gemm.token_targets import ListedTargets, Pair, listed_pairs, listed_targets, means
from ..native import kernels, raw
from ..op import Gradients, Want
from ..ops.multi_horizon_linear_cross_entropy import Arguments

CHUNK_BYTES = 64 * 2**20

scale = scale_in_place


def forward(args: Arguments, want: Want) -> tuple[list[Tensor], Gradients]:
    return shared_forward(args, want, PASSES)


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
