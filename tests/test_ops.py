"""Tests every op on every backend present, in every dtype, from the op's record: a new op needs no new test here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    leaves,
    require_grad,
)

import mfwm_kernels
from mfwm_kernels import autograd, backends
from mfwm_kernels.backends import ABSENT, BackendError, served_devices, use_backend
from mfwm_kernels.check import TOLERANCE, converted, doubled, relative_error, tensors_of
from mfwm_kernels.op import OPS


@contextlib.contextmanager
def profiled_backend() -> Iterator[list[str]]:
    """Record the backends that calls choose."""
    used: list[str] = []
    original = autograd.choose

    def choose(op: Any, args: Any) -> str:
        used.append(original(op, args))
        return used[-1]

    autograd.choose = choose
    try:
        yield used
    finally:
        autograd.choose = original


# In the interpreter these take 10 and 30 s a dtype. Their kernels load and store bf16 and fp16 without a branch, so the
# two take the samples in turns. Ops with products multiply bf16 otherwise than fp16.
TAKE_TURNS = ("fan_out", "multi_horizon_loss")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cases() -> Iterator[Any]:
    for op in OPS.values():
        for backend in backends_of(op.name):
            for dtype in DTYPES:
                if backend != "reference" and dtype not in op.backends[backend].dtypes:
                    continue
                yield pytest.param(op, backend, dtype, id=f"{op.name}-{backend}-{str(dtype)[6:]}")


def per_backend() -> list[Any]:
    return [pytest.param(op, b, id=f"{op.name}-{b}") for op in OPS.values() for b in backends_of(op.name)]


def samples(op: Any, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return list(op.samples(dtype, device))


# What has an entry per clip.
CLIPS = (
    "preds",
    "video",
    "inputs",
    "tokens",
    "token_mask",
    "position_weights",
    "condition",
    "hidden",
    "embedding",
    "actions",
    "segment_ids",
    "position_weights",
)


def sample_of(op: Any, backend: str, number: int) -> dict[str, Any]:
    """A sample in fp32; its first clip in Triton's interpreter, where a clip takes seconds and shows what two do:
    test_values_and_gradients compares all."""
    sample = samples(op, torch.float32, device_of(backend))[number]
    if not interpreted(backend):
        return sample

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, torch.Tensor) else converted(value, lambda tensor: tensor[:1])

    return {name: first(value) if name in CLIPS else value for name, value in sample.items()}


def upstream_of(result: Any) -> list[torch.Tensor]:
    """Random upstream gradients, so that a backward that assumes 1 is caught."""
    return [torch.randn_like(output) for output in differentiable_outputs(result)]


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS.values()])
def test_the_first_samples_are_not_empty(op: Any) -> None:
    """Other tests here take the first, the second or the first three: an empty one would show nothing."""
    first = samples(op, torch.float64, torch.device("cpu"))[:3]
    assert len(first) == 3
    for sample in first:
        assert all(t.numel() for t in tensors_of(list(sample.values())))
    assert any(leaves(op, require_grad(op, sample)) for sample in first)


@pytest.mark.parametrize(("op", "backend", "dtype"), list(cases()))
def test_values_and_gradients(op: Any, backend: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """Of outputs and inputs, neither written to nor marked as written to."""
    for number, sample in enumerate(samples(op, dtype, device_of(backend))):
        in_turns = interpreted(backend) and op.name in TAKE_TURNS and dtype != torch.float32
        if in_turns and number % 2 != (dtype == torch.float16):
            continue
        kwargs = require_grad(op, sample)
        given = tensors_of(list(kwargs.values()))
        before, versions = [t.detach().clone() for t in given], [t._version for t in given]
        with use_backend(backend):
            result = op.public(**kwargs)
        exact_kwargs = require_grad(op, doubled(sample))
        with use_backend("reference"):
            exact = op.public(**exact_kwargs)
        where = f"sample {number}"
        for place, (got, want) in enumerate(zip(tensors_of(result), tensors_of(exact), strict=True)):
            if got.is_floating_point():
                assert got.shape == want.shape
                error = relative_error(got, want)
                assert error <= TOLERANCE[dtype], f"{where}, output {place}: relative error {error:.2e}"
            else:
                assert torch.equal(got, want), f"{where}, output {place}"
        upstream = upstream_of(result)
        with use_backend("cpu" if backend == "reference" else "reference"):  # a backward must use its forward's backend
            got_gradients = gradients(op, kwargs, result, upstream)
        want_gradients = gradients(op, exact_kwargs, exact, upstream)
        for place, (got, want, leaf) in enumerate(zip(got_gradients, want_gradients, leaves(op, kwargs), strict=True)):
            assert got.dtype == leaf.dtype
            error = relative_error(got, want)
            # Horizon weights stay fp32 in an fp64 call.
            assert error <= max(TOLERANCE[dtype], TOLERANCE[leaf.dtype]), (
                f"{where}, gradient {place} {list(leaf.shape)}: relative error {error:.2e}"
            )
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True)), f"{where}: an input is written to"
        assert versions == [t._version for t in given], where


# The ops whose small calls one kernel of the cpu backend computes.
WITH_PRODUCTS = ("multi_horizon_linear", "mtp_combine", "multi_horizon_linear_cross_entropy")


@pytest.mark.parametrize(
    ("op", "backend", "dtype"), [p for p in cases() if p.values[0].name in WITH_PRODUCTS and p.values[1] == "cpu"]
)
def test_values_and_gradients_of_large_calls(
    op: Any, backend: str, dtype: torch.dtype, poisoned_empty: None, no_small_calls: None
) -> None:
    test_values_and_gradients(op, backend, dtype, None)


@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_bf16_states_multiplied_either_way(
    name: str, products: torch.dtype, poisoned_empty: None, no_small_calls: None
) -> None:
    if ABSENT["cpu"]:
        pytest.fail("the module mfwm_kernels._native is part of a test installation")
    test_values_and_gradients(OPS[name], "cpu", torch.bfloat16, None)


@pytest.mark.parametrize(("op", "backend"), per_backend())
def test_only_the_needed_gradients(op: Any, backend: str) -> None:
    """A leaf that alone requires grad gets the same gradient as among all leaves."""
    sample = sample_of(op, backend, 1)
    kwargs = require_grad(op, sample)
    with use_backend(backend):
        result = op.public(**kwargs)
        upstream = upstream_of(result)
        together = gradients(op, kwargs, result, upstream)
        for chosen in range(len(together)):
            alone = require_grad(op, sample)
            for place, leaf in enumerate(leaves(op, alone)):
                leaf.requires_grad_(place == chosen)
            (gradient,) = gradients(op, alone, op.public(**alone), upstream)
            assert relative_error(gradient, together[chosen]) <= 1e-6


@pytest.mark.skipif(bool(ABSENT["cpu"]), reason="needs the compiled module")
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_only_the_needed_gradients_of_large_cpu_calls(name: str, no_small_calls: None) -> None:
    test_only_the_needed_gradients(OPS[name], "cpu")


@pytest.mark.parametrize(("op", "backend"), per_backend())
def test_one_output_at_a_time(op: Any, backend: str) -> None:
    """Unused outputs contribute no gradient."""
    sample = sample_of(op, backend, 0)
    with use_backend(backend):
        kwargs = require_grad(op, sample)
        outputs = differentiable_outputs(op.public(**kwargs))
        if not leaves(op, kwargs) or len(outputs) == 1:
            return
        upstream = [torch.randn_like(output) for output in outputs]
        together = gradients(op, kwargs, outputs, upstream)
        summed = [torch.zeros_like(g) for g in together]
        for place in range(len(outputs)):
            kwargs = require_grad(op, sample)
            output = differentiable_outputs(op.public(**kwargs))[place]
            for total, g in zip(summed, gradients(op, kwargs, [output], [upstream[place]]), strict=True):
                total += g
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(summed, together, strict=True))


@pytest.mark.parametrize(("op", "backend"), per_backend())
def test_backward_again_and_create_graph(op: Any, backend: str) -> None:
    sample = sample_of(op, backend, 0)
    with use_backend(backend):
        kwargs = require_grad(op, sample)
        if not leaves(op, kwargs):
            return
        outputs = differentiable_outputs(op.public(**kwargs))
        upstream = [torch.randn_like(output) for output in outputs]
        first = torch.autograd.grad(outputs, leaves(op, kwargs), upstream, retain_graph=True, allow_unused=True)
        doubled_upstream = [2 * g for g in upstream]
        again = torch.autograd.grad(outputs, leaves(op, kwargs), doubled_upstream, retain_graph=True, allow_unused=True)
        for a, b in zip(first, again, strict=True):
            assert (a is None) == (b is None)
            assert a is None or relative_error(b, 2 * a) <= 1e-6
        with pytest.raises(RuntimeError, match=op.name):
            torch.autograd.grad(outputs, leaves(op, kwargs), upstream, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS.values()])
def test_gradcheck(op: Any) -> None:
    """The fp64 gradients of the reference and of the CPU kernels agree with finite differences."""
    for backend in [b for b in backends_of(op.name) if b in ("reference", "cpu")]:
        for sample in samples(op, torch.float64, torch.device("cpu"))[:3]:
            if "detach" in op.arguments._fields:
                # With a detached side the gradient is not the derivative, on purpose.
                sample = {**sample, "detach": None}
            kwargs = require_grad(op, doubled(sample))
            if not leaves(op, kwargs):
                continue

            def outputs(*_: torch.Tensor, kwargs: dict[str, Any] = kwargs) -> tuple[torch.Tensor, ...]:
                return tuple(o for o in differentiable_outputs(op.public(**kwargs)) if o.requires_grad)

            with use_backend(backend):
                torch.autograd.gradcheck(outputs, leaves(op, kwargs), fast_mode=True, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize(("op", "backend"), per_backend())
def test_no_gradient_needed(op: Any, backend: str) -> None:
    sample = sample_of(op, backend, 0)
    with use_backend(backend):
        with_grad = tensors_of(op.public(**require_grad(op, sample)))
        with torch.no_grad():
            without = tensors_of(op.public(**require_grad(op, sample)))
    assert not any(t.requires_grad for t in without)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(with_grad, without, strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("op", "backend"), [p for p in per_backend() if p.values[1] != "triton"])
def test_compile_fullgraph(op: Any, backend: str, dynamic: bool) -> None:
    """The compiled op has no graph break, and the values and gradients of eager mode."""
    torch._dynamo.reset()
    sample, compiler = samples(op, torch.float32, device_of(backend))[0], "aot_eager"
    if dynamic and backend == "reference":
        # Symbolic shapes take seconds a horizon, and aot_eager as long again: plain PyTorch holds no op of ours for it.
        sample, compiler = fewest_horizons(op, device_of(backend)), "eager"
    with use_backend(backend):
        compiled = torch.compile(op.public, fullgraph=True, dynamic=dynamic, backend=compiler)
        eager_kwargs, compiled_kwargs = require_grad(op, sample), require_grad(op, sample)
        eager, got = op.public(**eager_kwargs), compiled(**compiled_kwargs)
        for a, b in zip(tensors_of(eager), tensors_of(got), strict=True):
            assert relative_error(b, a) <= 1e-5
        upstream = upstream_of(eager)
        for a, b in zip(
            gradients(op, eager_kwargs, eager, upstream), gradients(op, compiled_kwargs, got, upstream), strict=True
        ):
            assert relative_error(b, a) <= 1e-5


@pytest.mark.parametrize(
    ("op", "backend"),
    [p for p in per_backend() if p.values[1] in ("cpu", "cuda")] or [pytest.param(None, "", id="none")],
)
def test_opcheck(op: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered op passes torch's checks (schema, fake, autograd) on the arguments of compiled calls."""
    if op is None:
        pytest.fail("no compiled backend present: the module mfwm_kernels._native is part of a test installation")
    seen: list[tuple[Any, ...]] = []
    registered = getattr(torch.ops.mfwm, op.name).default

    def record(op_: Any, args: Any) -> list[torch.Tensor]:
        seen.append((*args, autograd.flags_of(autograd.flatten(op_, args)[1]), backend))
        return original(op_, args)

    original = autograd.call
    module = __import__(op.public.__module__, fromlist=["call"])
    monkeypatch.setattr(module, "call", record)
    with use_backend(backend):
        for sample in samples(op, torch.float32, device_of(backend))[:3]:
            op.public(**require_grad(op, sample))
    for flat in seen:
        torch.library.opcheck(registered, flat, raise_exception=True)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS.values()])
