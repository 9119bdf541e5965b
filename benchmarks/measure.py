"""Times contenders in turns: medians with 20/80 percentiles, and the roofs in the same run.

A sample is the time of one call. On a CPU, calls cycle through copies of the inputs that together exceed the last-level
cache. On a GPU, a sample is the time of one call on every copy, divided by their number; it replays a CUDA graph if the
contender can be captured, so that launches cost nothing.

glibc returns large blocks to the system, so on a CPU every new output costs page faults. `keep_blocks` restarts the
program with that turned off, for every contender.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mfwm_kernels import info
from mfwm_kernels.dtypes import product_dtype

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
# Suffix of the results file of a run without ALLOCATOR.
DEFAULT_ALLOCATOR = "-default-allocator"
MOST_COPIES = 16


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    high: float
    samples: int
    graph: bool


class Contender(NamedTuple):
    """Calls that do the same work on different copies of the inputs."""

    name: str
    calls: Sequence[Callable[[], Any]]


def keep_blocks() -> None:
    """Restart this program with ALLOCATOR set, unless it already is."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ALLOCATOR})


def allocator() -> str:
    given = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    return "keeps its blocks" if given == ALLOCATOR else "default" if not given else f"partly set: {given}"


def interleaved(
    contenders: Sequence[Contender], device: torch.device, budget: float, graphs: bool = True
) -> dict[str, Timing]:
    """Time the contenders in turns, until each has at least 7 samples, and `budget` seconds or 200 samples.

    A very slow contender gets fewer: it stops after ten budgets, with at least 3 samples.
    """
    samplers = {contender.name: _sampler(contender, device, graphs) for contender in contenders}
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for sample, _ in samplers.values():
        sample()
    active = list(samplers)
    while active:
        for name in active:
            times[name].append(samplers[name][0]())
        active = [name for name in active if not _enough(times[name], budget)]
    return {name: summary(times[name], samplers[name][1]) for name in samplers}


def _enough(times: Sequence[float], budget: float) -> bool:
    if len(times) < 7:
        return len(times) >= 3 and sum(times) > 10 * budget
    return sum(times) >= budget or len(times) >= 200


def summary(times: Sequence[float], graph: bool = False) -> Timing:
    ordered = sorted(times)
    return Timing(
        statistics.median(ordered), ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5], len(ordered), graph
    )


def _sampler(contender: Contender, device: torch.device, graphs: bool) -> tuple[Callable[[], float], bool]:
    """A function that measures one sample, and whether it replays a graph."""
    calls = contender.calls
    if device.type == "cpu":
        turn = 0

        def sample() -> float:
            nonlocal turn
            call = calls[turn % len(calls)]
            turn += 1
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return sample, False

    replay = _captured(calls) if graphs else None

    def on_gpu() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if replay is not None:
            replay()
        else:
            for call in calls:
                call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return on_gpu, replay is not None


def _captured(calls: Sequence[Callable[[], Any]]) -> Callable[[], None] | None:
    """A replay of all calls as one CUDA graph, or None if they cannot be captured because they wait for the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def copies_for(bytes_: int, device: torch.device) -> int:
    """How many inputs of this size together are twice the last-level cache."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = max(_cpu_caches(), default=32 << 20)
    return max(1, min(MOST_COPIES, -(-2 * cache // max(1, bytes_))))


def _cpu_caches() -> list[int]:
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
    return sizes


def multiplied(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of measured matrix products: `dtype`, or fp32 on a CPU that does not multiply `dtype` in hardware."""
    return product_dtype(dtype) if device.type == "cpu" else dtype


def roofs(device: torch.device, dtype: torch.dtype) -> dict[str, Contender]:
    """A copy and a matrix product, to time among the contenders; `rates` converts their times."""
    elements = 2**28 if device.type == "cuda" else 2**25
    source, target = (torch.zeros(elements, dtype=torch.uint8, device=device) for _ in range(2))
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(multiplied(dtype, device))
    product = torch.empty_like(a)
    return {
        "copy": Contender("copy", [lambda: target.copy_(source)]),
        "matmul": Contender("matmul", [lambda: torch.mm(a, a, out=product)]),
    }


def rates(times: dict[str, Timing], device: torch.device) -> dict[str, float]:
    """Bytes/s of the copy (read and write counted) and FLOP/s of the matrix product."""
    elements = 2**28 if device.type == "cuda" else 2**25
    side = 8192 if device.type == "cuda" else 1024
    return {
        "bytes_per_s": 2 * elements / times["copy"].median,
        "flops_per_s": 2 * side**3 / times["matmul"].median,
    }


def environment() -> dict[str, Any]:
    """Device, versions, commit and date, for the results file."""
    here = info.environment()
    return {
        **here,
        "device": device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
        "allocator": allocator(),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{info.cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
