"""multi_horizon_linear_cross_entropy: token losses of K horizons, against pooled one-hot targets.

z            = F.linear(inputs[i], weight), softcapped
target       = mean of the one-hot ids of the f_i x f_i tokens that a cell covers
per_horizon  = mean over the cells that count of  logsumexp(z) - <target, z>   (smoothed, plus z_loss * logsumexp(z)^2)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..dtypes import cast
from ..horizon_loss import DETACH, HorizonLoss, check_consistency, check_horizon_weights, nan_if_invalid
from ..horizons import Horizons, check_horizons, valid_at
from ..op import Backend, Cost, Op, register
from .token_ids import checked_ids, raise_pending
from .video_pyramid import box_average


class Arguments(NamedTuple):
    inputs: list[Tensor]
    weight: list[Tensor]
    tokens: Tensor
    horizon_weights: Tensor
    consistency_weights: Tensor | None
    segment_ids: Tensor | None
    token_mask: Tensor | None
    offsets: list[int]
    factors: list[int]
    pairs: list[int]
    ids_per_token: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    chunk_size: int
    detach: str
    return_accuracy: bool


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
    return_accuracy: bool = False,
) -> HorizonLoss:
    """Cross-entropy of K horizons' tokens. The target of a far horizon is the mix of ids in each of its larger cells.

    Equivalent, if every token counts (T_v >= T + offsets[-1], one segment), to
    `sum(horizon_weights[i] * F.cross_entropy(F.linear(inputs[i], weight).flatten(0, 3), target_i.flatten(0, 3)))` with
    `target_i = avg_pool(F.one_hot(tokens, V), f_i)[:, k_i : k_i + T]` as class probabilities. Softmaxes are in fp32
    (fp64 for fp64). Under autocast, inputs and weight are cast as F.linear does.

    Args:
        inputs: K tensors [B, T, Hp / f_i, Wp / f_i, D]; fp32, bf16, fp16 or fp64, any strides.
        weight: [V, D] shared by the horizons, or K such tensors. With factored tokens [F * V, D], row f * V + v.
        tokens: [B, T_v, Hp, Wp] int32 or int64 with T_v >= T, or factored tokens [B, T_v, Hp, Wp, F], whose loss is the
            sum of F cross-entropies.
        horizons: offsets in frames, factors in tokens.
        horizon_weights: [K] tensor (fp32 or fp64, differentiable) or list; ones by default.
        segment_ids: [B, T_v], the episode of each frame.
        token_mask: [B, T_v, Hp, Wp] bool, True = counts. It applies at offset 0 only (MaskGIT predicts only the masked
            tokens of frame n), where False excludes an id as ignore_index does.
        ignore_index: ids equal to it are excluded from a cell's mean; a cell with no other ids does not count.
        label_smoothing: e: (1 - e) * nll + e * (logsumexp(z) - mean z).
        z_loss: adds z_loss * logsumexp(z)^2.
        softcap: c: z = c * tanh(z / c), before everything else. None: no cap.
        chunk_size: the most rows of logits, over all horizons, that exist at a time (but a far cell of a consistency
            pair always needs the near rows that it covers). By default as many as fit, with their states, into 64 MiB
            on the CPU and 512 MiB on a GPU. The reference ignores it.
        consistency_weights: [K], for the pairs (0, j): cross-entropy of the far cell's distribution, with the mean of
            the near distributions of the cells that it covers, at position n + k_j - k_0, as target; averaged over the
            positions where both horizons count. f_j must be a multiple of f_0 unless the weight is 0. A tensor that
            cannot be read up front (on a GPU, in torch.compile) makes the total NaN if it breaks that rule.
        detach: "near": the near side of a pair gets no gradient; "far": the far side gets none; None: both learn.
        return_accuracy: also return the share of counted cells (with factored tokens: of their ids) whose argmax is the
            cell's most frequent id, or the smallest of them if several are equally frequent.

    Returns:
        HorizonLoss with counts in cells; fp32 (fp64 for fp64 inputs). Differentiable with respect to inputs, weight and
        tensors of weights, through total alone.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value. An id outside [0, V) that is not
        ignore_index raises ValueError: on the CPU at once, on a GPU in the next call or `mfwm_kernels.check_errors()`.

    Source: "Multi-Frame Prediction for World Models"; z-loss: PaLM, arXiv 2204.02311; softcap: Gemma 2, arXiv
    2408.00118.
    """
    raise_pending()
    check_horizons(horizons)
    count = len(horizons)
    check.tensor("tokens", tokens, (4, 5), check.INTEGER_IDS)
    check.non_zero_sizes("tokens", tokens)
    device = tokens.device
    inputs = [cast(entry, device) for entry in check.tensors("inputs", inputs, count, 5)]
    shared = isinstance(weight, Tensor)
    if isinstance(weight, Tensor):
        heads = [check.tensor("weight", weight, 2)]
    else:
        heads = check.tensors("weight", weight, count, 2)
    heads = [cast(head, device) for head in heads]
    batch, frames, height, width = tokens.shape[:4]
    positions, depth = inputs[0].shape[1], inputs[0].shape[4]
    for i, (entry, factor) in enumerate(zip(inputs, horizons.factors, strict=True)):
        if height % factor or width % factor:
            raise ValueError(
                f"factors[{i}] = {factor} does not divide the token grid {height} x {width} "
                f"(tokens has shape {list(tokens.shape)})"
            )
        expected = (batch, positions, height // factor, width // factor, depth)
        check.shape(f"inputs[{i}]", entry, expected, "[B, T, Hp / f, Wp / f, D]")
        check.like(f"inputs[{i}]", entry, "inputs[0]", inputs[0])
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
    if token_mask is not None:
        check.tensor("token_mask", token_mask, 4, (torch.bool,))
        check.shape("token_mask", token_mask, (batch, frames, height, width), "[B, T_v, Hp, Wp]")
        check.same_device("token_mask", token_mask, "tokens", tokens)
    segment_ids = check.segments(segment_ids, batch, frames, "T_v", "tokens", tokens)
    options = check_options(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        chunk_size=chunk_size, detach=detach, return_accuracy=return_accuracy,
    )  # fmt: skip
    consistency, pairs, undivided = check_consistency(consistency_weights, horizons, tokens, matrix=False)
    args = Arguments(
        inputs=inputs,
        weight=heads,
        tokens=tokens,
        horizon_weights=check_horizon_weights(horizon_weights, count, tokens),
        consistency_weights=consistency,
        segment_ids=segment_ids,
        token_mask=token_mask,
        offsets=list(horizons.offsets),
        factors=list(horizons.factors),
        pairs=pairs,
        ids_per_token=ids_per_token,
        **options,
    )
    return nan_if_invalid(HorizonLoss(*call(OP, args)), consistency, undivided)


def check_options(
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk_size: int | None,
    detach: str | None,
    return_accuracy: bool,
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

    def logits(i: int, states: Tensor, cell_counted: Tensor) -> Tensor:
        """[..., F, V]. States that do not count are zeroed first, or a NaN there would reach gradients as 0 * NaN."""
        z = F.linear(torch.where(cell_counted[..., None], states, 0), args.weight[i % len(args.weight)]).to(computed)
        z = z.unflatten(-1, (args.ids_per_token, vocabulary))
        return args.softcap * torch.tanh(z / args.softcap) if args.softcap else z

    losses, counts, hits = [], [], []
    for i, (offset, factor) in enumerate(zip(offsets, factors, strict=True)):
        inside = max(0, min(positions, frames - offset))
        counted = ids != args.ignore_index
        if offset == 0 and args.token_mask is not None:
            counted = counted & args.token_mask[..., None]
        target, any_id = pooled_target(ids, counted, factor, vocabulary, computed)
        position_counted = valid_at(offset, positions, frames, args.segment_ids, batch, args.tokens.device)[:, :inside]
        # [B, inside, h, w, F]: which cross-entropies count.
        cell_counted = any_id[:, offset : offset + inside] & position_counted[:, :, None, None, None]
        target, z = target[:, offset : offset + inside], logits(i, inputs[i][:, :inside], cell_counted.any(-1))
        normaliser = z.logsumexp(-1)
        loss = (1 - args.label_smoothing) * (normaliser - (target * z).sum(-1))
        loss = loss + args.label_smoothing * (normaliser - z.mean(-1)) + args.z_loss * normaliser.square()
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
        far_counted = valid_at(offsets[j], positions, frames, args.segment_ids, batch, args.tokens.device)
        near_counted = valid_at(offsets[i], positions, frames, args.segment_ids, batch, args.tokens.device)
        both = (far_counted[:, :inside] & near_counted[:, apart:])[:, :, None, None]
        near, far = logits(i, inputs[i][:, apart:], both), logits(j, inputs[j][:, :inside], both)
        near = near.detach() if args.detach == "near" else near
        far = far.detach() if args.detach == "far" else far
        teacher = box_average(near.softmax(-1), factors[j] // factors[i], axis=2)
        entropy = -(teacher * far.log_softmax(-1)).sum((-1, -2))
        count = both.sum() * (entropy.shape[2] * entropy.shape[3])
        mean = torch.where(both, entropy, 0).sum() / count.clamp_min(1)
        assert args.consistency_weights is not None
        total = total + args.consistency_weights[j].to(computed) * mean
        consistency[j], consistency_counts[j] = mean.detach(), count
    outputs = (total, torch.stack(losses), torch.stack(counts), consistency, consistency_counts)
    return (*outputs, torch.stack(hits)) if args.return_accuracy else outputs


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
    return [*outputs, first.new_empty(count, dtype=out)] if args.return_accuracy else outputs


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, device=device)

    def inputs(horizons: Horizons, batch: int, positions: int, height: int, width: int, depth: int) -> list[Tensor]:
        return [normal(batch, positions, height // f, width // f, depth) for f in horizons.factors]

    cascade = Horizons.cascade(3)
    segments = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]], device=device)
    yield {
        "inputs": inputs(cascade, 2, 5, 4, 8, 12), "weight": normal(19, 12), "tokens": ids(19, 2, 5, 4, 8),
        "horizons": cascade, "segment_ids": segments, "return_accuracy": True,
    }  # fmt: skip
    tokens = ids(7, 2, 5, 4, 4, 2)
    tokens[0, :, :2, :2] = -1
    yield {
        "inputs": inputs(cascade, 2, 4, 4, 4, 9), "weight": [normal(14, 9) for _ in range(3)], "tokens": tokens.int(),
        "horizons": cascade, "ignore_index": -1, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0,
        "horizon_weights": torch.tensor([1.0, 0.5, 0.25], device=device),
        "consistency_weights": [0, 0.5, 0.25], "detach": None,
    }  # fmt: skip
    maskgit = Horizons((0, 1), (1, 2))
    yield {
        "inputs": inputs(maskgit, 2, 3, 2, 4, 8), "weight": normal(6, 8), "tokens": ids(6, 2, 3, 2, 4),
        "horizons": maskgit, "token_mask": torch.rand(2, 3, 2, 4, device=device) < 0.5,
        "consistency_weights": torch.tensor([0.0, 0.5], device=device),
    }  # fmt: skip
    yield {
        "inputs": inputs(cascade, 0, 3, 4, 4, 8),
        "weight": normal(6, 8),
        "tokens": ids(6, 0, 3, 4, 4),
        "horizons": cascade,
    }
    yield {
        "inputs": inputs(cascade, 2, 0, 4, 4, 8),
        "weight": normal(6, 8),
        "tokens": ids(6, 2, 3, 4, 4),
        "horizons": cascade,
    }
    # As wide as real states, and sliced in time as next-frame trainers do, so that the rows do not flatten.
    yield {
        "inputs": [states[:, :3] for states in inputs(cascade, 2, 4, 4, 8, 512)],
        "weight": normal(40, 512) / 512**0.5, "tokens": ids(40, 2, 3, 4, 8), "horizons": cascade,
        "consistency_weights": [0, 0.5, 0.25],
    }  # fmt: skip


def variants(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    kwargs = OP.bench["genie"](dtype, device)
    tokens, positions = kwargs["tokens"], kwargs["inputs"][0].shape[1]
    # As many frames as positions: the kernels gather rows of the far horizons.
    yield {**kwargs, "tokens": tokens[:, :positions]}
    mask = torch.empty(tokens.shape, dtype=torch.bool, device=device)
    yield {**kwargs, "horizons": Horizons((0, 2, 4, 8), (1, 2, 4, 8)), "token_mask": mask}
    segment_ids = torch.empty(tokens.shape[:2], dtype=torch.int64, device=device)
    kwargs.update(softcap=30.0, z_loss=1e-4, label_smoothing=0.1, return_accuracy=True, segment_ids=segment_ids)
    for detach in DETACH:
        yield {**kwargs, "consistency_weights": CONSISTENCY, "detach": detach}


def cost(kwargs: dict[str, Any]) -> Cost:
    inputs, weight = kwargs["inputs"], kwargs["weight"]
    heads = [weight] if isinstance(weight, Tensor) else list(weight)
    rows = [entry.numel() // entry.shape[-1] for entry in inputs]
    vocabulary, depth = heads[0].shape
    # Inputs and heads are read and their gradients written; logits need not reach memory.
    elements = sum(entry.numel() for entry in inputs) + sum(head.numel() for head in heads)
    moved = 2 * elements * inputs[0].element_size()
    return Cost(moved, 6 * sum(rows) * vocabulary * depth)


CASCADE = Horizons.cascade(4)
# Every horizon at full resolution, because most other libraries support only hard targets.
FLAT = Horizons((1, 2, 4, 8), (1, 1, 1, 1))
CONSISTENCY = [0, 0.1, 0.1, 0.1]


def _bench(
    batch: int,
    time: int,
    side: int,
    vocabulary: int,
    depth: int,
    ids_per_token: int = 1,
    horizons: Horizons = CASCADE,
    consistency_weights: list[float] | None = None,
) -> Any:
    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        # Tokens extend past the positions, so that every row counts.
        shape = (batch, time + horizons.offsets[-1], side, side, *((ids_per_token,) if ids_per_token > 1 else ()))
        options = {} if consistency_weights is None else {"consistency_weights": consistency_weights}
        return {
            "inputs": [
                torch.randn(batch, time, side // f, side // f, depth, device=device).to(dtype) for f in horizons.factors
            ],
            "weight": (torch.randn(ids_per_token * vocabulary, depth, device=device) / depth**0.5).to(dtype),
            "tokens": torch.randint(0, vocabulary, shape, device=device),
            "horizons": horizons,
            **options,
        }  # fmt: skip

    return make


KERNELS = ("multi_horizon_linear_cross_entropy", "multi_horizon_linear_consistency")

OP = register(
    Op(
        name="multi_horizon_linear_cross_entropy",
        arguments=Arguments,
        differentiable=("inputs", "weight", "horizon_weights", "consistency_weights"),
        reference=reference,
        fake=fake,
        public=multi_horizon_linear_cross_entropy,
        samples=samples,
        variants=variants,
        cost=cost,
        counts_flops=True,
        bench={
            "cpu": _bench(4, 8, 16, 1024, 512),
            "cpu-16k": _bench(4, 8, 16, 16384, 256),
            "cpu-flat": _bench(4, 8, 16, 1024, 512, horizons=FLAT),
            "cpu-consistency": _bench(4, 8, 16, 1024, 512, consistency_weights=CONSISTENCY),
            "genie": _bench(36, 16, 16, 1024, 512),
            "genie-flat": _bench(36, 16, 16, 1024, 512, horizons=FLAT),
            "genie-consistency": _bench(36, 16, 16, 1024, 512, consistency_weights=CONSISTENCY),
            "1x": _bench(16, 16, 16, 512, 256, ids_per_token=2),
            "1x-flat": _bench(16, 16, 16, 512, 256, ids_per_token=2, horizons=FLAT),
            "wide": _bench(16, 4, 16, 262144, 2048),
            "wide-near": _bench(16, 4, 16, 262144, 2048, horizons=Horizons.next_frame()),
        },
        backends={
            "cpu": Backend((*KERNELS, "multi_horizon_linear_add"), dtypes=check.FLOATING),
            "triton": Backend((*KERNELS, "multi_horizon_linear_normalisers", "multi_horizon_loss_scale")),
        },
        gradients_in_forward=True,
    )
)
