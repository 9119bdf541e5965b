"""benchmarks/gpu_all.sh check|bench OUT_DIR: check and measure the kernels on a GPU, in a few minutes each.

    check   builds, runs every sample on the Triton and CUDA kernels, then tests/test_gpu.py: 200 s at most
    bench   builds, times our ops and rivals, profiles the main kernels, saves the compiled caches: 420 s at most

DEADLINE=SECONDS in the environment sets another limit. The most important stages run first. All output is printed and
written to OUT_DIR immediately, so a killed run loses no result; summary.txt says for every stage whether it was ok,
failed, was cut off or was skipped, and why. The exit status is 1 if a stage failed or was cut off.

Needs Python with torch, Triton, numpy, pytest and pybind11, and cmake, ninja and a C++ compiler on the PATH; nvcc too
if there are no prebuilt objects (make prebuild). Builds in build/gpu. Without a GPU it runs the stages that a CPU can.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD, PREBUILT = ROOT / "build" / "gpu", ROOT / "build" / "prebuilt"
DEADLINES = {"check": 200, "bench": 420}
OPS = ("multi_horizon_loss", "multi_horizon_linear_cross_entropy", "multi_horizon_linear", "fan_out", "video_pyramid")
STEP = "training step"
CACHES = ("triton", "inductor")
# Some GPU services return at most 8 files of 16 MiB, and bench writes six besides these.
PART, PARTS = 15 << 20, 2
# Seconds after SIGINT until a process that still runs is killed.
GRACE = 10
# Parallel processes of aot and check.
JOBS = str(max(1, (os.cpu_count() or 1) - 2))
# How every stage starts Python.
PYTHON = [sys.executable, "-m"]
# Triton keys a compiled kernel by a hash of: libtriton.so and Triton's own sources; the source of the kernel and of the
# functions that it calls; types, constants and divisibility of the arguments; warps, stages and other options;
# architecture, ptxas and libdevice; and the variables TRITON_* that change code. So launches in later processes find
# what mfwm_kernels.aot compiles on this machine for this architecture, but nothing that another Python's Triton
# compiled. Cache entries list their files by absolute path, so a copied cache works only at the same path.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "PYTHONUNBUFFERED": "1",
    "TRITON_CACHE_DIR": str(BUILD / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor"),
}


class Stage:
    """A running command. Its output goes line by line to its log and, unless it is quiet, to the terminal."""

    def __init__(self, run: Run, name: str, log: str, seconds: float, command: Sequence[str], quiet: bool) -> None:
        self.run, self.name, self.log, self.quiet = run, name, run.out / log, quiet
        self.started = self.ended = time.monotonic()
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            # timeout runs it in its own process group, and signals the group.
            ["timeout", "--signal=INT", f"--kill-after={GRACE}", f"{seconds:.0f}", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            text=True,
            errors="replace",
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.log.open("a") as log:
            for line in self.process.stdout:
                self.lines.append(line)
                # One write per line, because parallel stages share a log.
                log.write(f"{self.name}: {line}")
                log.flush()
                if not self.quiet:
                    print(f"{self.name}: {line}", end="", flush=True)
        self.ended = time.monotonic()

    def finish(self) -> None:
        """Wait until the command ends, and report how it ended."""
        code = self.process.wait()
        # A descendant that outlives the killed process may hold the pipe open.
        self.reader.join(GRACE)
        self.run.stages.remove(self)
        # The exit codes of timeout: after SIGINT, and after it had to kill.
        cut_off = code in (124, 128 + signal.SIGKILL, -signal.SIGKILL)
        how = "ok" if code == 0 else "cut off" if cut_off else f"failed, exit {code},"
        results = [line.strip() for line in self.lines if re.search(r"\d+ (passed|failed|skipped|compiled)\b", line)][
            -1:
        ]
        if not results and how.startswith("failed"):
            results = [line.strip() for line in self.lines if line.strip()][-1:]
        self.run.say(
            f"{self.name}: {how} after {self.ended - self.started:.0f} s{''.join(f': {result}' for result in results)}"
        )
        self.run.failed |= code != 0
        if code != 0 and self.quiet:
            print("".join(self.lines[-30:]), end="", flush=True)


class Run:
    """Runs the stages of one command within its deadline."""

    def __init__(self, out: Path, deadline: float) -> None:
        self.out, self.ends = out, time.monotonic() + deadline
        self.failed = False
        self.stages: list[Stage] = []
        out.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        print(line, flush=True)
        with (self.out / "summary.txt").open("a") as summary:
            summary.write(line + "\n")

    def skip(self, name: str, why: str) -> None:
        self.say(f"{name}: skipped, {why}")

    def start(
        self, name: str, log: str, seconds: float, command: Sequence[str], quiet: bool = False
    ) -> Iterator[Stage]:
        """Start a stage with a limit of `seconds` and the deadline, and yield it; yield nothing if no time is left."""
        seconds = min(seconds, self.ends - time.monotonic() - GRACE)
        if seconds < 5:
            self.say(f"{name}: not run, the time is up")
            self.failed = True
            return
        self.stages.append(Stage(self, name, log, seconds, command, quiet))
        yield self.stages[-1]

    def stage(self, name: str, log: str, seconds: float, command: Sequence[str]) -> None:
        for stage in self.start(name, log, seconds, command):
            stage.finish()

    def together(self, log: str, seconds: float, commands: Mapping[str, Sequence[str]], quiet: bool = False) -> None:
        """Run commands in parallel, each in its own process, because a GPU fault ends all work of its process."""
        for stage in [s for name, command in commands.items() for s in self.start(name, log, seconds, command, quiet)]:
            stage.finish()

    def stop(self, why: str) -> None:
        for stage in list(self.stages):
            stage.process.terminate()
        for stage in list(self.stages):
            stage.reader.join(GRACE / 5)
            self.say(f"{stage.name}: {why} after {time.monotonic() - stage.started:.0f} s")


def gpu() -> tuple[str, str]:
    """The driver's description of the first GPU, and its architecture such as "90"; empty strings without a GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "", ""
    return found, found.rsplit(",", 1)[1].strip().replace(".", "")


