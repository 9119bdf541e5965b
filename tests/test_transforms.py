"""What torch attaches to a tensor or to the thread is honoured or refused by name, whichever tensor carries it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import (
    backends_of,
    device_of,
    differentiable_outputs,
    fewest_horizons,
    gradients,
    interpreted,
    require_grad,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from mfwm_kernels import (
    GradMonitor,
    Horizons,
    fan_out,
    mtp_combine,
    multi_horizon_linear,
    multi_horizon_linear_cross_entropy,
    use_backend,
)
from mfwm_kernels.check import relative_error, tensors_of
from mfwm_kernels.op import OPS

# The interpreter runs the same Python around a kernel, and is slow.
BACKENDS = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in OPS.values()
    for backend in backends_of(op.name)
    if not interpreted(backend)
]
ONE, IDS = Horizons.next_frame(), torch.zeros(3, 6, 1, 1, dtype=torch.int64)


def sample_of(op: Any, device: torch.device, number: int = 0) -> dict[str, Any]:
    torch.manual_seed(1)
    return list(op.samples(torch.float32, device))[number]


def results(op: Any, kwargs: dict[str, Any], upstream: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs, and gradients for upstream gradients of one half or those given."""
    kwargs = require_grad(op, kwargs)
    result = op.public(**kwargs)
    if upstream is None:
        upstream = [torch.full_like(output, 0.5) for output in differentiable_outputs(result)]
    return [t.detach() for t in tensors_of(result)] + gradients(op, kwargs, result, upstream)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.device, a.dtype, a.shape) == (b.device, b.dtype, b.shape), place
        assert relative_error(a, b) <= 1e-6, f"{place}: {relative_error(a, b):.1e}"


def function_of(op: Any, kwargs: dict[str, Any]) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The call as a function of its tensors alone, and those, floating ones first."""
    flat, spec = tree_flatten(kwargs)
    places = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
    places.sort(key=lambda i: not flat[i].is_floating_point())

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return tuple(differentiable_outputs(op.public(**tree_unflatten(given, spec))))

    return call, [flat[place] for place in places]


def floating(tensors: list[Tensor]) -> list[int]:
    return [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]


def changed(tensors: list[Tensor]) -> list[Tensor]:
    return [0.5 * tensor + 0.1 if tensor.is_floating_point() else tensor for tensor in tensors]


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_the_default_device_is_not_the_tensors(op: Any, backend: str) -> None:
    for sample in op.samples(torch.float32, device_of(backend)):
        with use_backend(backend):
            want = results(op, sample)
            # Upstream gradients and leaves are created outside: only what the op creates is in question.
            kwargs = require_grad(op, sample)
            outputs = differentiable_outputs(op.public(**kwargs))
            upstream = [torch.full_like(output, 0.5) for output in outputs]
            with torch.device("meta"):
                result = op.public(**kwargs)
                got = [t.detach() for t in tensors_of(result)] + gradients(op, kwargs, result, upstream)
        assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_the_default_dtype_is_not_the_tensors(op: Any, backend: str, dtype: torch.dtype) -> None:
    for sample in op.samples(torch.float32, device_of(backend)):
        with use_backend(backend):
            want = results(op, sample)
            torch.set_default_dtype(dtype)
            try:
                got = results(op, sample)
            finally:
                torch.set_default_dtype(torch.float32)
        assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_monitor_is_fp32_whatever_the_default(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        monitor = GradMonitor(2, [1.0, 0.5])
    finally:
        torch.set_default_dtype(torch.float32)
    assert monitor.norms.dtype == monitor.cosines.dtype == torch.float32


def negated(tensor: Tensor) -> Tensor:
    """The same values, of which memory holds the opposite."""
    lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, tensor)
    return lazy


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_pending_negation(op: Any, backend: str) -> None:
    """In any one input alone, and in the upstream gradients; the gradient reaches the tensor that was passed."""
    sample = sample_of(op, device_of(backend))
    call, tensors = function_of(op, sample)
    with use_backend(backend):
        want = [output.detach() for output in call(*tensors)]
        for chosen in floating(tensors):
            given = [negated(t) if i == chosen else t for i, t in enumerate(tensors)]
            assert_same([output.detach() for output in call(*given)], want)
        upstream = [torch.randn_like(output) for output in want]
        got = results(op, sample, [negated(gradient) for gradient in upstream])
        assert_same(got, results(op, sample, upstream))


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_tracers_record_what_runs(op: Any, backend: str) -> None:
    """A trace gives the results for other values. What jit.trace cannot follow it refuses."""
    call, tensors = function_of(op, fewest_horizons(op, device_of(backend)))
    others = changed(tensors)
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = list(call(*others))
        for trace in (
            lambda: torch.jit.trace(call, tuple(tensors), check_trace=False),
            lambda: make_fx(call)(*tensors),
            lambda: make_fx(call, tracing_mode="symbolic")(*tensors),
        ):
            assert_same(list(trace()(*others)), want)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_a_traced_backward(op: Any, backend: str) -> None:
    call, tensors = function_of(op, sample_of(op, device_of(backend)))

    if not op.differentiable or not tensors[0].is_floating_point():
        return

    def slope(*tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_(i == 0) for i, tensor in enumerate(tensors)]
        outputs = call(*leaves)
        return list(torch.autograd.grad([o for o in outputs if o.requires_grad], leaves[:1], outputs))

    others = changed(tensors)
    with use_backend(backend):
        assert_same(make_fx(slope)(*tensors)(*others), slope(*others))


class Seen(TorchDispatchMode):
    """The ops of this package that a mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mfwm":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("op", "backend"), [case for case in BACKENDS if case.values[1] != "reference"])
