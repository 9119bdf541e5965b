"""Tests of multi_horizon_linear alone: chunks of rows, the monitor, and no temporary as large as hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import kernels_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfwm_kernels import GradMonitor, Horizons, autograd, multi_horizon_linear, use_backend
from mfwm_kernels.check import relative_error
from mfwm_kernels.gemm import rows

pytestmark = pytest.mark.usefixtures("size")

KERNELS = kernels_of("multi_horizon_linear")
HORIZONS = Horizons((1, 2, 4), (1, 1, 1))


def call_of(dtype: torch.dtype, *tokens: int, width: int = 16, norm: str = "rms") -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    return {
        "hidden": normal(2, 3, *tokens, width),
        "actions": normal(2, 4, width),
        "weights": [normal(n, width) for n in (7, 3, 1)],
        "horizons": HORIZONS,
        "biases": [normal(n) for n in (7, 3, 1)],
        "norm": norm,
        "norm_weight": normal(width),
        "norm_bias": normal(3, width) if norm == "layer" else None,
    }


def leaves_of(kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [t for t in tree_leaves(kwargs) if isinstance(t, torch.Tensor)]


def gradients_of(backend: str, kwargs: dict[str, Any], upstream: list[torch.Tensor]) -> list[torch.Tensor]:
    with use_backend(backend):
        outputs = multi_horizon_linear(**kwargs)
    pairs = [(output, gradient) for output, gradient in zip(outputs, upstream, strict=True) if gradient is not None]
    used, given = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(used, leaves_of(kwargs), given, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves_of(kwargs), gradients, strict=True)]
    return [*(output.detach() for output in outputs), *filled]


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("backend", KERNELS)
def test_chunks_that_cut_positions(backend: str, norm: str, monitored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks have 256 rows at least: 256, 256 and 16 of 6 positions of 88."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1)
    kwargs = call_of(torch.float32, 8, 11, norm=norm)
    upstream = [torch.randn(2, 3, 8, 11, n) for n in (7, 3, 1)]
    want = gradients_of("reference", kwargs, upstream)
    if monitored:
        kwargs["grad_monitor"] = GradMonitor(3)
    got = gradients_of(backend, kwargs, upstream)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", [backend for backend in KERNELS if backend == "triton"])
@pytest.mark.parametrize(
    ("columns", "norm", "tokens", "programs", "dtype"),
    [
        ((48, 12, 3, 3), "rms", 130, 1, torch.bfloat16),
        ((48, 12, 3, 3), "rms", 130, 5, torch.float16),
        ((48, 12, 3, 3), "rms", 130, 1000, torch.bfloat16),
        ((15,), "rms", 3, 5, torch.bfloat16),
        ((16,), None, 70, 1000, torch.float16),
        ((63,), "rms", 20, 1, torch.float16),
        ((192, 48, 12, 3), "rms", 65, 5, torch.bfloat16),
        ((280,), "rms", 20, 1, torch.float16),
    ],
)
def test_all_products_in_one_pass(
    backend: str, columns: tuple[int, ...], norm: str | None, tokens: int, programs: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Groups of positions, and positions split among programs; columns with and without padding, and too many."""
    from mfwm_kernels.triton import multi_horizon_linear_products

    monkeypatch.setattr(multi_horizon_linear_products, "PROGRAMS", programs)
    count, depth = len(columns), 136
    shapes = [(2, 2, tokens, depth), (2, 4, depth), *((n, depth) for n in columns), (depth,)]
    scales = [1.0, 1.0, *(depth**-0.5 for _ in columns), 1.0]
    given = [(torch.randn(shape) * scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]
    # Features that are not side by side in memory.
    given[0] = given[0].repeat_interleave(2, 3)[..., ::2]
    upstream = [(torch.randn(2, 2, tokens, n) * 1e-4).to(dtype) for n in columns]

    def gradients(of: str, computed: torch.dtype) -> tuple[torch.Tensor, ...]:
        hidden, actions, *weights, norm_weight = (tensor.to(computed).requires_grad_() for tensor in given)
        leaves = [hidden, actions, *weights, *([] if norm is None else [norm_weight])]
        with use_backend(of):
            outputs = multi_horizon_linear(
                hidden, actions, weights, Horizons((1, 2, 4, 8)[:count], (1,) * count),
                norm_weight=None if norm is None else norm_weight,
            )  # fmt: skip
            return torch.autograd.grad(outputs, leaves, [grad.to(computed) for grad in upstream])

    wanted = gradients("reference", torch.float64)
    for got, want in zip(gradients(backend, dtype), wanted, strict=True):
        assert relative_error(got, want) < 2e-2


@pytest.mark.parametrize("backend", [backend for backend in KERNELS if backend == "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("columns", "norm", "tokens", "depth", "rows"),
    [
        # Several pieces per head, and features and columns that fill no tile. The last tile overlaps the one before.
        ((48, 12, 3, 3), "each", (10, 13), 72, 128),
        ((20, 5), "one", (1, 66), 33, 64),
        ((192, 48, 12, 3), "one", (130, 1), 130, 128),
        ((200, 70), "one", (8, 9), 64, 64),
        ((3, 3, 3, 3, 3, 3, 3, 3), "each", (65,), 24, 64),
        ((100, 28), None, (128,), 256, 128),
        # Too many columns, LayerNorm, and too few tokens per position: the kernel for all calls serves these.
        ((300, 30), "one", (128,), 40, None),
        ((9, 5), "layer", (128,), 40, None),
        ((9, 5), "one", (63,), 40, None),
    ],
)
def test_a_forward_of_few_columns(
    backend: str, columns: tuple[int, ...], norm: str | None, tokens: tuple[int, ...], depth: int, rows: int | None,
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from mfwm_kernels.triton import multi_horizon_linear_narrow as narrow

    launched: list[int] = []
    launch = narrow.launch

    def recorded(*args: Any, **options: Any) -> None:
        launched.append(options["ROWS"])
        launch(*args, **options)

    monkeypatch.setattr(narrow, "launch", recorded)
    count = len(columns)
    # Means that are larger than deviations, and rows that are twice as far apart as they need to be.
    hidden = (torch.randn(2, 3, *tokens, 2 * depth) + 2).to(dtype)[..., :depth]
    actions = torch.randn(2, 2 + 2**count, depth).to(dtype)
    weights = [(torch.randn(n, depth) / depth**0.5).to(dtype) for n in columns]
    biases = [torch.randn(n).to(dtype) if i != 1 else None for i, n in enumerate(columns)]
    shape = {"one": (depth,), "layer": (depth,), "each": (count, depth)}.get(norm or "")
    norm_weight = None if shape is None else torch.randn(shape).to(dtype)

    def outputs(of: str, computed: torch.dtype) -> tuple[torch.Tensor, ...]:
        given = [None if b is None else b.to(computed) for b in biases]
        with use_backend(of):
            return multi_horizon_linear(
                hidden.to(computed), actions.to(computed), [weight.to(computed) for weight in weights],
                Horizons(tuple(2**i for i in range(count)), (1,) * count), biases=given,
                norm="layer" if norm == "layer" else "rms",
                norm_weight=None if norm_weight is None else norm_weight.to(computed),
            )  # fmt: skip

    bound = 3e-2 if dtype == torch.bfloat16 else 4e-3
    for got, want in zip(outputs(backend, dtype), outputs("reference", torch.float64), strict=True):
        assert relative_error(got, want) < bound
    assert launched == ([] if rows is None else [rows])


@pytest.mark.parametrize("absent", [None, 1])
@pytest.mark.parametrize("norm", ["rms", "layer", None])
@pytest.mark.parametrize("scale", [None, [0.5, 2.0, -1.0]])
@pytest.mark.parametrize("backend", KERNELS)
def test_grad_monitor(backend: str, scale: list[float] | None, norm: str | None, absent: int | None) -> None:
    kwargs = call_of(torch.float32, 5, norm=norm or "rms")
    if norm is None:
        kwargs["norm_weight"] = None
    upstream = [None if i == absent else torch.randn(2, 3, 5, n) for i, n in enumerate((7, 3, 1))]
    monitors = [GradMonitor(3, scale), GradMonitor(3, scale)]
    results = [
        gradients_of(b, {**kwargs, "grad_monitor": monitor}, upstream)
        for b, monitor in zip(("reference", backend), monitors, strict=True)
    ]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(results[1], results[0], strict=True))
    torch.testing.assert_close(monitors[1].norms, monitors[0].norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(monitors[1].cosines, monitors[0].cosines, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_monitor_of_layer_norm_against_autograd(backend: str) -> None:
    """Norms and cosines equal those of gradients that autograd computes one horizon at a time, without our ops."""
    kwargs, upstream = call_of(torch.float32, 5, norm="layer"), [torch.randn(2, 3, 5, n) for n in (7, 3, 1)]
    hidden, actions, gradients = kwargs["hidden"], kwargs["actions"], []
    for i, offset in enumerate(HORIZONS.offsets):
        window = torch.stack([actions[:, n + 1 : n + offset].sum(1) for n in range(3)], 1)
        state = F.layer_norm(hidden + window[:, :, None], (16,), kwargs["norm_weight"], kwargs["norm_bias"][i], 1e-6)
        output = F.linear(state, kwargs["weights"][i], kwargs["biases"][i])
        gradients.append(torch.autograd.grad(output, hidden, upstream[i])[0].flatten())
    separate = torch.stack(gradients)
    norms, scale = separate.norm(dim=1), [0.5, 2.0, -1.0]
    kwargs["grad_monitor"] = monitor = GradMonitor(3, scale)
    found = gradients_of(backend, kwargs, upstream)[3]
    torch.testing.assert_close(monitor.norms, norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(monitor.cosines, separate @ separate.T / norms[:, None] / norms, rtol=1e-4, atol=1e-5)
    assert relative_error(found.flatten(), torch.tensor(scale) @ separate) < 1e-5


@pytest.mark.parametrize("backend", KERNELS)
def test_an_fp64_scale_is_as_good_as_an_fp32_one(backend: str) -> None:
    kwargs, upstream = call_of(torch.bfloat16, 5), [torch.randn(2, 3, 5, n).bfloat16() for n in (7, 3, 1)]
    scale = torch.tensor([0.5, 2.0, -1.0])
    narrow, wide = (
        gradients_of(backend, {**kwargs, "grad_monitor": GradMonitor(3, scale.to(dtype))}, upstream)
        for dtype in (torch.float32, torch.float64)
    )
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(wide, narrow, strict=True))


class Storages(TorchDispatchMode):
    """Records the bytes of every storage of which an op returns a tensor, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes[storage.data_ptr()] = max(storage.nbytes(), self.bytes.get(storage.data_ptr(), 0))
        return out


@pytest.mark.parametrize(("norm", "monitored"), [("rms", False), ("rms", True), ("layer", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_temporary_as_large_as_hidden(
    dtype: torch.dtype, norm: str, monitored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Let the mode see the ops inside our op, instead of routing the call through the registered op.
    monkeypatch.setattr(autograd, "prepare", lambda args, fields: (args, False))
    kwargs = call_of(dtype, 30, 30, width=64, norm=norm)
    upstream = [torch.randn(2, 3, 30, 30, n).to(dtype) for n in (7, 3, 1)]
    if monitored:
        kwargs["grad_monitor"] = GradMonitor(3)
    with Storages() as seen, use_backend("cpu"):
        outputs = multi_horizon_linear(**kwargs)
        gradients = torch.autograd.grad(outputs, leaves_of(kwargs), upstream)
    hidden = kwargs["hidden"]
    # Views of hidden and of its gradient are not temporaries.
    for tensor in (hidden, *gradients):
        seen.bytes.pop(tensor.untyped_storage().data_ptr(), None)
    assert 0 < max(seen.bytes.values()) <= hidden.numel() * hidden.element_size() // 2
