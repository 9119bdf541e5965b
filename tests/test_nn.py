"""The ops as modules: each gives what its function gives, owns its parameters and says what it is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfwm_kernels as m
from mfwm_kernels import Horizons
from mfwm_kernels import nn as mfwm_nn

HORIZONS = Horizons((1, 2, 4), (1, 2, 2))


def randomised(module: nn.Module) -> nn.Module:
    """No parameter at its initial value, so that a module that leaves one out is caught."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def states() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    options = {"condition": torch.randn(2, 5, 3, 8), "segment_ids": torch.tensor([[0, 0, 0, 1, 1], [2] * 5])}
    return torch.randn(2, 5, 4, 4, 8, requires_grad=True), torch.randn(2, 5, 8), options


def check_gradients(module: nn.Module, outputs: Any, expected: Any) -> None:
    """Equal outputs, and every parameter gets the gradient that the function gives it."""
    assert len(outputs) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    parameters = list(module.parameters())
    got, want = (torch.autograd.grad([o.square().sum() for o in values], parameters) for values in (outputs, expected))
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("per_horizon", [False, True])
def test_fan_out(per_horizon: bool) -> None:
    module: Any = randomised(
        mfwm_nn.FanOut(
            8, HORIZONS, pool=(1, 2, 2), norm_per_horizon=per_horizon, norm_eps=0.1, lag_gates=True, window_start=0
        )
    )
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "norm_weight": (3, 8) if per_horizon else (8,), "lag_weight": (3, 4, 8)
    }  # fmt: skip
    hidden, actions, options = states()
    expected = m.fan_out(
        hidden, actions, HORIZONS, pool=(1, 2, 2), norm_weight=module.norm_weight, norm_eps=0.1,
        lag_weight=module.lag_weight, window_start=0, **options,
    )  # fmt: skip
    check_gradients(module, module(hidden, actions, **options), expected)


@pytest.mark.parametrize("per_horizon", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [False, True], ids=["FanOut", "MultiHorizonLinear"])
def test_layer_norm_on_a_grid(heads: bool, bias: bool, per_horizon: bool) -> None:
    options: dict[str, Any] = {"norm": "layer", "norm_eps": 0.1, "grid": (4, 4)}
    kwargs = {**options, "norm_bias": bias, "norm_per_horizon": per_horizon}
    if heads:
        module: Any = mfwm_nn.MultiHorizonLinear(8, (5, 3, 1), HORIZONS, **kwargs)
    else:
        module = mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), **kwargs)
    shape = (3, 8) if per_horizon else (8,)
    norms = {name: p for name, p in module.named_parameters() if name.startswith("norm")}
    assert {name: tuple(p.shape) for name, p in norms.items()} == (
        {"norm_weight": shape, "norm_bias": shape} if bias else {"norm_weight": shape}
    )
    assert (module.norm_weight == 1).all() and (not bias or (module.norm_bias == 0).all())
    randomised(module)
    hidden, actions, given = states()
    hidden = hidden.detach().flatten(2, 3).requires_grad_()
    given.update(options, norm_weight=module.norm_weight, norm_bias=module.norm_bias)
    if heads:
        weights, biases = zip(*((head.weight, head.bias) for head in module.heads), strict=True)
        expected = m.multi_horizon_linear(hidden, actions, weights, HORIZONS, biases=biases, **given)
    else:
        expected = m.fan_out(hidden, actions, HORIZONS, pool=(1, 2, 2), **given)
    call = {name: given[name] for name in ("condition", "segment_ids")}
    check_gradients(module, module(hidden, actions, **call), expected)
    assert ("norm_bias=False" in repr(module)) == (not bias) and "norm='layer'" in repr(module)
    assert "grid=(4, 4)" in repr(module)


def test_fan_out_without_parameters() -> None:
    module = mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), norm=None)
    hidden, actions, _ = states()
    assert not list(module.parameters())
    for given in (actions, None):
        expected = m.fan_out(hidden, given, HORIZONS, pool=(1, 2, 2))
        assert all(torch.equal(a, b) for a, b in zip(module(hidden, given), expected, strict=True))


def test_fan_out_fills_a_monitor() -> None:
    monitor = m.GradMonitor(3, [1.0, 0.5, 2.0])
    hidden, actions, _ = states()
    sum(
        out.square().sum() for out in mfwm_nn.FanOut(8, HORIZONS, pool=(1, 1, 1))(hidden, actions, grad_monitor=monitor)
    ).backward()  # type: ignore[union-attr]
    assert (monitor.norms > 0).all()
    assert repr(monitor).startswith("GradMonitor(3, scale=[1.0, 0.5, 2.0], norms=[")


