"""Compiles recorded launches of Triton kernels for a GPU that need not be there. aot.py and launch_costs.py call it."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .cubins import resource_usage, usage_of
from .launches import Launch


class Variant(NamedTuple):
    """A launch with its own specialisation. `call` is the first call that causes it; `kernel` is (module, name)."""

    op: str
    call: str
    kernel: tuple[str, str]
    given: tuple[Any, ...]
    constants: dict[str, Any]


class Driver:
    """Replaces Triton's driver, and so sets the architecture to compile for without a GPU."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Kernels cache their compiled code per device, so each architecture needs its own number.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def use(architecture: str) -> None:
    """Record launches and compile for this architecture from here on."""
    from triton.runtime import driver

    from .triton import launch

    active = Driver(architecture)
    driver.set_active(active)
    launch.recorded_architecture = active.target.arch


def key_of(launch: Launch) -> str:
    """Dtypes, alignments, integers that are 1 or multiples of 16, constants and options, as Triton keys them."""
    from triton.runtime import driver

    *_, binder = launch.kernel.device_caches[driver.active.get_current_device()]
    _, specialization, options = binder(*launch.given, **launch.constants)
    return f"{specialization} {options}"


def compile_for(architecture: str, variant: Variant) -> Any:
    """The compiled kernel, specialised as a launch with these arguments would be."""
    use(architecture)
    module, name = variant.kernel
    kernel = getattr(importlib.import_module(module), name)
    compiled = kernel.run(*variant.given, grid=(1,), warmup=True, **variant.constants)
    assert compiled.metadata.target.arch == int(architecture.removeprefix("sm_"))
    return compiled


def resources(compiled: Any) -> dict[str, int]:
    """Registers per thread and bytes of local and shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (used,) = (usage_of(line) for line in resource_usage(cubin) if "REG:" in line)
    # Triton allocates shared memory at launch, so the cubin does not list it.
    return {**used, "shared_bytes": int(compiled.metadata.shared)}


def processes(jobs: int) -> ProcessPoolExecutor:
    """A pool of forked processes, which inherit the kernels as they are in this process."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"))