def test_a_mode_sees_the_op_forward_and_backward(op: Any, backend: str) -> None:
    sample = sample_of(op, device_of(backend))
    with use_backend(backend):
        want = results(op, sample)
        with Seen() as seen:
            assert_same(results(op, sample), want)
        assert op.name in seen.names
        kwargs = require_grad(op, sample)
        result = op.public(**kwargs)
        upstream = [torch.full_like(output, 0.5) for output in differentiable_outputs(result)]
        with Seen() as backward:
            got = [t.detach() for t in tensors_of(result)] + gradients(op, kwargs, result, upstream)
        assert_same(got, want)
    if op.differentiable and not op.gradients_in_forward and any(o.requires_grad for o in tensors_of(result)):
        assert backward.names == [f"{op.name}_backward"]


KERNELS = [case for case in BACKENDS if case.values[1] != "reference"]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("call", "forward"),
    [
        (lambda h, w: mtp_combine(h, h, w, hidden_norm_weight=h[0, 0], embedding_norm_weight=h[0, 0]), 2 * 15 * 16 * 6),
        (lambda h, w: multi_horizon_linear(h[..., None, :], h, [w[:, :8]], ONE)[0], 2 * 15 * 8 * 6),
        (
            lambda h, w: multi_horizon_linear_cross_entropy([h[:, :, None, None]], w[:, :8], IDS, ONE).total,
            2 * 15 * 8 * 6,
        ),
    ],
    ids=["mtp_combine", "multi_horizon_linear", "multi_horizon_linear_cross_entropy"],
)
def test_flops_are_counted(backend: str, call: Callable[..., Tensor], forward: int) -> None:
    """As of the products in plain PyTorch: twice as many in the backward."""
    hidden, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(6, 16, requires_grad=True)
    with use_backend(backend), FlopCounterMode(display=False) as counted:
        with torch.no_grad():
            call(hidden, weight)
        assert counted.get_total_flops() == forward
        call(hidden, weight).sum().backward()
    assert counted.get_total_flops() == 4 * forward


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_forward_mode_is_refused_by_name(op: Any, backend: str) -> None:
    """Whichever of the tensors has a tangent; without one the level changes nothing."""
    call, tensors = function_of(op, sample_of(op, device_of(backend)))
    with use_backend(backend), forward_ad.dual_level():
        want = [output.detach() for output in call(*tensors)]
        for chosen in floating(tensors):
            given = list(tensors)
            given[chosen] = forward_ad.make_dual(tensors[chosen], torch.ones_like(tensors[chosen]))
            with pytest.raises(NotImplementedError, match=f"{op.name} has no forward-mode derivative"):
                call(*given)
        assert_same([output.detach() for output in call(*tensors)], want)


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_torch_func_is_refused_by_name(op: Any, backend: str) -> None:
    call, tensors = function_of(op, sample_of(op, device_of(backend)))
    with use_backend(backend):
        for chosen in floating(tensors):
            tensor = tensors[chosen]

            def of_one(one: Tensor, chosen: int = chosen) -> tuple[Tensor, ...]:
                return call(*(one if i == chosen else t for i, t in enumerate(tensors)))

            with pytest.raises(NotImplementedError, match=f"{op.name} does not support vmap"):
                torch.func.vmap(of_one)(torch.stack([tensor, tensor]))
            with pytest.raises(NotImplementedError, match=f"{op.name} has no forward-mode derivative"):
                torch.func.jvp(of_one, (tensor,), (torch.ones_like(tensor),))
            with pytest.raises(NotImplementedError, match=rf"{op.name} does not support torch\.func\.grad"):
                torch.func.grad(lambda one, of_one=of_one: of_one(one)[0].sum())(tensor)
        assert_same(list(torch.func.functionalize(call)(*tensors)), [output.detach() for output in call(*tensors)])


