"""python -m benchmarks: time every op and its rivals, growing inputs, training steps and rollouts.

Results are written to benchmarks/results/<device>.json after every size, so an interrupted run loses only one; a second
run replaces the rows that it measures again. The exit status is 1 if one of our contenders fails or is wrong.
`python -m benchmarks.report` writes the tables and pictures.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mfwm_kernels.op import OPS

from . import bench_ops, bench_rollout, bench_scaling, bench_train, measure

RESULTS = Path(__file__).parent / "results"
LINES = {
    "ops": bench_ops.line_of,
    "scaling": bench_scaling.line_of,
    "train": bench_train.line_of,
    "rollout": bench_rollout.line_of,
}
# The contenders of ops and of training steps.
CONTENDERS = tuple(dict.fromkeys((*bench_ops.CONTENDERS, *bench_train.CONTENDERS)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=tuple(LINES))
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP")
    parser.add_argument("--size", nargs="+", metavar="SIZE", help="by default all sizes for the device")
    parser.add_argument("--dtype", nargs="+", choices=list(bench_ops.DTYPES), default=list(bench_ops.DTYPES))
    parser.add_argument(
        "--contender", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of measuring per contender and size")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="let glibc return memory; saved in <device>-default-allocator.json, shown next to the others",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="by default benchmarks/results/<device>.json")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.default_allocator and measure.allocator() != "default":
        parser.error(f"--default-allocator: {', '.join(measure.ALLOCATOR)} must not be set")
    if device.type == "cpu" and not arguments.default_allocator:
        measure.keep_blocks()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    name = slug(measure.device_name()) + (measure.DEFAULT_ALLOCATOR if arguments.default_allocator else "")
    out = arguments.out or RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{measure.device_name()}; results in {out}")
    counts = {"passed": 0, "failed": 0, "absent": 0}
    wrong = False
    for table, rows_of in work(arguments, device):
        rows = []
        try:
            for row in rows_of():
                rows.append(row)
                print(LINES[table](row), flush=True)
                status = row.get("status", "ok")
                counts["passed" if status == "ok" else "absent" if status.startswith("absent") else "failed"] += 1
                wrong |= status != "ok" and row["contender"].startswith("mfwm")
        finally:
            save(out, table, rows)
        bench_ops.release(device)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    sys.exit(wrong)


def work(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Callable[[], Iterator[Any]]]]:
    """Yield (table, function that measures rows of it)."""
    chosen = arguments.contender or CONTENDERS
    if arguments.only in (None, "ops"):
        for name in arguments.op:
            op = OPS[name]
            sizes = arguments.size or bench_ops.sizes_of(op, device)
            for size, dtype in itertools.product([s for s in sizes if s in op.bench], arguments.dtype):
                measured = functools.partial(bench_ops.measure, op, size, dtype, device, arguments.budget, chosen)
                yield "ops", measured
    if arguments.only == "scaling" or (arguments.only is None and not arguments.size):
        for axis, dtype in itertools.product(bench_scaling.AXES, arguments.dtype):
            measured = functools.partial(bench_scaling.measure, axis, dtype, device, arguments.budget / 4)
            yield "scaling", measured
    if arguments.only in (None, "train"):
        for size in arguments.size or bench_train.sizes_of(device):
            if size in bench_train.SIZES:
                stepped = [name for name in bench_train.CONTENDERS if name in chosen]
                measured = functools.partial(bench_train.measure, size, device, arguments.budget, stepped)
                yield "train", measured
    if arguments.only == "rollout" or (arguments.only is None and not arguments.size):
        yield "rollout", functools.partial(bench_rollout.measure, device, arguments.budget / 4)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("op", "size", "dtype", "contender") if name in row)


def save(file: Path, table: str, rows: list[dict[str, Any]]) -> None:
    """Replace rows of the same key, and leave the rest of the file unchanged. Each row names its commit."""
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"ops": [], "train": []}
    results["environment"] = measure.environment()
    stamp = {"commit": results["environment"]["commit"], "date": results["environment"]["date"]}
    new = {key_of(row): {**row, **stamp} for row in rows}
    old = [row for row in results.get(table, []) if key_of(row) not in new]
    results[table] = [*old, *new.values()]
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(file)


if __name__ == "__main__":
    main()
