"""The commands for a borrowed GPU machine: they end in time, lose nothing, and call programs by options that exist."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark.expression import Expression

import benchmarks.__main__ as program
from benchmarks import gpu_all, kernels
from mfwm_kernels import aot, check
from mfwm_kernels.op import OPS

ROOT = Path(__file__).resolve().parent.parent


def said(run: gpu_all.Run) -> list[str]:
    return (run.out / "summary.txt").read_text().splitlines()


def shell(code: str) -> list[str]:
    return ["bash", "-c", code]


def test_a_stage_is_kept_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = gpu_all.Run(tmp_path, 100)
    run.stage("one", "one.log", 10, shell("echo 3 passed; echo later"))
    run.stage("two", "two.log", 10, shell("echo wrong value; exit 3"))
    run.skip("three", "there is no GPU")
    assert (tmp_path / "one.log").read_text() == "one: 3 passed\none: later\n"
    assert said(run) == [
        "one: ok after 0 s: 3 passed",
        "two: failed, exit 3, after 0 s: wrong value",
        "three: skipped, there is no GPU",
    ]
    assert run.failed and "two: wrong value\n" in capsys.readouterr().out


def test_a_stage_that_takes_too_long_is_interrupted_and_may_still_speak(tmp_path: Path) -> None:
    run = gpu_all.Run(tmp_path, 100)
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('1 failed, 2 passed')"
    run.stage("slow", "slow.log", 5, [sys.executable, "-c", code])
    assert (tmp_path / "slow.log").read_text() == "slow: 1 failed, 2 passed\n"
    assert said(run)[0].startswith("slow: cut off after 5 s: 1 failed, 2 passed") and run.failed


def test_no_stage_starts_without_time(tmp_path: Path) -> None:
    run = gpu_all.Run(tmp_path, gpu_all.GRACE + 4)
    run.stage("late", "late.log", 60, ["true"])
    assert said(run) == ["late: not run, the time is up"] and run.failed


def test_stages_run_side_by_side_and_a_quiet_one_shows_its_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = gpu_all.Run(tmp_path, 100)
    begun = time.monotonic()
    run.together("log", 10, {"a": shell("sleep 2; echo A"), "b": shell("sleep 2; echo B; exit 1")}, quiet=True)
    assert time.monotonic() - begun < 3.5
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["a: A", "b: B"]
    assert sorted(line.split(" after")[0] for line in said(run)) == ["a: ok", "b: failed, exit 1,"]
    shown = capsys.readouterr().out.splitlines()
    assert "B" in shown and "A" not in shown


STUB = """
import sys
from pathlib import Path
from benchmarks import gpu_all
def stages(run):
    run.stage("check", "check.log", 20, ["bash", "-c", "echo FAIL fan_out; exec sleep 20"])
