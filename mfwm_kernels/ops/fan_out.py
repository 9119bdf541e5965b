"""fan_out: the K conditioned (pooled, conditioned, normed) states from one read of the shared hidden state.

out_i = norm(avg_pool(hidden, pool[i]) + window_sum_i + condition_i),  norm is RMSNorm or LayerNorm

with window_sum_i from action_window_sum. It and the condition are added to every token of their position. There is no
norm if norm_weight is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..grad_monitor import GradMonitor, branches
from ..horizons import Horizons
from ..op import Backend, Cost, Op, register
from .conditioning import DIFFERENTIABLE, bench_states, check_conditioning, check_grid, reference_sums
from .conditioning import variants as conditioning_variants
from .video_pyramid import box_average


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
    pool: list[int]


def fan_out(
    hidden: Tensor,
    actions: Tensor | None,
    horizons: Horizons,
    *,
    pool: Sequence[int],
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
    """The K states that the K horizons predict from, in one read of `hidden`.

    Equivalent to:

        x = (action_window_sum(actions, horizons.offsets)[:, :T] + condition)[:, :, :, None, None]
        [F.rms_norm(avg_pool(hidden, p) + x[:, :, i], (D,), norm_weight, norm_eps) for i, p in enumerate(pool)]

    where `avg_pool(hidden, p)` is the mean over p x p tokens, and with norm "layer" the last line has
    `F.layer_norm(..., (D,), norm_weight, norm_bias, norm_eps)`. Computed in fp32 (fp64 for fp64) and rounded once at
    the end. The backward reads hidden and the K gradients once, and writes the gradient of hidden once.

    Args:
        hidden: [B, T, Hp, Wp, D], or [B, T, S, D] if no pool is above 1 or with `grid`; fp32, bf16, fp16 or fp64, any
            strides.
        actions: [B, T_a, D], dtype and device of hidden; terms past the last action are omitted. None: no window
            sum.
        horizons: the offsets determine which actions are summed; the factors are ignored.
        pool: K integers >= 1; each divides Hp and Wp.
        condition: [B, T, K, D], dtype and device of hidden, added to every token of its position: a latent or a goal
            for each horizon.
        norm: "rms" or "layer"; the latter needs a norm_weight.
        norm_weight: [D] or [K, D]; None: no norm.
        norm_bias: [D] or [K, D], of norm "layer" only; None: no bias.
        norm_eps: added to the mean square ("rms") or to the variance ("layer").
        lag_weight, segment_ids, window_start: as in action_window_sum; segment_ids are [B, T_a]. The first two need
            actions.
        grid: (Hp, Wp), if hidden is [B, T, S, D] with S = Hp * Wp tokens in row order. The outputs then have that
            layout too: [B, T, S / pool[i]^2, D].
        grad_monitor: the backward writes it, see GradMonitor.

    Returns:
        K tensors [B, T, Hp / pool[i], Wp / pool[i], D] (or [B, T, S, D]), dtype of hidden. Differentiable with respect
        to hidden, actions, condition, norm_weight, norm_bias and lag_weight.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: "Multi-Frame Prediction for World Models"; RMSNorm: Zhang and Sennrich, arXiv 1910.07467;
    LayerNorm: Ba et al., arXiv 1607.06450.
    """
    if grid is not None:
        hidden = check_grid(hidden, grid)
    conditioning = check_conditioning(
        hidden, actions, horizons, condition, norm, norm_weight, norm_bias, norm_eps, lag_weight, segment_ids,
        window_start, grad_monitor,
    )  # fmt: skip
    pool = check.integers("pool", pool, least=1, count=len(horizons))
    for i, p in enumerate(pool):
        if hidden.dim() == 4:
            if p != 1:
                raise ValueError(
                    f"pool[{i}] must be 1 where hidden has no grid (shape {list(hidden.shape)}; pass grid=(Hp, Wp)), "
                    f"got {p}"
                )
        elif hidden.shape[2] % p or hidden.shape[3] % p:
            raise ValueError(
                f"pool[{i}] = {p} does not divide the token grid {hidden.shape[2]} x {hidden.shape[3]} "
                f"(hidden has shape {list(hidden.shape)}); {check.common_divisors(*hidden.shape[2:4])} would"
            )
    outputs = call(OP, Arguments(**conditioning, pool=list(pool)))
    return tuple(outputs if grid is None else [output.flatten(2, 3) for output in outputs])


def reference(args: Arguments) -> tuple[Tensor, ...]:
    states = conditioned_states(args, args.pool)
    return tuple(state.to(args.hidden.dtype) for state in states)


def conditioned_states(args: Any, pool: Sequence[int]) -> list[Tensor]:
    """The K states in fp32 (fp64 for fp64), from the fields that fan_out and multi_horizon_linear share."""
    hidden, sums = args.hidden, reference_sums(args)
    states = []
    for i, branch in enumerate(branches(hidden, len(pool), args.scale, args.norms, args.cosines)):
        state = box_average(branch.to(sums.dtype), pool[i], axis=2)
        token_axes = (1,) * (hidden.dim() - 3)
        state = state + sums[:, :, i].unflatten(-1, (*token_axes, -1))
        if args.norm_weight is not None:
            weight = norm_parameter_of(args.norm_weight, i).to(state.dtype)
            if args.norm == "rms":
                state = rms_norm(state, weight, args.norm_eps)
            else:
                bias = None if args.norm_bias is None else norm_parameter_of(args.norm_bias, i).to(state.dtype)
                state = F.layer_norm(state, weight.shape, weight, bias, args.norm_eps)
        states.append(state)
    return states


def norm_parameter_of(parameter: Tensor, i: int) -> Tensor:
    return parameter if parameter.dim() == 1 else parameter[i]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def fake(args: Arguments) -> list[Tensor]:
    shape = list(args.hidden.shape)
    if len(shape) == 4:
        return [args.hidden.new_empty(shape) for _ in args.pool]
    batch, positions, height, width, depth = shape
    return [args.hidden.new_empty(batch, positions, height // p, width // p, depth) for p in args.pool]


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    cascade = Horizons.cascade(4)
    segments = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]], device=device)
    yield {
        "hidden": normal(2, 3, 8, 16, 24), "actions": normal(2, 5, 24), "horizons": cascade, "pool": (1, 2, 4, 8),
        "norm_weight": normal(24), "segment_ids": segments,
    }  # fmt: skip
    yield {
        "hidden": normal(3, 2, 6, 6, 17).transpose(0, 1), "actions": normal(3, 4, 17)[:2],
        "horizons": Horizons((0, 1, 3), (1, 1, 3)), "pool": (1, 2, 3), "norm_weight": normal(3, 17),
        "lag_weight": normal(3, 3, 17), "window_start": 0, "condition": normal(2, 3, 3, 17),
    }  # fmt: skip
    yield {"hidden": normal(2, 4, 5, 8), "actions": normal(2, 4, 8), "horizons": cascade, "pool": (1, 1, 1, 1)}
    # Conditions with fewer actions than positions; conditions alone; neither.
    # They compile to the same kernels as the first sample.
    yield {
        "hidden": normal(2, 3, 8, 16, 24), "actions": normal(2, 2, 24), "horizons": cascade, "pool": (1, 2, 4, 8),
        "norm_weight": normal(24), "condition": normal(3, 2, 4, 24).transpose(0, 1), "segment_ids": segments[:, 1:3],
    }  # fmt: skip
    yield {"hidden": normal(1, 2, 8, 16, 24), "actions": None, "horizons": cascade, "pool": (1, 2, 4, 8),
           "norm_weight": normal(24), "condition": normal(1, 2, 4, 48)[..., ::2]}  # fmt: skip
    yield {"hidden": normal(1, 2, 8, 16, 24), "actions": None, "horizons": cascade, "pool": (1, 2, 4, 8),
           "norm_weight": normal(24)}  # fmt: skip
    yield {
        "hidden": normal(1, 3, 4, 2, 132)[..., 4:], "actions": normal(1, 3, 256)[..., ::2],
        "horizons": Horizons((1, 2), (1, 2)), "pool": (2, 2), "norm_weight": normal(128),
    }  # fmt: skip
    yield {"hidden": normal(0, 3, 4, 4, 8), "actions": normal(0, 3, 8), "horizons": cascade, "pool": (1, 2, 4, 4)}
    yield {"hidden": normal(2, 0, 4, 4, 8), "actions": normal(2, 3, 8), "horizons": cascade, "pool": (1, 2, 4, 4),
           "norm_weight": normal(8)}  # fmt: skip
    # LayerNorm, with a bias per horizon, one for all of them, and none.
    yield {
        "hidden": normal(2, 2, 6, 6, 17), "actions": normal(2, 4, 17), "horizons": Horizons((0, 1, 3), (1, 1, 3)),
        "pool": (1, 2, 3), "norm": "layer", "norm_weight": normal(3, 17), "norm_bias": normal(17, 3).T,
        "lag_weight": normal(3, 3, 17), "condition": normal(2, 2, 3, 17),
    }  # fmt: skip
    yield {
        "hidden": normal(2, 2, 32, 32), "actions": normal(2, 3, 32), "horizons": cascade, "pool": (1, 1, 2, 2),
        "grid": (4, 8), "norm": "layer", "norm_weight": normal(32), "norm_bias": normal(32),
    }  # fmt: skip
    yield {"hidden": normal(1, 2, 5, 24), "actions": None, "horizons": cascade, "pool": (1, 1, 1, 1),
           "norm": "layer", "norm_weight": normal(24)}  # fmt: skip


def variants(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    yield from conditioning_variants(OP.bench["genie"], dtype, device)


def cost(kwargs: dict[str, Any]) -> Cost:
    hidden = kwargs["hidden"]
    pooled = sum(hidden.numel() // p**2 for p in kwargs["pool"])
    # Forward reads hidden and writes the outputs; backward reads hidden and the gradients and writes d hidden.
    return Cost(hidden.element_size() * (3 * hidden.numel() + 2 * pooled), 16 * (hidden.numel() + pooled))


def _bench(batch: int, positions: int, side: int, width: int) -> Any:
    make = bench_states(batch, positions, side, width)
    return lambda *given: {**make(*given), "pool": (1, 2, 4, 8)}


KERNELS = ("action_window_sum_forward", "fan_out_forward", "fan_out_backward", "action_window_sum_backward")

OP = register(
    Op(
        name="fan_out",
        arguments=Arguments,
        differentiable=DIFFERENTIABLE,
        reference=reference,
        fake=fake,
        public=fan_out,
        samples=samples,
        variants=variants,
        cost=cost,
        bench={
            "cpu": _bench(4, 16, 16, 512),
            "genie": _bench(36, 16, 16, 512),
            "pixels": _bench(32, 24, 32, 1024),
            "latents": _bench(16, 32, 16, 1024),
            "1x": _bench(16, 16, 16, 256),
            "wide": _bench(16, 4, 16, 2048),
        },
        backends={
            "cpu": Backend(KERNELS, dtypes=check.FLOATING),
            "triton": Backend((*KERNELS, "action_window_sum_gates")),
        },
        mutated_in_backward=("norms", "cosines"),
    )
)
