"""What the backends of multi_horizon_linear_cross_entropy share: logits in chunks, and the matrix products around them.

A chunk is rows X, of all horizons one after the other. Their logits Z lie in a buffer; one pass over it, whichever
horizons its rows are of, makes the losses and leaves d Z in it:

    Z = X W^T,  d X = d Z W,  d W += d Z^T X

Rows that share a weight are gathered and multiplied together, so that a horizon of 1/64 of the size costs 1/64. A
chunk of a consistency pair is far cells and the near cells that they cover, the logits of both in the buffer.
Gradients are those of the total: d Z holds the horizon's weight over the number of cells that count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import stored_dtype
from ..horizon_loss import gradients_of_weights
from ..horizons import counts_at
from ..op import Gradients, Want
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from ..ops.token_ids import checked_ids
from .rows import by_clip, flat, pieces, rows_at, rows_of

# The share of a chunk from which on rows are multiplied where they lie, by themselves: there a copy costs more than
# a launch.
LARGE = 1 / 8


class Passes(NamedTuple):
    """What a backend brings to `forward`.

    chunk_bytes            of the logits and states of a chunk; a call's chunk_size comes first
    product_dtype(dtype)   what matrix products take
    drops                  rows that do not count stay out of the products. Where finding them would mean waiting for
                           the device, only those stay out whose frame is past the end; the states of those that a mask
                           or segments leave out are zeros in the weight's gradient, so that no NaN gets there
    batched                rows of several clips are one batched product, because a launch each would cost too much
    add(total, product)    total += product; total is fp32, the product bf16
    cross_entropy(args, logits, ids, starts, scales, losses, hits, learns)
        losses and hits [R * F] of logits [R * F, V], row r asked for ids[starts[r] : starts[r + 1]]; if `learns`, each
        row of logits becomes its gradient times scales[r]
    consistency(args, near, far, counted, scale, losses, learns_near, learns_far)
        losses [C, F] of far logits [C, F * V] under near ones [C * S, F * V]; the same, all times `scale`. Zeros where
        `counted` is False
    """

    chunk_bytes: int
    product_dtype: Callable[[torch.dtype], torch.dtype]
    drops: bool
    batched: bool
    add: Callable[[Tensor, Tensor], object]
    cross_entropy: Callable[..., None]
    consistency: Callable[..., None]


class Targets(NamedTuple):
    """The target ids of each row, horizons concatenated.

    rows      of each horizon: how many positions of every clip they cover, or their numbers among its B * T * h * w
    sizes     how many they are, all horizons' sum being R
    ids       the ids of each row's F cells, one cell after the other, int32; -1 for what is left out
    starts    [R * F + 1] int64, where a cell's ids start
    cells     [K] how many rows count
    terms     [K] how many of their F cross-entropies
    counted   [R] which rows count, where a mask or segments leave some out but not out of the products
    """

    rows: list[int | Tensor]
    sizes: list[int]
    ids: Tensor
    starts: Tensor
    cells: Tensor
    terms: Tensor
    counted: Tensor | None


class Part(NamedTuple):
    """Rows of the inputs of one horizon: a slice of the rows that its targets cover, or their numbers."""

    horizon: int
    rows: Tensor | slice
    size: int


class Product(NamedTuple):
    """Parts that are multiplied with one weight, and which rows of a chunk they are.

    states      [R, D] or [clips, R, D]: in the inputs, or a copy
    gradient    where the gradient of states in the inputs goes, if it is needed
    gathered    states are a copy, which their gradients overwrite
    """

    parts: list[Part]
    states: Tensor
    gradient: Tensor | None
    at: slice
    gathered: bool


class Clips(NamedTuple):
    """The rows of a horizon's inputs and of their gradient, [B, rows, D]; None where the strides allow no view, where
    rows are known by their numbers, and for a gradient that nobody needs."""

    states: Tensor | None
    gradient: Tensor | None


class Pair(NamedTuple):
    """Far rows [C], the near rows [C, S] that each covers, which of them count (None for all), and how many."""

    far: Tensor
    near: Tensor
    counted: Tensor | None
    cells: Tensor


def forward(args: Arguments, want: Want, passes: Passes) -> tuple[list[Tensor], Gradients]:
    heads = Heads(args, want, passes)
    device, count, computed = args.tokens.device, len(args.inputs), heads.computed

    def empty(*shape: int, dtype: torch.dtype = computed) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    targets = targets_of(args, passes.drops)
    heads.begin(targets.rows)
    terms = [size * args.ids_per_token for size in targets.sizes]
    scales = (args.horizon_weights.to(computed) / targets.cells.clamp_min(1)).unbind()
    scale_of = torch.cat([scale.expand(size) for scale, size in zip(scales, terms, strict=True)])
    losses = empty(sum(terms))
    hits = empty(sum(terms), dtype=torch.int32) if args.return_accuracy else None
    for first, last, parts in packed(targets, heads.size):
        products = heads.products(parts)
        logits = heads.logits(products).view(-1, args.weight[0].shape[0] // args.ids_per_token)
        here = slice(first * args.ids_per_token, last * args.ids_per_token)
        starts = targets.starts[here.start : here.stop + 1]
        learns = any(heads.learn_from(part.horizon) for part in parts)
        hits_here = None if hits is None else hits[here]
        passes.cross_entropy(args, logits, targets.ids, starts, scale_of[here], losses[here], hits_here, learns)
        if learns:
            counted = None if targets.counted is None else targets.counted[first:last]
            heads.learn(products, counted, added=False)
    per_horizon = torch.stack([sum_of(part) for part in losses.split(terms)]) / targets.cells.clamp_min(1)

    shape = (count,) if args.consistency_weights is None else tuple(args.consistency_weights.shape)
    agreement = torch.zeros(shape, dtype=computed, device=device)
    agreement_counts = torch.zeros(shape, dtype=torch.int64, device=device)
    for i, j in pairs_of(args):
        assert args.consistency_weights is not None
        pair = pair_of(args, i, j, passes.drops)
        scale = args.consistency_weights[j].to(computed) / pair.cells.clamp_min(1)
        losses = empty(pair.far.shape[0], args.ids_per_token)
        learns_near = args.detach != "near" and heads.learn_from(i)
        learns_far = args.detach != "far" and heads.learn_from(j)
        size = max(1, heads.size // (1 + pair.near.shape[1]))
        for first in range(0, losses.shape[0], size):
            chunk = slice(first, first + size)
            far_rows, near_rows = pair.far[chunk], pair.near[chunk].flatten()
            far_products = heads.products([Part(j, far_rows, far_rows.shape[0])])
            near_products = heads.products([Part(i, near_rows, near_rows.shape[0])], far_rows.shape[0])
            far, near = heads.logits(far_products), heads.logits(near_products)
            counted = None if pair.counted is None else pair.counted[chunk]
            passes.consistency(args, near, far, counted, scale, losses[chunk], learns_near, learns_far)
            if learns_near:
                covered = None if counted is None else counted[:, None].expand(-1, pair.near.shape[1]).flatten()
                heads.learn(near_products, covered, added=True)
            if learns_far:
                heads.learn(far_products, counted, added=True)
        agreement[j], agreement_counts[j] = sum_of(losses) / pair.cells.clamp_min(1), pair.cells

    total = (args.horizon_weights.to(computed) * per_horizon).sum()
    gradients = heads.gradients()
    if args.consistency_weights is not None:
        total = total + torch.where(agreement_counts > 0, args.consistency_weights.to(computed) * agreement, 0).sum()
    gradients |= gradients_of_weights(args, want, per_horizon, agreement)
    outputs = [total, per_horizon, targets.cells, agreement, agreement_counts]
    if hits is not None:
        right = torch.stack([part.sum() for part in hits.split(terms)])
        outputs.append(right.to(computed) / targets.terms.clamp_min(1))
    return outputs, gradients


def sum_of(losses: Tensor) -> Tensor:
    return losses.sum(dtype=torch.float64).to(losses.dtype)


class Heads:
    """The matrix products of a call: the buffer of logits, and the gradients of inputs and weights."""

    def __init__(self, args: Arguments, want: Want, passes: Passes) -> None:
        self.args, self.want = args, want
        dtype = args.inputs[0].dtype
        self.computed = torch.promote_types(dtype, torch.float32)
        self.dtype, self.add = passes.product_dtype(dtype), passes.add
        self.batched = passes.batched
        self.weights = [weight.to(self.dtype) for weight in args.weight]
        columns, depth = self.weights[0].shape
        # With a small vocabulary the states are what is large.
        self.size = args.chunk_size or max(1, passes.chunk_bytes // ((columns + depth) * self.dtype.itemsize))
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
        return self.want["inputs"][i] or self.want["weight"][self._place(i)]

    def begin(self, rows: Sequence[int | Tensor]) -> None:
        """Zero the gradients of the inputs outside `rows`, and view both by clip where rows are those of positions."""
        self.covered = rows
        self.clips: list[Clips] = []
        for states, gradient, covered in zip(self.args.inputs, self.of_inputs, rows, strict=True):
            if isinstance(covered, Tensor):
                if gradient is not None:
                    gradient.zero_()
                self.clips.append(Clips(None, None))
                continue
            if gradient is not None:
                gradient[:, covered:].zero_()
            clips = Clips(by_clip(states, covered), None if gradient is None else by_clip(gradient, covered))
            self.clips.append(one_clip(clips) or clips)

    def products(self, parts: Sequence[Part], first: int = 0) -> list[Product]:
        """How `parts` are multiplied; their logits fill the buffer from row `first` on."""
        shared, rows = len(self.weights) == 1, sum(part.size for part in parts)

        def stays(part: Part) -> bool:
            clips = self.clips[part.horizon].states
            if clips is None or clips.dtype != self.dtype or not isinstance(part.rows, slice):
                return False
            # Every clip has a gradient of the weight of its own to add: below V / 2 rows that moves more than a copy.
            long = clips.shape[0] == 1 or 2 * clips.shape[1] >= self.weights[0].shape[0]
            return long and (not shared or part.size >= LARGE * rows)

        made = []
        for in_place, run in itertools.groupby(parts, stays):
            together = list(run)
            groups = [[part] for part in together] if in_place or not shared else [together]
            for group in groups:
                clips = self.clips[group[0].horizon]
                states = self._pieces(clips.states, group[0]) if in_place else [self._gather(group)]
                gradients = self._pieces(clips.gradient, group[0]) if in_place else []
                for piece, gradient in itertools.zip_longest(states, gradients):
                    last = first + piece.shape[:-1].numel()
                    made.append(Product(group, piece, gradient, slice(first, last), not in_place))
                    first = last
        return made

    def logits(self, products: Sequence[Product]) -> Tensor:
        for product in products:
            weight = self.weights[self._place(product.parts[0].horizon)]
            multiply(product.states, weight.t(), self._of_chunk(product))
        return self.buffer[products[0].at.start : products[-1].at.stop]

    def learn(self, products: Sequence[Product], counted: Tensor | None, *, added: bool) -> None:
        """From the gradients in the buffer: those of inputs, added to what is there or not, and of weights, added.

        `counted`: which rows of the products count. The gradients of the others are zeros, but their states may be NaN.
        """
        for product in products:
            of_logits, place = self._of_chunk(product), self._place(product.parts[0].horizon)
            if self.want["weight"][place]:
                states = product.states
                if counted is not None:
                    first = product.at.start - products[0].at.start
                    own = counted[first : first + states.shape[:-1].numel()].view(*states.shape[:-1], 1)
                    states = torch.where(own, states, 0)
                self.of_weights[place] = self._sum(self.of_weights[place], of_logits, states)
            if product.gradient is not None:
                multiply(of_logits, self.weights[place], product.gradient)
            elif product.gathered and any(self.want["inputs"][part.horizon] for part in product.parts):
                multiply(of_logits, self.weights[place], product.states)
                computed_by_part = product.states.split([part.size for part in product.parts])
                for part, computed in zip(product.parts, computed_by_part, strict=True):
                    self._scatter(part, computed, added)

    def gradients(self) -> Gradients:
        """Those of the inputs and weights that are needed."""
        of_weights: list[Tensor | None] = []
        for weight, total, wants in zip(self.args.weight, self.of_weights, self.want["weight"], strict=True):
            stored = stored_dtype(weight)
            zeros = torch.zeros_like(weight, dtype=stored) if wants and total is None else None
            of_weights.append(total.to(stored) if wants and total is not None else zeros)
        return {"inputs": self.of_inputs, "weight": of_weights}

    def _place(self, horizon: int) -> int:
        """Which weight is a horizon's."""
        return horizon % len(self.weights)

    def _of_chunk(self, product: Product) -> Tensor:
        """The logits of a product, or their gradients, shaped as its states are."""
        return self.buffer[product.at].view(*product.states.shape[:-1], -1)

    def _pieces(self, clips: Tensor | None, part: Part) -> list[Tensor]:
        """The part's rows: views [R, D] or [clips, R, D] of the inputs or of their gradient."""
        assert isinstance(part.rows, slice)
        found = [] if clips is None else list(pieces(clips, part.rows))
        if not self.batched:
            found = [clip.unsqueeze(0) for piece in found for clip in piece]
        return [piece[0] if piece.shape[0] == 1 else piece for piece in found]

    def _gather(self, parts: Sequence[Part]) -> Tensor:
        counts = [part.size for part in parts]
        gathered = self._empty(sum(counts), self.args.inputs[0].shape[-1])
        for part, to in zip(parts, gathered.split(counts), strict=True):
            states = self.args.inputs[part.horizon]
            if isinstance(part.rows, Tensor):
                to.copy_(rows_at(states, part.rows))
                continue
            found = self._pieces(self.clips[part.horizon].states, part)
            if not found:
                # Strides that have no view by clip.
                found = [rows_of(states[:, : self.covered[part.horizon]], part.rows.start, part.rows.stop)]
            for piece, place in zip(found, to.split([piece.shape[:-1].numel() for piece in found]), strict=True):
                place.view(piece.shape).copy_(piece)
        return gathered

    def _scatter(self, part: Part, computed: Tensor, added: bool) -> None:
        """Write the computed gradients of a part's states to their rows, or add them."""
        gradient = self.of_inputs[part.horizon]
        if gradient is None:
            return
        if isinstance(part.rows, Tensor):
            rows = gradient.view(-1, gradient.shape[-1])
            rows[part.rows] = (rows[part.rows] + computed if added else computed).to(gradient.dtype)
            return
        to = self._pieces(self.clips[part.horizon].gradient, part)
        for piece, rows in zip(to, computed.split([piece.shape[:-1].numel() for piece in to]), strict=True):
            piece.copy_(piece + rows.view(piece.shape) if added else rows.view(piece.shape))

    def _sum(self, total: Tensor | None, of_logits: Tensor, states: Tensor) -> Tensor:
        """total + of_logits^T @ states, summed over clips, in fp32 (fp64 for fp64); a product of matrices that remains
        the only one stays as it is."""
        if states.dim() == 3:
            # A matrix a clip: as many at once as a chunk holds.
            size = max(1, self.size // states.shape[-1])
            for left, right in zip(of_logits.split(size), states.split(size), strict=True):
                each = self._empty(left.shape[0], left.shape[2], right.shape[2])
                summed = torch.bmm(left.transpose(1, 2), right, out=each).sum(0, dtype=self.computed)
                total = summed if total is None else total.to(self.computed).add_(summed)
            assert total is not None
            return total
        if total is None:
            return multiply(of_logits.t(), states, self._empty(of_logits.shape[1], states.shape[1]))
        total = total.to(self.computed)
        if self.dtype == self.computed:
            return torch.addmm(total, of_logits.t(), states, out=total)
        self.add(total, multiply(of_logits.t(), states, self._empty(*total.shape)))
        return total

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.args.tokens.device)


