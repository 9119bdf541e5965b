"""python -m mfwm_kernels.aot [--arch sm_80 sm_90 sm_100] [--json FILE]: compile every GPU kernel, without a GPU.

With --report [FILE] it prints instead what each kernel costs on an H200 at the benchmark sizes, by its machine code,
and with --compare FILE what got worse since a report was written to FILE (mfwm_kernels.aot_report, docs/gpu.md).

Compiles everything that the launchers of each op launch (mfwm_kernels.launches), once for each of Triton's
specialisations; with --fewer, once for each set of constants and dtypes, whatever is aligned, which are half as many. A
row fails if a kernel does not compile, spills registers, needs more shared memory than the GPU has, or overwrites a
tile that a dot still reads (mfwm_kernels.pipelines). Registers, local and shared memory are read from the cubin; for
CUDA C++ kernels, from the compiled module if it was built with nvcc. The exit status is 1 if a row fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from . import aot_report, native
from .aot_compile import Variant, compile_for, key_of, processes, resources, use
from .check import DTYPES, NAMED
from .cubins import name_of, resource_usage, usage_of
from .launches import Pointer, calls, recorded
from .op import OPS, Op
from .pipelines import races

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# The most shared memory of a block in bytes, from the CUDA programming guide.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def variants(
    ops: Sequence[Op], dtypes: Sequence[torch.dtype] = DTYPES, architecture: str = "sm_90", fewer: bool = False
) -> list[Variant]:
    """The launches of calls of `ops` in these dtypes, one for each key by which Triton specialises. If `fewer`, one for
    each set of constants and dtypes."""
    use(architecture)
    found: dict[Any, Variant] = {}
    for op in ops:
        for call in calls(op):
            for launch in recorded(call) if call.dtype in dtypes else ():
                function = launch.kernel.fn
                name = (function.__module__, function.__name__)
                variant = Variant(op.name, call.name, name, launch.given, launch.constants)
                key = config_of(launch.given, launch.constants) if fewer else key_of(launch)
                found.setdefault((name, key), variant)
    return list(found.values())


def compiled_row(architecture: str, variant: Variant) -> dict[str, Any]:
    row = row_of(architecture, variant)
    try:
        compiled = compile_for(architecture, variant)
        return judged({**row, **resources(compiled)}, races(compiled.asm["ttgir"]))
    except Exception as raised:  # A kernel that does not compile fails its row; the run continues.
        return {**row, "problem": f"{type(raised).__name__}: {' '.join(str(raised).split())}"}


def row_of(architecture: str, variant: Variant) -> dict[str, Any]:
    config = config_of(variant.given, variant.constants)
    return {"kernel": variant.kernel[1], "op": variant.op, "arch": architecture, "call": variant.call, "config": config}


def judged(row: dict[str, Any], raced: Sequence[str]) -> dict[str, Any]:
    """The row with its problem, or '' if it has none."""
    problems = list(raced)
    if row["local_bytes"]:
        problems.append(f"spills {row['local_bytes']} bytes")
    if row["shared_bytes"] > SHARED_BYTES[row["arch"]]:
        problems.append(f"needs {row['shared_bytes']} bytes of shared memory, a block has {SHARED_BYTES[row['arch']]}")
    return {**row, "problem": "; ".join(problems)}


def compiled_rows(found: Sequence[tuple[str, Variant]], jobs: int) -> Iterator[dict[str, Any]]:
    """A row for each architecture and variant, compiled in `jobs` processes."""
    remaining = list(found)
    while remaining:
        finished = 0
        with processes(jobs) as pool:
            rows = [pool.submit(compiled_row, *arguments) for arguments in remaining]
            for row, arguments in zip(rows, remaining, strict=True):
                finished += 1
                try:
                    yield row.result()
                except BrokenProcessPool:
                    # A crash of the compiler breaks the pool. Retry this variant alone, to see if it is to blame.
                    yield compiled_alone(*arguments)
                    break
        remaining = remaining[finished:]


def compiled_alone(architecture: str, variant: Variant) -> dict[str, Any]:
    with processes(1) as pool:
        try:
            return pool.submit(compiled_row, architecture, variant).result()
        except BrokenProcessPool:
            return {**row_of(architecture, variant), "problem": "the compiler ended its process"}


def cuda_rows(architecture: str) -> Iterator[dict[str, Any]]:
    """The CUDA C++ kernels in the compiled module. Their shared memory excludes what a launch may add."""
    if native.module is None or not native.module.has_cuda:
        return
    found = function = ""
    for line in resource_usage(Path(native.module.__file__ or "")):
        if line.startswith("arch = "):
            found = line.removeprefix("arch = ").strip()
        elif line.strip().startswith("Function "):
            function = line.split()[1].rstrip(":")
        elif "REG:" in line and found == architecture:
            source, kernel, arguments = name_of(function)
            row = {"kernel": kernel, "op": source, "arch": architecture, "call": "", "config": arguments}
            yield judged({**row, **usage_of(line)}, [])


def config_of(given: tuple[Any, ...], constants: dict[str, Any]) -> str:
    """The dtypes, then the constants: enough to distinguish most compilations of a kernel."""
    dtypes = sorted({str(pointer.dtype).removeprefix("torch.") for pointer in pointers_of(given)})
    return " ".join([*dtypes, *(f"{name}={value}".replace(" ", "") for name, value in constants.items())])


def pointers_of(value: Any) -> list[Pointer]:
    if isinstance(value, tuple):
        return [pointer for entry in value for pointer in pointers_of(entry)]
    return [value] if isinstance(value, Pointer) else []


def line_of(row: dict[str, Any]) -> str:
    dtypes = " ".join(word for word in row["config"].split() if "=" not in word)
    used = "".join(f"{row.get(name, ''):>10}" for name in ("registers", "local_bytes", "shared_bytes"))
    return f"{row['kernel']:36} {row['arch']:7} {row['call']:30} {dtypes:30}{used} {row['problem'][:60]}".rstrip()


def reported(ops: Sequence[Op], arguments: argparse.Namespace) -> int:
    dtypes = [name for name, dtype in aot_report.DTYPES.items() if str(dtype).removeprefix("torch.") in arguments.dtype]
    return aot_report.main(
        ops, arguments.backend, arguments.size or (), dtypes, arguments.jobs, arguments.report, arguments.compare or ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfwm_kernels.aot", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, metavar="ARCH")
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=list(OPS), metavar="OP")
    parser.add_argument("--dtype", nargs="+", default=list(NAMED), choices=list(NAMED), metavar="DTYPE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="number of compiling processes")
    parser.add_argument("--fewer", action="store_true", help="compile each set of constants and dtypes once")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument(
        "--report", nargs="?", const="", metavar="FILE", help="what each kernel costs; write it to FILE"
    )
    parser.add_argument("--compare", metavar="FILE", help="with --report: fail on what is worse than in FILE")
    parser.add_argument("--size", nargs="+", metavar="SIZE", help="with --report: these sizes only")
    backends = ["triton", "cuda"]
    parser.add_argument("--backend", nargs="+", default=backends, choices=backends, help="with --report: these only")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET must not be 1: the interpreter compiles nothing")
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be >= 1, got {arguments.jobs}")

    chosen = [op for op in OPS.values() if op.name in arguments.op]
    if arguments.report is not None:
        sys.exit(reported([op for op in chosen if "triton" in op.backends], arguments))
    served, dtypes = [op for op in chosen if "triton" in op.backends], [NAMED[name] for name in arguments.dtype]
    found = [
        (architecture, variant)
        for architecture in arguments.arch
        for variant in variants(served, dtypes, architecture, arguments.fewer)
    ]
    compiled = compiled_rows(found, arguments.jobs)
    built = (row for arch in arguments.arch for row in cuda_rows(arch) if row["op"] in arguments.op)
    rows = []
    print(f"{'kernel':36} {'arch':7} {'call':30} {'dtypes':30} registers     local    shared (bytes)")
    for row in itertools.chain(compiled, built):
        rows.append(row)
        print(line_of(row), flush=True)
    failed = [row for row in rows if row["problem"]]
    for row in failed:
        where = f"{row['kernel']} of {row['op']} on {row['arch']}"
        print(f"FAILED {where}, {row['call']}: {row['problem']} ({row['config']})")
    spilling = sum(row.get("local_bytes", 0) > 0 for row in rows)
    print(f"{len(rows)} compiled, {len(failed)} failed, {spilling} spill")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=2)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
