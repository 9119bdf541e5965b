"""The commands that tell a user what is installed, whether it is right, and how kernels compile."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mfwm_kernels import aot, check, registry
from mfwm_kernels.registry import OPS

NO_TRITON = importlib.util.find_spec("triton") is None


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )


def test_info_names_every_op_and_why_a_backend_is_absent() -> None:
    shown = python("-m", "mfwm_kernels.info")
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in OPS)
    for backend, reason in registry.ABSENT.items():
        assert not reason or f"{backend} is absent: {reason}" in shown.stdout


def test_info_json_lists_the_kernels_of_each_backend() -> None:
    table = json.loads(python("-m", "mfwm_kernels.info", "--json").stdout)
    assert set(table["ops"]) == set(OPS)
    for name, op in OPS.items():
        for backend, record in op.backends.items():
            assert table["ops"][name]["backends"][backend]["kernels"] == list(record.kernels)
    assert table["environment"]["native"] == getattr(registry.native, "build_info", None)


@pytest.mark.skipif(NO_TRITON, reason="needs Triton")
def test_no_triton_kernel_is_launched_that_is_not_listed() -> None:
    for name, op in OPS.items():
        launched = {kernel.fn.__name__ for size in op.bench for kernel, *_ in aot.launches(op, size, torch.bfloat16)}
        assert launched <= set(op.backends["triton"].kernels), name


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


@pytest.mark.parametrize("fault", ["wrong values", "raises"])
def test_check_fails_a_faulty_kernel_by_name(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op = OPS["action_window_sum"]
    launcher = registry.load(op, "cpu")
    right = launcher.forward

    def faulty(args: Any, wanted: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("the kernel went wrong")
        outputs, kept = right(args, wanted)
        return [output * 1.1 for output in outputs], kept

    monkeypatch.setattr(launcher, "forward", faulty)
    monkeypatch.setattr(check, "OPS", {op.name: op})
    monkeypatch.setitem(registry.ABSENT, "triton", "left out of this test")
    monkeypatch.setattr(sys, "argv", ["check", "--no-timing"])
    with pytest.raises(SystemExit) as stopped:
        check.main()
    assert stopped.value.code == 1
    problem = "RuntimeError: the kernel went wrong" if fault == "raises" else "relative error"
    shown = capsys.readouterr().out
    assert f"FAILED action_window_sum on cpu, float32: {problem}" in shown
    assert "FAILED action_window_sum on reference" not in shown


@pytest.mark.skipif(NO_TRITON, reason="needs Triton")
def test_kernels_compile_for_sm_90_without_spills(tmp_path: Path) -> None:
    done = python(
        "-m", "mfwm_kernels.aot", "--arch", "sm_90", "--json", str(tmp_path / "aot.json"), TRITON_INTERPRET="0"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())
    assert {row["op"] for row in rows} == {name for name, op in OPS.items() if "triton" in op.backends}
    assert all(row["arch"] == "sm_90" and row["registers"] > 0 and row["local_bytes"] == 0 for row in rows)


@pytest.mark.skipif(NO_TRITON, reason="needs Triton")
def test_a_tile_far_too_large_spills_and_fails() -> None:
    code = (
        "import sys; from mfwm_kernels import aot; from mfwm_kernels.triton import video_pyramid as kernels;"
        "kernels.TARGET = 262144; sys.argv[1:] = ['--arch', 'sm_90', '--op', 'video_pyramid']; aot.main()"
    )
    done = python("-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SPILLS video_pyramid of video_pyramid on sm_90: " in done.stdout
