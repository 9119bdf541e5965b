"""python -m mfwm_kernels.check [--json FILE]: is this installation right, and how fast is it?

Every op on every backend present, in every dtype that it serves, on the op's own samples: values and gradients against
`reference` in fp64. Then the time of a forward and backward at the op's smallest benchmark size, the achieved GB/s or
TFLOP/s, and the share of the roof that was measured on this device in the same run. Exit status 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import info, registry
from .cpu import product_dtype
from .registry import OPS, Op, use_backend

# Relative norm of the difference, of the contract.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 2e-2}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in tensors_of(entry)]
    return []


def converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """`value` with its floating tensors converted, lists and dicts followed."""
    if isinstance(value, dict):
        return {name: converted(entry, convert) for name, entry in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(entry, (Tensor, type(None))) for entry in value):
        return [converted(entry, convert) for entry in value]
    return convert(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def doubled(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call in fp64: floating tensors and the dtype argument converted, the rest as it is."""
    return {
        name: torch.float64 if isinstance(value, torch.dtype) else converted(value, lambda t: t.detach().double())
        for name, value in kwargs.items()
    }


def run(op: Op, kwargs: dict[str, Any], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all differentiable tensors for upstream gradients fixed by place alone."""
    kwargs = {
        name: converted(value, lambda t: t.detach().requires_grad_()) if name in op.differentiable else value
        for name, value in kwargs.items()
    }
    with use_backend(backend):
        result = op.public(**kwargs)
    outputs = tensors_of(result)
    leaves = [t for name in op.differentiable for t in tensors_of(kwargs.get(name)) if t.requires_grad]
    pairs = [(o, wave(o)) for o in outputs if o.requires_grad]
    if not pairs or not leaves:
        return [o.detach() for o in outputs], []
    gradients = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    filled = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
    return [o.detach() for o in outputs], filled


def wave(like: Tensor) -> Tensor:
    """A fixed, non-constant gradient."""
    steps = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    return (1.5 + torch.cos(steps)).view(like.shape).to(like.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    difference = (got.double() - want.double()).norm().item()
    scale = want.double().norm().item()
    error = difference if scale == 0 else difference / scale
    return error if error == error else float("inf")


def largest_error(op: Op, backend: str, dtype: torch.dtype, device: torch.device) -> float:
    """Over all samples, outputs and gradients; infinite where the backend raises or shapes differ."""
    torch.manual_seed(1)
    worst = 0.0
    for sample in op.samples(dtype, device):
        exact_sample = doubled(sample)
        got, want = run(op, sample, backend), run(op, exact_sample, "reference")
        for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
            if a.shape != b.shape:
                return float("inf")
            error = relative_error(a, b)
            # Weights of horizons stay fp32 in a fp64 call, and so does their gradient's rounding.
            if a.is_floating_point() and TOLERANCE[a.dtype] > TOLERANCE[dtype] and error <= TOLERANCE[a.dtype]:
                continue
            worst = max(worst, error)
    return worst


def median_seconds(work: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Median time of `work` over as many runs as fit the budget, at least three; or one if that alone exceeds it."""

    def once() -> float:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    first = once()
    if first > budget:
        return first
    times: list[float] = []
    deadline = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < deadline and len(times) < 100):
        times.append(once())
    return statistics.median(times)


def roofs(device: torch.device, budget: float) -> dict[str, float]:
    """Bytes/s of a copy (read and write counted) and FLOP/s of a bf16 matrix product, fp32 on a CPU that has none."""
    elements = 2**28 if device.type == "cuda" else 2**25
    source, target = torch.zeros(elements, device=device), torch.empty(elements, device=device)
    copy = median_seconds(lambda: target.copy_(source), device, budget)
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device)
    a = a.to(product_dtype(torch.bfloat16) if device.type == "cpu" else torch.bfloat16)
    gemm = median_seconds(lambda: a @ a, device, budget)
    return {"bytes_per_s": 8 * elements / copy, "flops_per_s": 2 * side**3 / gemm}


