"""The forward of multi_horizon_linear_cross_entropy, which its backends share: chunks of logits and matrix products.

A chunk is a number of rows X of the horizons' concatenated inputs. Their logits Z are in a buffer. One pass over it,
for rows of any horizons, computes the losses and overwrites Z with d Z:

    Z = X W^T,  d X = d Z W,  d W += d Z^T X,  d bias += column sums of d Z

Rows that share a weight are gathered into one product, so that a horizon of 1/64 the size costs 1/64 of the time. A
chunk of a consistency pair has far cells and the near cells that they cover, with the logits of both in the buffer.
Gradients are those of the total: d Z includes the factor horizon weight / number of cells that count. In fp16 such
factors are subnormal, so d Z is divided by the largest of them, and the gradients are multiplied by it at the end. A
product that is a gradient is then stored in fp32: as a sum over rows it may exceed 65,504.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import stored_dtype
from ..horizon_loss import gradients_of_weights
from ..op import Gradients, Want
from ..ops.multi_horizon_linear_cross_entropy import Arguments
from .products import ADDS_IN_FP32, add_product, multiply
from .rows import by_clip, clip_views, flat, rows_at, rows_of
from .token_targets import Pair, Targets, pairs_of

# Parts at least this large a share of a chunk get a matrix product of their own, in place: copying them together with
# the others would cost more than the extra launch.
LARGE = 1 / 8


class Passes(NamedTuple):
    """The options and functions of a backend that `forward` uses.

    chunk_bytes            the bytes of the logits and states of a chunk, unless the call sets chunk_size
    product_dtype(dtype)   the dtype of the operands of matrix products
    drops                  True: products exclude all rows that do not count. False, for devices that would have to wait
                           to find them: products exclude only rows whose frame is past the end, and the weight's
                           gradient replaces states that a mask, segments or position weights exclude by zeros, because
                           they may be NaN. A call that returns predictions excludes no row
    batched                rows of several clips become one batched product, because one launch per clip costs too much
    add(total, product)    total += product, for an fp32 total and a bf16 product
    column_sums(rows)      the sums [N] of rows [R, N], in fp32 (fp64 for fp64)
    targets(args)          the Targets, as the backend's next two functions read them
    cross_entropy(args, logits, targets, first, biases, losses, hits, predictions, learns, scale)
        writes losses, hits and predictions [R * F] of a chunk's logits [r * F, V], whose first row is row `first` of
        the R * F, plus their bias in [N, V], N of F or of K * F. If `learns`, overwrites the logits with their
        gradients times `scale` [], unless it is None. Position weights multiply these, and may multiply the losses
    pairs(args)            the consistency pairs
    consistency(args, pair, near, far, near_bias, far_bias, counted, known, losses, learns_near, learns_far, scale)
        writes losses [C, F] of a chunk of the pair's far logits [C, F * V] against near ones [C * S, F * V], and
        overwrites the logits that learn with their gradients times `scale`. Both are 0 where `counted` is False. A bias
        is [F * V] or None. Each id >= 0 in known [C * S, F, f * f] contributes its one-hot in place of a share of
        1 / (f * f) of the near distribution
    means(args, targets, pairs, losses, hits)
        the total, the mean losses [K], those of consistency and how many far cells these count, both in the shape of
        the consistency weights, and the shares of hits or None. `losses` are those of the R * F cells, then those of
        each pair
    """

    chunk_bytes: int
    product_dtype: Callable[[torch.dtype], torch.dtype]
    drops: bool
    batched: bool
    add: Callable[[Tensor, Tensor], object]
    column_sums: Callable[[Tensor], Tensor]
    targets: Callable[[Arguments], Any]
    cross_entropy: Callable[..., None]
    pairs: Callable[[Arguments], list[Pair]]
    consistency: Callable[..., None]
    means: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]


class Part(NamedTuple):
    """Rows of one horizon's inputs: a slice of the rows in its Targets, or row numbers."""

    horizon: int
    rows: Tensor | slice
    size: int


class Product(NamedTuple):
    """One matrix product: parts that share a weight, and the rows of the buffer that hold their logits.

    states      [R, D] or [clips, R, D]: a view of the inputs, or a copy
    gradient    the view that receives the gradient of `states`, if they are a view and it is needed
    at          the rows of the buffer
    gathered    `states` are a copy, which their gradients overwrite
    """

    parts: list[Part]
    states: Tensor
    gradient: Tensor | None
    at: slice
    gathered: bool


