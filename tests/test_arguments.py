"""Malformed calls: each is a ValueError or TypeError that names the argument, before anything is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

import mfwm_kernels as m
from mfwm_kernels import GradMonitor, Horizons, arguments
from mfwm_kernels.check import tensors_of
from mfwm_kernels.op import OPS

NAN = float("nan")
CASCADE = Horizons.cascade(3)


def window(**changes: Any) -> Any:
    call = {"actions": torch.randn(2, 5, 8), "offsets": (1, 2, 4), **changes}
    return m.action_window_sum(**call)


def fan(**changes: Any) -> Any:
    call = {
        "hidden": torch.randn(2, 5, 4, 8, 8),
        "actions": torch.randn(2, 5, 8),
        "horizons": CASCADE,
        "pool": (1, 2, 4),
    }
    return m.fan_out(**{**call, **changes})


def linear(**changes: Any) -> Any:
    call = {"hidden": torch.randn(2, 5, 6, 8), "actions": torch.randn(2, 5, 8), "horizons": CASCADE}
    return m.multi_horizon_linear(**{**call, "weights": [torch.randn(3, 8)] * 3, **changes})


def pyramid(**changes: Any) -> Any:
    return m.video_pyramid(**{"video": torch.zeros(2, 5, 3, 8, 8, dtype=torch.uint8), "factors": (1, 2, 4), **changes})


def loss(**changes: Any) -> Any:
    call = {"preds": [torch.randn(2, 5, 3, 8 // f, 8 // f) for f in (1, 2, 4)], "horizons": CASCADE}
    return m.multi_horizon_loss(**{**call, "video": torch.zeros(2, 6, 3, 8, 8, dtype=torch.uint8), **changes})


def tokens(**changes: Any) -> Any:
    call = {"inputs": [torch.randn(2, 5, 4 // f, 4 // f, 8) for f in (1, 2, 4)], "weight": torch.randn(11, 8)}
    ids = torch.randint(0, 11, (2, 5, 4, 4))
    return m.multi_horizon_linear_cross_entropy(**{**call, "tokens": ids, "horizons": CASCADE, **changes})


def grid_tokens(**changes: Any) -> Any:
    inputs = [torch.randn(2, 5, 16 // f**2, 8) for f in (1, 2, 4)]
    call = {"inputs": inputs, "tokens": torch.randint(0, 11, (2, 5, 16)), "grid": (4, 4), **changes}
    return tokens(**call)


def combine(**changes: Any) -> Any:
    call = {"hidden": torch.randn(2, 8), "embedding": torch.randn(2, 8), "weight": torch.randn(4, 16)}
    norms = {"hidden_norm_weight": torch.ones(8), "embedding_norm_weight": torch.ones(8)}
    return m.mtp_combine(**{**call, **norms, **changes})


LAYER = {"norm": "layer", "norm_weight": torch.ones(8)}


def bad_tokens(value: int) -> torch.Tensor:
    ids = torch.zeros(2, 5, 4, 4, dtype=torch.int64)
    ids[1, 2, 3, 0] = value
    return ids


MALFORMED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (Horizons, {"offsets": (1, 2), "factors": (1,)}, "factors must have one entry per offset"),
    (Horizons, {"offsets": (2, 1), "factors": (1, 1)}, r"offsets must not decrease: offsets\[1\] = 1"),
    (Horizons, {"offsets": (), "factors": ()}, "offsets must name at least one horizon"),
    (Horizons, {"offsets": (-1,), "factors": (1,)}, r"offsets\[0\] must be >= 0, got -1"),
    (Horizons, {"offsets": (1,), "factors": (0,)}, r"factors\[0\] must be >= 1, got 0"),
    (Horizons, {"offsets": (1.5,), "factors": (1,)}, r"offsets\[0\] must be an integer, got 1.5"),
    (Horizons, {"offsets": (True,), "factors": (1,)}, r"offsets\[0\] must be an integer, got True"),
    (Horizons, {"offsets": (1, 1), "factors": (2, 2)}, "factors must increase where an offset repeats"),
    # Integers that no kernel can take.
    (fan, {"horizons": Horizons((1, 10**20), (1, 1)), "pool": (1, 1)}, r"horizons.offsets must be <= 2147483647"),
    (fan, {"pool": (2**31,)}, r"pool\[0\] must be <= 2147483647, got 2147483648"),
    (fan, {"window_start": 2**40}, "window_start must be <= 2147483647, got 1099511627776"),
    (window, {"offsets": (1, 2**31)}, r"offsets\[1\] must be <= 2147483647"),
    (pyramid, {"factors": (10**20,)}, r"factors\[0\] must be <= 2147483647"),
    (loss, {"horizons": Horizons((1, 2, 2**33), (1, 2, 4))}, r"horizons.offsets must be <= 2147483647"),
    (tokens, {"ignore_index": 10**20}, "ignore_index must be <= 2147483647"),
    (tokens, {"chunk_size": 2**64}, "chunk_size must be <= 9223372036854775807"),
    (Horizons.cascade, {"count": 0}, "count must be >= 1, got 0"),
    (Horizons.cascade, {"count": True}, "count must be an integer, got True"),
    (Horizons.low_res, {"offsets": 4}, "offsets must be a sequence of integers, got int"),
    (Horizons.low_res, {"factor": 0}, "factor must be >= 1, got 0"),
    (Horizons.multi_resolution, {"factors_of_offset": [1]}, "factors_of_offset must map offsets .* got list"),
    (Horizons.multi_resolution, {"factors_of_offset": {"a": [1], 1: [1]}}, r"factors_of_offset\[0\] must be an int"),
    (window, {"actions": torch.randn(2, 5)}, r"actions must have 3 dimensions, .*; got shape \[2, 5\]"),
    (window, {"actions": torch.zeros(2, 5, 8, dtype=torch.int64)}, "actions must have dtype float32.*int64"),
    (window, {"actions": [1, 2]}, "actions must be a torch.Tensor, got list"),
    (window, {"actions": torch.randn(2, 5, 0)}, "actions must not have size 0 in dimension 2"),
    (window, {"offsets": (4, 1)}, r"offsets must not decrease"),
    (window, {"offsets": "124"}, "offsets must be a sequence of integers, got str"),
    (window, {"window_start": -1}, "window_start must be >= 0, got -1"),
    (window, {"lag_weight": torch.randn(3, 3, 8)}, r"lag_weight must have shape .* = \[3, 4, 8\], got \[3, 3, 8\]"),
    (window, {"lag_weight": torch.randn(3, 4, 8).double()}, "lag_weight must have the dtype of actions"),
    (window, {"segment_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"segment_ids must have shape .* = \[2, 5\]"),
    (window, {"segment_ids": torch.zeros(2, 5)}, "segment_ids must have dtype int32, int64, got float32"),
    (fan, {"pool": (1, 2, 3)}, r"pool\[2\] = 3 does not divide the token grid 4 x 8"),
    (fan, {"pool": (1, 2)}, "pool must have one entry per horizon, 3; got 2"),
    (fan, {"hidden": torch.randn(2, 5, 32, 8)}, r"pool\[1\] must be 1 where hidden has no grid"),
    (fan, {"actions": None, "lag_weight": torch.ones(3, 4, 8)}, "lag_weight must be None where actions is None"),
    (fan, {"actions": None, "segment_ids": torch.zeros(2, 5).int()}, "segment_ids must be None where actions is None"),
    (fan, {"actions": "none"}, "actions must be a torch.Tensor, got str"),
    (fan, {"condition": torch.randn(2, 5, 8)}, r"condition must have 4 dimensions, .*; got shape \[2, 5, 8\]"),
    (fan, {"condition": torch.randn(2, 5, 2, 8)}, r"condition must have shape \[B, T, K, D\] = \[2, 5, 3, 8\]"),
    (
        fan,
        {"condition": torch.randn(2, 5, 3, 8).half()},
        "condition must have the dtype of hidden, float32; got float16",
    ),
    (fan, {"actions": torch.randn(2, 5, 9)}, r"actions must have shape \[B, T_a, D\]"),
    (fan, {"actions": torch.randn(2, 5, 8).half()}, "actions must have the dtype of hidden, float32; got float16"),
    (fan, {"actions": torch.randn(2, 5, 8, device="meta")}, "actions must be on the device of hidden, cpu; got meta"),
    (fan, {"horizons": (1, 2, 4)}, "horizons must be a Horizons, got tuple"),
    (fan, {"norm_weight": torch.ones(2, 8)}, r"norm_weight must have shape \[D\] = \[8\] or \[K, D\] = \[3, 8\]"),
    (fan, {"norm": "batch"}, "norm must be one of 'rms', 'layer'; got 'batch'"),
    (fan, {"norm": None}, "norm must be .*got .*None"),
    (fan, {"norm": "layer"}, 'norm "layer" needs a norm_weight, got None'),
    (linear, {"norm": "layer", "norm_bias": torch.ones(8)}, 'norm "layer" needs a norm_weight, got None'),
    (fan, {"norm_weight": torch.ones(8), "norm_bias": torch.ones(8)}, 'norm_bias must be None with norm "rms"'),
    (linear, {"norm_bias": torch.ones(3, 8)}, 'norm_bias must be None with norm "rms"'),
    (fan, {**LAYER, "norm_bias": torch.ones(2, 8)}, r"norm_bias must have shape \[D\] = \[8\] or \[K, D\] = \[3, 8\]"),
    (fan, {**LAYER, "norm_bias": 1.0}, "norm_bias must be a torch.Tensor, got float"),
    (linear, {**LAYER, "norm_bias": torch.ones(8).half()}, "norm_bias must have the dtype of hidden, float32"),
    (fan, {"grid": (4, 8)}, r"hidden must have 4 dimensions, \[B, T, S, D\] with grid; got shape \[2, 5, 4, 8, 8\]"),
    (
        fan,
        {"hidden": torch.randn(2, 5, 32, 8), "grid": (4, 4)},
        r"grid must have Hp \* Wp = 32",
    ),
    (fan, {"hidden": torch.randn(2, 5, 32, 8), "grid": 32}, r"grid must be a pair of integers \(Hp, Wp\), got int"),
    (fan, {"hidden": torch.randn(2, 5, 32, 8), "grid": (2, 4, 4)}, "grid must be a pair of integers"),
    (fan, {"hidden": torch.randn(2, 5, 32, 8), "grid": (4, 8.0)}, r"grid\[1\] must be an integer, got 8.0"),
    (fan, {"hidden": torch.randn(2, 5, 32, 8), "grid": (-4, -8)}, r"grid\[0\] must be >= 1, got -4"),
    (
        fan,
        {"hidden": torch.randn(2, 5, 32, 8), "grid": (2, 16)},
        r"pool\[2\] = 4 does not divide the token grid 2 x 16",
    ),
    (linear, {"grid": (2, 4)}, "grid must have Hp \\* Wp = 6"),
    (linear, {"hidden": torch.randn(2, 5, 2, 3, 8), "grid": (2, 3)}, r"hidden must have 4 dimensions, .* with grid"),
    (fan, {"norm_eps": NAN}, "norm_eps must be finite, got nan"),
    (fan, {"norm_eps": 10**400}, "norm_eps must be finite, got 10000"),
    (fan, {"norm": np.zeros(2)}, r"norm must be one of 'rms', 'layer'; got array\("),
    (fan, {"norm_eps": "small"}, "norm_eps must be a number, got str"),
    (fan, {"grad_monitor": GradMonitor(2)}, "grad_monitor must have K = 3"),
    (fan, {"grad_monitor": object()}, "grad_monitor must be a GradMonitor, got object"),
    (GradMonitor, {"K": 2, "scale": [1.0, NAN]}, "scale entry must be finite, got nan"),
    (linear, {"weights": [torch.randn(3, 8)] * 2}, "weights must have one entry per horizon, 3; got 2"),
    (linear, {"weights": [torch.randn(3, 9)] * 3}, r"weights\[0\] must have shape \[N, D\] = \[3, 8\], got \[3, 9\]"),
    (linear, {"biases": [torch.randn(4)] * 3}, r"biases\[0\] must have shape \[N\] = \[3\], got \[4\]"),
    (linear, {"biases": torch.randn(3, 3)}, "biases must be a list or tuple of tensors, got Tensor"),
    (pyramid, {"factors": (1, 3)}, r"factors\[1\] = 3 does not divide the frame 8 x 8"),
    (pyramid, {"factors": ()}, "factors must name at least one factor"),
    (pyramid, {"patch_sizes": (4, 2, 3)}, r"factors\[2\] = 4 times patch_sizes\[2\] = 3 does not divide"),
    (pyramid, {"dtype": torch.int32}, "dtype must be one of .*, got torch.int32"),
    (pyramid, {"scale": float("inf")}, "scale must be finite, got inf"),
    (pyramid, {"video": torch.zeros(2, 5, 3, 8, 8, dtype=torch.int16)}, "video must have dtype uint8, .*, got int16"),
    (loss, {"preds": [torch.randn(2, 5, 3, 8, 8)] * 3}, r"preds\[1\] must have shape .* = \[2, 5, 3, 4, 4\]"),
    (loss, {"preds": torch.randn(3, 2)}, "preds must be a list or tuple of tensors, got Tensor"),
    (loss, {"video": torch.zeros(2, 4, 3, 8, 8)}, "video must have at least as many frames .*: T_v = 4, T = 5"),
    (loss, {"video": torch.zeros(2, 6, 3, 8, 8, requires_grad=True)}, "video must not require grad"),
    (loss, {"kind": "l2"}, "kind must be one of 'mse', 'l1', 'huber', 'charbonnier', 'gaussian', 'laplace'; got 'l2'"),
    (loss, {"horizon_weights": [1.0, 2.0]}, r"horizon_weights must have shape \[3\], got \[1.0, 2.0\]"),
    (loss, {"horizon_weights": [1.0, NAN, 1.0]}, "horizon_weights entry must be finite, got nan"),
    (loss, {"horizon_weights": torch.ones(3).half()}, "horizon_weights must have dtype float32, float64, got float16"),
    (loss, {"consistency_weights": [[0, 1], [0, 0]]}, r"consistency_weights must have shape \[3\] or \[3, 3\]"),
    (loss, {"consistency_weights": [[1, 1, 1]] * 3}, r"consistency_weights\[0\]\[0\] must be 0: only pairs"),
    (loss, {"detach": "both"}, "detach must be one of None, 'near', 'far'; got 'both'"),
    (loss, {"residual": 1}, "residual must be True or False, got 1"),
    (loss, {"delta": 0.0}, "delta must be > 0, got 0.0"),
    (loss, {"patch_sizes": (2, 2, 2)}, r"preds\[0\] must have 4 dimensions, .*; got shape"),
    (loss, {"kind": ["mse", "l1"]}, "kind must be a string or have one entry per horizon, 3; got 2"),
    (loss, {"kind": ("mse", "l1", "l3")}, r"kind\[2\] must be one of 'mse', .*; got 'l3'"),
    (loss, {"kind": ["mse", None, "l1"]}, r"kind\[1\] must be one of 'mse', .*; got None"),
    (loss, {"kind": 3}, "kind must be a string or a list of strings, got int"),
    (
        loss,
        {"kind": "gaussian"},
        r"preds\[0\] must have shape \[B, T, 2 \* C, .* = \[2, 5, 6, 8, 8\], got \[2, 5, 3, 8, 8\]",
    ),
    (
        loss,
        {"kind": ("mse", "laplace", "l1")},
        r"preds\[1\] must have shape .* = \[2, 5, 6, 4, 4\], got \[2, 5, 3, 4, 4\]",
    ),
    (
        loss,
        {
            "kind": "laplace",
            "preds": [torch.randn(2, 5, (4 // f) ** 2, 12) for f in (1, 2, 4)],
            "patch_sizes": (2, 2, 2),
        },
        r"preds\[0\] must have shape .* = \[2, 5, 16, 24\], got \[2, 5, 16, 12\]",
    ),
    (loss, {"beta": -0.5}, "beta must be >= 0, got -0.5"),
    (loss, {"beta": NAN}, "beta must be finite, got nan"),
    (loss, {"beta": -(10**400)}, "beta must be finite, got -10000"),
    (loss, {"motion_gain": True}, "motion_gain must be a number, got bool"),
    (loss, {"horizon_weights": [1.0, 10**400, 1.0]}, "horizon_weights entry must be finite, got 10000"),
    (loss, {"kind": [np.zeros(2)] * 3}, r"kind\[0\] must be one of 'mse', .*; got array"),
    (loss, {"detach": np.zeros(2)}, r"detach must be one of None, 'near', 'far'; got array"),
    (loss, {"motion_gain": -1}, "motion_gain must be >= 0, got -1"),
    (loss, {"motion_gain": "much"}, "motion_gain must be a number, got str"),
    (
        loss,
        {"position_weights": torch.ones(2, 6)},
        r"position_weights must have shape .*\[2, 5\] or .*\[2, 5, 3\], got \[2, 6\]",
    ),
    (loss, {"position_weights": torch.ones(2, 5, 1)}, r"position_weights must have shape .*, got \[2, 5, 1\]"),
    (
        loss,
        {"position_weights": torch.ones(2, 5).half()},
        "position_weights must have dtype float32, float64, got float16",
    ),
    (loss, {"position_weights": torch.full((2, 5), -0.5)}, "position_weights must be finite and >= 0"),
    (loss, {"position_weights": torch.full((2, 5, 3), NAN)}, "position_weights must be finite and >= 0"),
    (loss, {"position_weights": torch.ones(2, 5, requires_grad=True)}, "position_weights must not require grad"),
    (loss, {"position_weights": torch.ones(2, 5, device="meta")}, "position_weights must be on the device of"),
    (loss, {"position_weights": [1.0] * 5}, "position_weights must be a torch.Tensor, got list"),
    (loss, {"grid": (8, 8)}, r"video must have 4 dimensions, \[B, T_v, S, C\] with grid"),
    (loss, {"grid": (8, 8), "video": torch.zeros(2, 6, 63, 3)}, r"grid .*63"),
    (loss, {"grid": 8, "video": torch.zeros(2, 6, 64, 3)}, "grid must be"),
    (
        loss,
        {"grid": (8, 8), "video": torch.zeros(2, 6, 64, 3), "patch_sizes": (1, 1, 1)},
        "patch_sizes must be None with grid",
    ),
    (
        loss,
        {"grid": (8, 8), "video": torch.zeros(2, 6, 64, 3), "preds": [torch.randn(2, 5, 64, 3)] * 3},
        r"preds\[1\] must have shape \[B, T, S / f\^2, C\] = \[2, 5, 16, 3\], got \[2, 5, 64, 3\]",
    ),
    (
        loss,
        {"grid": (6, 6), "video": torch.zeros(2, 6, 36, 3)},
        r"factors\[2\] = 4 does not divide the frame 6 x 6",
    ),
    (tokens, {"tokens": torch.zeros(2, 5, 4, 4)}, "tokens must have dtype int32, int64, got float32"),
    (tokens, {"tokens": bad_tokens(11)}, r"tokens must be in \[0, 11\).*tokens\[1, 2, 3, 0\] = 11"),
    (tokens, {"tokens": bad_tokens(-7)}, r"tokens\[1, 2, 3, 0\] = -7"),
    (tokens, {"weight": torch.randn(11, 9)}, r"weight must have shape \[V, D\] = \[11, 8\], got \[11, 9\]"),
    (tokens, {"label_smoothing": 1.5}, "label_smoothing must be <= 1, got 1.5"),
    (tokens, {"softcap": 0}, "softcap must be > 0, got 0"),
    (tokens, {"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    (tokens, {"token_mask": torch.ones(2, 5, 4, 4)}, "token_mask must have dtype bool, got float32"),
    (tokens, {"biases": torch.zeros(8)}, r"biases must have shape \[V\] = \[11\], got \[8\]"),
    (tokens, {"biases": torch.zeros(1, 11)}, r"biases must have 1 dimensions, \[V\]; got shape \[1, 11\]"),
    (tokens, {"biases": torch.zeros(11).double()}, r"biases must have the dtype of inputs\[0\], float32; got float64"),
    (tokens, {"biases": [torch.zeros(11)] * 2}, "biases must be a tensor or have one entry per horizon, 3; got 2"),
    (tokens, {"biases": [None, torch.zeros(11), torch.zeros(7)]}, r"biases\[2\] must have shape \[V\]"),
    (tokens, {"biases": 1.0}, "biases must be a tensor or a list or tuple of tensors, got float"),
    (tokens, {"position_weights": [1.0]}, "position_weights must be a torch.Tensor, got list"),
    (tokens, {"position_weights": torch.ones(2, 4)}, r"position_weights must have shape \[B, T\] = \[2, 5\] or"),
    (tokens, {"position_weights": torch.ones(2, 5, 2)}, r"\[B, T, K\] = \[2, 5, 3\], got \[2, 5, 2\]"),
    (
        tokens,
        {"position_weights": torch.ones(2)},
        r"position_weights must have 2 or 3 dimensions, \[B, T\] or \[B, T, K\]",
    ),
    (
        tokens,
        {"position_weights": torch.ones(2, 5).half()},
        "position_weights must have dtype float32, float64, got float16",
    ),
    (tokens, {"position_weights": torch.full((2, 5), -1.0)}, "position_weights must be finite and >= 0"),
    (tokens, {"position_weights": torch.full((2, 5), NAN)}, "position_weights must be finite and >= 0"),
    (tokens, {"position_weights": torch.full((2, 5), float("inf"))}, "position_weights must be finite and >= 0"),
    (tokens, {"position_weights": torch.ones(2, 5, requires_grad=True)}, "position_weights must not require grad"),
    (tokens, {"grid": (4, 4)}, r"inputs\[0\] must have 4 dimensions, \[B, T, S / f\^2, D\]"),
    (grid_tokens, {"grid": (4, 8)}, r"grid must have Hp \* Wp = 16.*; got 4 x 8"),
    (grid_tokens, {"grid": (4,)}, r"grid must be a pair of integers \(Hp, Wp\), got \(4,\)"),
    (grid_tokens, {"grid": (2, 8)}, r"factors\[2\] = 4 does not divide the token grid 2 x 8"),
    (grid_tokens, {"grid": None}, r"tokens must have 4 or 5 dimensions, .*\[B, T_v, S\] needs grid"),
    (
        grid_tokens,
        {"token_mask": torch.ones(2, 5, 4, 4, dtype=torch.bool)},
        r"token_mask must have 3 dimensions, \[B, T_v, S\]",
    ),
    (tokens, {"return_predictions": 1}, "return_predictions must be"),
    (tokens, {"consistency_weights": [[0, 1, 1]] * 3}, r"consistency_weights must have shape \[3\]"),
    (combine, {"weight": torch.randn(4, 8)}, r"weight must have shape \[N, 2 D\] = \[4, 16\], got \[4, 8\]"),
    (combine, {"order": "action_first"}, "order must be one of 'hidden_first', 'embedding_first'"),
    (combine, {"embedding": torch.randn(3, 8)}, r"embedding must have shape .* = \[2, 8\], got \[3, 8\]"),
    (combine, {"norm_eps": -1.0}, "norm_eps must be >= 0, got -1.0"),
]


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [pytest.param(*case, id=f"{case[0].__name__}-{i}") for i, case in enumerate(MALFORMED)],
)
def test_malformed_call(function: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        function(**changes)


def test_well_formed_calls_pass() -> None:
    for function in (window, fan, linear, pyramid, loss, tokens, combine):
        function()


def test_a_consistency_weight_needs_nested_factors() -> None:
    horizons = Horizons((1, 2), (2, 3))
    preds = [torch.randn(1, 3, 1, 6 // f, 6 // f) for f in (2, 3)]
    video = torch.zeros(1, 4, 1, 6, 6)
    m.multi_horizon_loss(preds, video, horizons, consistency_weights=[0, 0])
    m.multi_horizon_loss(preds, video, horizons, consistency_weights=torch.zeros(2))
    for weights in ([0, 1], torch.ones(2)):
        with pytest.raises(ValueError, match=r"consistency_weights\[1\] must be 0: factors\[1\] = 3 is not a multiple"):
            m.multi_horizon_loss(preds, video, horizons, consistency_weights=weights)


@pytest.fixture
def no_constants() -> None:
    arguments._constants.clear()


def gradient_of_a_loss() -> torch.Tensor:
    """Of a loss whose weights are a list, which becomes a cached tensor."""
    preds = [torch.ones(1, 4, 3, 8 // f, 8 // f, requires_grad=True) for f in (1, 2, 4)]
    total = loss(preds=preds, video=torch.zeros(1, 5, 3, 8, 8), horizon_weights=[1.0, 0.5, 2.0]).total
    return torch.autograd.grad(total, preds[0])[0]


@pytest.mark.usefixtures("no_constants")
def test_a_list_of_weights_is_made_a_tensor_once() -> None:
    like = torch.zeros(3)
    made = arguments.constant((0.5, 0.25), (2,), like)
    assert made.dtype == torch.float64 and made.tolist() == [0.5, 0.25]
    assert arguments.constant((0.5, 0.25), (2,), torch.ones(1)) is made
    assert arguments.constant((0.5, 0.25), (1, 2), like).tolist() == [[0.5, 0.25]]
    assert arguments.constant((0.5, 0.125), (2,), like).tolist() == [0.5, 0.125]


@pytest.mark.usefixtures("no_constants")
def test_a_list_is_its_receivers_own_where_that_may_be_written() -> None:
    GradMonitor(3, scale=[1.0, 0.5, 2.0]).scale.mul_(100)  # type: ignore[union-attr]
    assert torch.equal(gradient_of_a_loss(), torch.full((1, 4, 3, 8, 8), 2 / (4 * 3 * 8 * 8)))


def test_a_monitor_follows_the_tensor_that_it_was_given() -> None:
    scale = torch.ones(3)
    monitor = GradMonitor(3, scale=scale)
    scale.mul_(2)
    assert monitor.scale is not None and monitor.scale.tolist() == [2.0, 2.0, 2.0]


def in_inference_mode() -> None:
    with torch.inference_mode():
        loss(horizon_weights=[1.0, 0.5, 2.0])


def with_fake_tensors() -> None:
    with FakeTensorMode():
        loss(horizon_weights=[1.0, 0.5, 2.0])


def with_real_tensors_in_a_mode_of_fake_ones(allow: bool) -> None:
    call = {
        "preds": [torch.randn(2, 5, 3, 8, 8)],
        "video": torch.zeros(2, 6, 3, 8, 8),
        "horizons": Horizons((1,), (1,)),
    }
    with FakeTensorMode(allow_non_fake_inputs=allow):
        if allow:
            assert type(m.multi_horizon_loss(**call, horizon_weights=[1.0]).total) is FakeTensor
        else:
            with pytest.raises((AssertionError, TypeError, RuntimeError)):
                m.multi_horizon_loss(**call, horizon_weights=[1.0])


def under_torch_func() -> None:
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda pred: loss(preds=[pred], horizons=Horizons((1,), (1,)), horizon_weights=[1.0]).total)(
            torch.randn(2, 5, 3, 8, 8)
        )


@pytest.mark.usefixtures("no_constants")
@pytest.mark.parametrize(
    "call",
    [
        in_inference_mode,
        with_fake_tensors,
        lambda: with_real_tensors_in_a_mode_of_fake_ones(False),
        lambda: with_real_tensors_in_a_mode_of_fake_ones(True),
        under_torch_func,
    ],
    ids=["inference", "fake tensors", "real tensors in their mode", "where they are allowed", "torch.func"],
)
def test_what_is_made_in_a_mode_does_not_spoil_calls_outside_it(call: Callable[[], None]) -> None:
    call()
    assert torch.equal(gradient_of_a_loss(), torch.full((1, 4, 3, 8, 8), 2 / (4 * 3 * 8 * 8)))
    loss(preds=[torch.zeros(2, 5, 3, 8, 8)], horizons=Horizons((1,), (1,)), horizon_weights=[1.0])


class Frames(torch.Tensor):
    """As libraries of transforms have them."""


def test_a_video_of_a_class_of_its_own_is_read() -> None:
    call = {"preds": [torch.randn(2, 5, 3, 8, 8)], "horizons": Horizons((1,), (1,))}
    video = torch.randint(0, 256, (2, 6, 3, 8, 8), dtype=torch.uint8)
    want, got = (m.multi_horizon_loss(video=v, **call).total for v in (video, video.as_subclass(Frames)))
    assert torch.equal(got, want)


def test_fake_consistency_weights_are_not_read() -> None:
    with FakeTensorMode():
        preds = [torch.randn(2, 5, 3, 12 // f, 12 // f) for f in (1, 2, 3)]
        weights = torch.zeros(3, 3)
        call = {"preds": preds, "video": torch.zeros(2, 6, 3, 12, 12), "horizons": Horizons((1, 2, 3), (1, 2, 3))}
        assert loss(**call, consistency_weights=weights).total.shape == ()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_fake_tensors_give_fake_results_of_the_right_shapes(op: Any) -> None:
    """In eager mode too, where a pointer to their data would be one to nothing."""
    for sample in op.samples(torch.float32, torch.device("cpu")):
        want = op.public(**sample)
        with FakeTensorMode() as mode:
            got = op.public(**tree_map_only(torch.Tensor, mode.from_tensor, sample))
        for fake, real in zip(tensors_of(got), tensors_of(want), strict=True):
            assert type(fake) is FakeTensor and (fake.shape, fake.dtype) == (real.shape, real.dtype)
