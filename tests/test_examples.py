"""The examples run, and what they say of themselves holds."""

from __future__ import annotations

import ast
import difflib
import runpy
from pathlib import Path

import numpy as np
import pytest
from mfwm.data import ReplayWriter
from mfwm.training import train
from small_run import moving_squares, small_config

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "squares"
    moving_squares(path)
    return path


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["host_trainer", "host_trainer_multi_frame"])
def test_hosts_learn(
    name: str, squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(name, str(squares), "--steps", "12", monkeypatch=monkeypatch, capsys=capsys).splitlines()
    # A loss, or one per horizon.
    losses = [ast.literal_eval(line.split(" ", 3)[3]) for line in lines if line.startswith("step ")]
    first, last = (loss if isinstance(loss, list) else [loss] for loss in (losses[0], losses[-1]))
    assert all(new < old for old, new in zip(first, last, strict=True)), lines


def test_heads_come_into_the_host_in_under_20_changed_lines() -> None:
    texts = []
    for name in ("host_trainer", "host_trainer_multi_frame"):
        text = (EXAMPLES / f"{name}.py").read_text()
        texts.append(text.split('"""', 2)[2].splitlines())
    changes = [line for line in difflib.ndiff(*texts) if line[:2] in ("+ ", "- ") and line[2:].strip()]
    assert 0 < len(changes) < 20, changes


def test_rollout_of_a_run(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(squares), tmp_path / "run", progress=False, stop_after=2)
    gif = tmp_path / "rollout.gif"
    out = run(
        "rollout", str(tmp_path / "run"), "--steps", "9", "--gif", str(gif), monkeypatch=monkeypatch, capsys=capsys
    )
    assert out.count("squared error") == 9 + 2 and gif.stat().st_size > 0


def test_comparison_trains_every_kind_of_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = ReplayWriter(tmp_path / "noise", 64, 64, actions=3, env="noise")
    writer.append(np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8), np.arange(24) % 3, 0)
    out = ""
    for only in ("5 latents", "5 tokens, tokenised", "8 masked"):
        out += run(
            "compare_heads", str(tmp_path / "noise"), "--steps", "1", "--only", only,
            monkeypatch=monkeypatch, capsys=capsys,
        )  # fmt: skip
    assert out.count("per horizon") == 3