@pytest.mark.parametrize("bias", [True, False])
def test_multi_horizon_linear(bias: bool) -> None:
    module: Any = randomised(mfwm_nn.MultiHorizonLinear(8, (5, 3, 1), HORIZONS, bias=bias))
    keys = {"norm_weight", *(f"heads.{i}.weight" for i in range(3)), *(f"heads.{i}.bias" for i in range(3) if bias)}
    assert set(module.state_dict()) == keys
    hidden, actions, options = states()
    expected = m.multi_horizon_linear(
        hidden, actions, [head.weight for head in module.heads], HORIZONS, biases=[head.bias for head in module.heads],
        norm_weight=module.norm_weight, **options,
    )  # fmt: skip
    check_gradients(module, module(hidden, actions, **options), expected)


def test_heads_start_as_linear_does() -> None:
    torch.manual_seed(3)
    module: Any = mfwm_nn.MultiHorizonLinear(64, (48,), Horizons.next_frame())
    token: Any = mfwm_nn.MultiHorizonLinearCrossEntropy(64, 48, Horizons.next_frame())
    for weight in (module.heads[0].weight, token.weight, mfwm_nn.MTPCombine(32, 48).weight):
        assert 0.11 < weight.abs().max() <= 1 / 8 and abs(weight.mean()) < 0.01


