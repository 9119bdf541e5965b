"""Compiles csrc/cpu for one SIMD level after another, and runs the tests of the ops on each.

    python tests/simd_levels.py               every level that this CPU runs
    python tests/simd_levels.py baseline v3

The module that is installed has all levels and runs the highest that the CPU has, so its tests see no other. Compiling
takes up to a minute for a level, and the tests take about as long. Exit status 1: a level does not build, or a test
failed on it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from planted_faults import ROOT, Place

LEVELS = {"baseline": "DEFAULT", "v3": "AVX2", "v4": "AVX512"}
TESTS = "tests/test_ops.py tests/ops -k 'cpu and not compile'"


def levels_of(capability: str) -> list[str]:
    """The levels that a CPU runs whose highest is `capability`, as torch names it."""
    if capability not in LEVELS.values():
        return ["baseline"]
    return list(LEVELS)[: list(LEVELS.values()).index(capability) + 1]


def outcome(level: str, folder: Path) -> str:
    """Which test of the ops fails on this level and why, or ''. RuntimeError if it does not build."""
    place = Place(folder, ROOT, level, optimised=True)
    place.fresh(compiled=True)
    status, output = place.python(["-c", "from mfwm_kernels import native; print(native.module.build_info['simd'])"])
    if status or output.split()[-1:] != [level]:
        raise RuntimeError(f"the copy must import a module of {level}, got: {output.strip()[-500:]}")
    test, why = place.tested(TESTS)
    return f"{test}: {why}" if test else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    supported = levels_of(torch.backends.cpu.get_cpu_capability())
    parser.add_argument("levels", nargs="*", metavar="LEVEL", help=f"of {', '.join(supported)}")
    levels = parser.parse_args().levels or supported
    if unknown := [level for level in levels if level not in supported]:
        parser.error(f"levels must be of those that this CPU runs, {', '.join(supported)}; got {', '.join(unknown)}")
    failures = 0
    for level in levels:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="simd-levels-") as folder:
            try:
                failure = outcome(level, Path(folder))
            except (RuntimeError, TimeoutError) as error:
                failure = str(error)
        failures += bool(failure)
        print(f"{level}: {failure or 'passed'} ({time.monotonic() - began:.0f} s)", flush=True)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