def test_the_reference_is_differentiated_as_torch_does(op: Any = OPS["fan_out"]) -> None:
    call, tensors = function_of(op, sample_of(op, torch.device("cpu")))
    with use_backend("reference"):
        ones = tuple(torch.ones_like(t) if i == 0 else torch.zeros_like(t) for i, t in enumerate(tensors[:2]))
        _, tangents = torch.func.jvp(lambda *two: call(*two, *tensors[2:]), tuple(tensors[:2]), ones)
        leaf = tensors[0].detach().requires_grad_()
        outputs = call(leaf, *tensors[1:])
        (gradient,) = torch.autograd.grad(outputs, leaf, [torch.ones_like(o) for o in outputs])
    forward = sum(tangent.sum() for tangent in tangents)
    assert abs(float(forward - gradient.sum())) <= 1e-4 * float(gradient.abs().sum())


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_upstream_gradients_with_tangents_or_batched_are_refused_by_name(op: Any, backend: str) -> None:
    with use_backend(backend):
        kwargs = require_grad(op, sample_of(op, device_of(backend)))
        outputs = [o for o in differentiable_outputs(op.public(**kwargs)) if o.requires_grad]
        if not outputs:
            return
        inputs = [t for name in op.differentiable for t in tensors_of(kwargs.get(name)) if t.requires_grad]
        ones = [torch.ones_like(output) for output in outputs]
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{op.name} has no forward-mode"):
            duals = [forward_ad.make_dual(one, one.clone()) for one in ones]
            torch.autograd.grad(outputs, inputs, duals, retain_graph=True, allow_unused=True)
        batched = [torch.stack([one, one]) for one in ones]
        with pytest.raises(NotImplementedError, match=f"{op.name} does not support vmap"):
            torch.autograd.grad(
                outputs, inputs, batched, retain_graph=True, allow_unused=True, is_grads_batched=True
            )  # fmt: skip


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_a_second_derivative_is_refused_under_a_mode_too(op: Any, backend: str) -> None:
    with use_backend(backend), Seen():
        kwargs = require_grad(op, sample_of(op, device_of(backend)))
        outputs = [o for o in differentiable_outputs(op.public(**kwargs)) if o.requires_grad]
        if not outputs:
            return
        inputs = [t for name in op.differentiable for t in tensors_of(kwargs.get(name)) if t.requires_grad]
        ones = [torch.ones_like(output) for output in outputs]
        with pytest.raises(RuntimeError, match=f"{op.name} has no second derivative"):
            torch.autograd.grad(outputs, inputs, ones, create_graph=True, allow_unused=True)


def test_a_monitor_created_under_a_default_device_without_data() -> None:
    hidden = torch.randn(1, 3, 2, 2, 8, requires_grad=True)
    with torch.device("meta"):
        monitor = GradMonitor(2, [1.0, 0.5])
    states = fan_out(hidden, torch.randn(1, 3, 8), Horizons((1, 2), (1, 1)), pool=(1, 1), grad_monitor=monitor)
    sum(state.sum() for state in states).backward()
    assert (monitor.norms > 0).all() and monitor.scale is not None and monitor.scale.tolist() == [1.0, 0.5]


class Tagged(Tensor):
    """A subclass as libraries have them: ops see what is inside."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tagged:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tagged, lambda t: t.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_a_subclass_without_data_in_any_place(op: Any, backend: str) -> None:
    """A kernel would read through a null pointer."""
    call, tensors = function_of(op, sample_of(op, device_of(backend)))
    with use_backend(backend), torch.no_grad():
        want = list(call(*tensors))
        for chosen in floating(tensors):
            assert_same(list(call(*(Tagged(t) if i == chosen else t for i, t in enumerate(tensors)))), want)