def test_multi_horizon_loss() -> None:
    module: Any = mfwm_nn.MultiHorizonLoss(
        HORIZONS,
        kind="huber",
        horizon_weights=[1, 0.5, 0.1],
        consistency_weights=[0, 0.5, 0.1],
        residual=True,
        delta=0.5,
    )
    preds = [torch.randn(2, 5, 3, 8 // f, 8 // f, requires_grad=True) for f in HORIZONS.factors]
    video, segments = torch.rand(2, 6, 3, 8, 8), torch.tensor([[0, 0, 0, 1, 1, 1], [2] * 6])
    loss = module(preds, video, segment_ids=segments)
    expected = m.multi_horizon_loss(
        preds, video, HORIZONS, kind="huber", horizon_weights=[1, 0.5, 0.1], consistency_weights=[0, 0.5, 0.1],
        residual=True, delta=0.5, segment_ids=segments,
    )  # fmt: skip
    for got, want in zip(loss[:5], expected[:5], strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=0)
    assert set(module.state_dict()) == {"horizon_weights", "consistency_weights"}


@pytest.mark.parametrize("per_horizon", [False, True])
def test_multi_horizon_linear_cross_entropy(per_horizon: bool) -> None:
    module: Any = randomised(
        mfwm_nn.MultiHorizonLinearCrossEntropy(
            8,
            7,
            HORIZONS,
            ids_per_token=2,
            head_per_horizon=per_horizon,
            consistency_weights=torch.tensor([0, 0.5, 1]),
            softcap=3.0,
            return_accuracy=True,
        )
    )
    inputs = [torch.randn(2, 5, 4 // f, 4 // f, 8) for f in HORIZONS.factors]
    tokens = torch.randint(0, 7, (2, 6, 4, 4, 2))
    loss = module(inputs, tokens)
    weight = list(module.weight) if per_horizon else module.weight
    expected = m.multi_horizon_linear_cross_entropy(
        inputs, weight, tokens, HORIZONS, consistency_weights=[0, 0.5, 1], softcap=3.0, return_accuracy=True
    )
    assert torch.equal(loss.accuracy, expected.accuracy)
    check_gradients(module, [loss.total], [expected.total])
    keys = {f"weight.{i}" for i in range(3)} if per_horizon else {"weight"}
    assert set(module.state_dict()) == {*keys, "horizon_weights", "consistency_weights"}


@pytest.mark.parametrize("per_horizon", [False, True])
def test_multi_horizon_linear_cross_entropy_of_tokens_in_a_row(per_horizon: bool) -> None:
    """With biases, a grid, position weights and predictions."""
    module: Any = randomised(
        mfwm_nn.MultiHorizonLinearCrossEntropy(
            8, 7, HORIZONS, head_per_horizon=per_horizon, bias=True, grid=(4, 4), return_predictions=True
        )
    )
    inputs = [torch.randn(2, 5, 16 // f**2, 8) for f in HORIZONS.factors]
    tokens, weights = torch.randint(0, 7, (2, 6, 16)), torch.rand(2, 5)
    loss = module(inputs, tokens, position_weights=weights)
    weight, bias = (list(entry) if per_horizon else entry for entry in (module.weight, module.bias))
    expected = m.multi_horizon_linear_cross_entropy(
        [states.unflatten(2, (4 // f, 4 // f)) for states, f in zip(inputs, HORIZONS.factors, strict=True)], weight,
        tokens.unflatten(2, (4, 4)), HORIZONS, biases=bias, position_weights=weights, return_predictions=True,
    )  # fmt: skip
    for got, want in zip(loss.predictions, expected.predictions, strict=True):
        assert torch.equal(got, want.flatten(2, 3))
    check_gradients(module, [loss.total], [expected.total])
    names = [f"{name}.{i}" for name in ("weight", "bias") for i in range(3)] if per_horizon else ["weight", "bias"]
    assert set(module.state_dict()) == {*names, "horizon_weights"}


def test_mtp_combine() -> None:
    module: Any = randomised(mfwm_nn.MTPCombine(8, 5, order="embedding_first", norm_eps=0.1))
    hidden, embedding = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = m.mtp_combine(
        hidden, embedding, module.weight, hidden_norm_weight=module.hidden_norm_weight,
        embedding_norm_weight=module.embedding_norm_weight, order="embedding_first", norm_eps=0.1,
    )  # fmt: skip
    check_gradients(module, [module(hidden, embedding)], [expected])


def test_weights_keep_their_precision() -> None:
    """The ops take weights in fp32 and fp64 alone, so a module that is cast to bf16 must not cast them."""
    for weights, dtype in (([1, 0.3, 0.1], torch.float64), (torch.tensor([1, 0.3, 0.1]), torch.float32)):
        module: Any = mfwm_nn.MultiHorizonLinearCrossEntropy(
            8, 7, HORIZONS, horizon_weights=weights, consistency_weights=weights
        )
        module = copy.deepcopy(module).bfloat16()
        assert module.weight.dtype == torch.bfloat16
        for buffer in (module.horizon_weights, module.consistency_weights):
            assert buffer.dtype == dtype
            assert torch.equal(buffer, torch.as_tensor(weights, dtype=dtype))
        inputs = [torch.randn(2, 5, 4 // f, 4 // f, 8, dtype=torch.bfloat16) for f in HORIZONS.factors]
        module(inputs, torch.randint(0, 7, (2, 6, 4, 4))).total.backward()
        assert module.to("meta").horizon_weights.is_meta


def test_weights_of_two_modules_are_not_shared() -> None:
    first, second = (mfwm_nn.MultiHorizonLoss(HORIZONS, horizon_weights=[1, 0.5, 0.1]) for _ in range(2))
    first.horizon_weights.zero_()
    assert second.horizon_weights.tolist() == [1, 0.5, 0.1]


def test_modules_without_data_have_a_repr() -> None:
    assert repr(m.GradMonitor(3, device="meta")) == "GradMonitor(3, device='meta')"
    assert "horizon_weights=[3]" in repr(mfwm_nn.MultiHorizonLoss(HORIZONS, device="meta"))


def test_repr_says_what_a_module_is() -> None:
    shown = repr(
        nn.ModuleList([
            mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), norm_per_horizon=True, lag_gates=True),
            mfwm_nn.MultiHorizonLinear(8, (5, 3, 1), HORIZONS, norm=None, bias=False),
            mfwm_nn.MultiHorizonLoss(HORIZONS, kind="l1", consistency_weights=[0, 0.1, 0.1]),
            mfwm_nn.MultiHorizonLinearCrossEntropy(8, 7, HORIZONS, softcap=3.0),
            mfwm_nn.MTPCombine(8),
        ])
    )  # fmt: skip
    for part in (
        "FanOut(8, Horizons(offsets=(1, 2, 4), factors=(1, 2, 2)), pool=(1, 2, 2), norm='rms', norm_eps=1e-06, "
        "norm_per_horizon=True, lag_gates=True, window_start=1)",
        "norm=None, window_start=1",
        "Linear(in_features=8, out_features=5, bias=False)",
        "horizon_weights=[1.0, 1.0, 1.0], consistency_weights=[0.0, 0.1, 0.1], kind='l1', detach='near'",
        "MultiHorizonLinearCrossEntropy(8, 7, Horizons",
        "softcap=3.0",
        "MTPCombine(8, 8, norm_eps=1e-06, order='hidden_first')",
    ):
        assert part in shown, part


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mfwm_nn.FanOut(8, (1, 2), pool=(1, 1)), "horizons must be a Horizons, got tuple"),  # type: ignore[arg-type]
        (lambda: mfwm_nn.FanOut(0, HORIZONS, pool=(1, 2, 2)), "in_features must be >= 1, got 0"),
        (lambda: mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2)), "pool must have one entry per horizon, 3; got 2"),
        (lambda: mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), norm="batch"), "norm must be one of 'rms', 'layer', None"),
        (lambda: mfwm_nn.MultiHorizonLinear(8, (5, 3), HORIZONS), "out_features must have one entry per horizon, 3"),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, horizon_weights=[1, 2]), r"horizon_weights must have shape \[3\]"),
        (lambda: mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), norm_eps="small"), "norm_eps must be a number, got str"),
        (lambda: mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), dtype=torch.int64), "dtype must be one of float32.*int64"),
        (lambda: mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), device="gpu"), "device must be a device .*, got 'gpu'"),
        (lambda: mfwm_nn.MultiHorizonLinear(8, (5, 3, 1), HORIZONS, dtype=torch.int64), "dtype must be one of float32"),
        (lambda: mfwm_nn.MTPCombine(8, norm_eps=-1), "norm_eps must be >= 0, got -1"),
        (lambda: mfwm_nn.MTPCombine(8, order="first"), "order must be one of 'hidden_first', 'embedding_first'"),
        (lambda: mfwm_nn.MTPCombine(8, dtype=torch.int64), "dtype must be one of float32"),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, kind="l2"), "kind must be one of 'mse'"),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, detach="both"), "detach must be one of None, 'near', 'far'"),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, residual=1), "residual must be True or False, got 1"),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, scale="255"), "scale must be a number, got str"),
        (
            lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, patch_sizes=(2,)),
            "patch_sizes must have one entry per horizon, 3",
        ),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, eps=0), "eps must be > 0, got 0"),
        (lambda: mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), device=1.5), "device must be a device of torch, got 1.5"),  # type: ignore[arg-type]
        (lambda: mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), dtype=np.zeros(2)), "dtype must be one of float32"),  # type: ignore[arg-type]
        (lambda: mfwm_nn.FanOut(8, HORIZONS, pool=(1, 2, 2), grid=(4,)), r"grid must be a pair .*, got \(4,\)"),
        (lambda: mfwm_nn.MultiHorizonLinear(8, (5, 3, 1), HORIZONS, grid=()), r"grid must be a pair .*, got \(\)"),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, grid=(4, 4, 4)), r"grid must be a pair .*, got \(4, 4, 4\)"),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, grid=(4, 4), patch_sizes=(1, 1, 1)), "patch_sizes must be None"),
        (lambda: mfwm_nn.MultiHorizonLinearCrossEntropy(8, 7, HORIZONS, grid=(4,)), r"grid must be a pair of integers"),
        (lambda: mfwm_nn.MultiHorizonLoss(HORIZONS, device="gpu"), "device must be a device of torch, got 'gpu'"),
        (lambda: mfwm_nn.MultiHorizonLinearCrossEntropy(8, 7, HORIZONS, softcap=0), "softcap must be > 0, got 0"),
        (
            lambda: mfwm_nn.MultiHorizonLinearCrossEntropy(8, 7, HORIZONS, label_smoothing=2),
            "label_smoothing must be <= 1",
        ),
        (
            lambda: mfwm_nn.MultiHorizonLinearCrossEntropy(8, 7, HORIZONS, chunk_size=0),
            "chunk_size must be >= 1, got 0",
        ),
        (lambda: mfwm_nn.MultiHorizonLinearCrossEntropy(8, 7, HORIZONS, ids_per_token=0), "ids_per_token must be >= 1"),
        (
            lambda: mfwm_nn.MultiHorizonLinearCrossEntropy(8, 7, HORIZONS, dtype=torch.int64),
            "dtype must be one of float32",
        ),
        (
            lambda: mfwm_nn.MultiHorizonLoss(Horizons((1, 2), (2, 3)), consistency_weights=[0, 1]),
            r"consistency_weights\[1\] must be 0: factors\[1\] = 3 is not a multiple of factors\[0\] = 2",
        ),
    ],
)
def test_malformed(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()