def one_clip(clips: Clips) -> Clips | None:
    """The same as one long clip [1, B * rows, D], where states and gradient are dense: a product of matrices instead of
    a batched one."""
    dense = Clips(*(None if rows is None else flat(rows) for rows in clips))
    if any(rows is not None and matrix is None for rows, matrix in zip(clips, dense, strict=True)):
        return None
    return Clips(*(None if matrix is None else matrix.unsqueeze(0) for matrix in dense))


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, for one `left` [R, D] or a batch [clips, R, D]. With an output autocast leaves it alone."""
    if left.dim() == 2:
        return torch.mm(left, right, out=out)
    return torch.bmm(left, right.expand(left.shape[0], -1, -1), out=out)


def pairs_of(args: Arguments) -> list[tuple[int, int]]:
    return list(zip(args.pairs[::2], args.pairs[1::2], strict=True))


def ids_or_ignored(args: Arguments) -> Tensor:
    """[B, T_v, Hp, Wp, F] int32, -1 where an id is ignored."""
    ids = checked_ids(args.tokens, args.weight[0].shape[0] // args.ids_per_token, args.ignore_index)
    ids = torch.where(ids == args.ignore_index, -1, ids).int()
    return ids if ids.dim() == 5 else ids.unsqueeze(-1)


def targets_of(args: Arguments, drops: bool) -> Targets:
    all_ids = ids_or_ignored(args)
    rows, targets = zip(*(targets_of_horizon(args, all_ids, i, drops) for i in range(len(args.inputs))), strict=True)
    sizes = [ids.shape[0] for ids in targets]
    starts, first = [], 0
    for ids in targets:
        starts.append(torch.arange(first, first + ids.numel(), ids.shape[-1], device=ids.device))
        first += ids.numel()
    starts.append(torch.full((1,), first, device=all_ids.device))
    counted = None
    if drops and args.ids_per_token == 1:
        # The rows that remain are those that count, each with its one cross-entropy.
        cells = terms = torch.tensor(sizes, dtype=torch.int64, device=all_ids.device)
    else:
        taken = [(ids >= 0).any(-1) for ids in targets]
        counts = [any_left.any(-1) for any_left in taken]
        cells = torch.stack([count.sum() for count in counts])
        terms = torch.stack([any_left.sum() for any_left in taken])
        if not drops and (args.segment_ids is not None or args.token_mask is not None):
            counted = torch.cat(counts)
    ids = torch.cat([ids.flatten() for ids in targets])
    return Targets(list(rows), sizes, ids, torch.cat(starts), cells, terms, counted)


def targets_of_horizon(args: Arguments, ids: Tensor, i: int, drops: bool) -> tuple[int | Tensor, Tensor]:
    """The rows of horizon i, as in Targets, and the target ids [R, F, f * f] of each."""
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
    ids = cells_of(ids, height, width).permute(0, 1, 2, 3, 5, 4).reshape(-1, args.ids_per_token, factor * factor)
    if drops:
        counted = (ids >= 0).any(-1).any(-1)
        if not counted.all():
            return numbered(states)[:, :inside].flatten()[counted], ids[counted]
    return inside, ids


def packed(targets: Targets, size: int) -> Iterator[tuple[int, int, list[Part]]]:
    """The rows of all horizons, one horizon after the other, in chunks of at most `size`, as equal as can be: the first
    and last of each chunk, and the parts of horizons that it is made of."""
    total = sum(targets.sizes)
    ends = list(itertools.accumulate(targets.sizes))
    count = -(-total // size)
    for chunk in range(count):
        first, last = total * chunk // count, total * (chunk + 1) // count
        parts = []
        for i, (rows, end) in enumerate(zip(targets.rows, ends, strict=True)):
            begin = end - targets.sizes[i]
            part = slice(max(first, begin) - begin, min(last, end) - begin)
            if part.start < part.stop:
                parts.append(Part(i, part if isinstance(rows, int) else rows[part], part.stop - part.start))
        yield first, last, parts


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
