"""multi_horizon_linear_cross_entropy: token losses of K horizons, against pooled one-hot targets.

z            = F.linear(inputs[i], weight, bias), softcapped
target       = mean of the one-hot ids of the f_i x f_i tokens that a cell covers
per_horizon  = mean over the cells that count of  logsumexp(z) - <target, z>   (smoothed, plus z_loss * logsumexp(z)^2)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..dtypes import autocasts, cast
from ..horizon_loss import (
    DETACH,
    HorizonLoss,
    check_consistency,
    check_horizon_weights,
    check_position_weights,
    nan_if_invalid,
    warn_of_horizons_that_never_count,
)
from ..horizons import Horizons, check_horizons, valid_at
from ..op import Backend, Cost, Op, register
from .multi_horizon_linear_cross_entropy_samples import BENCH, samples, variants
from .token_ids import checked_ids, raise_pending
from .video_pyramid import box_average


class Arguments(NamedTuple):
    inputs: list[Tensor]
    weight: list[Tensor]
    biases: list[Tensor]  # K, one that the horizons share, or none
    tokens: Tensor
    horizon_weights: Tensor
    consistency_weights: Tensor | None
    segment_ids: Tensor | None
    token_mask: Tensor | None
    position_weights: Tensor | None
    offsets: list[int]
    factors: list[int]
    leaders: list[int]  # the horizon whose logits each shares: the first given the same tensors
    pairs: list[int]
    ids_per_token: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    chunk_size: int
    detach: str
    return_accuracy: bool
    return_predictions: bool


def multi_horizon_linear_cross_entropy(
    inputs: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    tokens: Tensor,
    horizons: Horizons,
    *,
    horizon_weights: Tensor | Sequence[float] | None = None,
    segment_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    consistency_weights: Tensor | Sequence[float] | None = None,
    detach: str | None = "near",
    biases: Tensor | Sequence[Tensor | None] | None = None,
    position_weights: Tensor | None = None,
    grid: Sequence[int] | None = None,
    return_accuracy: bool = False,
    return_predictions: bool = False,
) -> HorizonLoss:
    """Cross-entropy of K horizons' tokens. The target of a far horizon is the mix of ids in each of its larger cells.

    Equivalent, if every token counts (T_v >= T + offsets[-1], one segment), to:

        ids = F.one_hot(tokens, V).float()  # [B, T_v, Hp, Wp, V]
        targets = [avg_pool(ids, f)[:, k : k + T] for k, f in zip(offsets, factors)]  # class probabilities
        logits = [F.linear(x, weight, biases) for x in inputs]
        losses = [F.cross_entropy(z.flatten(0, 3), target.flatten(0, 3)) for z, target in zip(logits, targets)]
        total = sum(w * loss for w, loss in zip(horizon_weights, losses))

    where `avg_pool(ids, f)` is the mean over f x f tokens. No more than `chunk_size` rows of logits exist at a time.
    Softmaxes are in fp32 (fp64 for fp64). Under autocast, inputs and weight are cast as F.linear does. Horizons that
    are given the same tensors of states, weight and bias share one matrix product and one softmax, as in
    modded-nanogpt's loss.

    Args:
        inputs: K tensors [B, T, Hp / f_i, Wp / f_i, D], or [B, T, S / f_i^2, D] with grid; fp32, bf16, fp16 or fp64,
            any strides. To share logits, give the same tensor object: two views of it have gradients of their own.
        weight: [V, D] shared by the horizons, or K such tensors. With factored tokens [F * V, D], row f * V + v.
        tokens: [B, T_v, Hp, Wp] int32 or int64 with T_v >= T, or factored tokens [B, T_v, Hp, Wp, F], whose loss is the
            sum of F cross-entropies. With grid: [B, T_v, S] or [B, T_v, S, F].
        horizons: offsets in frames, factors in tokens.
        horizon_weights: [K] tensor (fp32 or fp64, differentiable) or list; ones by default.
        segment_ids: [B, T_v], the episode of each frame.
        token_mask: [B, T_v, Hp, Wp] (or [B, T_v, S]) bool, True = counts. It applies at offset 0 only (MaskGIT predicts
            only the masked tokens of frame n), where False excludes an id as ignore_index does.
        ignore_index: ids equal to it are excluded from a cell's mean; a cell with no other ids does not count.
        label_smoothing: e: (1 - e) * nll + e * (logsumexp(z) - mean z).
        z_loss: adds z_loss * logsumexp(z)^2.
        softcap: c: z = c * tanh(z / c), before everything else. None: no cap.
        chunk_size: the most rows of logits, over all horizons, that exist at a time (but a far cell of a consistency
            pair always needs the near rows that it covers). By default as many as fit, with their states, into 64 MiB
            on the CPU and 512 MiB on a GPU. The reference ignores it.
        consistency_weights: [K], for the pairs (0, j): cross-entropy of the far cell's distribution, with the mean of
            the near distributions of the cells that it covers, at position n + k_j - k_0, as target; averaged over the
            positions where both horizons count, whatever their ids. Softcap and biases are included, smoothing and
            z_loss are not. f_j must be a multiple of f_0 unless the weight is 0. A tensor that cannot be read up front
            (on a GPU, in torch.compile) makes the total NaN if it breaks that rule. With token_mask and offset 0, where
            the near head is trained on masked ids only, an id with mask False contributes its one-hot instead of the
            near distribution (unless it is ignore_index); with f_0 > 1 each id of a near cell has a 1 / f_0^2 share.
        detach: "near": the near side of a pair gets no gradient; "far": the far side gets none; None: both learn.
        biases: [V] ([F * V] with factored tokens) shared by the horizons, or K such tensors, some of which may be None;
            added to the logits in fp32 before everything else. Shared or not, independently of weight.
        position_weights: [B, T] or [B, T, K], fp32 or fp64, finite and >= 0, without gradient. It multiplies the losses
            of the predictions made at n; those of weight 0 do not count, and each mean is over what counts. A
            consistency pair counts where both of its predictions do, and is not multiplied. Values that cannot be read
            up front (on a GPU, in torch.compile) make the total NaN if they break that rule.
        grid: (Hp, Wp), if tokens, masks and inputs have their S = Hp * Wp cells in one dimension, in row order.
        return_accuracy: also return the share of counted cells (with factored tokens: of their ids) whose argmax is the
            cell's most frequent id, or the smallest of them if several are equally frequent. Position weights do not
            multiply it.
        return_predictions: also return K int64 tensors [B, T, Hp / f_i, Wp / f_i(, F)] (with grid
            [B, T, S / f_i^2(, F)]): the argmax of the fp32 logits before softcap, the smallest id on ties, at every
            position.

    Returns:
        HorizonLoss with counts in cells; fp32 (fp64 for fp64 inputs). Differentiable with respect to inputs, weight,
        biases and tensors of weights, through total alone.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value. An id outside [0, V) that is not
            ignore_index raises ValueError, on the CPU at once, on a GPU in the next call or in
            `mfwm_kernels.check_errors()`.

    Source: "Multi-Frame Prediction for World Models"; z-loss: PaLM, arXiv 2204.02311; softcap: Gemma 2, arXiv
    2408.00118; K targets on one row of logits: KellerJordan/modded-nanogpt, FusedSoftcappedCrossEntropy.
    """
    raise_pending()
    check_horizons(horizons)
    count = len(horizons)
    if grid is None:
        letters = "[B, T_v, Hp, Wp] or [B, T_v, Hp, Wp, F] ([B, T_v, S] needs grid=(Hp, Wp))"
        check.tensor("tokens", tokens, (4, 5), letters, check.INTEGER_IDS)
    else:
        check.tensor("tokens", tokens, (3, 4), "[B, T_v, S] or [B, T_v, S, F] with grid", check.INTEGER_IDS)
    check.non_zero_sizes("tokens", tokens)
    letters = "[B, T, Hp / f, Wp / f, D]" if grid is None else "[B, T, S / f^2, D]"
    given = check.tensors("inputs", inputs, count, letters.count(",") + 1, letters)
    inputs = cast_once(given, tokens.device)
    if token_mask is not None:
        mask_letters = "[B, T_v, Hp, Wp]" if grid is None else "[B, T_v, S]"
        check.tensor("token_mask", token_mask, mask_letters.count(",") + 1, mask_letters, (torch.bool,))
        check.shape("token_mask", token_mask, tokens.shape[: token_mask.dim()], mask_letters)
        check.same_device("token_mask", token_mask, "tokens", tokens)
    if grid is not None:
        rows, columns = check.grid(grid, "tokens", tokens)
        tokens = tokens.unflatten(2, (rows, columns))
        token_mask = None if token_mask is None else token_mask.unflatten(2, (rows, columns))
    device = tokens.device
    shared = isinstance(weight, Tensor)
    if isinstance(weight, Tensor):
        heads = [check.tensor("weight", weight, 2, "[V, D]")]
    else:
        heads = check.tensors("weight", weight, count, 2, "[V, D]")
    heads = cast_once(heads, device)
    batch, frames, height, width = tokens.shape[:4]
    positions, depth = inputs[0].shape[1], inputs[0].shape[-1]
    for i, (entry, factor) in enumerate(zip(inputs, horizons.factors, strict=True)):
        if height % factor or width % factor:
            raise ValueError(
                f"factors[{i}] = {factor} does not divide the token grid {height} x {width} "
                f"(tokens has shape {list(tokens.shape)}); {check.common_divisors(height, width)} would"
            )
        cells = (height // factor, width // factor)
        expected = (batch, positions, *(cells if grid is None else (cells[0] * cells[1],)), depth)
        check.shape(f"inputs[{i}]", entry, expected, letters)
        check.like(f"inputs[{i}]", entry, "inputs[0]", inputs[0])
        if grid is not None:
            inputs[i] = entry.unflatten(2, cells)
    check.non_zero_sizes("inputs[0]", inputs[0])
    check.same_device("tokens", tokens, "inputs[0]", inputs[0])
    if frames < positions:
        raise ValueError(
            f"tokens must have at least as many frames as inputs positions: T_v = {frames}, T = {positions}"
        )
    ids_per_token = tokens.shape[4] if tokens.dim() == 5 else 1
    for i, head in enumerate(heads):
        name = "weight" if shared else f"weight[{i}]"
        check.shape(name, head, (heads[0].shape[0], depth), "[V, D]")
        check.non_zero_sizes(name, head, may_be_zero=())
        check.like(name, head, "inputs[0]", inputs[0])
        if head.shape[0] % ids_per_token:
            raise ValueError(
                f"{name} must have F * V rows, a multiple of F = {ids_per_token}; got shape {list(head.shape)}"
            )
    columns = heads[0].shape[0]
    bias_list = check_biases(biases, count, columns, inputs[0])
    unread = None
    if position_weights is not None:
        position_weights, unread = check_position_weights(position_weights, batch, positions, count, tokens)
    if frames <= horizons.offsets[-1]:
        warn_of_horizons_that_never_count(horizons, positions, frames, "tokens")
    segment_ids = check.segments(segment_ids, batch, frames, "T_v", "tokens", tokens)
    options = check_options(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        chunk_size=chunk_size, detach=detach, return_accuracy=return_accuracy, return_predictions=return_predictions,
    )  # fmt: skip
    consistency, pairs, undivided = check_consistency(consistency_weights, horizons, tokens, matrix=False)
    args = Arguments(
        inputs=inputs,
        weight=heads,
        biases=bias_list,
        tokens=tokens,
        horizon_weights=check_horizon_weights(horizon_weights, count, tokens),
        consistency_weights=consistency,
        segment_ids=segment_ids,
        token_mask=token_mask,
        position_weights=position_weights,
        offsets=list(horizons.offsets),
        factors=list(horizons.factors),
        leaders=[first_with(i, given, weight, biases) for i in range(count)],
        pairs=pairs,
        ids_per_token=ids_per_token,
        **options,
    )
    total, means, counts, consistencies, pair_counts, *rest = call(OP, args)
    accuracy = rest[0] if args.return_accuracy else None
    predictions = None
    if args.return_predictions:
        predictions = tuple(ids if grid is None else ids.flatten(2, 3) for ids in rest[len(rest) - count :])
    loss = HorizonLoss(total, means, counts, consistencies, pair_counts, accuracy, predictions)
    return nan_if_invalid(loss, consistency, undivided, unread)


def cast_once(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Each tensor as autocast needs it, copied once where the same tensor is given several times."""
    if not autocasts(device):
        return list(tensors)
    results: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        first = first_with(i, tensors)
        results.append(cast(tensor, device) if first == i else results[first])
    return results


