"""benchmarks/gpu_all.sh check|bench OUT_DIR: what a GPU machine can tell, in two commands of a few minutes.

    check   builds, runs every sample on the Triton and CUDA kernels, then tests/test_gpu.py: 200 s at most
    bench   builds, times ours and the rivals, profiles the main kernels, keeps the compiled caches: 420 s at most

DEADLINE=SECONDS in the environment sets another limit. The most telling stages come first. Everything is printed and
written into OUT_DIR while it happens, so a run that is killed loses nothing that it knew; summary.txt says of every
stage whether it was ok, failed, was cut off or was skipped, and why. Exit status 1 if a stage failed or was cut off.

Needs Python with torch, Triton, numpy, pytest and pybind11, and cmake, ninja and a C++ compiler on the PATH; nvcc too
where there are no prebuilt objects (make prebuild). Builds in build/gpu. Without a GPU it runs what a CPU can.
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
# What comes back from a borrowed machine may be limited to 8 files of 16 MiB: bench writes six besides these.
PART, PARTS = 15 << 20, 2
# A process that does not end on SIGINT is killed so many seconds later.
GRACE = 10
# Processes that compile or check side by side.
JOBS = str(max(1, (os.cpu_count() or 1) - 2))
# Python, as every stage starts it.
PYTHON = [sys.executable, "-m"]
# Triton finds a compiled kernel by the hash of: libtriton.so and Triton's own sources; the source of the kernel and of
# what it calls; types, constants and divisibility of the arguments; warps, stages and further options; architecture,
# ptxas and libdevice; and the variables TRITON_* that change code. So what mfwm_kernels.aot compiles on this machine
# for this architecture is found by the launches of all later processes, and nothing from another Python's Triton is.
# Each entry lists its files by absolute path: a cache that is carried along works at the same path alone.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "PYTHONUNBUFFERED": "1",
    "TRITON_CACHE_DIR": str(BUILD / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor"),
}


class Stage:
    """A running command, whose output goes line by line into its log, and to the terminal unless it is quiet."""

    def __init__(self, run: Run, name: str, log: str, seconds: float, command: Sequence[str], quiet: bool) -> None:
        self.run, self.name, self.log, self.quiet = run, name, run.out / log, quiet
        self.begun = self.ended = time.monotonic()
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            # In a process group of its own, which gets the signal.
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
                # In one write: stages side by side share a log.
                log.write(f"{self.name}: {line}")
                log.flush()
                if not self.quiet:
                    print(f"{self.name}: {line}", end="", flush=True)
        self.ended = time.monotonic()

    def finish(self) -> None:
        """Wait for its end and say how it went."""
        code = self.process.wait()
        # A process that outlives the killed one may hold the pipe.
        self.reader.join(GRACE)
        self.run.stages.remove(self)
        # timeout's own code, and what it gives after it had to kill.
        cut_off = code in (124, 128 + signal.SIGKILL, -signal.SIGKILL)
        how = "ok" if code == 0 else "cut off" if cut_off else f"failed, exit {code},"
        told = [line.strip() for line in self.lines if re.search(r"\d+ (passed|failed|skipped|compiled)\b", line)][-1:]
        if not told and how.startswith("failed"):
            told = [line.strip() for line in self.lines if line.strip()][-1:]
        self.run.say(f"{self.name}: {how} after {self.ended - self.begun:.0f} s{''.join(f': {t}' for t in told)}")
        self.run.failed |= code != 0
        if code != 0 and self.quiet:
            print("".join(self.lines[-30:]), end="", flush=True)


class Run:
    """The stages of one command within its deadline."""

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
        """The started stage, which may take so many seconds within the deadline; nothing where no time is left."""
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
        """Run commands side by side, each in a process of its own: a fault on a GPU ends one of them."""
        for stage in [s for name, command in commands.items() for s in self.start(name, log, seconds, command, quiet)]:
            stage.finish()

    def stop(self, why: str) -> None:
        for stage in list(self.stages):
            stage.process.terminate()
        for stage in list(self.stages):
            stage.reader.join(GRACE / 5)
            self.say(f"{stage.name}: {why} after {time.monotonic() - stage.begun:.0f} s")


def gpu() -> tuple[str, str]:
    """What the driver says of the first GPU, and its architecture, as in "90"; empty without one."""
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
    """Build the module and beside it fill Triton's cache. Where one of them fails, the rest runs all the same."""
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
    # Ids are <op>-<backend>. Faults of one op must not end the tests of another, and inductor takes its time.
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
        """A process for each op: a fault on the GPU ends one."""
        for op in ops:
            run.stage(f"{op}, {size}", "bench.log", seconds, command(op, size, contenders))

    if not found:
        # The quickest on a CPU.
        measured(["multi_horizon_loss", "video_pyramid"], "cpu", "eager mfwm", seconds=150)
        measured([STEP], "tiny", "eager mfwm", seconds=100)
        run.skip("further ops, torch.compile, pixels and rivals", "on a CPU make bench measures them, in more time")
        run.skip("kernels and ncu", "they look at a GPU's kernels")
        run.skip("caches", "nothing was compiled for a GPU")
        return
    measured(OPS, "genie", "eager mfwm")
    measured([STEP], "genie", "eager mfwm", seconds=75)
    # Inductor's cache is filled for all ops side by side; then each is timed alone.
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
    """Times of each kernel in a forward and backward, and with ncu what bounds them."""
    command = [*PYTHON, "benchmarks.kernels", "--op", *OPS[:4], "--size", "genie", "--dtype", "bf16"]
    run.stage("kernels", "kernels.log", 40, command)
    if shutil.which("ncu") is None:
        run.skip("ncu", "it is not on the PATH")
        return
    # The clocks stay as they are: others use the machine too.
    ncu = ["ncu", "--set", "basic", "--clock-control", "none", "--profile-from-start", "off"]
    ncu += ["--kernel-name", "regex:multi_horizon|fan_out|patch_kernel|gather_kernel"]
    run.stage("ncu", "kernels.log", 60, [*ncu, *command, "--for-ncu"])


def keep_caches(run: Run) -> None:
    """The compiled kernels, for the next run on such a machine: in parts, to be put into build/prebuilt."""
    whole = BUILD / "caches.tar.gz"
    with tarfile.open(whole, "w:gz", compresslevel=6) as archive:
        for name in CACHES:
            if (BUILD / name).exists():
                archive.add(BUILD / name, arcname=name)
    packed = whole.read_bytes()
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
    whole = BUILD / "caches.tar.gz"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(whole) as archive:
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
