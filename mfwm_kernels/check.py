"""python -m mfwm_kernels.check [--op OP ...] [--backend ...] [--dtype ...] [--json FILE]: is this installation right?

Runs every op on every backend present, in every dtype that it serves, on the op's own samples, and compares values and
gradients with `reference` in fp64. It also times a forward and backward in bf16 at the op's smallest benchmark size,
and reports GB/s, TFLOP/s and the share of the roof measured on this device in the same run.

Failures are printed as they happen, and FILE is replaced after every row, so an interrupted run loses only the rows
that it had not finished. The exit status is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import info
from .backends import ABSENT, BACKENDS, use_backend
from .dtypes import product_dtype
from .op import OPS, Op

# Largest allowed ||got - want|| / ||want|| per dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 2e-2}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# The ops with the most intricate kernels come first, so that an interrupted run has tested the riskiest ones.
ORDER = ("multi_horizon_loss", "multi_horizon_linear_cross_entropy", "multi_horizon_linear", "fan_out", "video_pyramid")


class Case(NamedTuple):
    """An op on a backend and device, in a dtype: one row of the results."""

    op: str
    backend: str
    device: torch.device
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} on {self.backend}, {self.dtype}"

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device.type == "cpu"


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in tensors_of(entry)]
    return []


def converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `convert` applied to its floating tensors, including those in lists and dicts. A tensor that it has
    several times is converted once, because an op may treat the same tensor otherwise than an equal one."""
    results: dict[int, Tensor] = {}

    def once(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {name: once(part) for name, part in entry.items()}
        if isinstance(entry, (list, tuple)) and any(isinstance(part, (Tensor, type(None))) for part in entry):
            return [once(part) for part in entry]
        if not (isinstance(entry, Tensor) and entry.is_floating_point()):
            return entry
        if id(entry) not in results:
            results[id(entry)] = convert(entry)
        return results[id(entry)]

    return once(value)


def different(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in order, each once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def doubled(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same call in fp64: floating tensors and the dtype argument are converted, the rest is unchanged."""
    return {
        name: torch.float64 if isinstance(value, torch.dtype) else converted(value, lambda t: t.detach().double())
        for name, value in kwargs.items()
    }


def run(op: Op, kwargs: dict[str, Any], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of all differentiable tensors for upstream gradients that every run repeats."""
    kwargs = {
        name: converted(value, lambda t: t.detach().requires_grad_()) if name in op.differentiable else value
        for name, value in kwargs.items()
    }
    with use_backend(backend), warnings.catch_warnings():
        # Some samples have horizons that never count, on purpose.
        warnings.filterwarnings("ignore", message="horizon .* never counts")
        result = op.public(**kwargs)
    outputs = tensors_of(result)
    leaves = different([t for name in op.differentiable for t in tensors_of(kwargs.get(name)) if t.requires_grad])
    pairs = [(o, wave(o)) for o in outputs if o.requires_grad]
    if not pairs or not leaves:
        return [o.detach() for o in outputs], []
    gradients = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    filled = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
    return [o.detach() for o in outputs], filled


def wave(like: Tensor) -> Tensor:
    """A gradient that depends only on each element's index, and is not constant."""
    steps = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    return (1.5 + torch.cos(steps)).view(like.shape).to(like.dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    difference = (got.double() - want.double()).norm().item()
    magnitude = want.double().norm().item()
    error = difference if magnitude == 0 else difference / magnitude
    return error if error == error else float("inf")


def tensor_names(op: Op, kwargs: dict[str, Any], outputs: int) -> list[str]:
    """The name of each tensor that `run` returns, in the same order."""
    names = [f"output {i}" for i in range(outputs)]
    seen: set[int] = set()
    for name in op.differentiable:
        value = kwargs.get(name)
        entries = (
            [(name, value)] if isinstance(value, Tensor) else [(f"{name}[{i}]", t) for i, t in enumerate(value or ())]
        )
        for entry, t in entries:
            if isinstance(t, Tensor) and t.is_floating_point() and id(t) not in seen:
                seen.add(id(t))
                names.append(f"gradient of {entry}")
    return names


def compare(op: Op, backend: str, sample: dict[str, Any], dtype: torch.dtype) -> tuple[float, list[str]]:
    """The largest relative error of outputs and gradients, and a description of each tensor that is wrong."""
    got, want = run(op, sample, backend), run(op, doubled(sample), "reference")
    worst, problems = 0.0, []
    names = tensor_names(op, sample, len(got[0]))
    for name, a, b in zip(names, [*got[0], *got[1]], [*want[0], *want[1]], strict=False):
        if a.shape != b.shape:
            worst = float("inf")
            problems.append(f"{name} has shape {list(a.shape)}, not {list(b.shape)}")
            continue
        error = relative_error(a, b)
        # Horizon weights stay fp32 in an fp64 call, so their gradients are only fp32-accurate.
        if a.is_floating_point() and TOLERANCE[a.dtype] > TOLERANCE[dtype] and error <= TOLERANCE[a.dtype]:
            continue
        worst = max(worst, error)
        if not error <= TOLERANCE[dtype]:
            problems.append(
                f"{name}: relative error {error:.2e} is above {TOLERANCE[dtype]:.0e}, {largest_difference(a, b)}"
            )
    if len(got[0]) + len(got[1]) != len(want[0]) + len(want[1]):
        worst = float("inf")
        problems.append(f"{len(got[0])} outputs and {len(got[1])} gradients, not {len(want[0])} and {len(want[1])}")
    return worst, problems


def largest_difference(got: Tensor, want: Tensor) -> str:
    """The index and values at which two tensors of the same shape differ most."""
    got, want = got.double(), want.double()
    wrong = int((~got.isfinite()).sum())
    position = int((got - want).abs().nan_to_num(float("inf")).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(position), got.shape)]
    values = f"{got.flatten()[position].item():.4g} for {want.flatten()[position].item():.4g}"
    return f"at {index} of {list(got.shape)} {values}" + (f", {wrong} of {got.numel()} not finite" if wrong else "")


def median_seconds(work: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Median time of `work` over as many runs as fit the budget, at least three; one run if that alone exceeds it."""

    def once() -> float:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

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
        if not ABSENT[name]:
            here = "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"
            pairs.append((name, torch.device(here)))
    return pairs


def cases(ops: Sequence[str], backends: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """Every row that can run here, the ops of ORDER first."""
    rank = {name: i for i, name in enumerate(ORDER)}
    return [
        Case(name, backend, device, dtype)
        for name in sorted(ops, key=lambda name: rank.get(name, len(rank)))
        for backend, device in backends_of(OPS[name])
        for dtype in dtypes
        if backend in backends and (backend == "reference" or NAMED[dtype] in OPS[name].backends[backend].dtypes)
    ]


def check_row(case: Case) -> dict[str, Any]:
    """Test one case. A sample that fails is printed at once, and the next ones still run."""
    op, dtype = OPS[case.op], NAMED[case.dtype]
    torch.manual_seed(1)
    worst, count = 0.0, 0
    problems: list[str] = []
    failed: list[int] = []

    def report(problem: str) -> None:
        problems.append(problem)
        print(f"      {case}, {problem}", flush=True)

    try:
        for number, sample in enumerate(op.samples(dtype, case.device)):
            count = number + 1
            try:
                error, wrong = compare(op, case.backend, sample, dtype)
            except Exception as raised:  # A backend that raises fails its row; the check continues.
                error, wrong = float("inf"), [f"{type(raised).__name__}: {raised}"]
                print(traceback.format_exc(limit=-4), end="", flush=True)
            worst = max(worst, error)
            for problem in wrong:
                report(f"sample {number}: {problem}")
            if wrong:
                failed.append(number)
                if case.device.type == "cuda":
                    torch.cuda.synchronize()
    except Exception as raised:
        # After a GPU fault nothing on the GPU works in this process, not even the code that builds the samples.
        worst = float("inf")
        report(f"nothing runs after {count} samples: {type(raised).__name__}: {raised}")
    return row_of(case, worst, problems, f"{len(failed)} of {count} samples" if problems else "")


def row_of(case: Case, error: float, problems: Sequence[str], failed: str) -> dict[str, Any]:
    return {
        "op": case.op,
        "backend": case.backend,
        "device": str(case.device),
        "interpreted": case.interpreted,
        "dtype": case.dtype,
        "error": error,
        "tolerance": TOLERANCE[NAMED[case.dtype]],
        "passed": not problems,
        "failed": failed,
        "problem": problems[0] if problems else "",
        "problems": list(problems),
    }


def rows_here(chosen: Sequence[Case], measured: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """The rows of all cases, run in this process. bf16 kernels that pass are timed on devices with a measured roof."""
    for case in chosen:
        row = check_row(case)
        if row["passed"] and case.dtype == "bfloat16" and case.device.type in measured and not case.interpreted:
            try:
                row.update(timing(OPS[case.op], case.backend, case.device, measured[case.device.type], 0.5))
            except Exception as raised:  # A failure here, too, fails the row only.
                problem = f"it cannot be timed: {type(raised).__name__}: {raised}"
                print(f"      {case}, {problem}", flush=True)
                row = row_of(case, row["error"], [problem], "no sample")
        yield row


def rows_in_processes(chosen: Sequence[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of all cases as they finish. Each runs in its own process, because a GPU fault disables its process."""
    context = multiprocessing.get_context("spawn")
    waiting, running = list(chosen), dict[Connection, tuple[Any, Case]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send_row, args=(sender, case), daemon=True)
                process.start()
                sender.close()
                running[receiver] = process, case
            ready = wait(list(running))
            for receiver in [r for r in running if r in ready]:
                process, case = running.pop(receiver)
                try:
                    yield receiver.recv()
                except EOFError:
                    process.join()
                    problem = f"its process ended with exit code {process.exitcode}"
                    print(f"      {case}, {problem}", flush=True)
                    yield row_of(case, float("inf"), [problem], "all samples")
    finally:
        for process, _ in running.values():
            process.kill()


def _send_row(sender: Connection, case: Case) -> None:
    # Ctrl-C signals the whole process group, but the parent ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sender.send(check_row(case))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfwm_kernels.check", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="by default all that are present")
    parser.add_argument("--dtype", nargs="+", choices=list(NAMED), default=list(NAMED))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to FILE")
    parser.add_argument("--no-timing", action="store_true", help="values and gradients only")
    parser.add_argument("--jobs", type=int, metavar="N", help="run each row in its own process, N at a time, untimed")
    arguments = parser.parse_args()
    if arguments.jobs is not None and arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.jobs is not None and not arguments.no_timing:
        parser.error("--jobs needs --no-timing: parallel processes would slow each other down")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: {arguments.json.parent} is not a directory")
    # Like an interrupt: exit through `finally`, which prints the results so far.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    started = time.perf_counter()
    environment = info.environment()
    print(f"mfwm_kernels {environment['mfwm_kernels']}, torch {environment['torch']}, {environment['cpu']}", flush=True)
    absent = [name for name in arguments.backend or () if ABSENT[name]]
    for name in absent:
        print(f"FAIL  {name} is absent: {ABSENT[name]}", flush=True)
    chosen = cases(arguments.op, arguments.backend or BACKENDS, arguments.dtype)
    if not chosen and not absent:
        parser.error("nothing to check: no backend that is present serves these ops in these dtypes")
    devices = {case.device for case in chosen if not arguments.no_timing and not case.interpreted}
    measured = {device.type: roofs(device, 0.5) for device in devices}
    for device_type, roof in measured.items():
        print(
            f"roofs on {device_type}: copy {roof['bytes_per_s'] / 1e9:.1f} GB/s, "
            f"GEMM {roof['flops_per_s'] / 1e12:.2f} TFLOP/s"
        )
    rows: list[dict[str, Any]] = []
    try:
        for row in rows_in_processes(chosen, arguments.jobs) if arguments.jobs else rows_here(chosen, measured):
            rows.append(row)
            print(line_of(row), flush=True)
            if arguments.json:
                save(arguments.json, {"environment": environment, "roofs": measured, "rows": rows})
    finally:
        failed = [row for row in rows if not row["passed"]]
        for name in () if arguments.backend else BACKENDS:
            if ABSENT[name]:
                print(f"not checked: {name}, since {ABSENT[name]}")
        print(
            f"{len(rows) - len(failed)} passed, {len(failed)} failed, {len(chosen) - len(rows)} did not finish, "
            f"{time.perf_counter() - started:.0f} s"
        )
        for row in failed:
            print(f"FAILED {row['op']} on {row['backend']}, {row['dtype']}: {row['failed']}, {row['problem']}")
        finished = {(row["op"], row["backend"], row["dtype"]) for row in rows}
        for case in chosen:
            if (case.op, case.backend, case.dtype) not in finished:
                print(f"NOT FINISHED {case}", flush=True)
    sys.exit(bool(failed or absent))


def save(file: Path, results: dict[str, Any]) -> None:
    """Write beside FILE and rename, so that FILE is complete at any time."""
    partial = file.with_name(file.name + ".partial")
    rows = [{**row, "error": row["error"] if math.isfinite(row["error"]) else None} for row in results["rows"]]
    partial.write_text(json.dumps({**results, "rows": rows}, indent=2, allow_nan=False))
    partial.replace(file)


def line_of(row: dict[str, Any]) -> str:
    line = (
        f"{'PASS' if row['passed'] else 'FAIL'}  {row['op']:36} {row['backend']:10} {row['dtype']:9} "
        f"error {row['error']:.1e} (<= {row['tolerance']:.0e})" + (row["failed"] and f", {row['failed']} fail")
    )
    if "seconds" in row:
        line += (
            f"  {row['size']}: {row['seconds'] * 1e3:.3g} ms, {row['gb_per_s']:.1f} GB/s, "
            f"{row['tflop_per_s']:.2f} TFLOP/s, {row['share_of_roof']:.0%} of the roof"
        )
    return line


if __name__ == "__main__":
    main()