gpu_all.COMMANDS["check"] = stages
sys.argv[1:] = ["check", sys.argv[1]]
gpu_all.main()
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_every_failure(sent: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUB, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "check.log"
    until = time.monotonic() + 15
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(sent)
    code = process.wait(20)
    assert log.read_text() == "check: FAIL fan_out\n"
    summary = (tmp_path / "summary.txt").read_text()
    assert "check, at most 200 s" in summary
    if sent == signal.SIGTERM:
        assert code == 128 + sent and "check: cut off by a signal after" in summary


def test_without_a_gpu_the_check_ends_in_time_and_says_what_it_skipped(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["bash", str(ROOT / "benchmarks" / "gpu_all.sh"), "check", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "DEADLINE": "90", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    assert "check: ok" in summary and f"{2 * len(OPS)} passed, 0 failed" in summary
    for skipped in ("build", "aot", "tests"):
        assert f"\n{skipped}: skipped, " in summary


def test_a_deadline_must_be_a_number(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_all.py"), "check", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DEADLINE": "soon"})
    assert done.returncode == 2 and "DEADLINE must be a number of seconds; got 'soon'" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- on a GPU


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[list[str]]]:
    """What a command would start on an H200."""
    started: list[list[str]] = []

    def start(
        run: Any, name: str, log: str, seconds: float, command: Sequence[str], quiet: bool = False
    ) -> Iterator[Any]:
        started.append(list(command))
        return iter(())

    def of(name: str) -> list[list[str]]:
        gpu_all.COMMANDS[name](gpu_all.Run(tmp_path, 1000))
        return started

    monkeypatch.setattr(gpu_all, "gpu", lambda: ("NVIDIA H200, 580, 143771 MiB, 9.0", "90"))
    monkeypatch.setattr(gpu_all.Run, "start", start)
    monkeypatch.setattr(gpu_all, "BUILD", tmp_path)
    return of


class Parsed(Exception):
    """A program has read its options."""


MAINS = {
    "mfwm_kernels.aot": aot.main,
    "mfwm_kernels.check": check.main,
    "benchmarks": program.main,
    "benchmarks.kernels": kernels.main,
}


@pytest.mark.parametrize("name", ["check", "bench"])
def test_commands_call_programs_by_options_that_exist(
    name: str, commands: Callable[[str], list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser) -> None:
        parse_args(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    tried = set()
    for _, _, module, *arguments in (command for command in commands(name) if command[1] == "-m"):
        if module in MAINS:
            tried.add(module)
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            with pytest.raises(Parsed):
                MAINS[module]()
            if module == "benchmarks" and "--op" in arguments:
                op = OPS[arguments[arguments.index("--op") + 1]]
                assert arguments[arguments.index("--size") + 1] in op.bench
    assert tried == {"mfwm_kernels.aot"} | (
        {"mfwm_kernels.check"} if name == "check" else {"benchmarks", "benchmarks.kernels"}
    )


def test_each_test_of_a_gpu_runs_once(commands: Callable[[str], list[list[str]]]) -> None:
    chosen = [command[command.index("-k") + 1] for command in commands("check") if command[2] == "pytest"]
    collect = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "--collect-only"]
    shown = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True).stdout
    tests = [line.split("::")[1] for line in shown.splitlines() if "::" in line]
    assert len(tests) > 50
    for test in tests:
        runs = [k for k in chosen if Expression.compile(k).evaluate(lambda word, test=test, **_: word in test)]
        assert len(runs) == 1, (test, runs)
        assert ("not compiled" not in runs[0]) == ("compiled" in test)


def test_prebuilt_objects_are_of_this_architecture_and_of_these_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_all, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_all, "PREBUILT", tmp_path / "prebuilt")
    assert gpu_all.prebuilt("90") == "there are none"
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "kernel.cu").write_text("one")
    sums = subprocess.run(["sha256sum", "kernel.cu"], cwd=tmp_path, capture_output=True, text=True).stdout
    (tmp_path / "prebuilt" / "sources").write_text(sums)
    (tmp_path / "prebuilt" / "objects.cmake").write_text('set(cuda_architectures "90")\n')
    assert gpu_all.prebuilt("90") == "" and gpu_all.prebuilt("80") == "they are not for sm_80"
    (tmp_path / "kernel.cu").write_text("another")
    assert gpu_all.prebuilt("90") == "csrc or CMakeLists.txt has changed since"


def test_caches_come_back_in_parts_and_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_all, "PART", 50)
    monkeypatch.setattr(gpu_all, "PARTS", 9)
    monkeypatch.setattr(gpu_all, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_all, "PREBUILT", tmp_path / "out")
    (tmp_path / "build" / "triton" / "KEY").mkdir(parents=True)
    (tmp_path / "build" / "triton" / "KEY" / "kernel.cubin").write_bytes(b"machine code")
    run = gpu_all.Run(tmp_path / "out", 100)
    gpu_all.keep_caches(run)
    assert len(list(run.out.glob("caches.tar.gz.*"))) > 1
    monkeypatch.setattr(gpu_all, "BUILD", tmp_path / "other")
    gpu_all.unpack_caches(run)
    assert (tmp_path / "other" / "triton" / "KEY" / "kernel.cubin").read_bytes() == b"machine code"
    monkeypatch.setattr(gpu_all, "PARTS", 1)
    monkeypatch.setattr(gpu_all, "BUILD", tmp_path / "build")
    gpu_all.keep_caches(run)
    assert said(run)[-1].startswith("caches: skipped, ")
