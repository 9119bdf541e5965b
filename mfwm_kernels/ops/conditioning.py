"""The conditioned hidden state of fan_out and multi_horizon_linear: an action window and a condition per horizon.

x_i = hidden + window_sum_i + condition_i,  with window_sum_i from action_window_sum (0 without actions)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import arguments as check
from ..dtypes import follow
from ..grad_monitor import GradMonitor, monitor_fields
from ..horizons import Horizons, check_horizons
from ..op import Gradients, Want
from . import action_window_sum
from .action_window_sum import check_window, window_sum

DIFFERENTIABLE = ("hidden", "actions", "condition", "norm_weight", "norm_bias", "lag_weight")
NORMS = ("rms", "layer")
HIDDEN = "[B, T, Hp, Wp, D] or [B, T, S, D]"


def check_conditioning(
    hidden: Tensor,
    actions: Tensor | None,
    horizons: Horizons,
    condition: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    lag_weight: Tensor | None,
    segment_ids: Tensor | None,
    window_start: int,
    grad_monitor: GradMonitor | None,
) -> dict[str, Any]:
    """Check the arguments that both ops share, and return them as fields of their Arguments."""
    check.tensor("hidden", hidden, (4, 5), HIDDEN)
    check.non_zero_sizes("hidden", hidden)
    check_horizons(horizons)
    batch, positions, width, count = hidden.shape[0], hidden.shape[1], hidden.shape[-1], len(horizons)
    if actions is None:
        for name, value in (("lag_weight", lag_weight), ("segment_ids", segment_ids)):
            if value is not None:
                raise ValueError(f"{name} must be None where actions is None: it acts on the window of actions")
        window_start = check.integer("window_start", window_start, least=0)
    else:
        check.tensor("actions", actions, 3, "[B, T_a, D]")
        actions, lag_weight = follow(actions, hidden), follow(lag_weight, hidden)
        check.like("actions", actions, "hidden", hidden)
        if actions.shape[0] != batch or actions.shape[2] != width:
            raise ValueError(
                f"actions must have shape [B, T_a, D] = [{batch}, T_a, {width}], got {list(actions.shape)}"
            )
        lag_weight, segment_ids, _, window_start = check_window(
            actions, "actions", horizons.offsets, lag_weight, segment_ids, window_start
        )
    if condition is not None:
        check.tensor("condition", condition, 4, "[B, T, K, D]")
        condition = follow(condition, hidden)
        check.shape("condition", condition, (batch, positions, count, width), "[B, T, K, D]")
        check.like("condition", condition, "hidden", hidden)
    check.choice("norm", norm, NORMS)
    if norm == "layer" and norm_weight is None:
        raise ValueError('norm "layer" needs a norm_weight, got None')
    if norm_bias is not None and norm != "layer":
        raise ValueError(f'norm_bias must be None with norm "rms", which has no bias; norm is {norm!r}')
    norm_weight = norm_parameter("norm_weight", norm_weight, count, hidden)
    norm_bias = norm_parameter("norm_bias", norm_bias, count, hidden)
    norm_eps = check.number("norm_eps", norm_eps, least=0)
    scale, norms, cosines = monitor_fields(grad_monitor, count, hidden)
    return {
        "hidden": hidden, "actions": actions, "condition": condition, "norm_weight": norm_weight,
        "norm_bias": norm_bias, "lag_weight": lag_weight, "segment_ids": segment_ids, "scale": scale, "norms": norms,
        "cosines": cosines, "offsets": list(horizons.offsets), "norm": norm, "norm_eps": norm_eps,
        "window_start": window_start,
    }  # fmt: skip


def check_grid(hidden: Tensor, grid: Sequence[int]) -> Tensor:
    """`hidden` [B, T, S, D] as a view [B, T, Hp, Wp, D]."""
    check.tensor("hidden", hidden, 4, "[B, T, S, D] with grid")
    return hidden.unflatten(2, check.grid(grid, "hidden", hidden))


def norm_parameter(name: str, value: Tensor | None, count: int, hidden: Tensor) -> Tensor | None:
    """A weight or bias [D] or [K, D] of the norm."""
    if value is None:
        return None
    check.tensor(name, value, (1, 2), "[D] or [K, D]")
    value = follow(value, hidden)
    width = hidden.shape[-1]
    if tuple(value.shape) not in ((width,), (count, width)):
        raise ValueError(
            f"{name} must have shape [D] = [{width}] or [K, D] = [{count}, {width}], got {list(value.shape)}"
        )
    check.like(name, value, "hidden", hidden)
    return value


def reference_sums(args: Any) -> Tensor:
    """[B, T, K, D] in fp32 (fp64 for fp64): the sums added to the hidden state, in plain PyTorch."""
    batch, positions, width = args.hidden.shape[0], args.hidden.shape[1], args.hidden.shape[-1]
    computed = torch.promote_types(args.hidden.dtype, torch.float32)
    if args.actions is None:
        sums = torch.zeros(batch, positions, len(args.offsets), width, dtype=computed, device=args.hidden.device)
    else:
        sums = window_sum(window_of(args), positions)
    return sums if args.condition is None else sums + args.condition.to(computed)


def window_of(args: Any) -> action_window_sum.Arguments:
    return action_window_sum.Arguments(args.actions, args.lag_weight, args.segment_ids, args.offsets, args.window_start)


def conditioning_sums(args: Any, window_sums: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    """[B, T, K, D], dense: the sums added to the hidden state. `window_sums` is the backend's function."""
    batch, positions, width = args.hidden.shape[0], args.hidden.shape[1], args.hidden.shape[-1]
    if args.actions is not None:
        sums = window_sums(window_of(args), positions, dtype)
        return sums if args.condition is None else sums.add_(args.condition)
    if args.condition is not None:
        return args.condition.to(dtype).contiguous()
    return torch.zeros(batch, positions, len(args.offsets), width, dtype=dtype, device=args.hidden.device)


