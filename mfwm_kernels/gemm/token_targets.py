"""What multi_horizon_linear_cross_entropy is trained on, as torch computes it: the target ids of rows, the rows of
consistency pairs, and the means of the losses."""

from __future__ import annotations

import itertools
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

    rows      per horizon: the number of leading positions of every clip, or row numbers among its B * T * h * w. A
              leader's are all that count for a horizon that shares its logits; the others have 0
    sizes     per horizon: its number of rows; their sum is R
    losses    the number of cross-entropies of R * F cells: one for each horizon that shares a cell's logits
    cells     [K]: how many rows count
    terms     [K]: how many cross-entropies count, at most F per row
    counted   [R]: which rows count, if products include rows that do not (other than for their ignored ids); else None
    known     the ids that teach in place of horizon 0's distributions, because it does not train on them: for each of
              its B * T * h * w rows [F, f * f], int32, -1 for the others. None without pairs or without a mask at
              offset 0. Every pair's near horizon is 0
    """

    rows: list[int | Tensor]
    sizes: list[int]
    losses: int
    cells: Tensor
    terms: Tensor
    counted: Tensor | None
    known: Tensor | None


@dataclass(frozen=True)
class ListedTargets(Targets):
    """Targets with a bias for each of the R * F cells and E entries, one for each horizon that shares its logits. Where
    fewer than E do, the other entries have no ids and scale 0.

    entries     E
    ids         the ids of each entry, concatenated, int32; -1 for excluded ids
    starts      [R * F * E + 1] int64: the start of each entry's ids
    weights     [R * F * E]: the position weight of each entry, or None
    scales      [R * F * E]: horizon weight * position weight / number of rows that count
    bias_rows   [R * F] int32: the row of each cell in the biases [N * F, V], or None without biases
    """

    entries: int
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


def groups_of(args: Arguments) -> dict[int, list[int]]:
    """The horizons that share the logits of each leader, itself first."""
    groups: dict[int, list[int]] = {}
    for i, leader in enumerate(args.leaders):
        groups.setdefault(leader, []).append(i)
    return groups


def listed_targets(args: Arguments, *, drops: bool) -> ListedTargets:
    """`drops`: rows that do not count are dropped, which waits for the device."""
    all_ids = _ids_or_ignored(args)
    device, computed = all_ids.device, torch.promote_types(args.inputs[0].dtype, torch.float32)
    per_token = args.ids_per_token
    groups = groups_of(args)
    entries = max(map(len, groups.values()))
    each = [_targets_of_group(args, all_ids, group, drops) for group in groups.values()]
    rows: list[int | Tensor] = [0] * len(args.inputs)
    sizes = [0] * len(args.inputs)
    for leader, (group_rows, ids, _) in zip(groups, each, strict=True):
        rows[leader], sizes[leader] = group_rows, ids.shape[0]
    starts, first = [], 0
    for _, ids, _ in each:
        of_cell = torch.arange(first, first + ids.numel(), ids.shape[2:].numel(), device=device)
        if entries > 1:
            of_entry = torch.arange(entries, device=device).clamp_max(ids.shape[2]) * ids.shape[3]
            of_cell = (of_cell[:, None] + of_entry).flatten()
        starts.append(of_cell)
        first += ids.numel()
    starts.append(torch.full((1,), first, device=device))
    counted = None
    if drops and per_token == entries == 1:
        # All remaining rows count, each with one cross-entropy.
        cells = terms = torch.tensor(sizes, dtype=torch.int64, device=device)
    else:
        # [R, F, E]
        term_counted = [(ids >= 0).any(-1) for _, ids, _ in each]
        cells = _in_order(groups, [term.any(1).sum(0) for term in term_counted])
        terms = _in_order(groups, [term.sum((0, 1)) for term in term_counted])
        excluded = (args.segment_ids, args.token_mask, args.position_weights)
        if not drops and (args.return_predictions or any(tensor is not None for tensor in excluded)):
            counted = torch.cat([term.any(-1).any(-1) for term in term_counted])
    scales = (args.horizon_weights.to(computed) / cells.clamp_min(1)).unbind()
    of_groups = [
        scales[leader] if entries == 1 else _padded(torch.stack([scales[i] for i in group]), entries)
        for leader, group in groups.items()
    ]
    cells_of_groups = [sizes[leader] * per_token for leader in groups]
    all_scales = torch.cat(
        [scale.expand(count, *scale.shape) for scale, count in zip(of_groups, cells_of_groups, strict=True)]
    ).flatten()
    weights = None
    if args.position_weights is not None:
        row_weights = torch.cat([_padded(weight, entries) for _, _, weight in each if weight is not None]).to(computed)
        weights = row_weights[:, None].expand(-1, per_token, -1).flatten()
        all_scales = all_scales * weights
    return ListedTargets(
        rows, sizes, all_scales.shape[0], cells, terms, counted, _known_ids(args, all_ids),
        entries=entries, ids=torch.cat([ids.flatten() for _, ids, _ in each]), starts=torch.cat(starts),
        weights=weights, scales=all_scales, bias_rows=_bias_rows(args, [size * per_token for size in sizes]),
    )  # fmt: skip


def _in_order(groups: dict[int, list[int]], counts: list[Tensor]) -> Tensor:
    """[K]: the counts of each group's horizons, in the order of horizons."""
    found = dict(zip(itertools.chain(*groups.values()), torch.cat(counts).unbind(), strict=True))
    return torch.stack([found[i] for i in range(len(found))])


