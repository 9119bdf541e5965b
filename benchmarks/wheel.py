"""One wheel beside several versions of torch: python -m benchmarks.wheel WHEEL --python PYTHON ... [--out FILE]

Each PYTHON is the interpreter of an environment with torch and numpy, such as /tmp/torch-2.11/bin/python. The wheel is
installed into a folder of its own, so the environments stay as they are. In each of them it runs the self-check on
every op, measures what the import costs beyond torch's, looks for a second OpenMP runtime, and trains
examples/engines/torchrun_ddp.py in two processes. Where a result is not as it should be, the exit status is 1.

`auditwheel show` (pip install auditwheel) says which platforms the wheel is for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "engines" / "torchrun_ddp.py"
# CPU time, because other programs on the machine lengthen any other.
IMPORTS = """
import json, time
start = time.process_time()
import torch
between = time.process_time()
import mfwm_kernels
print(json.dumps([between - start, time.process_time() - between]))
"""
VERSIONS = """
import importlib.util, json, platform, numpy, torch
from mfwm_kernels import info, native
build = native.module.build_info if native.module else None
triton = importlib.util.find_spec("triton") and __import__("triton").__version__
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "numpy": numpy.__version__, "triton": triton, "cpu": info.cpu_name(), "native": build}))
"""
# The OpenMP runtimes in the process, and the threads that a call of a kernel adds at each torch.set_num_threads.
OPENMP = """
import json, os, re, torch
from mfwm_kernels import use_backend, video_pyramid
video = torch.zeros(8, 16, 3, 64, 64, dtype=torch.uint8)
threads = []
before = len(os.listdir("/proc/self/task"))
for count in (1, 3):
    torch.set_num_threads(count)
    with use_backend("cpu"):
        video_pyramid(video, (1, 2, 4, 8))
    threads.append(len(os.listdir("/proc/self/task")) - before)
paths = {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(g|i|)omp\\d?[.-][^/]*$", line)}
print(json.dumps({"runtimes": sorted("/".join(path.split("/")[-3:]) for path in paths), "added_threads": threads}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheel", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", required=True, metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "wheel.json")
    parser.add_argument("--times", type=int, default=5, help="runs of which the median import is taken")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"date": datetime.date.today().isoformat(), "wheel": wheel(arguments.wheel)}
    print(json.dumps(results["wheel"], indent=2), flush=True)
    results["environments"] = []
    for python in arguments.python:
        results["environments"].append(environment(python, arguments.wheel, arguments.times))
        print(json.dumps(results["environments"][-1], indent=2), flush=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    failed = [problem for found in results["environments"] for problem in problems(found)]
    for problem in failed:
        print(f"FAILED {problem}")
    sys.exit(bool(failed))


def wheel(path: Path) -> dict[str, Any]:
    """What the file says of itself, and what auditwheel says of its compiled module."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    shown = " ".join(run([sys.executable, "-m", "auditwheel", "show", str(path)]).split())
    tag = re.search(r'constrains the platform tag to "([^"]+)"', shown) or re.search(r'platform tag: "([^"]+)"', shown)
    symbols: dict[str, str] = {}
    for kind, version in re.findall(r"'([A-Z]+)_(\d[\d.]*)'", shown):
        symbols[kind] = max(symbols.get(kind, "0"), version, key=lambda text: [int(part) for part in text.split(".")])
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "installed_bytes": sum(entry.file_size for entry in entries),
        "native_bytes": sum(entry.file_size for entry in entries if entry.filename.endswith(".so")),
        "platform_tag": tag[1] if tag else None,
        "libraries": sorted(set(re.findall(r"lib[\w+-]+\.so[.\d]*", shown))),
        "newest_symbols": dict(sorted(symbols.items())),
    }


def environment(python: str, path: Path, times: int) -> dict[str, Any]:
    """What the wheel does in the environment of an interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        site, report = Path(folder) / "site", Path(folder) / "check.json"
        run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(path)])
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONPYCACHEPREFIX")}
        variables = {**inherited, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

        def at(*command: str) -> str:
            return run([python, *command], env=variables, cwd=folder)

        result = json.loads(at("-c", VERSIONS))
        imports = [json.loads(at("-c", IMPORTS)) for _ in range(times)]
        result["torch_import_s"] = round(statistics.median(pair[0] for pair in imports), 4)
        result["import_s"] = round(statistics.median(pair[1] for pair in imports), 4)
        result["openmp"] = json.loads(at("-c", OPENMP))
        at("-m", "mfwm_kernels.check", "--no-timing", "--json", str(report))
        rows = json.loads(report.read_text())["rows"]
        passed = sum(row["passed"] for row in rows)
        result["check"] = {"passed": passed, "failed": len(rows) - passed}
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        losses = re.findall(r"loss (\d\.\d+)", at(*launch, str(EXAMPLE), "--steps", "30"))
        result["ddp_losses"] = [float(losses[0]), float(losses[-1])]
    return result


def problems(found: dict[str, Any]) -> list[str]:
    """What is not as it should be in an environment."""
    where, openmp, losses = f"torch {found['torch']}", found["openmp"], found["ddp_losses"]
    return [
        f"{where}: {problem}"
        for problem, wrong in {
            "the compiled module did not load": found["native"] is None,
            f"self-check: {found['check']}": found["check"]["failed"] > 0 or found["check"]["passed"] == 0,
            f"OpenMP: {openmp}": len(openmp["runtimes"]) != 1 or openmp["added_threads"] != [0, 2],
            f"the losses did not fall: {losses}": losses[1] >= losses[0],
        }.items()
        if wrong
    ]


def run(command: list[str], **options: Any) -> str:
    """The output of a command. Exits with its errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