def prebuilt(architecture: str) -> str:
    """Why the objects of `make prebuild` cannot be used, or ''."""
    if not (PREBUILT / "sources").exists():
        return "there are none"
    if f'"{architecture}"' not in (PREBUILT / "objects.cmake").read_text():
        return f"they are not for sm_{architecture}"
    same = subprocess.run(["sha256sum", "--check", "--status", PREBUILT / "sources"], cwd=ROOT).returncode == 0
    return "" if same else "csrc or CMakeLists.txt has changed since"


def build_command(architecture: str, objects: str) -> list[str]:
    configure = [
        *("cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DMFWM_CUDA=ON"),
        *(f"-DCMAKE_CUDA_ARCHITECTURES={architecture}", f"-DMFWM_PREBUILT={objects}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'mfwm_kernels'}"),
    ]
    pybind = f'-Dpybind11_DIR="$({shlex.join([*PYTHON, "pybind11", "--cmakedir"])})"'
    steps = [f"{shlex.join(configure)} {pybind}", shlex.join(["cmake", "--build", str(BUILD)])]
    return ["bash", "-c", " && ".join([*steps, shlex.join([*PYTHON, "mfwm_kernels.info"])])]


def build(run: Run, found: str, architecture: str) -> None:
    """Build the module, and fill Triton's cache in parallel. Later stages run even if one of them fails."""
    if not found:
        run.say("no GPU: this run shows that the stages work, not the kernels")
        run.skip("build", "without a GPU the module that is installed is used")
        run.skip("aot", "without a GPU nothing would use the kernels that it compiles")
        return
    run.say(found)
    unpack_caches(run)
    why = prebuilt(architecture)
    run.say(f"build: everything; prebuilt objects: {why}" if why else "build: the bindings; objects are prebuilt")
    aot = [*PYTHON, "mfwm_kernels.aot", "--arch", f"sm_{architecture}", "--jobs", JOBS]
    compiling = build_command(architecture, "" if why else str(PREBUILT))
    building = [*run.start("build", "build.log", 150, compiling, quiet=True)]
    for stage in [*building, *run.start("aot", "build.log", 75, aot, quiet=True)]:
        stage.finish()


def check(run: Run) -> None:
    found, architecture = gpu()
    build(run, found, architecture)
    command = [*PYTHON, "mfwm_kernels.check", "--no-timing", "--json", str(run.out / "check.json")]
    if not found:
        run.stage("check", "check.log", 100, [*command, "--backend", "cpu", "--dtype", "float32", "bfloat16"])
        run.skip("tests", "graphs, streams and compiled Triton and CUDA kernels need a GPU")
        return
    options = ["--backend", "triton", "cuda", "--dtype", "float32", "bfloat16", "--jobs", JOBS]
    run.stage("check", "check.log", 90, [*command, *options])
    pytest = [*PYTHON, "pytest", "tests/test_gpu.py", "--at-once", "-rf", "--tb=short", "-k"]
    # Test ids are <op>-<backend>. One process per op, so that a fault of one op does not end the tests of another.
    # Compiled tests run last, because inductor is slow.
    named = " or ".join(f"{op}-" for op in OPS)
    choices = {op: f"{op}- and not compiled" for op in OPS} | {"further ops": f"not ({named}) and not compiled"}
    run.together("tests.log", 75, {f"tests of {name}": [*pytest, chosen] for name, chosen in choices.items()})
    choices = {op: f"{op}- and compiled" for op in OPS} | {"further ops": f"not ({named}) and compiled"}
    run.together("tests.log", 75, {f"compiled tests of {name}": [*pytest, chosen] for name, chosen in choices.items()})