class Clips(NamedTuple):
    """Views [B, rows, D] of a horizon's inputs and of their gradient. None if the strides allow no view, if rows are
    given by number, or if the gradient is not needed."""

    states: Tensor | None
    gradient: Tensor | None


def forward(args: Arguments, want: Want, passes: Passes) -> tuple[list[Tensor], Gradients]:
    heads = Heads(args, want, passes)
    device, computed = args.tokens.device, heads.computed

    def empty(*shape: int, dtype: torch.dtype = computed) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    targets: Targets = passes.targets(args)
    pairs: list[Pair] = passes.pairs(args)
    heads.set_rows(targets.rows)
    if heads.dtype == torch.float16:
        heads.set_unit(largest_factor(args, targets, pairs))
    terms = [size * args.ids_per_token for size in targets.sizes]
    losses = empty(targets.losses + sum(pair.far.shape[0] for pair in pairs) * args.ids_per_token)
    hits = empty(targets.losses, dtype=torch.int32) if args.return_accuracy else None
    predictions = empty(sum(terms), dtype=torch.int32) if args.return_predictions else None
    vocabulary = args.weight[0].shape[0] // args.ids_per_token
    biases = None if heads.biases is None else heads.biases.view(-1, vocabulary)
    for first, last, parts in packed(targets, heads.size):
        products = heads.products(parts)
        rows = heads.logits(products)
        learns = any(heads.learns(part.horizon) for part in parts)
        passes.cross_entropy(
            args, rows.view(-1, vocabulary), targets, first * args.ids_per_token, biases, losses, hits, predictions,
            learns, heads.scale,
        )  # fmt: skip
        if learns:
            heads.sum_biases(parts, rows)
            counted = None if targets.counted is None else targets.counted[first:last]
            heads.backpropagate(products, counted, added=False)
    first_of_pair = targets.losses
    for pair in pairs:
        pair_losses = losses[first_of_pair : first_of_pair + pair.far.shape[0] * args.ids_per_token]
        first_of_pair += pair_losses.shape[0]
        teach(args, passes, heads, pair, targets.known, pair_losses.view(-1, args.ids_per_token))
    gradients = heads.gradients()
    total, per_horizon, consistency, consistency_counts, accuracy = passes.means(args, targets, pairs, losses, hits)
    gradients |= gradients_of_weights(args, want, per_horizon, consistency)
    outputs = [total, per_horizon, targets.cells, consistency, consistency_counts]
    if accuracy is not None:
        outputs.append(accuracy)
    if predictions is not None:
        predicted = predictions.split_with_sizes(terms)
        for states, leader in zip(args.inputs, args.leaders, strict=True):
            outputs.append(predicted[leader].view(*states.shape[:-1], *args.tokens.shape[4:]).long())
    return outputs, gradients


def largest_factor(args: Arguments, targets: Targets, pairs: Sequence[Pair]) -> Tensor:
    """The largest factor [] of a row's gradient: its weights, divided by the number of cells that count."""
    factors = args.horizon_weights.abs() / targets.cells.clamp_min(1)
    if args.position_weights is not None and args.position_weights.numel():
        factors = factors * args.position_weights.amax()
    if args.consistency_weights is not None and pairs:
        weights = torch.stack([args.consistency_weights[pair.horizons[1]] for pair in pairs])
        cells = torch.stack([pair.cells for pair in pairs])
        factors = torch.cat([factors, weights.abs() / cells.clamp_min(1)])
    # Not 0, by which gradients would be divided.
    return factors.amax().float().clamp_min(1e-30)


