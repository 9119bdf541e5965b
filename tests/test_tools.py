"""The commands that tell a user what is installed and whether it is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mfwm_kernels import check, native
from mfwm_kernels.backends import ABSENT, BACKENDS, load
from mfwm_kernels.op import OPS


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )


def test_info_names_every_op_and_why_a_backend_is_absent() -> None:
    shown = python("-m", "mfwm_kernels.info")
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in OPS)
    for backend in BACKENDS:
        reason = ABSENT[backend]
        assert not reason or f"{backend} is absent: {reason}" in shown.stdout


def test_info_json_lists_the_kernels_of_each_backend() -> None:
    table = json.loads(python("-m", "mfwm_kernels.info", "--json").stdout)
    assert set(table["ops"]) == set(OPS)
    for name, op in OPS.items():
        for backend, record in op.backends.items():
            assert table["ops"][name]["backends"][backend]["kernels"] == list(record.kernels)
    assert table["environment"]["native"] == getattr(native.module, "build_info", None)


def test_info_shows_a_forced_backend() -> None:
    table = json.loads(python("-m", "mfwm_kernels.info", "--json", MFWM_BACKEND="reference").stdout)
    assert table["environment"]["forced_backend"] == "reference"


def test_check_passes_and_keeps_a_row_per_op_backend_and_dtype(tmp_path: Path) -> None:
    done = python(
        "-m", "mfwm_kernels.check", "--no-timing", "--json", str(tmp_path / "check.json"), TRITON_INTERPRET="0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert all(row["passed"] and row["error"] <= row["tolerance"] for row in rows)
    assert {row["op"] for row in rows} == set(OPS)
    assert len({(row["op"], row["backend"], row["dtype"]) for row in rows}) == len(rows)


class Faulty:
    """action_window_sum on the CPU, wrong in some of its calls: in value, or with an exception."""

    def __init__(self, fault: str, calls: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault, self.calls, self.call = fault, calls, -1
        self.launcher = load(OPS["action_window_sum"], "cpu")
        self.right = self.launcher.forward
        monkeypatch.setattr(self.launcher, "forward", self.forward)

    def forward(self, args: Any, want: Any) -> Any:
        self.call += 1
        outputs, gradients = self.right(args, want)
        if self.call not in self.calls:
            return outputs, gradients
        if self.fault == "raises":
            raise RuntimeError("the kernel went wrong")
        if self.fault == "interrupted":
            raise KeyboardInterrupt
        outputs[0].view(-1)[5] = float("nan") if self.fault == "not finite" else 1e3
        return outputs, gradients


def checked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    chosen = ["--op", "action_window_sum", "--backend", "cpu", "--no-timing", *arguments]
    monkeypatch.setattr(sys, "argv", ["check", *chosen])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        check.main()
    return getattr(stopped.value, "code", "interrupted")


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("wrong value", r"output 0: relative error \S+ is above 2e-05, at \[.*\] of \[.*\] 1000 for "),
        ("not finite", r"output 0: relative error inf is above 2e-05, at .* nan for .*, 1 of \d+ not finite"),
        ("raises", "RuntimeError: the kernel went wrong"),
    ],
)
def test_check_names_each_sample_that_fails(
    fault: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Faulty(fault, {1, 3}, monkeypatch)
    samples = len(list(OPS["action_window_sum"].samples(torch.float32, torch.device("cpu"))))
    file = tmp_path / "check.json"
    assert checked(monkeypatch, "--dtype", "float32", "--json", str(file)) == 1
    shown = capsys.readouterr().out
    case = "action_window_sum on cpu, float32"
    assert re.search(f"{case}, sample 1: {problem}", shown) and re.search(f"{case}, sample 3: {problem}", shown)
    assert re.search(f"FAILED {case}: 2 of {samples} samples, sample 1: {problem}", shown)
    (row,) = json.loads(file.read_text())["rows"]
    assert len(row["problems"]) == 2 and not row["passed"]
    assert ("went wrong" in shown) == ('raise RuntimeError("the kernel went wrong")' in shown)


def test_check_that_is_cut_off_has_kept_what_it_knew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    samples = len(list(OPS["action_window_sum"].samples(torch.float32, torch.device("cpu"))))
    Faulty("interrupted", {samples}, monkeypatch)
    file = tmp_path / "check.json"
    assert checked(monkeypatch, "--dtype", "float32", "float16", "--json", str(file)) == "interrupted"
    (row,) = json.loads(file.read_text())["rows"]
    assert row["passed"] and row["dtype"] == "float32"
    assert "NOT FINISHED action_window_sum on cpu, float16" in capsys.readouterr().out


def test_check_reports_a_row_whose_process_dies(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = check.Case("action_window_sum", "cpu", torch.device("cpu"), "float32")
    died = check.Case("no such op", "cpu", torch.device("cpu"), "float32")
    rows = {row["op"]: row for row in check.rows_in_processes([died, case], 2)}
    assert rows[case.op]["passed"] and not rows[died.op]["passed"]
    assert rows[died.op]["problem"] == "its process ended with exit code 1"
    assert "no such op on cpu, float32, its process ended with exit code 1" in capfd.readouterr().out


def test_check_fails_a_backend_that_is_asked_for_and_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ABSENT, "cuda", "built without it")
    assert checked(monkeypatch, "--backend", "cpu", "cuda", "--dtype", "float32") == 1
    shown = capsys.readouterr().out
    assert "FAIL  cuda is absent: built without it" in shown and "1 passed, 0 failed" in shown


def test_check_starts_with_the_most_telling_ops() -> None:
    named = [case.op for case in check.cases(list(OPS), BACKENDS, ["float32"])]
    assert list(dict.fromkeys(named))[:2] == ["multi_horizon_loss", "multi_horizon_linear_cross_entropy"]
    assert set(named) == set(OPS) and set(check.ORDER) <= set(OPS)