def first_with(i: int, *fields: Any) -> int:
    """The first horizon that has in each field, a list or one for all, the very object that horizon i has.

    Equal memory is not enough: the gradients of two views of it may differ, as those of x and x.detach() do.
    """
    for j in range(i):
        if all(field[j] is field[i] for field in fields if isinstance(field, (list, tuple))):
            return j
    return i


def check_biases(biases: Any, count: int, columns: int, first: Tensor) -> list[Tensor]:
    """One bias that the horizons share, K biases, or none; a horizon without one among others with gets zeros."""
    if biases is None:
        return []
    shared = isinstance(biases, Tensor)
    if not shared and not isinstance(biases, (list, tuple)):
        raise TypeError(f"biases must be a tensor or a list or tuple of tensors, got {type(biases).__name__}")
    if not shared and len(biases) != count:
        raise ValueError(f"biases must be a tensor or have one entry per horizon, {count}; got {len(biases)}")
    checked: list[Tensor | None] = []
    for i, bias in enumerate([biases] if shared else biases):
        name = "biases" if shared else f"biases[{i}]"
        if bias is not None:
            check.tensor(name, bias, 1, "[V]")
            bias = cast(bias, first.device)
            check.shape(name, bias, (columns,), "[V]")
            check.like(name, bias, "inputs[0]", first)
        checked.append(bias)
    if all(bias is None for bias in checked):
        return []
    return [first.new_zeros(columns) if bias is None else bias for bias in checked]


