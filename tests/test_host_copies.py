"""No op copies from the host or waits for the device: every op on tensors without data, under a dispatch mode.

On device "meta" a call takes the path of a GPU, up to the launches, which are recorded instead. Reading a value back
raises there by itself; what builds a tensor from numbers of the host is caught by the mode.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import differentiable_outputs, gradients, require_grad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfwm_kernels import Horizons, arguments, autograd, backends, multi_horizon_linear_cross_entropy, use_backend
from mfwm_kernels.check import converted, tensors_of
from mfwm_kernels.gemm import rows
from mfwm_kernels.op import OPS
from mfwm_kernels.ops import token_ids

META = torch.device("meta")
BACKENDS = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in OPS.values()
    for backend in ("reference", *op.backends)
    if backend != "cpu" and (backend != "triton" or importlib.util.find_spec("triton") is not None)
]


class NoHostCopies(TorchDispatchMode):
    """Fails an op that reads a tensor which is neither given nor the result of an op: its numbers come from the host.
    Counts the ops."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        # Storages, since views and saved tensors are new objects; all kept alive, so that no address is used twice.
        self.known: dict[int, Any] = {}
        self.learn(given)

    def learn(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                raise AssertionError(f"{func} reads what was copied from the host")
        result = func(*args, **(kwargs or {}))
        self.learn(result)
        self.count[func.overloadpacket.__name__] += 1
        return result


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """GPU backends serve tensors without data, and launch nothing."""
    for backend in ("triton", "cuda"):
        monkeypatch.setitem(backends.ABSENT, backend, "")
    monkeypatch.setattr(backends, "served_devices", lambda backend: ("meta",))
    # The mode is to see what happens within an op.
    monkeypatch.setattr(autograd, "prepare", lambda args, fields: (args, False))
    for name in ("ops.multi_horizon_loss", "cuda.multi_horizon_loss", "cuda.video_pyramid"):
        module = importlib.import_module(f"mfwm_kernels.{name}")
        monkeypatch.setattr(module, "raw", lambda tensor: None)
        monkeypatch.setattr(module, "launch", lambda *args: None, raising=False)
    if importlib.util.find_spec("triton") is not None:
        launcher = importlib.import_module("mfwm_kernels.triton.launch")
        monkeypatch.setattr(launcher, "recorder", lambda *args: None)
    arguments._constants.clear()
    yield


def sliced(tensor: Tensor) -> Tensor:
    """Of the same shape, cut out of one that is longer in dimension 1: its rows do not flatten."""
    if tensor.dim() < 2:
        return tensor
    batch, time, *rest = tensor.shape
    return torch.empty(batch, time + 1, *rest, dtype=tensor.dtype, device=tensor.device)[:, :time]


def permuted(tensor: Tensor) -> Tensor:
    """Of the same shape, with strides in the opposite order."""
    axes = tuple(range(tensor.dim()))[::-1]
    return torch.empty(tensor.shape[::-1], dtype=tensor.dtype, device=tensor.device).permute(axes)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_no_copy_from_the_host(op: Any, backend: str, on_meta: None) -> None:
    for sample in op.samples(torch.float32, META):
        for change in (torch.clone, sliced, permuted):
            kwargs = require_grad(op, converted(sample, change))
            with use_backend(backend), NoHostCopies(list(kwargs.values())):
                result = op.public(**kwargs)
                upstream = [change(output.detach()) for output in differentiable_outputs(result)]
                gradients(op, kwargs, result, upstream)
                assert all(t.is_meta for t in tensors_of(result))


def test_bad_ids_are_reported_without_a_copy_from_the_host() -> None:
    with NoHostCopies():
        tokens = torch.empty(2, 3, dtype=torch.int64, device=META)
        token_ids.write(torch.empty(2, 4, dtype=torch.int64, device=META), tokens, tokens < 0, 7)


def test_a_row_index_from_the_host_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.unravel_index copies the sizes to the device."""

    def unravelled(states: Tensor, numbers: Tensor) -> Tensor:
        return states[torch.unravel_index(numbers, states.shape[:-1])]

    states = sliced(torch.empty(2, 3, 4, 8, device=META))
    with NoHostCopies(states):
        assert rows.rows_of(states, 1, 5).shape == (4, 8)
        monkeypatch.setattr(rows, "rows_at", unravelled)
        with pytest.raises(AssertionError, match="copied from the host"):
            rows.rows_of(states, 1, 5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("time", [16, 24])
def test_rows_stay_in_place(time: int, on_meta: None) -> None:
    """Token loss with as many frames as positions, or with all that the horizons reach: the two nearest horizons, most
    of the rows, are multiplied where they are, forward and backward; the far ones share a copy each way."""
    horizons = Horizons.cascade(4)
    inputs = [
        torch.empty(4, 16, 16 // f, 16 // f, 64, device=META, requires_grad=True, dtype=torch.bfloat16)
        for f in horizons.factors
    ]
    weight = torch.empty(256, 64, device=META, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.empty(4, time, 16, 16, device=META, dtype=torch.int64)
    with use_backend("triton"), NoHostCopies(inputs, weight, tokens) as seen:
        multi_horizon_linear_cross_entropy(inputs, weight, tokens, horizons).total.backward()
    assert "index" not in seen.count and "index_put" not in seen.count and "index_put_" not in seen.count
    # Of the three products that give the weight's gradient, two add to the first.
    products = {name: seen.count[name] for name in ("mm", "addmm", "bmm")}
    assert products == ({"mm": 7, "addmm": 2, "bmm": 0} if time == 24 else {"mm": 2, "addmm": 1, "bmm": 6})