def timing(op: Op, backend: str, device: torch.device, roof: dict[str, float], budget: float) -> dict[str, Any]:
    """Forward and backward in bf16 at the op's smallest benchmark size, as a share of the roof that binds it."""
    size = "cpu" if device.type == "cpu" else "genie"
    kwargs = op.bench[size if size in op.bench else next(iter(op.bench))](torch.bfloat16, device)
    seconds = median_seconds(lambda: run(op, kwargs, backend), device, budget)
    cost = op.cost(kwargs)
    floor = max(cost.bytes / roof["bytes_per_s"], cost.flops / roof["flops_per_s"])
    return {
        "size": size if size in op.bench else next(iter(op.bench)),
        "seconds": seconds,
        "gb_per_s": cost.bytes / seconds / 1e9,
        "tflop_per_s": cost.flops / seconds / 1e12,
        "share_of_roof": floor / seconds,
    }


def backends_of(op: Op) -> list[tuple[str, torch.device]]:
    """(backend, device) pairs that can run here."""
    pairs = [("reference", torch.device("cuda" if torch.cuda.is_available() else "cpu"))]
    for name in op.backends:
        if not registry.ABSENT[name]:
            here = "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"
            pairs.append((name, torch.device(here)))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfwm_kernels.check", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", metavar="FILE", help="keep the rows in FILE")
    parser.add_argument("--no-timing", action="store_true", help="values and gradients only")
    arguments = parser.parse_args()

    measured = {
        device.type: roofs(device, 0.5)
        for device in {device for op in OPS.values() for _, device in backends_of(op)}
        if not arguments.no_timing
    }
    for device_type, roof in measured.items():
        print(
            f"roofs on {device_type}: copy {roof['bytes_per_s'] / 1e9:.1f} GB/s, "
            f"GEMM {roof['flops_per_s'] / 1e12:.2f} TFLOP/s"
        )
    rows: list[dict[str, Any]] = []
    for op in OPS.values():
        for backend, device in backends_of(op):
            speed: dict[str, Any] = {}
            interpreted = backend == "triton" and device.type == "cpu"
            if not arguments.no_timing and not interpreted:
                speed = timing(op, backend, device, measured[device.type], 0.5)
            for dtype in DTYPES:
                if backend != "reference" and dtype not in op.backends[backend].dtypes:
                    continue
                rows.append(check_row(op, backend, device, dtype, interpreted))
                if dtype == torch.bfloat16:
                    rows[-1].update(speed)
                print(line_of(rows[-1]), flush=True)
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    for row in failed:
        print(f"FAILED {row['op']} on {row['backend']}, {row['dtype']}: {row['problem']}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"environment": info.environment(), "roofs": measured, "rows": rows}, file, indent=2)
    sys.exit(bool(failed))


def check_row(op: Op, backend: str, device: torch.device, dtype: torch.dtype, interpreted: bool) -> dict[str, Any]:
    problem = ""
    try:
        error = largest_error(op, backend, dtype, device)
    except Exception as raised:  # A backend that raises is a row that fails, not the end of the check.
        error, problem = float("inf"), f"{type(raised).__name__}: {raised}"
    passed = error <= TOLERANCE[dtype]
    if not passed and not problem:
        problem = f"relative error {error:.2e} is above {TOLERANCE[dtype]:.0e}"
    return {
        "op": op.name,
        "backend": backend,
        "device": str(device),
        "interpreted": interpreted,
        "dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "tolerance": TOLERANCE[dtype],
        "passed": passed,
        "problem": problem,
    }


def line_of(row: dict[str, Any]) -> str:
    line = (
        f"{'PASS' if row['passed'] else 'FAIL'}  {row['op']:36} {row['backend']:10} {row['dtype']:9} "
        f"error {row['error']:.1e} (<= {row['tolerance']:.0e})"
    )
    if "seconds" in row:
        line += (
            f"  {row['size']}: {row['seconds'] * 1e3:.3g} ms, {row['gb_per_s']:.1f} GB/s, "
            f"{row['tflop_per_s']:.2f} TFLOP/s, {row['share_of_roof']:.0%} of the roof"
        )
    return line


if __name__ == "__main__":
    main()
