"""The ops as modules that own their parameters: norm weights, lag gates and heads.

Arguments are those of the functions. Norm weights and lag gates start at 1, norm biases at 0, heads as in nn.Linear.
Horizon weights and consistency weights are buffers, which keep their dtype when a module is cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments as check
from .grad_monitor import GradMonitor
from .horizon_loss import HorizonLoss, check_consistency, check_horizon_weights
from .horizons import Horizons, check_horizons
from .ops.conditioning import NORMS
from .ops.fan_out import fan_out
from .ops.mtp_combine import ORDERS, mtp_combine
from .ops.multi_horizon_linear import multi_horizon_linear
from .ops.multi_horizon_linear_cross_entropy import check_options as check_token_options
from .ops.multi_horizon_linear_cross_entropy import multi_horizon_linear_cross_entropy
from .ops.multi_horizon_loss import check_no_patches, multi_horizon_loss
from .ops.multi_horizon_loss import check_options as check_loss_options
from .ops.video_pyramid import check_patch_sizes

__all__ = ["FanOut", "MTPCombine", "MultiHorizonLinear", "MultiHorizonLinearCrossEntropy", "MultiHorizonLoss"]


class _Conditioned(nn.Module):
    """The parameters that condition a hidden state: norm weights and biases [D] or [K, D], and lag gates
    [K, max offset, D]."""

    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    lag_weight: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        horizons: Horizons,
        norm: str | None,
        norm_per_horizon: bool,
        norm_eps: float,
        norm_bias: bool,
        lag_gates: bool,
        window_start: int,
        grid: Sequence[int] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_horizons(horizons)
        factory = _factory(device, dtype)
        self.in_features = check.integer("in_features", in_features, least=1)
        self.horizons = horizons
        self.norm = check.choice("norm", norm, (*NORMS, None))
        self.norm_eps = check.number("norm_eps", norm_eps, least=0)
        self.window_start = check.integer("window_start", window_start, least=0)
        count, lags = len(horizons), max(1, horizons.offsets[-1])
        shape = (count, in_features) if check.flag("norm_per_horizon", norm_per_horizon) else (in_features,)
        self.norm_weight = None if norm is None else nn.Parameter(torch.ones(shape, **factory))
        biased = check.flag("norm_bias", norm_bias) and norm == "layer"
        self.norm_bias = nn.Parameter(torch.zeros(shape, **factory)) if biased else None
        self.grid = None if grid is None else check.grid_sizes(grid)
        gated = check.flag("lag_gates", lag_gates)
        self.lag_weight = nn.Parameter(torch.ones(count, lags, in_features, **factory)) if gated else None

    def conditioning(self) -> dict[str, Any]:
        """The keyword arguments of the function that this module supplies."""
        return {
            "norm": self.norm or "rms", "norm_weight": self.norm_weight, "norm_bias": self.norm_bias,
            "norm_eps": self.norm_eps, "lag_weight": self.lag_weight, "window_start": self.window_start,
            "grid": self.grid,
        }  # fmt: skip

    def conditioning_repr(self) -> str:
        norm = "None" if self.norm_weight is None else f"{self.norm!r}, norm_eps={self.norm_eps}"
        per_horizon = ", norm_per_horizon=True" if self.norm_weight is not None and self.norm_weight.dim() == 2 else ""
        bias = ", norm_bias=False" if self.norm == "layer" and self.norm_bias is None else ""
        gates = "" if self.lag_weight is None else ", lag_gates=True"
        grid = "" if self.grid is None else f", grid={self.grid}"
        return f"norm={norm}{per_horizon}{bias}{gates}, window_start={self.window_start}{grid}"


class FanOut(_Conditioned):
    """`mfwm_kernels.fan_out` with its norm weight and lag gates.

    Args:
        in_features: D, the width of the hidden state.
        horizons, pool, norm_eps, window_start, grid: as in the function.
        norm: "rms", "layer", or None for no norm.
        norm_per_horizon: norm weights and biases [K, D] instead of one [D] that the horizons share.
        norm_bias: whether norm "layer" has a bias.
        lag_gates: a learned gate per horizon and lag of the action window instead of a plain sum.
        device, dtype: of the parameters.

    Shapes: hidden [B, T, Hp, Wp, D] and actions [B, T_a, D] (or None) -> K tensors [B, T, Hp / pool, Wp / pool, D].
    """

    def __init__(
        self,
        in_features: int,
        horizons: Horizons,
        *,
        pool: Sequence[int],
        norm: str | None = "rms",
        norm_per_horizon: bool = False,
        norm_eps: float = 1e-6,
        norm_bias: bool = True,
        lag_gates: bool = False,
        window_start: int = 1,
        grid: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, horizons, norm, norm_per_horizon, norm_eps, norm_bias, lag_gates, window_start, grid, device,
            dtype,
        )  # fmt: skip
        self.pool = check.integers("pool", pool, least=1, count=len(horizons))

    def forward(
        self,
        hidden: Tensor,
        actions: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        segment_ids: Tensor | None = None,
        grad_monitor: GradMonitor | None = None,
    ) -> tuple[Tensor, ...]:
        return fan_out(
            hidden, actions, self.horizons, pool=self.pool, condition=condition, segment_ids=segment_ids,
            grad_monitor=grad_monitor, **self.conditioning(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.horizons}, pool={self.pool}, {self.conditioning_repr()}"


class MultiHorizonLinear(_Conditioned):
    """`mfwm_kernels.multi_horizon_linear` with its heads, norm weight and lag gates.

    Args:
        in_features: D, the width of the hidden state.
        out_features: K integers, the columns of each head. heads.i is an nn.Linear, with an nn.Linear's state keys.
        horizons, norm_eps, window_start, grid: as in the function.
        bias: whether the heads have biases.
        norm, norm_per_horizon, norm_bias, lag_gates, device, dtype: as in FanOut.

    Shapes: hidden [B, T, Hp, Wp, D] and actions [B, T_a, D] (or None) -> K tensors [B, T, Hp, Wp, out_features[i]].
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        horizons: Horizons,
        *,
        bias: bool = True,
        norm: str | None = "rms",
        norm_per_horizon: bool = False,
        norm_eps: float = 1e-6,
        norm_bias: bool = True,
        lag_gates: bool = False,
        window_start: int = 1,
        grid: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, horizons, norm, norm_per_horizon, norm_eps, norm_bias, lag_gates, window_start, grid, device,
            dtype,
        )  # fmt: skip
        columns = check.integers("out_features", out_features, least=1, count=len(horizons))
        check.flag("bias", bias)
        self.heads = nn.ModuleList(nn.Linear(in_features, n, bias=bias, device=device, dtype=dtype) for n in columns)

    def forward(
        self,
        hidden: Tensor,
        actions: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        segment_ids: Tensor | None = None,
        grad_monitor: GradMonitor | None = None,
    ) -> tuple[Tensor, ...]:
        heads: list[Any] = list(self.heads)
        return multi_horizon_linear(
            hidden, actions, [head.weight for head in heads], self.horizons, biases=[head.bias for head in heads],
            condition=condition, segment_ids=segment_ids, grad_monitor=grad_monitor, **self.conditioning(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.horizons}, {self.conditioning_repr()}"


class _Weighted(nn.Module):
    """A loss whose horizon weights [K] and consistency weights are buffers, in fp32 or fp64 as the op requires."""

    horizon_weights: Tensor
    consistency_weights: Tensor | None

    def __init__(
        self,
        horizons: Horizons,
        horizon_weights: Tensor | Sequence[float] | None,
        consistency_weights: Any,
        matrix: bool,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        check_horizons(horizons)
        self.horizons = horizons
        like = torch.empty(0, device=check.device("device", device))
        weights = check_horizon_weights(_moved(horizon_weights, like), len(horizons), like)
        consistency, _, _ = check_consistency(_moved(consistency_weights, like), horizons, like, matrix=matrix)
        # Clone, because lists became cached fp64 tensors that other calls share (arguments.constant).
        self.register_buffer("horizon_weights", weights.detach().clone())
        self.register_buffer("consistency_weights", None if consistency is None else consistency.detach().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        weights = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in weights.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def weights_repr(self) -> str:
        consistency = self.consistency_weights
        shown = "" if consistency is None else f", consistency_weights={_numbers(consistency)}"
        return f"horizon_weights={_numbers(self.horizon_weights)}{shown}"


def _moved(weights: Any, like: Tensor) -> Any:
    return weights.to(like.device) if isinstance(weights, Tensor) else weights


def _numbers(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return list(tensor.shape)
    return [_numbers(row) for row in tensor] if tensor.dim() > 1 else [float(f"{x:.6g}") for x in tensor.tolist()]


class MultiHorizonLoss(_Weighted):
    """`mfwm_kernels.multi_horizon_loss` with its options and weights.

    Args: as in the function. `device` is where the weights are created.

    Shapes: K predictions [B, T, C, H / f_i, W / f_i] (or tokens [B, T, S_i, P_i * P_i * C] with patch_sizes) and a
    video [B, T_v, C, H, W] -> HorizonLoss. With grid: [B, T, S / f_i^2, C] and [B, T_v, S, C].
    """

    def __init__(
        self,
        horizons: Horizons,
        *,
        kind: str | Sequence[str] = "mse",
        horizon_weights: Tensor | Sequence[float] | None = None,
        consistency_weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
        detach: str | None = "near",
        patch_sizes: Sequence[int] | None = None,
        residual: bool = False,
        motion_gain: float = 0.0,
        beta: float = 0.0,
        scale: float | None = None,
        shift: float | None = None,
        grid: Sequence[int] | None = None,
        delta: float = 1.0,
        eps: float = 1e-3,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(horizons, horizon_weights, consistency_weights, True, device)
        check_loss_options(
            len(horizons), kind=kind, detach=detach, residual=residual, motion_gain=motion_gain, beta=beta, delta=delta,
            eps=eps,
        )  # fmt: skip
        check_patch_sizes(patch_sizes, len(horizons))
        if grid is not None:
            grid = check.grid_sizes(grid)
            check_no_patches(patch_sizes)
        for name, number in (("scale", scale), ("shift", shift)):
            if number is not None:
                check.number(name, number)
        self.options: dict[str, Any] = {
            "kind": kind, "detach": detach, "patch_sizes": patch_sizes, "residual": residual,
            "motion_gain": motion_gain, "beta": beta, "scale": scale, "shift": shift, "grid": grid, "delta": delta,
            "eps": eps,
        }  # fmt: skip

    def forward(
        self,
        preds: Sequence[Tensor],
        video: Tensor,
        *,
        segment_ids: Tensor | None = None,
        position_weights: Tensor | None = None,
    ) -> HorizonLoss:
        return multi_horizon_loss(
            preds, video, self.horizons, horizon_weights=self.horizon_weights,
            consistency_weights=self.consistency_weights, segment_ids=segment_ids, position_weights=position_weights,
            **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
        return f"{self.horizons}, {self.weights_repr()}, {given}"


class MultiHorizonLinearCrossEntropy(_Weighted):
    """`mfwm_kernels.multi_horizon_linear_cross_entropy` with its heads, options and weights.

    Args:
        in_features: D, the width of the inputs.
        vocabulary: V, the number of ids; for factored tokens, the number for each of the F ids.
        horizons and the options: as in the function.
        ids_per_token: F, above 1 for factored tokens [B, T_v, Hp, Wp, F]. A head has F * V rows.
        head_per_horizon: K heads instead of one that the horizons share. `weight` (and `bias`) is then a ParameterList.
        bias: whether the heads have biases.
        device, dtype: of the heads.

    Shapes: K inputs [B, T, Hp / f_i, Wp / f_i, D] and tokens [B, T_v, Hp, Wp(, F)] -> HorizonLoss. With grid:
    [B, T, S / f_i^2, D] and [B, T_v, S(, F)].
    """

    def __init__(
        self,
        in_features: int,
        vocabulary: int,
        horizons: Horizons,
        *,
        ids_per_token: int = 1,
        head_per_horizon: bool = False,
        bias: bool = False,
        horizon_weights: Tensor | Sequence[float] | None = None,
        consistency_weights: Tensor | Sequence[float] | None = None,
        detach: str | None = "near",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk_size: int | None = None,
        grid: Sequence[int] | None = None,
        return_accuracy: bool = False,
        return_predictions: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(horizons, horizon_weights, consistency_weights, False, device)
        self.in_features = check.integer("in_features", in_features, least=1)
        self.vocabulary = check.integer("vocabulary", vocabulary, least=1)
        self.ids_per_token = check.integer("ids_per_token", ids_per_token, least=1)
        self.options: dict[str, Any] = {
            "detach": detach, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss,
            "softcap": softcap, "chunk_size": chunk_size, "return_accuracy": return_accuracy,
            "return_predictions": return_predictions,
        }  # fmt: skip
        check_token_options(**self.options)
        self.options["grid"] = None if grid is None else check.grid_sizes(grid)
        count = len(horizons) if check.flag("head_per_horizon", head_per_horizon) else 1
        shape = (self.ids_per_token * self.vocabulary, self.in_features)
        heads = [_linear_weight(shape, device, dtype) for _ in range(count)]
        self.weight = nn.ParameterList(heads) if head_per_horizon else heads[0]
        self.bias: nn.ParameterList | nn.Parameter | None = None
        if check.flag("bias", bias):
            biases = [_linear_bias(head) for head in heads]
            self.bias = nn.ParameterList(biases) if head_per_horizon else biases[0]

    def forward(
        self,
        inputs: Sequence[Tensor],
        tokens: Tensor,
        *,
        segment_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        position_weights: Tensor | None = None,
    ) -> HorizonLoss:
        weight = self.weight if isinstance(self.weight, Tensor) else list(self.weight)
        biases = list(self.bias) if isinstance(self.bias, nn.ParameterList) else self.bias
        return multi_horizon_linear_cross_entropy(
            inputs, weight, tokens, self.horizons, horizon_weights=self.horizon_weights,
            consistency_weights=self.consistency_weights, segment_ids=segment_ids, token_mask=token_mask, biases=biases,
            position_weights=position_weights, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
        factored = "" if self.ids_per_token == 1 else f", ids_per_token={self.ids_per_token}"
        return f"{self.in_features}, {self.vocabulary}{factored}, {self.horizons}, {self.weights_repr()}, {given}"


class MTPCombine(nn.Module):
    """`mfwm_kernels.mtp_combine` with its projection and both norm weights.

    Args:
        in_features: D, the width of the hidden state and of the embedding.
        out_features: N; by default D.
        norm_eps, order: as in the function.
        device, dtype: of the parameters.

    Shapes: hidden and embedding [..., D] -> [..., N].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        norm_eps: float = 1e-6,
        order: str = "hidden_first",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check.integer("in_features", in_features, least=1)
        self.out_features = check.integer(
            "out_features", in_features if out_features is None else out_features, least=1
        )
        self.norm_eps, self.order = check.number("norm_eps", norm_eps, least=0), check.choice("order", order, ORDERS)
        self.weight = _linear_weight((self.out_features, 2 * self.in_features), device, dtype)
        self.hidden_norm_weight = nn.Parameter(torch.ones(self.in_features, **_factory(device, dtype)))
        self.embedding_norm_weight = nn.Parameter(torch.ones(self.in_features, **_factory(device, dtype)))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return mtp_combine(
            hidden, embedding, self.weight, hidden_norm_weight=self.hidden_norm_weight,
            embedding_norm_weight=self.embedding_norm_weight, norm_eps=self.norm_eps, order=self.order,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, norm_eps={self.norm_eps}, order={self.order!r}"


def _factory(device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """The arguments of a factory of torch, checked."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in check.FLOATING):
        raise TypeError(f"dtype must be one of {check.names(check.FLOATING)}, got {dtype}")
    return {"device": check.device("device", device), "dtype": dtype}


def _linear_weight(
    shape: tuple[int, int], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """[N, D], initialised like the weight of an nn.Linear: uniform in +-1 / sqrt(D)."""
    weight = nn.Parameter(torch.empty(shape, **_factory(device, dtype)))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


def _linear_bias(weight: nn.Parameter) -> nn.Parameter:
    """[N], initialised like the bias of an nn.Linear: uniform in +-1 / sqrt(D)."""
    bound = 1 / math.sqrt(weight.shape[1])
    return nn.Parameter(torch.empty_like(weight[:, 0]).uniform_(-bound, bound))