def bench(run: Run) -> None:
    found, architecture = gpu()
    build(run, found, architecture)
    settings = ["--dtype", "bf16" if found else "fp32", "--budget", "0.2" if found else "0.02"]

    def command(op: str, size: str, contenders: str, out: Path = run.out / "results.json") -> list[str]:
        chosen = ["--size", size, *settings, "--contender", *contenders.split(), "--out", str(out)]
        only = ["--only", "train"] if op == STEP else ["--only", "ops", "--op", op]
        return [*PYTHON, "benchmarks", *only, *chosen]

    def measured(ops: Sequence[str], size: str, contenders: str, seconds: float = 45) -> None:
        """Run one process per op, because a GPU fault ends all work of its process."""
        for op in ops:
            run.stage(f"{op}, {size}", "bench.log", seconds, command(op, size, contenders))

    if not found:
        # The fastest ones on a CPU.
        measured(["multi_horizon_loss", "video_pyramid"], "cpu", "eager mfwm", seconds=150)
        measured([STEP], "tiny", "eager mfwm", seconds=100)
        run.skip("further ops, torch.compile, pixels and rivals", "on a CPU make bench measures them, in more time")
        run.skip("kernels and ncu", "they look at a GPU's kernels")
        run.skip("caches", "nothing was compiled for a GPU")
        return
    measured(OPS, "genie", "eager mfwm")
    measured([STEP], "genie", "eager mfwm", seconds=75)
    # Fill inductor's cache for all ops in parallel, then time each op alone.
    scratch = {op: BUILD / f"{op}.json" for op in OPS}
    compiling = {f"compiling {op}": command(op, "genie", "eager torch.compile", scratch[op]) for op in OPS}
    run.together("compile.log", 100, compiling, quiet=True)
    measured(OPS, "genie", "eager mfwm torch.compile")
    measured(["multi_horizon_loss", "multi_horizon_linear"], "pixels", "eager mfwm")
    rivals = "eager mfwm F.linear_cross_entropy Liger CCE QuACK"
    measured(["multi_horizon_linear_cross_entropy"], "genie-flat", rivals)
    profile(run)
    keep_caches(run)


def profile(run: Run) -> None:
    """Time each kernel of a forward and backward, and let ncu, if there is one, report what limits it."""
    command = [*PYTHON, "benchmarks.kernels", "--op", *OPS[:4], "--size", "genie", "--dtype", "bf16"]
    run.stage("kernels", "kernels.log", 40, command)
    if shutil.which("ncu") is None:
        run.skip("ncu", "it is not on the PATH")
        return
    # Do not lock the clocks, because others may use the machine too.
    ncu = ["ncu", "--set", "basic", "--clock-control", "none", "--profile-from-start", "off"]
    ncu += ["--kernel-name", "regex:multi_horizon|fan_out|strip_kernel|patch_kernel|gather_kernel"]
    run.stage("ncu", "kernels.log", 60, [*ncu, *command, "--for-ncu"])


def keep_caches(run: Run) -> None:
    """Save the compiled kernels in parts, which build/prebuilt provides to the next run on such a machine."""
    archive_file = BUILD / "caches.tar.gz"
    with tarfile.open(archive_file, "w:gz", compresslevel=6) as archive:
        for name in CACHES:
            if (BUILD / name).exists():
                archive.add(BUILD / name, arcname=name)
    packed = archive_file.read_bytes()
    if len(packed) > PART * PARTS:
        run.skip("caches", f"{len(packed) >> 20} MiB do not fit into {PARTS} files of {PART >> 20} MiB")
        return
    for number, start in enumerate(range(0, len(packed), PART)):
        (run.out / f"caches.tar.gz.{number}").write_bytes(packed[start : start + PART])
    run.say(f"caches: {len(packed) / 2**20:.1f} MiB")


def unpack_caches(run: Run) -> None:
    parts = sorted(PREBUILT.glob("caches.tar.gz.*"))
    if not parts or any((BUILD / name).exists() for name in CACHES):
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    archive_file = BUILD / "caches.tar.gz"
    archive_file.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(archive_file) as archive:
        archive.extractall(BUILD, filter="data")
    run.say(f"caches: those of {PREBUILT}")


COMMANDS: dict[str, Callable[[Run], None]] = {"check": check, "bench": bench}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_all.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    arguments = parser.parse_args()
    deadline = os.environ.get("DEADLINE", str(DEADLINES[arguments.command]))
    if not deadline.isdecimal() or int(deadline) < 1:
        parser.error(f"DEADLINE must be a number of seconds; got {deadline!r}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run = Run(arguments.out.resolve(), float(deadline))
    run.say(f"{arguments.command}, at most {deadline} s")
    try:
        COMMANDS[arguments.command](run)
    finally:
        run.stop("cut off by a signal")
        print("\n" + (run.out / "summary.txt").read_text(), end="", flush=True)
    sys.exit(run.failed)


if __name__ == "__main__":
    main()