def wants_sums(want: Want) -> bool:
    """Whether any gradient that follows from the gradient of the sums is needed."""
    return bool(want["actions"] or want["condition"] or want["lag_weight"])


def gradients_of_sums(
    args: Any, want: Want, gradient: Tensor, gradients_of_window: Callable[..., Gradients]
) -> Gradients:
    """The gradients of actions, condition and lag_weight, given the gradient of the sums [B, T, K, D]."""
    gradients: Gradients = {}
    if want["condition"]:
        gradients["condition"] = gradient.to(args.condition.dtype)
    if want["actions"] or want["lag_weight"]:
        gradients |= gradients_of_window(window_of(args), want, gradient)
    return gradients


def variants(make: Any, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """Both ops' variants at size genie: monitors, lag gates, segments, LayerNorm."""
    kwargs = make(dtype, device)
    batch, positions, width = kwargs["actions"].shape
    count, offsets = len(kwargs["horizons"]), kwargs["horizons"].offsets
    lag_weight = torch.empty(count, offsets[-1], width, dtype=dtype, device=device)
    segment_ids = torch.empty(batch, positions, dtype=torch.int64, device=device)
    yield {**kwargs, "grad_monitor": GradMonitor(count, [1.0] * count, device=device)}
    yield {**kwargs, "norm_weight": None, "grad_monitor": GradMonitor(count, [1.0] * count, device=device)}
    yield {**kwargs, "lag_weight": lag_weight, "segment_ids": segment_ids}
    yield {**kwargs, "lag_weight": lag_weight, "segment_ids": segment_ids.int(), "norm_weight": None}
    layer = {**kwargs, "norm": "layer"}
    yield layer
    yield {**layer, "norm_bias": kwargs["norm_weight"]}
    yield {**layer, "norm_bias": kwargs["norm_weight"],
           "grad_monitor": GradMonitor(count, [1.0] * count, device=device)}  # fmt: skip


def bench_states(batch: int, positions: int, side: int, width: int) -> Any:
    """Benchmark inputs of both ops."""

    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        return {
            "hidden": torch.randn(batch, positions, side, side, width, device=device).to(dtype),
            "actions": torch.randn(batch, positions, width, device=device).to(dtype),
            "horizons": Horizons.cascade(4),
            "norm_weight": torch.randn(width, device=device).to(dtype),
        }

    return make
