"""What multi_horizon_linear_cross_entropy is trained on, as torch computes it: the target ids of rows, the rows of
consistency pairs, and the means of the losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..horizons import valid_at
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from ..ops.token_ids import checked_ids


@dataclass(frozen=True)
class Targets:
    """Which rows products include, horizons concatenated, and how many of them count.

    rows      per horizon: the number of leading positions of every clip, or row numbers among its B * T * h * w
    sizes     per horizon: its number of rows; their sum is R
    cells     [K]: how many rows count
    terms     [K]: how many cross-entropies count, at most F per row
    counted   [R]: which rows count, if products include rows that do not (other than for their ignored ids); else None
    known     the ids that teach in place of horizon 0's distributions, because it does not train on them: for each of
              its B * T * h * w rows [F, f * f], int32, -1 for the others. None without pairs or without a mask at
              offset 0. Every pair's near horizon is 0
    """

    rows: list[int | Tensor]
    sizes: list[int]
    cells: Tensor
    terms: Tensor
    counted: Tensor | None
    known: Tensor | None


@dataclass(frozen=True)
class ListedTargets(Targets):
    """Targets with a start in the ids, a scale and a bias for each of the R * F cells.

    ids         the ids of each cell, concatenated, int32; -1 for excluded ids
    starts      [R * F + 1] int64: the start of each cell's ids
    weights     [R * F]: the position weight of each cell, or None
    scales      [R * F]: horizon weight * position weight / number of rows that count
    bias_rows   [R * F] int32: the row of each cell in the biases [N * F, V], or None without biases
    """

    ids: Tensor
    starts: Tensor
    weights: Tensor | None
    scales: Tensor
    bias_rows: Tensor | None


@dataclass(frozen=True)
class Pair:
    """Horizons (near, far); numbers of the far rows [C] and of the near rows [C, S] that each covers, among the
    B * T * h * w rows of their horizon; which far rows count (None: all); how many do."""

    horizons: tuple[int, int]
    far: Tensor
    near: Tensor
    counted: Tensor | None
    cells: Tensor


def pairs_of(args: Arguments) -> list[tuple[int, int]]:
    return list(zip(args.pairs[::2], args.pairs[1::2], strict=True))


def listed_targets(args: Arguments, *, drops: bool) -> ListedTargets:
    """`drops`: rows that do not count are dropped, which waits for the device."""
    all_ids = _ids_or_ignored(args)
    device, computed = all_ids.device, torch.promote_types(args.inputs[0].dtype, torch.float32)
    each = (_targets_of_horizon(args, all_ids, i, drops) for i in range(len(args.inputs)))
    rows, targets, row_weights = zip(*each, strict=True)
    sizes = [ids.shape[0] for ids in targets]
    repeats = [size * args.ids_per_token for size in sizes]
    starts, first = [], 0
    for ids in targets:
        starts.append(torch.arange(first, first + ids.numel(), ids.shape[-1], device=device))
        first += ids.numel()
    starts.append(torch.full((1,), first, device=device))
    counted = None
    if drops and args.ids_per_token == 1:
        # All remaining rows count, each with one cross-entropy.
        cells = terms = torch.tensor(sizes, dtype=torch.int64, device=device)
    else:
        cell_counted = [(ids >= 0).any(-1) for ids in targets]
        row_counted = [cell.any(-1) for cell in cell_counted]
        cells = torch.stack([row.sum() for row in row_counted])
        terms = torch.stack([cell.sum() for cell in cell_counted])
        excluded = (args.segment_ids, args.token_mask, args.position_weights)
        if not drops and (args.return_predictions or any(tensor is not None for tensor in excluded)):
            counted = torch.cat(row_counted)
    scales = (args.horizon_weights.to(computed) / cells.clamp_min(1)).unbind()
    row_scales = torch.cat([scale.expand(size) for scale, size in zip(scales, repeats, strict=True)])
    weights = None
    if args.position_weights is not None:
        weights = torch.cat(row_weights).to(computed)[:, None].expand(-1, args.ids_per_token).flatten()
        row_scales = row_scales * weights
    return ListedTargets(
        list(rows), sizes, cells, terms, counted, _known_ids(args, all_ids),
        ids=torch.cat([ids.flatten() for ids in targets]), starts=torch.cat(starts), weights=weights,
        scales=row_scales, bias_rows=_bias_rows(args, repeats),
    )  # fmt: skip


def means(
    args: Arguments, targets: ListedTargets, pairs: list[Pair], losses: Tensor, hits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See gemm.multi_horizon_linear_cross_entropy.Passes."""
    computed, device, per_token = losses.dtype, losses.device, args.ids_per_token
    repeats = [size * per_token for size in targets.sizes]
    rest = losses[sum(repeats) :].split_with_sizes([pair.far.shape[0] * per_token for pair in pairs])
    losses = losses[: sum(repeats)]
    if targets.weights is not None:
        losses = losses * targets.weights
    per_horizon = torch.stack([sum_of(part) for part in losses.split_with_sizes(repeats)]) / targets.cells.clamp_min(1)
    total = (args.horizon_weights.to(computed) * per_horizon).sum()
    shape = (len(args.inputs),) if args.consistency_weights is None else tuple(args.consistency_weights.shape)
    consistency = torch.zeros(shape, dtype=computed, device=device)
    consistency_counts = torch.zeros(shape, dtype=torch.int64, device=device)
    for pair, part in zip(pairs, rest, strict=True):
        _, j = pair.horizons
        consistency[j], consistency_counts[j] = sum_of(part) / pair.cells.clamp_min(1), pair.cells
    if args.consistency_weights is not None:
        weighted = args.consistency_weights.to(computed) * consistency
        total = total + torch.where(consistency_counts > 0, weighted, 0).sum()
    if hits is None:
        return total, per_horizon, consistency, consistency_counts, None
    right = torch.stack([part.sum() for part in hits.split_with_sizes(repeats)])
    accuracy = right.to(computed) / targets.terms.clamp_min(1)
    return total, per_horizon, consistency, consistency_counts, accuracy


