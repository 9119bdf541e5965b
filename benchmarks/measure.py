"""How everything here is timed: contenders interleaved, medians with 20/80 percentiles, roofs of the same run.

A sample is the time of one call. On a CPU the calls go round copies of the inputs that together exceed the last cache;
on a GPU one sample is a pass over all copies, replayed as a CUDA graph where the contender can be captured (so that
launches cost nothing), divided by their number.

glibc gives large blocks back to the system, so on a CPU every fresh output costs page faults. `keep_blocks` starts the
program again with that turned off for every contender.
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
# What the results file of a run without it adds to the device's name.
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
    """Start this program again with an allocator that keeps its blocks, unless it has it."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ALLOCATOR})


def allocator() -> str:
    given = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    return "keeps its blocks" if given == ALLOCATOR else "default" if not given else f"partly set: {given}"


def interleaved(
    contenders: Sequence[Contender], device: torch.device, budget: float, graphs: bool = True
) -> dict[str, Timing]:
    """Time the contenders in turns until each has had `budget` seconds or 200 samples, at least 7.

    One whose samples are very slow has fewer: it stops after ten budgets, with 3 at least.
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
    """A function that takes one sample, and whether it replays a graph."""
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
    """A replay of all calls as one CUDA graph; None where they cannot be captured (they wait for the host)."""
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
    """Copies of inputs of that size which together are twice the last cache."""
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
    """What matrix products are measured in: `dtype`, or on a CPU that does not multiply that in hardware, fp32."""
    return product_dtype(dtype) if device.type == "cpu" else dtype


def roofs(device: torch.device, dtype: torch.dtype) -> dict[str, Contender]:
    """A copy and a matrix product, to be timed among the contenders; `rates` makes rates of their times."""
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
    """Device, versions, commit and date, as each results file records them."""
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
