"""python -m mfwm_kernels.info [--json]: what is installed, and which backend serves which op."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
from typing import Any

import torch

from . import __version__, native
from .arguments import names
from .backends import ABSENT, BACKENDS, INTERPRETED, forced, is_candidate
from .dtypes import multiplies_bf16
from .op import OPS


def environment() -> dict[str, Any]:
    """Versions and devices, as every results file records them."""
    triton = None
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("triton").__version__
    return {
        "mfwm_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "triton_interpreter": INTERPRETED,
        "native": None if native.module is None else native.module.build_info,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cpu": cpu_name(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cpu_multiplies_bf16": multiplies_bf16(),
        "threads": torch.get_num_threads(),
        "forced_backend": forced(),
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def ops() -> dict[str, dict[str, Any]]:
    """For each op: every backend's kernels, dtypes and reason for its absence, and the backend that `auto` takes."""
    table: dict[str, dict[str, Any]] = {}
    for op in OPS.values():
        backends: dict[str, Any] = {"reference": {"kernels": [], "dtypes": "all", "absent": ""}}
        for name, backend in op.backends.items():
            backends[name] = {
                "kernels": list(backend.kernels),
                "dtypes": names(backend.dtypes),
                "absent": ABSENT[name],
            }
        auto = {
            device: next((name for name in op.backends if is_candidate(name, device)), "reference")
            for device in ("cpu", "cuda")
        }
        table[op.name] = {"backends": backends, "auto": auto}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mfwm_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps({"environment": environment(), "ops": ops()}, indent=2))
        return
    for key, value in environment().items():
        print(f"{key:20} {value}")
    print()
    width = max(map(len, OPS))
    print(f"{'op':{width}}  {'auto on cpu':12} {'auto on cuda':12}  backends")
    for name, row in ops().items():
        listed = ", ".join(b + ("" if not r["absent"] else " (absent)") for b, r in row["backends"].items())
        print(f"{name:{width}}  {row['auto']['cpu']:12} {row['auto']['cuda']:12}  {listed}")
    for backend in BACKENDS:
        if ABSENT[backend]:
            print(f"\n{backend} is absent: {ABSENT[backend]}")


if __name__ == "__main__":
    main()
