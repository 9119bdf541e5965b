"""Plants known faults, one at a time, each in a fresh copy of the working tree, and reports which test catches it.

    python tests/planted_faults.py --kind kernel gradient --json faults.json
    python tests/planted_faults.py "the window is one action short"

A fault replaces a text that is found exactly once in its file; where that no longer holds, the program ends and names
the fault. Its tests run without it first, so that only the fault can make them fail. Faults in csrc/cpu are compiled,
for the baseline SIMD level alone; all others run with the compiled module of the tree. Exit status 1: a fault was
missed, or could not be judged.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import FAULTS, KINDS, Fault

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 900.0  # seconds for the tests of a fault; they take a few, or a minute where they compile csrc/cuda
TELLS = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.+?)?)(?: - (.*))?$", re.MULTILINE)


@dataclass
class Verdict:
    """What became of a fault: CAUGHT by a test, MISSED, or NOT JUDGED, and why."""

    fault: Fault
    status: str
    by: str = ""
    why: str = ""
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**self.fault._asdict(), "status": self.status, "by": self.by, "why": self.why, "seconds": self.seconds}

    def __str__(self) -> str:
        by = f" by {self.by}" if self.by else ""
        return f"{self.status:10} {self.fault.kind:10} {self.fault.name}{by} ({self.seconds:.0f} s)"


def check_texts(faults: Iterable[Fault], root: Path) -> None:
    """Every text is there once: else a fault would be planted elsewhere, or nowhere."""
    problems = []
    for name, times in Counter(fault.name for fault in faults).items():
        if times > 1:
            problems.append(f"{name}: {times} faults have this name")
    for fault in faults:
        file = root / fault.file
        found = file.read_text().count(fault.right) if file.is_file() else None
        if found != 1:
            where = f"{fault.file} does not exist" if found is None else f"found {found} times in {fault.file}"
            problems.append(f"{fault.name}: {where}: {fault.right!r}")
    if problems:
        raise SystemExit("faults whose text is not found exactly once:\n  " + "\n  ".join(problems))


class Place:
    """A folder for one fault after another: a fresh copy of the tree each time, and what the copies' C++ compiles to.

    The copies have one path, which the objects of tests/cuda_emulator are known by. Their C++ is compiled for one SIMD
    level, and with -O1 in a third of the time of -O3 unless `optimised`.
    """

    def __init__(self, folder: Path, root: Path, simd: str = "baseline", *, optimised: bool = False) -> None:
        self.root, self.tree, self.sources, self.build = root, folder / "tree", folder / "sources", folder / "build"
        self.simd, self.optimised = simd, optimised
        self.emulator = folder / "emulator"
        self.emulator.mkdir(parents=True)

    def fresh(self, fault: Fault | None = None, *, compiled: bool) -> None:
        """A new copy, with a fault in it; `compiled`: with its own module."""
        shutil.rmtree(self.tree, ignore_errors=True)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=self.root, check=True, capture_output=True, text=True).stdout.split("\0")
        modules = [] if compiled else (self.root / "mfwm_kernels").glob("_native*.so")
        for name in {*names, *(str(module.relative_to(self.root)) for module in modules)} - {""}:
            if (self.root / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.root / name, self.tree / name)
        (self.tree / "build").mkdir()
        (self.tree / "build" / "cuda_emulator").symlink_to(self.emulator)
        if fault is not None:
            file = self.tree / fault.file
            file.write_text(file.read_text().replace(fault.right, fault.wrong))
        if compiled:
            self.compile()

    def compile(self) -> None:
        """Compile the copy's module. What differs from the copy compiled before is compiled again."""
        self.configure()
        self.run("cmake", "--build", self.build)
        for module in self.build.glob("_native*.so"):
            shutil.copy2(module, self.tree / "mfwm_kernels")

    def configure(self) -> None:
        """Bring `sources` up to date with the copy, and run CMake on them."""
        import pybind11

        # CMake hashes the stub.
        others = (self.tree / "CMakeLists.txt", self.tree / "mfwm_kernels" / "_native.pyi")
        for path in [*others, *(p for p in (self.tree / "csrc").rglob("*") if p.is_file())]:
            text = path.read_text()
            if path.name == "CMakeLists.txt" and not self.optimised:
                text = text.replace("-O3", "-O1")
            known = self.sources / path.relative_to(self.tree)
            if not known.exists() or known.read_text() != text:
                known.parent.mkdir(parents=True, exist_ok=True)
                known.write_text(text)
        self.run(
            *("cmake", "-S", self.sources, "-B", self.build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            *("-DMFWM_CUDA=OFF", f"-DMFWM_SIMD={self.simd}", f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.build}"),
        )

    def run(self, *command: str | Path) -> None:
        """Run CMake; RuntimeError with the end of what it prints if it fails."""
        import cmake
        import ninja

        environment = {**os.environ, "PATH": os.pathsep.join([cmake.CMAKE_BIN_DIR, ninja.BIN_DIR, os.environ["PATH"]])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the module does not build: {(done.stderr or done.stdout).strip()[-2000:]}")

    def python(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Exit status and output of a Python that imports the copy's packages; TimeoutError if it takes too long."""
        paths = [str(self.tree), str(self.tree / "python")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            # Python knows a .pyc by the time and size of its source, and the next copy may have the same of both.
            "PYTHONDONTWRITEBYTECODE": "1",
            # Loading pytest's plugins takes a second, and no test needs one.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "COLUMNS": "400",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=self.tree, env=environment, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"not done after {LONGEST:.0f} s") from error
        finally:
            # What the tests have started ends with them.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        return process.returncode, output

    def tested(self, tests: str) -> tuple[str, str]:
        """The first test that fails, and why; empty where all pass. RuntimeError where none was run."""
        pytest = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=short"]
        status, output = self.python([*pytest, *shlex.split(tests)])
        if status < 0:
            return tests, f"ended by signal {-status}"
        told = TELLS.search(output)
        if status == 0 and re.search(r"\b\d+ passed", output):
            return "", ""
        if status == 1 and told:
            return told[1], told[2] or ""
        raise RuntimeError(f"pytest {tests} left with {status}: {output.strip()[-1000:]}")

    def origins(self) -> list[str]:
        """The files of the packages that a copy's tests import: those of the copy, or RuntimeError."""
        code = (
            "import importlib.util as i\n"
            "for name in ('mfwm_kernels', 'mfwm', 'mfwm_kernels._native'):\n"
            "    print('FILE', i.find_spec(name).origin)\n"
        )
        status, output = self.python(["-c", code])
        files = [line.removeprefix("FILE ") for line in output.splitlines() if line.startswith("FILE ")]
        if status or len(files) != 3 or not all(Path(file).is_relative_to(self.tree) for file in files):
            raise RuntimeError(f"the copy's packages must be imported, got:\n{output}")
        return files


def judge(
    faults: Sequence[Fault], root: Path, folder: Path, *, jobs: int = 1, say: Callable[[str], object] = print
) -> Iterator[Verdict]:
    """Plant each fault in a copy of `root` below `folder`, and run its tests, which must pass without it."""
    check_texts(faults, root)
    places: queue.Queue[Place] = queue.Queue()
    for number in range(jobs):
        places.put(Place(folder / str(number), root))

    def run(fault: Fault, *, planted: bool) -> Verdict:
        place, began = places.get(), time.monotonic()
        verdict = Verdict(fault, "MISSED")
        try:
            place.fresh(fault if planted else None, compiled=fault.is_compiled)
            verdict.by, verdict.why = place.tested(fault.tests)
            if verdict.by:
                verdict.status = "CAUGHT"
        except (RuntimeError, TimeoutError) as error:
            verdict.status, verdict.why = "NOT JUDGED", str(error)
        finally:
            places.put(place)
        verdict.seconds = round(time.monotonic() - began, 1)
        return verdict

    def needs(fault: Fault) -> tuple[str, bool]:
        return fault.tests, fault.is_compiled

    with ThreadPoolExecutor(jobs) as pool:
        distinct = {needs(fault): fault for fault in faults}
        say(f"{len(distinct)} selections of tests without a fault")
        unsound: dict[tuple[str, bool], str] = {}
        for alone in pool.map(lambda fault: run(fault, planted=False), distinct.values()):
            if alone.status != "MISSED":
                unsound[needs(alone.fault)] = f"its tests fail without it: {alone.by} {alone.why}"
            state = "fails" if needs(alone.fault) in unsound else "passes"
            say(f"  {state}: {alone.fault.tests} ({alone.seconds:.0f} s)")
        say(f"{len(faults)} faults")

        def verdict_on(fault: Fault) -> Verdict:
            if needs(fault) in unsound:
                return Verdict(fault, "NOT JUDGED", why=unsound[needs(fault)])
            return run(fault, planted=True)

        yield from pool.map(verdict_on, faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; all by default")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--jobs", type=int, default=1, help="faults at once, each of which compiles for itself")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="name the faults and run nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - {fault.name for fault in FAULTS}:
        parser.error(f"no fault has the name {', '.join(sorted(unknown))}; --list names them")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    faults = [f for f in FAULTS if f.kind in args.kind and (not args.names or f.name in args.names)]
    if args.list:
        for fault in faults:
            print(f"{fault.kind:10} {fault.name}: {fault.file}, by {fault.tests}")
        return
    check_texts(FAULTS, ROOT)
    if not list((ROOT / "mfwm_kernels").glob("_native*.so")):
        parser.error("the tree has no compiled module: make setup first")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        first = Place(Path(folder) / "origins", ROOT)
        first.fresh(compiled=False)
        print("copies import", *first.origins(), sep="\n  ", flush=True)
        verdicts = []
        for verdict in judge(faults, ROOT, Path(folder), jobs=args.jobs, say=lambda line: print(line, flush=True)):
            verdicts.append(verdict)
            print(f"  {verdict}" + (f"\n    {verdict.why}" if verdict.status == "NOT JUDGED" else ""), flush=True)
            if args.json is not None:
                rows = [v.row() for v in verdicts]
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    counts = Counter(verdict.status for verdict in verdicts)
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"in {time.monotonic() - began:.0f} s")
    raise SystemExit(0 if set(counts) <= {"CAUGHT"} else 1)


if __name__ == "__main__":
    main()
