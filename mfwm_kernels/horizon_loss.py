"""HorizonLoss, which both loss ops return, and the checks of the weights that both take."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments as check
from .horizons import Horizons, consistency_pairs
from .op import Gradients, Want

DETACH = (None, "near", "far")


class HorizonLoss(NamedTuple):
    """The loss of K horizons.

    Fields:
        total: scalar, sum_i horizon_weights[i] * per_horizon[i] + the weighted consistency terms; the only
            differentiable field.
        per_horizon: [K] mean losses. The perplexity of a token model is exp(per_horizon[0]); total sums over horizons.
        counts: [K] int64, what each mean is over: the number of elements in multi_horizon_loss, of cells in
            multi_horizon_linear_cross_entropy.
        consistency: the means for pairs of horizons, in the shape of the consistency weights ([K] without any); 0
            where there is no pair.
        consistency_counts: what these means are over, in the same shape.
        accuracy: [K] shares in 0..1, or None.
        predictions: K int64 tensors, the most likely ids of every position, or None.
    """

    total: Tensor
    per_horizon: Tensor
    counts: Tensor
    consistency: Tensor
    consistency_counts: Tensor
    accuracy: Tensor | None = None
    predictions: tuple[Tensor, ...] | None = None


def check_horizon_weights(horizon_weights: Tensor | Sequence[float] | None, count: int, like: Tensor) -> Tensor:
    """[K] weights; ones by default."""
    if horizon_weights is None:
        return check.constant((1.0,) * count, (count,), like)
    return check.horizon_weights("horizon_weights", horizon_weights, [(count,)], like)


def check_position_weights(
    position_weights: Tensor, batch: int, positions: int, count: int, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """[B, T, K] weights, and the same for `nan_if_invalid` to test if they cannot be read up front."""
    letters = "[B, T] or [B, T, K]"
    check.tensor("position_weights", position_weights, (2, 3), letters, (torch.float32, torch.float64))
    if tuple(position_weights.shape) not in ((batch, positions), (batch, positions, count)):
        raise ValueError(
            f"position_weights must have shape [B, T] = [{batch}, {positions}] or [B, T, K] = "
            f"[{batch}, {positions}, {count}], got {list(position_weights.shape)}"
        )
    check.same_device("position_weights", position_weights, "the inputs", like)
    if position_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("position_weights must not require grad: they are constants; pass position_weights.detach()")
    readable = is_readable(position_weights)
    if readable and not ((position_weights >= 0) & (position_weights < float("inf"))).all():
        raise ValueError("position_weights must be finite and >= 0, got a weight that is not")
    if position_weights.dim() == 2:
        position_weights = position_weights.unsqueeze(-1).expand(-1, -1, count)
    return position_weights, None if readable else position_weights


def is_readable(tensor: Tensor) -> bool:
    """Whether the values can be checked: on the CPU, outside torch.compile. Reading from a GPU waits for it."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and check.has_data(tensor)


def warn_of_horizons_that_never_count(horizons: Horizons, positions: int, frames: int, name: str) -> None:
    """Warn, once for each horizon, of those whose offset reaches past every frame: their loss is 0, their heads do not
    learn, and a log shows them as perfect."""
    if positions > 0:
        _warn(horizons, tuple(i for i, offset in enumerate(horizons.offsets) if frames <= offset), name)


def _warn(horizons: Horizons, never: tuple[int, ...], name: str) -> None:
    for i in never:
        if (horizons, i) in _warned:
            continue
        _warned.add((horizons, i))
        warnings.warn(
            f"horizon {i} of {horizons} never counts, because {name} has no more frames than its offset, "
            f"{horizons.offsets[i]}: its loss is 0 and its head does not learn",
            stacklevel=4,
        )


# The compiler calls it once while tracing. Its arguments are constants there: not `frames`, which may be symbolic.
# torch.compiler.assume_constant_result does the same, but imports the whole compiler: 1.4 s at every start.
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
_warned: set[tuple[Horizons, int]] = set()


def check_consistency(
    consistency_weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None,
    horizons: Horizons,
    like: Tensor,
    *,
    matrix: bool = True,
) -> tuple[Tensor | None, list[int], list[tuple[int, ...]]]:
    """The weights as a tensor, the pairs to compute as a flat list i0, j0, i1, j1, ..., and indices for nan_if_invalid.

    A pair whose weight is a Python 0 is not computed. A pair whose factors do not divide must have weight 0. A tensor's
    values are read only on the CPU and outside torch.compile, because reading from a GPU waits for the device. In the
    other cases `nan_if_invalid` tests them.
    """
    if consistency_weights is None:
        return None, [], []
    count = len(horizons)
    shapes = [(count,), (count, count)] if matrix else [(count,)]
    tensor = check.horizon_weights("consistency_weights", consistency_weights, shapes, like)
    listed = not isinstance(consistency_weights, Tensor)
    readable = listed or is_readable(tensor)
    pairs: list[int] = []
    undivided: list[tuple[int, ...]] = []
    shape = tensor.shape
    for i, j in consistency_pairs(count, shape):
        index = index_of((i, j), shape)
        if listed and _entry(consistency_weights, index) == 0:
            continue
        if horizons.factors[j] % horizons.factors[i]:
            if not readable:
                undivided.append(index)
            if not readable or (not listed and tensor.detach()[index] == 0):
                continue
            subscript = "".join(f"[{axis}]" for axis in index)
            raise ValueError(
                f"consistency_weights{subscript} must be 0: factors[{j}] = {horizons.factors[j]} is not a multiple of "
                f"factors[{i}] = {horizons.factors[i]}"
            )
        pairs += [i, j]
    if listed and len(shape) == 2:
        for i in range(count):
            for j in range(i + 1):
                if _entry(consistency_weights, (i, j)) != 0:
                    raise ValueError(f"consistency_weights[{i}][{j}] must be 0: only pairs [i][j] with i < j exist")
    return tensor, pairs, undivided


def _entry(numbers: Any, index: tuple[int, ...]) -> float:
    return numbers[index[0]] if len(index) == 1 else numbers[index[0]][index[1]]


def nan_if_invalid(
    loss: HorizonLoss, weights: Tensor | None, undivided: Sequence[tuple[int, ...]], position_weights: Tensor | None
) -> HorizonLoss:
    """Set the total to NaN if a weight that could not be checked up front breaks its rule: a consistency weight is
    non-zero for a pair whose factors do not divide, or a position weight is negative or not finite."""
    if not undivided and position_weights is None:
        return loss
    total = loss.total
    for index in undivided:
        assert weights is not None
        total = torch.where(weights.detach()[index] == 0, total, float("nan"))
    if position_weights is not None:
        legal = ((position_weights >= 0) & (position_weights < float("inf"))).all()
        total = torch.where(legal, total, float("nan"))
    return HorizonLoss(total, *loss[1:])  # torch 2.11 cannot compile _replace


def gradients_of_weights(args: Any, want: Want, means: Tensor, consistency: Tensor) -> Gradients:
    """The gradients of horizon_weights and consistency_weights. The total is linear in both, so they are the mean
    losses themselves."""
    gradients: Gradients = {}
    for name, mean in (("horizon_weights", means), ("consistency_weights", consistency)):
        if want[name]:
            gradients[name] = mean.to(getattr(args, name).dtype, copy=True)
    return gradients


def index_of(pair: tuple[int, int], shape: Sequence[int]) -> tuple[int, ...]:
    """The index of a pair in consistency weights of this shape."""
    return pair if len(shape) == 2 else pair[1:]