def listed_pairs(args: Arguments) -> list[Pair]:
    """The pairs without the rows that do not count, which waits for the device."""
    return [_listed_pair(args, i, j) for i, j in pairs_of(args)]


def _listed_pair(args: Arguments, i: int, j: int) -> Pair:
    far_states, near_states = args.inputs[j], args.inputs[i]
    positions, height, width = far_states.shape[1:4]
    frames, apart = args.tokens.shape[1], args.offsets[j] - args.offsets[i]
    inside = max(0, min(positions - apart, frames - args.offsets[j]))
    both = counting_positions(args, j)[:, :inside] & counting_positions(args, i)[:, apart : apart + inside]
    counted = both[:, :, None, None].expand(-1, -1, height, width).flatten()
    far = numbered(far_states)[:, :inside].flatten()
    near = cells_of(numbered(near_states)[:, apart : apart + inside, ..., None], height, width).flatten(0, 3).flatten(1)
    return Pair((i, j), far[counted], near[counted], None, counted.sum())


def sum_of(losses: Tensor) -> Tensor:
    return losses.sum(dtype=torch.float64).to(losses.dtype)


def _bias_rows(args: Arguments, repeats: list[int]) -> Tensor | None:
    if not args.biases:
        return None
    count, device = args.ids_per_token, args.tokens.device
    rows = []
    for i, size in enumerate(repeats):
        first = i % len(args.biases) * count
        rows.append(torch.arange(first, first + count, dtype=torch.int32, device=device).repeat(size // count))
    return torch.cat(rows)


def _targets_of_horizon(
    args: Arguments, ids: Tensor, i: int, drops: bool
) -> tuple[int | Tensor, Tensor, Tensor | None]:
    """The rows of horizon i, as in Targets, their target ids [R, F, f * f] and position weights [R]."""
    offset, factor = args.offsets[i], args.factors[i]
    states = args.inputs[i]
    positions, height, width = states.shape[1:4]
    frames = ids.shape[1]
    inside = max(0, min(positions, frames - offset))
    ids = ids[:, offset : offset + inside]
    if offset == 0 and args.token_mask is not None:
        ids = torch.where(args.token_mask[:, :inside, ..., None], ids, -1)
    if args.segment_ids is not None or args.position_weights is not None:
        counts = counting_positions(args, i)[:, :inside]
        ids = torch.where(counts[:, :, None, None, None], ids, -1)
    if args.return_predictions:
        # Positions past the end have no target, but logits.
        ids, inside = F.pad(ids, (0,) * 7 + (positions - inside,), value=-1), positions
    weights = None
    if args.position_weights is not None:
        weights = args.position_weights[:, :inside, i, None, None].expand(-1, -1, height, width).flatten()
    ids = cells_of(ids, height, width).permute(0, 1, 2, 3, 5, 4).reshape(-1, args.ids_per_token, factor * factor)
    if drops:
        counted = (ids >= 0).any(-1).any(-1)
        if not counted.all():
            weights = None if weights is None else weights[counted]
            return numbered(states)[:, :inside].flatten()[counted], ids[counted], weights
    return inside, ids, weights


def counting_positions(args: Arguments, i: int) -> Tensor:
    """[B, T]: the positions where horizon i counts."""
    batch, positions = args.inputs[i].shape[:2]
    frames, device = args.tokens.shape[1], args.tokens.device
    counted = valid_at(args.offsets[i], positions, frames, args.segment_ids, batch, device)
    return counted if args.position_weights is None else counted & (args.position_weights[:, :, i] > 0)


def _ids_or_ignored(args: Arguments) -> Tensor:
    """The ids [B, T_v, Hp, Wp, F], int32, with -1 for ignored ones."""
    ids = checked_ids(args.tokens, args.weight[0].shape[0] // args.ids_per_token, args.ignore_index)
    ids = torch.where(ids == args.ignore_index, -1, ids).int()
    return ids if ids.dim() == 5 else ids.unsqueeze(-1)


def teaches_known_ids(args: Arguments) -> bool:
    return bool(args.pairs) and args.offsets[0] == 0 and args.token_mask is not None


def _known_ids(args: Arguments, ids: Tensor) -> Tensor | None:
    if not teaches_known_ids(args):
        return None
    _, positions, height, width = args.inputs[0].shape[:4]
    assert args.token_mask is not None
    known = torch.where(args.token_mask[..., None], -1, ids)[:, :positions]
    return cells_of(known, height, width).transpose(4, 5).flatten(0, 3).contiguous()


def numbered(states: Tensor) -> Tensor:
    """[B, T, h, w]: the number of each row of `states`."""
    shape = states.shape[:-1]
    return torch.arange(shape.numel(), device=states.device).view(shape)


def cells_of(grid: Tensor, height: int, width: int) -> Tensor:
    """[B, T, height * f, width * f, F] -> [B, T, height, width, f * f, F]: the ids that each cell covers."""
    batch, time, rows, columns, last = grid.shape
    cells = grid.reshape(batch, time, height, rows // height, width, columns // width, last)
    return cells.transpose(3, 4).flatten(4, 5)
