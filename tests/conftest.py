"""What tests share: fixtures, comparisons, and the markers that say what a test costs."""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Any

# Set this before anything imports Triton: without a GPU the tests run its kernels in the interpreter.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import pytest
from torch import Tensor

from mfwm_kernels import dtypes, info
from mfwm_kernels.backends import ABSENT, served_devices
from mfwm_kernels.check import converted, different, tensors_of
from mfwm_kernels.cpu import small
from mfwm_kernels.op import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(backend: str) -> torch.device:
    """The device of a backend's tensors: the GPU if there is one, but always the CPU for the cpu backend."""
    return torch.device("cpu") if backend == "cpu" else DEVICE


def kernels_of(name: str) -> list[str]:
    """The backends of an op that can run here, without the reference."""
    return [b for b in OPS[name].backends if not ABSENT[b] and device_of(b).type in served_devices(b)]


def backends_of(name: str) -> list[str]:
    return ["reference", *kernels_of(name)]


def interpreted(backend: str) -> bool:
    """Whether Triton is interpreted: slow for large tensors, and truncates to bf16 where a GPU rounds."""
    return backend == "triton" and DEVICE.type == "cpu"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Print the CPU and the dtype of its products, because some bounds and most times depend on them."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        products = str(dtypes.product_dtype(torch.bfloat16)).removeprefix("torch.")
        capability = torch.backends.cpu.get_cpu_capability()
        reporter.write_line(f"{info.cpu_name()}, {capability}: bf16 states are multiplied in {products}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--at-once", action="store_true", help="print each failure immediately, for runs that may be killed"
    )


class AtOnce:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.__stdout__, flush=True)


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in the background with SIGINT ignored, and so would be what the tests start to interrupt.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--at-once"):
        config.pluginmanager.register(AtOnce())


# What a test needs, by its file, its name and its parameters. pyproject.toml says what each marker means.
MARKERS = {
    "interpreter": r"(test_ops\.py|/ops/).*(\btriton\b|too_long_for_registers)",
    "compile": r"::.*(compile|opcheck|tracers|tensor_that_cannot_be_read|without_a_hidden_gradient)",
    "emulator": r"test_cuda_emulated|test_cuda_strips",
    "aot": r"test_aot|test_triton_launcher",
    "process": r"test_(benchmarks|docs_notebook|docs_site|engines|evaluation|examples|gpu_all|jumps|parallel|play)"
    r"|test_(reading_list|run_data|run_safety|token_path|tools|training)|tokens_train|killed|ctrl_c|mistake_is_one_line"
    r"|moved_set_is_an_option|threads_that_wait|procgen|encode_keeps",
    "alone": r"test_gpu\.py|test_gpu_all|ctrl_c|a_signal_saves|test_memory",
}
COSTLY = ("interpreter", "compile", "emulator", "aot", "process", "slow")
LIMIT_S = 10.0
begun = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = torch.cuda.is_available()
    items[:] = [item for item in items if not is_repeated(item)]
    for item in items:
        for marker, pattern in MARKERS.items():
            if re.search(pattern, item.nodeid) and not (here and marker == "interpreter"):
                item.add_marker(marker)
        if not here and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    if not ABSENT["triton"] and any("interpreter" in item.keywords for item in items):
        import quick_interpreter

        quick_interpreter.install()


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for: the same whatever else runs on the machine."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[begun] = cpu_seconds()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """In CI, a test that `make quick` runs fails above LIMIT_S, fixtures included: so it stays quick."""
    used = cpu_seconds() - item.stash[begun]
    if os.environ.get("CI") and used > LIMIT_S and not any(item.get_closest_marker(name) for name in COSTLY):
        pytest.fail(f"{used:.1f} s of CPU time, at most {LIMIT_S:.0f} without one of the markers {', '.join(COSTLY)}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def on_the_backends_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of a `backend` creates its tensors on that backend's device, unless it names one."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec is not None else None
    if backend is None or device_of(backend).type == "cpu":
        yield
        return
    with torch.device(device_of(backend)):
        yield


@pytest.fixture(autouse=True)
def two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """The CPU kernels share their work between threads, also where each worker of a run has one thread."""
    threads = torch.get_num_threads()
    if re.search(r"\bcpu\b|_cpu\.py", request.node.nodeid):
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(two_threads: None) -> Iterator[None]:
    """One thread, for bounds on memory: a matrix product has a workspace per thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["bf16", "fp32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype in which the cpu backend multiplies bf16 states. Both choices are tested on any machine."""
    monkeypatch.setattr(dtypes, "_MULTIPLIES_BF16", request.param == "bf16")
    return dtypes.product_dtype(torch.bfloat16)


@pytest.fixture
def no_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls, as those of most tests are, run on the CPU what large calls run."""
    monkeypatch.setattr(small, "MULTIPLICATIONS", -1)


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest) -> None:
    """Tests of the cpu backend run twice, the second time with no small calls."""
    if request.param == "large":
        request.getfixturevalue("no_small_calls")


def is_repeated(item: pytest.Item) -> bool:
    """Whether the fixture `size` repeats a test that runs no kernel of the cpu backend."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("size") == "large" and params.get("backend", "cpu") != "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill results of torch.empty etc. with NaN (the largest integer, True), to expose elements that a kernel skips."""

    def poison(make: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


def fewest_horizons(op: Any, device: torch.device) -> dict[str, Any]:
    """The sample of an op with the fewest horizons, which all run the same lines, for what takes seconds a horizon."""
    torch.manual_seed(1)
    samples = [s for s in op.samples(torch.float32, device) if all(t.numel() for t in tensors_of(list(s.values())))]
    return min(samples, key=lambda sample: len(getattr(sample.get("horizons"), "offsets", ())))


def require_grad(op: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same call, with its differentiable tensors copied to leaves that require grad, each once."""

    def leaf(value: Tensor) -> Tensor:
        if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
            # An expanded tensor cannot be copied to; nothing writes to the one that is shared here.
            return value.detach().requires_grad_()
        # Keep the strides: clone() would make the leaf contiguous.
        strided = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return strided.copy_(value).requires_grad_()

    return {name: converted(value, leaf) if name in op.differentiable else value for name, value in kwargs.items()}


def leaves(op: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return different([t for name in op.differentiable for t in tensors_of(kwargs.get(name)) if t.requires_grad])


def differentiable_outputs(result: Any) -> list[Tensor]:
    return [result.total] if hasattr(result, "total") else tensors_of(result)


def gradients(op: Any, kwargs: dict[str, Any], result: Any, upstream: list[Tensor]) -> list[Tensor]:
    """The gradient of every leaf, zeros if it has none."""
    outputs = differentiable_outputs(result)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    inputs = leaves(op, kwargs)
    if not pairs or not inputs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    got = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(got, inputs, strict=True)]
