"""What the backends of multi_horizon_linear_cross_entropy share: logits in chunks, and the matrix products around them.

A chunk is rows X of one horizon. Their logits Z lie in a buffer; a pass over it makes the losses and leaves d Z in it:

    Z = X W^T,  d X = d Z W,  d W += d Z^T X

A chunk of a consistency pair is far cells and the near cells that they cover, the logits of both in the buffer.
Gradients are those of the total: d Z holds the horizon's weight over the number of cells that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..horizons import counts_at
from ..ids import checked_ids
from ..losses import gradients_of_weights
from ..ops.multi_horizon_linear_cross_entropy import OP, Arguments
from ..registry import gradients_by_field, stored_dtype
from .rows import rows_at


class Passes(NamedTuple):
    """What a backend brings to `forward`.

    chunk_bytes            of logits; a call's chunk_size comes first
    product_dtype(dtype)   what matrix products take
    drops                  rows that do not count stay out of the products. Where finding them would mean waiting for
                           the device, only those stay out whose frame is past the end
    add(total, product)    total += product; total is fp32, the product bf16
    cross_entropy(args, logits, ids, scale, losses, hits, learns)
        losses and hits [R * F] of logits [R * F, V] asked for ids [R * F, f * f]; if `learns`, the logits become their
        gradients times `scale`
    consistency(args, near, far, counted, scale, losses, learns_near, learns_far)
        losses [C, F] of far logits [C, F * V] under near ones [C * S, F * V]; the same. Zeros where `counted` is False
    """

    chunk_bytes: int
    product_dtype: Callable[[torch.dtype], torch.dtype]
    drops: bool
    add: Callable[[Tensor, Tensor], object]
    cross_entropy: Callable[..., None]
    consistency: Callable[..., None]


class Targets(NamedTuple):
    """Of one horizon, the rows [R] among its B * T * h * w, None for all; their ids [R, F, f * f], -1 for what is left
    out; how many rows count, and how many of their F cross-entropies."""

    rows: Tensor | None
    ids: Tensor
    cells: Tensor
    terms: Tensor


class Pair(NamedTuple):
    """Far rows [C], the near rows [C, S] that each covers, which of them count (None for all), and how many."""

    far: Tensor
    near: Tensor
    counted: Tensor | None
    cells: Tensor


def forward(args: Arguments, wanted: Sequence[bool], passes: Passes) -> tuple[list[Tensor], list[Tensor]]:
    heads = Heads(args, wanted, passes)
    device, count, computed = args.tokens.device, len(args.inputs), heads.computed
    ids = kept_ids(args)

    def empty(*shape: int, dtype: torch.dtype = computed) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    means, counts, accuracies = [], [], []
    for i in range(count):
        targets = targets_of(args, ids, i, passes.drops)
        scale = args.weights[i].to(computed) / targets.cells.clamp_min(1)
        terms = targets.ids.shape[:2]
        losses, hits = empty(*terms), empty(*terms, dtype=torch.int32) if args.return_accuracy else None
        learns = heads.learn_from(i)
        heads.begin(i, targets.rows)
        for first in range(0, losses.shape[0], heads.size):
            part = slice(first, min(first + heads.size, losses.shape[0]))
            rows = part if targets.rows is None else targets.rows[part]
            states, logits = heads.logits(i, rows, 0)
            flat_logits, its_ids = (
                logits.unflatten(1, (args.factored, -1)).flatten(0, 1),
                targets.ids[part].flatten(0, 1),
            )
            its_hits = None if hits is None else hits[part].flatten()
            passes.cross_entropy(args, flat_logits, its_ids, scale, losses[part].flatten(), its_hits, learns)
            if learns:
                heads.learn(i, rows, states, logits, added=False)
        means.append(mean_of(losses, targets.cells))
        counts.append(targets.cells)
        if hits is not None:
            accuracies.append(hits.sum().to(computed) / targets.terms.clamp_min(1))

    shape = (count,) if args.consistency_weights is None else tuple(args.consistency_weights.shape)
    agreement = torch.zeros(shape, dtype=computed, device=device)
    agreement_counts = torch.zeros(shape, dtype=torch.int64, device=device)
    for i, j in pairs_of(args):
        assert args.consistency_weights is not None
        pair = pair_of(args, i, j, passes.drops)
        scale = args.consistency_weights[j].to(computed) / pair.cells.clamp_min(1)
        losses = empty(pair.far.shape[0], args.factored)
        learns_near = args.detach != "near" and heads.learn_from(i)
        learns_far = args.detach != "far" and heads.learn_from(j)
        size = max(1, heads.size // (1 + pair.near.shape[1]))
        for first in range(0, losses.shape[0], size):
            part = slice(first, first + size)
            far_rows, near_rows = pair.far[part], pair.near[part].flatten()
            far_states, far = heads.logits(j, far_rows, 0)
            near_states, near = heads.logits(i, near_rows, far.shape[0])
            counted = None if pair.counted is None else pair.counted[part]
            passes.consistency(args, near, far, counted, scale, losses[part], learns_near, learns_far)
            if learns_near:
                heads.learn(i, near_rows, near_states, near, added=True)
            if learns_far:
                heads.learn(j, far_rows, far_states, far, added=True)
        agreement[j], agreement_counts[j] = mean_of(losses, pair.cells), pair.cells

    per_horizon = torch.stack(means)
    total = (args.weights.to(computed) * per_horizon).sum()
    extras = heads.gradients()
    if args.consistency_weights is not None:
        total = total + torch.where(agreement_counts > 0, args.consistency_weights.to(computed) * agreement, 0).sum()
    rest = wanted[count + len(args.weight) :]
    extras += gradients_of_weights(args.weights, args.consistency_weights, rest, per_horizon, agreement)
    outputs = [total, per_horizon, torch.stack(counts), agreement, agreement_counts]
    return [*outputs, torch.stack(accuracies)] if args.return_accuracy else outputs, extras


def mean_of(losses: Tensor, count: Tensor) -> Tensor:
    return losses.sum(dtype=torch.float64).to(losses.dtype) / count.clamp_min(1)


class Heads:
    """The matrix products of a call: the buffer of logits, and the gradients of inputs and weights."""

    def __init__(self, args: Arguments, wanted: Sequence[bool], passes: Passes) -> None:
        flags: list[Any] = list(wanted)
        self.args, self.want = args, gradients_by_field(OP, args, flags)
        dtype = args.inputs[0].dtype
        self.computed = torch.promote_types(dtype, torch.float32)
        self.dtype, self.add = passes.product_dtype(dtype), passes.add
        self.weights = [weight.to(self.dtype) for weight in args.weight]
        columns = self.weights[0].shape[0]
        self.size = args.chunk_size or max(1, passes.chunk_bytes // (columns * self.dtype.itemsize))
        rows = sum(states.shape[:-1].numel() for states in args.inputs)
        # A cell of a pair needs its near rows beside it, however small the chunk.
        least = max((1 + (args.factors[j] // args.factors[i]) ** 2 for i, j in pairs_of(args)), default=0)
        self.buffer = self._empty(min(max(self.size, least), rows), columns)
        self.of_inputs = [
            torch.empty(states.shape, dtype=stored_dtype(states), device=states.device) if wants else None
            for states, wants in zip(args.inputs, self.want["inputs"], strict=True)
        ]
        self.of_weights: list[Tensor | None] = [None] * len(args.weight)

    def learn_from(self, i: int) -> bool:
        """Whether the gradients of horizon i's logits are needed."""
        return self.want["inputs"][i] or self.want["weight"][i % len(self.weights)]

    def begin(self, i: int, rows: Tensor | None) -> None:
        """Zeros in the gradient of horizon i's inputs, where `rows` are not all of them."""
        gradient = self.of_inputs[i]
        if gradient is not None and rows is not None:
            gradient.zero_()

    def logits(self, i: int, rows: Tensor | slice, first: int) -> tuple[Tensor, Tensor]:
        """Rows of horizon i and their logits, in the buffer from row `first`."""
        states = rows_at(self.args.inputs[i], rows).to(self.dtype)
        weight = self.weights[i % len(self.weights)]
        return states, torch.mm(states, weight.t(), out=self.buffer[first : first + states.shape[0]])

    def learn(self, i: int, rows: Tensor | slice, states: Tensor, of_logits: Tensor, *, added: bool) -> None:
        """The gradients of rows of horizon i, added to what is there or not, and of its weight, always added."""
        gradient, place = self.of_inputs[i], i % len(self.weights)
        if gradient is not None:
            to = gradient.view(-1, gradient.shape[-1])
            if isinstance(rows, slice) and to.dtype == self.dtype and not added:
                torch.mm(of_logits, self.weights[place], out=to[rows])
            else:
                made = self._product(of_logits, self.weights[place])
                to[rows] = (to[rows] + made if added else made).to(to.dtype)
        if self.want["weight"][place]:
            self.of_weights[place] = self._sum(self.of_weights[place], of_logits.t(), states)

    def gradients(self) -> list[Tensor]:
        """Those of the inputs and weights that are wanted."""
        made = [gradient for gradient in self.of_inputs if gradient is not None]
        for weight, total, wants in zip(self.args.weight, self.of_weights, self.want["weight"], strict=True):
            if wants:
                stored = stored_dtype(weight)
                made.append(torch.zeros_like(weight, dtype=stored) if total is None else total.to(stored))
        return made

    def _sum(self, total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        """total + left @ right, in fp32 (fp64 for fp64); a product that remains the only one stays as it is."""
        if total is None:
            return self._product(left, right)
        total = total.to(self.computed)
        if self.dtype == self.computed:
            return torch.addmm(total, left, right, out=total)
        self.add(total, self._product(left, right))
        return total

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        # Products are given their output: so autocast leaves them alone.
        return torch.mm(left, right, out=self._empty(left.shape[0], right.shape[1]))

    def _empty(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self.dtype, device=self.args.tokens.device)


def pairs_of(args: Arguments) -> list[tuple[int, int]]:
    return list(zip(args.pairs[::2], args.pairs[1::2], strict=True))


def kept_ids(args: Arguments) -> Tensor:
    """[B, T_v, Hp, Wp, F] int32, -1 for what is ignored."""
    ids = checked_ids(args.tokens, args.weight[0].shape[0] // args.factored, args.ignore_index)
    ids = torch.where(ids == args.ignore_index, -1, ids).int()
    return ids if ids.dim() == 5 else ids.unsqueeze(-1)


def targets_of(args: Arguments, ids: Tensor, i: int, drops: bool) -> Targets:
    offset, factor = args.offsets[i], args.factors[i]
    states = args.inputs[i]
    batch, positions, height, width = states.shape[:4]
    frames = ids.shape[1]
    inside = max(0, min(positions, frames - offset))
    ids = ids[:, offset : offset + inside]
    if offset == 0 and args.token_mask is not None:
        ids = torch.where(args.token_mask[:, :inside, ..., None], ids, -1)
    if args.segment_ids is not None:
        counts = counts_at(offset, positions, frames, args.segment_ids, batch, ids.device)[:, :inside]
        ids = torch.where(counts[:, :, None, None, None], ids, -1)
    ids = cells_of(ids, height, width).permute(0, 1, 2, 3, 5, 4).reshape(-1, args.factored, factor * factor)
    taken = (ids >= 0).any(-1)
    counted = taken.any(-1)
    rows = None
    if inside < positions or (drops and not counted.all()):
        rows = numbered(states)[:, :inside].flatten()
        if drops:
            rows, ids = rows[counted], ids[counted]
    return Targets(rows, ids.contiguous(), counted.sum(), taken.sum())


def pair_of(args: Arguments, i: int, j: int, drops: bool) -> Pair:
    far_states, near_states = args.inputs[j], args.inputs[i]
    batch, positions, height, width = far_states.shape[:4]
    frames, apart = args.tokens.shape[1], args.offsets[j] - args.offsets[i]
    inside = max(0, min(positions - apart, frames - args.offsets[j]))
    far_counts, near_counts = (
        counts_at(args.offsets[k], positions, frames, args.segment_ids, batch, args.tokens.device) for k in (j, i)
    )
    both = far_counts[:, :inside] & near_counts[:, apart : apart + inside]
    counted = both[:, :, None, None].expand(-1, -1, height, width).flatten()
    far = numbered(far_states)[:, :inside].flatten()
    near = cells_of(numbered(near_states)[:, apart : apart + inside, ..., None], height, width).flatten(0, 3).flatten(1)
    if drops:
        return Pair(far[counted], near[counted], None, counted.sum())
    return Pair(far, near, None if args.segment_ids is None else counted, counted.sum())


def numbered(states: Tensor) -> Tensor:
    """[B, T, h, w] the numbers of the rows of `states`."""
    shape = states.shape[:-1]
    return torch.arange(shape.numel(), device=states.device).view(shape)


def cells_of(grid: Tensor, height: int, width: int) -> Tensor:
    """[B, T, height * f, width * f, F] -> [B, T, height, width, f * f, F], each cell with what it covers."""
    batch, time, rows, columns, last = grid.shape
    cells = grid.reshape(batch, time, height, rows // height, width, columns // width, last)
    return cells.transpose(3, 4).flatten(4, 5)