def test_forced_backend_refuses_by_name(op: Any) -> None:
    sample = samples(op, torch.float64, torch.device("cpu"))[0]
    for backend in ("triton", "cuda"):
        with use_backend(backend), pytest.raises(BackendError, match=f"'{backend}'.*{op.name}"):
            op.public(**sample)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS.values()])
def test_auto_takes_the_first_that_serves(op: Any) -> None:
    seen: list[str] = []
    for sample in samples(op, torch.float32, torch.device("cpu"))[:1]:
        for backend in op.backends:
            # `auto` never chooses the interpreter.
            if backend != "triton" and not ABSENT[backend] and "cpu" in served_devices(backend):
                seen.append(backend)
        with profiled_backend() as used:
            op.public(**sample)
        assert used == [seen[0] if seen else "reference"]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="name must be one of auto, reference, cpu, triton, cuda; got 'opencl'"):
        use_backend("opencl")


def test_use_backend_may_be_entered_twice() -> None:
    before, chosen = backends._forced, use_backend("cpu")
    with chosen, chosen:
        assert backends._forced == "cpu"
    assert backends._forced == before


@pytest.mark.parametrize("backend", [b for b in backends_of("action_window_sum") if b != "triton"])
def test_zeros_where_nothing_depends_on_an_input(backend: str) -> None:
    """With an empty window, every backend returns zero gradients; none returns None."""
    actions = torch.randn(1, 3, 4, requires_grad=True)
    gate = torch.randn(1, 1, 4, requires_grad=True)
    with use_backend(backend):
        output = mfwm_kernels.action_window_sum(actions, (1,), lag_weight=gate)
        gradients_ = torch.autograd.grad(output.sum(), (actions, gate))
    assert not any(gradient.any() for gradient in gradients_)
