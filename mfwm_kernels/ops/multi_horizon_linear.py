"""multi_horizon_linear: K heads on the conditioned hidden state, without storing a fan-out.

out_i = F.linear(fan_out_i(pool 1), weights[i], biases[i])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..dtypes import cast, cast_all
from ..grad_monitor import GradMonitor
from ..horizons import Horizons
from ..op import Backend, Cost, Op, register
from .conditioning import DIFFERENTIABLE, HIDDEN, bench_states, check_conditioning, check_grid
from .conditioning import variants as conditioning_variants
from .fan_out import conditioned_states


class Arguments(NamedTuple):
    hidden: Tensor
    actions: Tensor | None
    condition: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    lag_weight: Tensor | None
    segment_ids: Tensor | None
    scale: Tensor | None
    norms: Tensor | None
    cosines: Tensor | None
    offsets: list[int]
    norm: str
    norm_eps: float
    window_start: int
    weights: list[Tensor]
    biases: list[Tensor]  # K or none: torch drops all gradients of a list that contains None


def multi_horizon_linear(
    hidden: Tensor,
    actions: Tensor | None,
    weights: Sequence[Tensor],
    horizons: Horizons,
    *,
    biases: Sequence[Tensor | None] | None = None,
    condition: Tensor | None = None,
    norm: str = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    lag_weight: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window_start: int = 1,
    grid: Sequence[int] | None = None,
    grad_monitor: GradMonitor | None = None,
) -> tuple[Tensor, ...]:
    """K linear heads, each on the hidden state conditioned on its horizon's actions.

    Equivalent to:

        states = fan_out(hidden, actions, horizons, pool=(1,) * K, norm_weight=norm_weight)
        [F.linear(state, weight, bias) for state, weight, bias in zip(states, weights, biases)]

    but no state is ever stored. Under autocast, every floating tensor is cast as F.linear does.

    Args:
        hidden: [B, T, Hp, Wp, D] or [B, T, S, D]; fp32, bf16, fp16 or fp64, any strides.
        actions: [B, T_a, D], or None.
        weights: K tensors [N_i, D].
        horizons: the offsets determine which actions are summed; the factors are ignored.
        biases: K tensors [N_i] (None for a head without one), or None for no biases.
        condition, norm, norm_weight, norm_bias, norm_eps, lag_weight, segment_ids, window_start, grad_monitor: as in
            fan_out.
        grid: (Hp, Wp), if hidden is [B, T, S, D] with S = Hp * Wp. It changes nothing but checks S.

    Returns:
        K tensors [B, T, Hp, Wp, N_i] (or [B, T, S, N_i]), dtype of hidden. Differentiable with respect to hidden,
        actions, condition, weights, biases, norm_weight, norm_bias and lag_weight.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: "Multi-Frame Prediction for World Models"; the heads of a multi-token predictor (Gloeckle et al.,
    arXiv 2404.19737) with an action window.
    """
    if grid is not None:
        check_grid(hidden, grid)
    check.tensor("hidden", hidden, (4, 5), HIDDEN)
    device = hidden.device
    hidden = cast(hidden, device)
    conditioning = check_conditioning(
        hidden, actions, horizons, condition, norm, norm_weight, norm_bias, norm_eps, lag_weight, segment_ids,
        window_start, grad_monitor,
    )  # fmt: skip
    count, width = len(horizons), hidden.shape[-1]
    weights = list(cast_all(check.tensors("weights", weights, count, 2, "[N, D]"), device))
    for i, weight in enumerate(weights):
        check.shape(f"weights[{i}]", weight, (weight.shape[0], width), "[N, D]")
        check.non_zero_sizes(f"weights[{i}]", weight, may_be_zero=())
        check.like(f"weights[{i}]", weight, "hidden", hidden)
    if biases is None:
        biases = [None] * count
    if not isinstance(biases, (list, tuple)):
        raise TypeError(f"biases must be a list or tuple of tensors, got {type(biases).__name__}")
    if len(biases) != count:
        raise ValueError(f"biases must have one entry per horizon, {count}; got {len(biases)}")
    biases = cast_all(biases, device)
    for i, bias in enumerate(biases):
        if bias is not None:
            check.tensor(f"biases[{i}]", bias, 1, "[N]")
            check.shape(f"biases[{i}]", bias, (weights[i].shape[0],), "[N]")
            check.like(f"biases[{i}]", bias, "hidden", hidden)
    if all(bias is None for bias in biases):
        biases = []
    filled = [
        hidden.new_zeros(weight.shape[0]) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=False)
    ]
    return tuple(call(OP, Arguments(**conditioning, weights=weights, biases=filled)))


def reference(args: Arguments) -> tuple[Tensor, ...]:
    states = [state.to(args.hidden.dtype) for state in conditioned_states(args, [1] * len(args.offsets))]
    outputs = [F.linear(state, weight) for state, weight in zip(states, args.weights, strict=True)]
    if args.biases:
        outputs = [output + bias for output, bias in zip(outputs, args.biases, strict=True)]
    return tuple(outputs)


def statistics_of(args: Arguments) -> Tensor:
    """Empty statistics [S, rows] in fp32 (fp64 for fp64): with a norm, K rows of 1 / the root mean square of a row's
    conditioned states, and with LayerNorm one of the means of hidden."""
    size = 0 if args.norm_weight is None else len(args.offsets) + (args.norm == "layer")
    dtype = torch.promote_types(args.hidden.dtype, torch.float32)
    return args.hidden.new_empty(size, math.prod(args.hidden.shape[:-1]), dtype=dtype)


def fake(args: Arguments) -> list[Tensor]:
    outputs = [args.hidden.new_empty(*args.hidden.shape[:-1], weight.shape[0]) for weight in args.weights]
    return [*outputs, statistics_of(args)]


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    cascade = Horizons.cascade(4)
    segments = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]], device=device)
    yield {
        "hidden": normal(2, 3, 4, 5, 24), "actions": normal(2, 5, 24), "horizons": cascade,
        "weights": [normal(n, 24) for n in (48, 12, 3, 1)], "biases": [normal(48), None, normal(3), normal(1)],
        "norm_weight": normal(24), "segment_ids": segments,
    }  # fmt: skip
    yield {
        "hidden": normal(3, 2, 7, 17).transpose(0, 1), "actions": normal(2, 4, 34)[..., ::2],
        "horizons": Horizons((0, 1, 3), (1, 1, 3)), "weights": [normal(17, n).T for n in (5, 9, 2)],
        "norm_weight": normal(3, 17), "lag_weight": normal(3, 3, 17), "window_start": 0,
        "condition": normal(2, 3, 3, 17),
    }  # fmt: skip
    yield {"hidden": normal(2, 4, 3, 8), "actions": normal(2, 4, 8), "horizons": cascade,
           "weights": [normal(6, 8) for _ in range(4)]}  # fmt: skip
    yield {"hidden": normal(0, 4, 3, 8), "actions": normal(0, 4, 8), "horizons": Horizons.next_frame(),
           "weights": [normal(6, 8)]}  # fmt: skip
    # A condition beside fewer actions than positions; alone; and neither. The last two compile to the kernels above.
    yield {"hidden": normal(2, 5, 3, 8), "actions": normal(2, 3, 8), "horizons": cascade, "norm_weight": normal(8),
           "weights": [normal(6, 8) for _ in range(4)], "condition": normal(5, 2, 4, 8).transpose(0, 1)}  # fmt: skip
    yield {"hidden": normal(2, 4, 3, 8), "actions": None, "horizons": cascade, "condition": normal(2, 4, 4, 8),
           "weights": [normal(6, 8) for _ in range(4)]}  # fmt: skip
    yield {"hidden": normal(2, 4, 3, 8), "actions": None, "horizons": cascade,
           "weights": [normal(6, 8) for _ in range(4)]}  # fmt: skip
    # Wide enough for pipelined loops in the GPU kernels, and sliced in time so that the rows do not flatten.
    yield {
        "hidden": normal(2, 3, 40, 512)[:, :2], "actions": normal(2, 2, 512), "horizons": cascade,
        "weights": [normal(n, 512) / 512**0.5 for n in (48, 12, 3, 3)], "norm_weight": normal(512),
    }  # fmt: skip
    # Enough tokens per position for the GPU kernel that reads hidden once, and not a multiple of its tiles.
    yield {
        "hidden": normal(2, 3, 10, 13, 72)[:, :2], "actions": normal(2, 2, 72), "horizons": cascade,
        "weights": [normal(n, 72) / 72**0.5 for n in (48, 12, 3, 3)], "norm_weight": normal(4, 72),
        "biases": [normal(48), None, normal(3), normal(3)],
    }  # fmt: skip
    # LayerNorm, with a bias per horizon, one for all of them, and none.
    yield {
        "hidden": normal(3, 2, 7, 17).transpose(0, 1), "actions": normal(2, 4, 17),
        "horizons": Horizons((0, 1, 3), (1, 1, 3)), "weights": [normal(17, n).T for n in (5, 9, 2)],
        "norm": "layer", "norm_weight": normal(3, 17), "norm_bias": normal(17, 3).T, "lag_weight": normal(3, 3, 17),
        "condition": normal(2, 3, 3, 17),
    }  # fmt: skip
    yield {
        "hidden": normal(2, 3, 20, 24), "actions": normal(2, 5, 24), "horizons": cascade, "grid": (4, 5),
        "weights": [normal(n, 24) for n in (48, 12, 3, 1)], "biases": [normal(48), None, normal(3), normal(1)],
        "norm": "layer", "norm_weight": normal(24), "norm_bias": normal(24), "segment_ids": segments,
    }  # fmt: skip
    yield {"hidden": normal(2, 4, 3, 8), "actions": None, "horizons": cascade, "norm": "layer",
           "norm_weight": normal(8), "weights": [normal(6, 8) for _ in range(4)]}  # fmt: skip


def variants(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    for kwargs in conditioning_variants(OP.bench["genie"], dtype, device):
        yield {**kwargs, "biases": [weight[:, 0] for weight in kwargs["weights"]]}


def cost(kwargs: dict[str, Any]) -> Cost:
    hidden, columns = kwargs["hidden"], sum(weight.shape[0] for weight in kwargs["weights"])
    rows, width = hidden.numel() // hidden.shape[-1], hidden.shape[-1]
    # Forward reads hidden and writes the outputs; backward reads hidden and the gradients and writes d hidden.
    return Cost(hidden.element_size() * rows * (3 * width + 2 * columns), 6 * rows * width * columns)


def _bench(batch: int, positions: int, side: int, width: int, columns: tuple[int, ...]) -> Any:
    states = bench_states(batch, positions, side, width)

    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        heads = [(torch.randn(n, width, device=device) / width**0.5).to(dtype) for n in columns]
        return {**states(dtype, device, batch), "weights": heads}

    return make


KERNELS = (
    "action_window_sum_forward",
    "multi_horizon_linear_forward",
    "multi_horizon_linear_scale",
    "multi_horizon_linear_combine",
    "multi_horizon_linear_monitor",
    "action_window_sum_backward",
)

SMALL = ("multi_horizon_linear_small_forward", "multi_horizon_linear_small_backward")

AROUND = (
    "multi_horizon_linear_prepare",
    "multi_horizon_linear_project",
    "multi_horizon_linear_finish_sums",
    "multi_horizon_linear_finish_heads",
)

OP = register(
    Op(
        name="multi_horizon_linear",
        arguments=Arguments,
        differentiable=(*DIFFERENTIABLE, "weights", "biases"),
        reference=reference,
        fake=fake,
        public=multi_horizon_linear,
        samples=samples,
        variants=variants,
        cost=cost,
        counts_flops=True,
        bench={
            "cpu": _bench(4, 16, 16, 512, (192, 48, 12, 3)),
            "genie": _bench(36, 16, 16, 512, (48, 12, 3, 3)),
            "pixels": _bench(32, 24, 32, 1024, (192, 48, 12, 3)),
            "latents": _bench(16, 32, 16, 1024, (64, 16, 16, 16)),
        },
        backends={
            "cpu": Backend((*KERNELS, *SMALL), dtypes=check.FLOATING),
            "triton": Backend(
                (
                    *KERNELS,
                    *AROUND,
                    "multi_horizon_linear_narrow",
                    "multi_horizon_linear_products",
                    "action_window_sum_gates",
                )
            ),
        },
        outputs_in_backward=True,
        statistics=1,
        mutated_in_backward=("norms", "cosines"),
    )
)