def check_options(
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk_size: int | None,
    detach: str | None,
    return_accuracy: bool,
    return_predictions: bool,
) -> dict[str, Any]:
    """The fields of Arguments that depend on no tensor."""
    label_smoothing = check.number("label_smoothing", label_smoothing, least=0)
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing must be <= 1, got {label_smoothing}")
    return {
        "ignore_index": check.integer("ignore_index", ignore_index, least=-(2**31)),
        "label_smoothing": label_smoothing,
        "z_loss": check.number("z_loss", z_loss, least=0),
        "softcap": 0.0 if softcap is None else check.number("softcap", softcap, above=0),
        "chunk_size": 0 if chunk_size is None else check.integer("chunk_size", chunk_size, least=1, most=2**63 - 1),
        "detach": check.choice("detach", detach, DETACH) or "none",
        "return_accuracy": check.flag("return_accuracy", return_accuracy),
        "return_predictions": check.flag("return_predictions", return_predictions),
    }


def reference(args: Arguments) -> tuple[Tensor, ...]:
    inputs, offsets, factors = args.inputs, args.offsets, args.factors
    batch, frames = args.tokens.shape[:2]
    positions = inputs[0].shape[1]
    vocabulary = args.weight[0].shape[0] // args.ids_per_token
    computed = torch.promote_types(inputs[0].dtype, torch.float32)
    ids = checked_ids(args.tokens, vocabulary, args.ignore_index)
    if args.tokens.dim() == 4:
        ids = ids.unsqueeze(-1)

    def uncapped(i: int, states: Tensor) -> Tensor:
        z = F.linear(states, args.weight[i % len(args.weight)]).to(computed)
        if args.biases:
            z = z + args.biases[i % len(args.biases)].to(computed)
        return z.unflatten(-1, (args.ids_per_token, vocabulary))

    def logits(i: int, states: Tensor, cell_counted: Tensor) -> Tensor:
        """[..., F, V]. States that do not count are zeroed first, or a NaN there would reach gradients as 0 * NaN."""
        z = uncapped(i, torch.where(cell_counted[..., None], states, 0))
        return args.softcap * torch.tanh(z / args.softcap) if args.softcap else z

    def counting_positions(i: int) -> Tensor:
        counted = valid_at(offsets[i], positions, frames, args.segment_ids, batch, args.tokens.device)
        return counted if args.position_weights is None else counted & (args.position_weights[:, :, i] > 0)

    losses, counts, hits = [], [], []
    for i, (offset, factor) in enumerate(zip(offsets, factors, strict=True)):
        inside = max(0, min(positions, frames - offset))
        counted = ids != args.ignore_index
        if offset == 0 and args.token_mask is not None:
            counted = counted & args.token_mask[..., None]
        target, any_id = pooled_target(ids, counted, factor, vocabulary, computed)
        position_counted = counting_positions(i)[:, :inside]
        # [B, inside, h, w, F]: which cross-entropies count.
        cell_counted = any_id[:, offset : offset + inside] & position_counted[:, :, None, None, None]
        target, z = target[:, offset : offset + inside], logits(i, inputs[i][:, :inside], cell_counted.any(-1))
        normaliser = z.logsumexp(-1)
        loss = (1 - args.label_smoothing) * (normaliser - (target * z).sum(-1))
        loss = loss + args.label_smoothing * (normaliser - z.mean(-1)) + args.z_loss * normaliser.square()
        if args.position_weights is not None:
            loss = loss * args.position_weights[:, :inside, i, None, None, None].to(computed)
        count = cell_counted.any(-1).sum()
        losses.append(torch.where(cell_counted, loss, 0).sum() / count.clamp_min(1))
        counts.append(count)
        hit = (z.argmax(-1) == target.argmax(-1)) & cell_counted
        hits.append(hit.sum().to(computed) / cell_counted.sum().clamp_min(1))

    shape = (len(inputs),) if args.consistency_weights is None else args.consistency_weights.shape
    consistency = torch.zeros(shape, dtype=computed, device=args.tokens.device)
    consistency_counts = torch.zeros(shape, dtype=torch.int64, device=args.tokens.device)
    total = (args.horizon_weights.to(computed) * torch.stack(losses)).sum()
    for i, j in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        apart = offsets[j] - offsets[i]
        inside = max(0, positions - apart)
        both = (counting_positions(j)[:, :inside] & counting_positions(i)[:, apart:])[:, :, None, None]
        near, far = logits(i, inputs[i][:, apart:], both), logits(j, inputs[j][:, :inside], both)
        near = near.detach() if args.detach == "near" else near
        far = far.detach() if args.detach == "far" else far
        teacher = near.softmax(-1)
        if offsets[i] == 0 and args.token_mask is not None:
            frame = slice(apart, apart + near.shape[1])
            known = (ids[:, frame] != args.ignore_index) & ~args.token_mask[:, frame, ..., None]
            teacher = with_known_ids(teacher, ids[:, frame], known, factors[i])
        teacher = box_average(teacher, factors[j] // factors[i], axis=2)
        entropy = -(teacher * far.log_softmax(-1)).sum((-1, -2))
        count = both.sum() * (entropy.shape[2] * entropy.shape[3])
        mean = torch.where(both, entropy, 0).sum() / count.clamp_min(1)
        assert args.consistency_weights is not None
        total = total + args.consistency_weights[j].to(computed) * mean
        consistency[j], consistency_counts[j] = mean.detach(), count
    outputs = [total, torch.stack(losses), torch.stack(counts), consistency, consistency_counts]
    if args.return_accuracy:
        outputs.append(torch.stack(hits))
    if args.return_predictions:
        predictions = [uncapped(i, states).argmax(-1) for i, states in enumerate(inputs)]
        outputs += predictions if args.tokens.dim() == 5 else [ids.squeeze(-1) for ids in predictions]
    return tuple(outputs)


def with_known_ids(distributions: Tensor, ids: Tensor, known: Tensor, factor: int) -> Tensor:
    """The near distributions [B, T, h, w, F, V] of cells of factor x factor ids, where each `known` id contributes its
    one-hot in place of the distribution, for a share of 1 / factor^2."""
    one_hot = ((ids[..., None] == torch.arange(distributions.shape[-1], device=ids.device)) & known[..., None]).to(
        distributions.dtype
    )
    unknown = box_average((~known).to(distributions.dtype)[..., None], factor, axis=2)
    return distributions * unknown + box_average(one_hot, factor, axis=2)


def pooled_target(
    ids: Tensor, counted: Tensor, factor: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The mean one-hot of the ids of each factor x factor cell where `counted`, [B, T_v, h, w, F, V], and if any is."""
    one_hot = ((ids[..., None] == torch.arange(vocabulary, device=ids.device)) & counted[..., None]).to(dtype)
    share = box_average(counted.to(dtype)[..., None], factor, axis=2)
    return box_average(one_hot, factor, axis=2) / share.where(share > 0, 1), share[..., 0] > 0


def fake(args: Arguments) -> list[Tensor]:
    first, count = args.inputs[0], len(args.inputs)
    out = torch.promote_types(first.dtype, torch.float32)
    outputs = [
        first.new_empty((), dtype=out),
        first.new_empty(count, dtype=out),
        first.new_empty(count, dtype=torch.int64),
        first.new_empty(count, dtype=out),
        first.new_empty(count, dtype=torch.int64),
    ]
    if args.return_accuracy:
        outputs.append(first.new_empty(count, dtype=out))
    if args.return_predictions:
        ids = args.tokens.shape[4:]
        outputs += [first.new_empty(*states.shape[:-1], *ids, dtype=torch.int64) for states in args.inputs]
    return outputs


def cost(kwargs: dict[str, Any]) -> Cost:
    inputs, weight = kwargs["inputs"], kwargs["weight"]
    heads = [weight] if isinstance(weight, Tensor) else list(weight)
    # Horizons that are given the same tensors share a product. Arguments name the leaders, a call of the function not.
    leaders = kwargs.get("leaders") or [first_with(i, inputs, weight, kwargs.get("biases")) for i in range(len(inputs))]
    own = [inputs[i] for i in sorted(set(leaders))]
    rows = [entry.numel() // entry.shape[-1] for entry in own]
    vocabulary, depth = heads[0].shape
    # Inputs and heads are read and their gradients written; logits need not reach memory.
    elements = sum(entry.numel() for entry in own) + sum(head.numel() for head in heads)
    moved = 2 * elements * inputs[0].element_size()
    return Cost(moved, 6 * sum(rows) * vocabulary * depth)


KERNELS = ("multi_horizon_linear_cross_entropy", "multi_horizon_linear_consistency")

OP = register(
    Op(
        name="multi_horizon_linear_cross_entropy",
        arguments=Arguments,
        differentiable=("inputs", "weight", "biases", "horizon_weights", "consistency_weights"),
        reference=reference,
        fake=fake,
        public=multi_horizon_linear_cross_entropy,
        samples=samples,
        variants=variants,
        cost=cost,
        counts_flops=True,
        bench=BENCH,
        backends={
            "cpu": Backend(
                (*KERNELS, "multi_horizon_linear_add", "multi_horizon_linear_cross_entropy_small"),
                dtypes=check.FLOATING,
            ),
            "triton": Backend(
                (
                    "multi_horizon_linear_targets",
                    "multi_horizon_linear_pairs",
                    *KERNELS,
                    "multi_horizon_linear_normalisers",
                    "multi_horizon_linear_sums",
                    "multi_horizon_linear_means",
                    "multi_horizon_loss_scale",
                )
            ),
        },
        gradients_in_forward=True,
    )
)