def _padded(values: Tensor, entries: int) -> Tensor:
    """[..., m] with zeros up to [..., E]."""
    return values if values.shape[-1] == entries else F.pad(values, (0, entries - values.shape[-1]))


def means(
    args: Arguments, targets: ListedTargets, pairs: list[Pair], losses: Tensor, hits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See gemm.multi_horizon_linear_cross_entropy.Passes."""
    computed, device, per_token = losses.dtype, losses.device, args.ids_per_token
    rest = losses[targets.losses :].split_with_sizes([pair.far.shape[0] * per_token for pair in pairs])
    losses = losses[: targets.losses]
    if targets.weights is not None:
        losses = losses * targets.weights
    sums = torch.stack([sum_of(part) for part in _by_horizon(args, targets, losses)])
    per_horizon = sums / targets.cells.clamp_min(1)
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
    right = torch.stack([part.sum() for part in _by_horizon(args, targets, hits)])
    accuracy = right.to(computed) / targets.terms.clamp_min(1)
    return total, per_horizon, consistency, consistency_counts, accuracy


def _by_horizon(args: Arguments, targets: ListedTargets, values: Tensor) -> list[Tensor]:
    """Each horizon's part of values [R * F * E]."""
    sizes = [size * args.ids_per_token for size in targets.sizes]
    if targets.entries == 1:
        return list(values.split_with_sizes(sizes))
    cells = values.view(-1, targets.entries).split_with_sizes(sizes)
    return [cells[leader][:, args.leaders[:i].count(leader)] for i, leader in enumerate(args.leaders)]


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


def _targets_of_group(
    args: Arguments, all_ids: Tensor, group: list[int], drops: bool
) -> tuple[int | Tensor, Tensor, Tensor | None]:
    """The rows of m horizons that share logits, as in Targets, their target ids [R, F, m, f * f] and position weights
    [R, m]."""
    states, offset = args.inputs[group[0]], args.offsets[group[0]]
    positions, height, width = states.shape[1:4]
    # Positions past the end have no target, but logits, which only predictions need.
    inside = positions if args.return_predictions else max(0, min(positions, all_ids.shape[1] - offset))
    each = [_ids_of_horizon(args, all_ids, i, inside) for i in group]
    ids = each[0].unsqueeze(2) if len(each) == 1 else torch.stack(each, 2)
    weights = None
    if args.position_weights is not None:
        weights = torch.stack([args.position_weights[:, :inside, i] for i in group], -1)
        weights = weights[:, :, None, None].expand(-1, -1, height, width, -1).flatten(0, 3)
    if drops:
        counted = (ids >= 0).flatten(1).any(-1)
        if not counted.all():
            weights = None if weights is None else weights[counted]
            return numbered(states)[:, :inside].flatten()[counted], ids[counted], weights
    return inside, ids, weights


def _ids_of_horizon(args: Arguments, ids: Tensor, i: int, positions: int) -> Tensor:
    """The target ids [R, F, f * f] of horizon i at the rows of the first positions; -1 for those that do not count."""
    offset, factor = args.offsets[i], args.factors[i]
    height, width = args.inputs[i].shape[2:4]
    inside = max(0, min(positions, ids.shape[1] - offset))
    ids = ids[:, offset : offset + inside]
    if offset == 0 and args.token_mask is not None:
        ids = torch.where(args.token_mask[:, :inside, ..., None], ids, -1)
    if args.segment_ids is not None or args.position_weights is not None:
        counts = counting_positions(args, i)[:, :inside]
        ids = torch.where(counts[:, :, None, None, None], ids, -1)
    if inside < positions:
        ids = F.pad(ids, (0,) * 7 + (positions - inside,), value=-1)
    return cells_of(ids, height, width).permute(0, 1, 2, 3, 5, 4).reshape(-1, args.ids_per_token, factor * factor)


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