def teach(args: Arguments, passes: Passes, heads: Heads, pair: Pair, known: Tensor | None, losses: Tensor) -> None:
    """The losses [C, F] of a consistency pair, and its gradients."""
    i, j = (args.leaders[horizon] for horizon in pair.horizons)
    learns_near = args.detach != "near" and heads.learns(i)
    learns_far = args.detach != "far" and heads.learns(j)
    size = max(1, heads.size // (1 + pair.near.shape[1]))
    for first in range(0, losses.shape[0], size):
        chunk = slice(first, first + size)
        far_rows, near_rows = pair.far[chunk], pair.near[chunk].flatten()
        far_part, near_part = Part(j, far_rows, far_rows.shape[0]), Part(i, near_rows, near_rows.shape[0])
        far_products = heads.products([far_part])
        near_products = heads.products([near_part], far_part.size)
        far, near = heads.logits(far_products), heads.logits(near_products)
        counted = None if pair.counted is None else pair.counted[chunk]
        passes.consistency(
            args, pair, near, far, heads.bias_of(i), heads.bias_of(j), counted,
            None if known is None else known[near_rows], losses[chunk], learns_near, learns_far, heads.scale,
        )  # fmt: skip
        if learns_near:
            heads.sum_biases([near_part], near)
            covered = None if counted is None else counted[:, None].expand(-1, pair.near.shape[1]).flatten()
            heads.backpropagate(near_products, covered, added=True)
        if learns_far:
            heads.sum_biases([far_part], far)
            heads.backpropagate(far_products, counted, added=True)


class Heads:
    """Computes the matrix products of a call. Owns the buffer of logits and the gradients of inputs and parameters."""

    def __init__(self, args: Arguments, want: Want, passes: Passes) -> None:
        self.args, self.want = args, want
        dtype = args.inputs[0].dtype
        self.computed = torch.promote_types(dtype, torch.float32)
        self.dtype, self.add, self.column_sums = passes.product_dtype(dtype), passes.add, passes.column_sums
        self.batched = passes.batched
        self.adds_in_fp32 = ADDS_IN_FP32 and args.tokens.device.type != "cpu" and self.dtype != self.computed
        # The dtype of products that are gradients of weights.
        self.summed_dtype = self.computed if self.dtype == torch.float16 else self.dtype
        self.unit: Tensor | None = None
        self.scale: Tensor | None = None
        self.weights = [weight.to(self.dtype) for weight in args.weight]
        columns, depth = self.weights[0].shape
        # Count the gathered states too: with V < D they are larger than the logits.
        self.size = args.chunk_size or max(1, passes.chunk_bytes // ((columns + depth) * self.dtype.itemsize))
        # A chunk of a pair may have the same rows twice, as near ones and as far ones.
        buffered = range(len(args.inputs)) if args.pairs else set(args.leaders)
        rows = sum(args.inputs[i].shape[:-1].numel() for i in buffered)
        # However small the chunk, the buffer must hold a far cell of a pair and the near rows that it covers.
        least = max((1 + (args.factors[j] // args.factors[i]) ** 2 for i, j in pairs_of(args)), default=0)
        self.buffer = self._empty(min(max(self.size, least), rows), columns)
        wanted = [
            wants and i == leader for i, (wants, leader) in enumerate(zip(want["inputs"], args.leaders, strict=True))
        ]
        self.input_gradients = [
            torch.empty(states.shape, dtype=stored_dtype(states), device=states.device) if wants else None
            for states, wants in zip(args.inputs, wanted, strict=True)
        ]
        self.weight_gradients: list[Tensor | None] = [None] * len(args.weight)
        self.biases = torch.stack([bias.to(self.computed) for bias in args.biases]) if args.biases else None
        self.bias_gradients: list[Tensor | None] = [None] * len(args.biases)

    def set_unit(self, unit: Tensor) -> None:
        """Have all gradients in units of `unit` until `gradients` returns them."""
        self.unit, self.scale = unit, unit.reciprocal()

    def learns(self, i: int) -> bool:
        """Whether the gradient of horizon i's logits is needed."""
        wants_bias = self.biases is not None and self.want["biases"][self._bias_index(i)]
        return self.want["inputs"][i] or self.want["weight"][self._weight_index(i)] or wants_bias

    def bias_of(self, i: int) -> Tensor | None:
        """The bias [F * V] of horizon i."""
        return None if self.biases is None else self.biases[self._bias_index(i)]

    def set_rows(self, rows: Sequence[int | Tensor]) -> None:
        """Store the rows of Targets, zero the gradients of inputs elsewhere, and create views by clip if possible."""
        self.covered = rows
        self.clips: list[Clips] = []
        for states, gradient, covered in zip(self.args.inputs, self.input_gradients, rows, strict=True):
            if isinstance(covered, Tensor):
                if gradient is not None:
                    gradient.zero_()
                self.clips.append(Clips(None, None))
                continue
            if gradient is not None and covered < states.shape[1]:
                gradient[:, covered:].zero_()
            clips = Clips(by_clip(states, covered), None if gradient is None else by_clip(gradient, covered))
            self.clips.append(one_clip(clips) or clips)

    def products(self, parts: Sequence[Part], first: int = 0) -> list[Product]:
        """Group `parts` into products, whose logits fill the buffer from row `first` on."""
        shared, rows = len(self.weights) == 1, sum(part.size for part in parts)

        def is_multiplied_in_place(part: Part) -> bool:
            clips = self.clips[part.horizon].states
            if clips is None or clips.dtype != self.dtype or not isinstance(part.rows, slice):
                return False
            # Each clip adds its own gradient of the weight: below V / 2 rows that moves more bytes than a copy.
            long = clips.shape[0] == 1 or 2 * clips.shape[1] >= self.weights[0].shape[0]
            return long and (not shared or part.size >= LARGE * rows)

        products = []
        for in_place, run in itertools.groupby(parts, is_multiplied_in_place):
            neighbours = list(run)
            groups = [[part] for part in neighbours] if in_place or not shared else [neighbours]
            for group in groups:
                clips = self.clips[group[0].horizon]
                states = self._views(clips.states, group[0]) if in_place else [self._gather(group)]
                gradients = self._views(clips.gradient, group[0]) if in_place else []
                for state, gradient in itertools.zip_longest(states, gradients):
                    last = first + state.shape[:-1].numel()
                    products.append(Product(group, state, gradient, slice(first, last), not in_place))
                    first = last
        return products

    def logits(self, products: Sequence[Product]) -> Tensor:
        """Compute the products into the buffer, and return its rows."""
        for product in products:
            weight = self.weights[self._weight_index(product.parts[0].horizon)]
            multiply(product.states, weight.t(), self._logits_of(product))
        return self.buffer[products[0].at.start : products[-1].at.stop]

    def backpropagate(self, products: Sequence[Product], counted: Tensor | None, *, added: bool) -> None:
        """Read the gradients of logits in the buffer, add to those of weights, and add to (or write) those of inputs.

        `counted`: which rows of the products count. The gradients of the others are 0, but their states may be NaN.
        """
        for product in products:
            logits_gradient, index = self._logits_of(product), self._weight_index(product.parts[0].horizon)
            if self.want["weight"][index]:
                states = product.states
                if counted is not None:
                    first = product.at.start - products[0].at.start
                    mask = counted[first : first + states.shape[:-1].numel()].view(*states.shape[:-1], 1)
                    states = torch.where(mask, states, 0)
                self.weight_gradients[index] = self._sum(self.weight_gradients[index], logits_gradient, states)
            if product.gradient is not None:
                multiply(logits_gradient, self.weights[index], product.gradient)
            elif product.gathered and any(self.want["inputs"][part.horizon] for part in product.parts):
                multiply(logits_gradient, self.weights[index], product.states)
                gradients = product.states.split_with_sizes([part.size for part in product.parts])
                for part, gradient in zip(product.parts, gradients, strict=True):
                    self._scatter(part, gradient, added)

    def sum_biases(self, parts: Sequence[Part], logits_gradient: Tensor) -> None:
        """Add the column sums of the gradients [R, F * V] of the parts' logits to the gradients of their biases."""
        if self.biases is None:
            return
        first = 0
        for index, run in itertools.groupby(parts, lambda part: self._bias_index(part.horizon)):
            last = first + sum(part.size for part in run)
            if self.want["biases"][index]:
                total, summed = self.bias_gradients[index], self.column_sums(logits_gradient[first:last])
                self.bias_gradients[index] = summed if total is None else total.add_(summed)
            first = last

    def gradients(self) -> Gradients:
        """The needed gradients of inputs, weights and biases. That of states which are given several times is at the
        first, with None at the others."""

        if self.unit is not None:
            for total in (*self.input_gradients, *self.weight_gradients, *self.bias_gradients):
                if total is not None:
                    total.mul_(self.unit)

        def stored(leaf: Tensor, total: Tensor | None, wants: bool) -> Tensor | None:
            if total is not None and wants:
                return total.to(stored_dtype(leaf))
            return torch.zeros_like(leaf, dtype=stored_dtype(leaf)) if wants else None

        return {
            "inputs": self.input_gradients,
            "weight": list(map(stored, self.args.weight, self.weight_gradients, self.want["weight"])),
            "biases": list(map(stored, self.args.biases, self.bias_gradients, self.want["biases"])),
        }

    def _weight_index(self, horizon: int) -> int:
        """The index of a horizon's weight: 0 if all share one."""
        return horizon % len(self.weights)

    def _bias_index(self, horizon: int) -> int:
        """The index of a horizon's bias: 0 if all share one."""
        return horizon % len(self.args.biases)

    def _logits_of(self, product: Product) -> Tensor:
        """The logits of a product, or their gradients, in the shape of its states."""
        return self.buffer[product.at].view(*product.states.shape[:-1], -1)

    def _views(self, clips: Tensor | None, part: Part) -> list[Tensor]:
        """Views [R, D] or [clips, R, D] of the part's rows in `clips`, of inputs or their gradient; none for None."""
        assert isinstance(part.rows, slice)
        views = [] if clips is None else list(clip_views(clips, part.rows))
        if not self.batched:
            views = [clip.unsqueeze(0) for view in views for clip in view]
        return [view[0] if view.shape[0] == 1 else view for view in views]

    def _gather(self, parts: Sequence[Part]) -> Tensor:
        """A copy of the parts' rows, concatenated."""
        counts = [part.size for part in parts]
        gathered = self._empty(sum(counts), self.args.inputs[0].shape[-1])
        for part, target in zip(parts, gathered.split_with_sizes(counts), strict=True):
            states = self.args.inputs[part.horizon]
            if isinstance(part.rows, Tensor):
                matrix = flat(states)
                if matrix is not None and matrix.dtype == target.dtype:
                    torch.index_select(matrix, 0, part.rows, out=target)
                else:
                    target.copy_(rows_at(states, part.rows))
                continue
            views = self._views(self.clips[part.horizon].states, part)
            if not views:
                # The strides allow no view by clip.
                views = [rows_of(states[:, : self.covered[part.horizon]], part.rows.start, part.rows.stop)]
            sizes = [view.shape[:-1].numel() for view in views]
            for view, rows in zip(views, target.split_with_sizes(sizes), strict=True):
                rows.view(view.shape).copy_(view)
        return gathered

    def _scatter(self, part: Part, gradient: Tensor, added: bool) -> None:
        """Write the gradient of a part's states to the rows of the inputs' gradient, or add it."""
        target = self.input_gradients[part.horizon]
        if target is None:
            return
        if isinstance(part.rows, Tensor):
            rows = target.view(-1, target.shape[-1])
            rows[part.rows] = (rows[part.rows] + gradient if added else gradient).to(target.dtype)
            return
        views = self._views(self.clips[part.horizon].gradient, part)
        sizes = [view.shape[:-1].numel() for view in views]
        for view, rows in zip(views, gradient.split_with_sizes(sizes), strict=True):
            view.copy_(view + rows.view(view.shape) if added else rows.view(view.shape))

    def _sum(self, total: Tensor | None, logits_gradient: Tensor, states: Tensor) -> Tensor:
        """total + logits_gradient^T @ states, summed over clips, in fp32 (fp64 for fp64). Unless torch adds in fp32, a
        first product of two matrices is returned in its own dtype, because it may remain the only one."""
        if states.dim() == 3:
            # One [V, D] product per clip: as many at a time as a chunk holds.
            size = max(1, self.size // states.shape[-1])
            for left, right in zip(logits_gradient.split(size), states.split(size), strict=True):
                products = self._empty(left.shape[0], left.shape[2], right.shape[2], dtype=self.summed_dtype)
                summed = multiply(left.transpose(1, 2), right, products).sum(0, dtype=self.computed)
                total = summed if total is None else total.to(self.computed).add_(summed)
            assert total is not None
            return total
        if self.adds_in_fp32:
            return add_product(total, logits_gradient.t(), states, self.computed)
        if total is None:
            product = self._empty(logits_gradient.shape[1], states.shape[1], dtype=self.summed_dtype)
            return multiply(logits_gradient.t(), states, product)
        total = total.to(self.computed)
        if self.dtype == self.computed:
            return torch.addmm(total, logits_gradient.t(), states, out=total)
        self.add(total, multiply(logits_gradient.t(), states, self._empty(*total.shape, dtype=self.summed_dtype)))
        return total

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.args.tokens.device)


def one_clip(clips: Clips) -> Clips | None:
    """The same views as one long clip [1, B * rows, D], or None if their strides forbid it. One product of two matrices
    then replaces a batched one."""
    dense = Clips(*(None if rows is None else flat(rows) for rows in clips))
    if any(rows is not None and matrix is None for rows, matrix in zip(clips, dense, strict=True)):
        return None
    return Clips(*(None if matrix is None else matrix.unsqueeze(0) for matrix in dense))


def packed(targets: Targets, size: int) -> Iterator[tuple[int, int, list[Part]]]:
    """Chunks of at most `size` of all horizons' concatenated rows, nearly equal in size: (first, last, parts)."""
    total = sum(targets.sizes)
    ends = list(itertools.accumulate(targets.sizes))
    count = -(-total // size)
    for chunk in range(count):
        first, last = total * chunk // count, total * (chunk + 1) // count
        parts = []
        for i, (rows, end) in enumerate(zip(targets.rows, ends, strict=True)):
            start = end - targets.sizes[i]
            part = slice(max(first, start) - start, min(last, end) - start)
            if part.start < part.stop:
                parts.append(Part(i, part if isinstance(rows, int) else rows[part], part.stop - part.start))
        yield first, last, parts
