"""Which calls one kernel of the cpu backend computes whole, matrix products included."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import gradients, kernels_of, require_grad

from mfwm_kernels import GradMonitor, use_backend
from mfwm_kernels.check import doubled, relative_error, tensors_of
from mfwm_kernels.cpu import small
from mfwm_kernels.op import OPS

pytestmark = pytest.mark.skipif("cpu" not in kernels_of("mtp_combine"), reason="needs the compiled module")

# The multiplications of the first sample's forward: rows * columns * depth.
PRODUCTS = {
    "multi_horizon_linear": 2 * 3 * 20 * (48 + 12 + 3 + 1) * 24,
    "multi_horizon_linear_cross_entropy": 2 * 5 * (32 + 8 + 2) * 19 * 12,
    "mtp_combine": 30 * 16 * 32,
}


class Recorder:
    """The compiled module, which records the names of the kernels that are called."""

    def __init__(self, module: Any) -> None:
        self.module, self.names = module, set[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.names.add(name)
        return getattr(self.module, name)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., set[str]]]:
    """called(name, changes): the kernels of forward and backward of an op's first sample."""

    def call(name: str, changes: dict[str, Any]) -> set[str]:
        op = OPS[name]
        torch.manual_seed(1)
        sample = {**next(iter(op.samples(torch.float32, torch.device("cpu")))), **changes}
        module = importlib.import_module(f"mfwm_kernels.cpu.{name}")
        recorder = Recorder(module.kernels)
        with monkeypatch.context() as patch, use_backend("cpu"):
            patch.setattr(module, "kernels", recorder)
            kwargs = require_grad(op, sample)
            result = op.public(**kwargs)
            outputs = [result.total] if hasattr(result, "total") else tensors_of(result)
            upstream = [torch.randn_like(output) for output in outputs]
            got = gradients(op, kwargs, result, upstream)
        exact = require_grad(op, doubled(sample))
        with use_backend("reference"):
            want = gradients(op, exact, op.public(**exact), upstream)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
        return recorder.names

    yield call


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_threshold(name: str, called: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call with as many multiplications is small; with one more it runs what large calls run, to the same results."""
    for most, expected in ((PRODUCTS[name], True), (PRODUCTS[name] - 1, False)):
        monkeypatch.setattr(small, "MULTIPLICATIONS", most)
        kernels = called(name, {})
        assert kernels <= set(OPS[name].backends["cpu"].kernels)
        assert {"small" in kernel for kernel in kernels} == {expected}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("multi_horizon_linear", {"grad_monitor": GradMonitor(4)}),
        ("multi_horizon_linear_cross_entropy", {"chunk_size": 100}),
        ("multi_horizon_linear_cross_entropy", {"return_predictions": True}),
        ("multi_horizon_linear_cross_entropy", {"consistency_weights": [0, 1.0, 0]}),
    ],
)
def test_options_that_only_large_calls_have(
    name: str, changes: dict[str, Any], called: Callable[..., set[str]]
) -> None:
    assert not any("small" in kernel for kernel in called(name, changes))


def test_columns_of_ids(called: Callable[..., set[str]]) -> None:
    """A small call reads tokens, masks and weights of any strides, in cells of several ids, some of them ignored."""
    tokens = torch.randint(0, 19, (4, 5, 2, 8)).permute(2, 1, 0, 3)
    mask, weights = (torch.rand(4, 5, 2, 8) < 0.5).permute(2, 1, 0, 3), torch.rand(3, 5, 2).permute(2, 1, 0)
    changes = {"tokens": tokens, "token_mask": mask, "position_weights": weights.round(decimals=1), "ignore_index": 3}
    assert called("multi_horizon_linear_cross_entropy", changes) == {"multi_horizon_linear_cross_entropy_small"}
