"""The examples run, and what they say of themselves holds."""

from __future__ import annotations

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
    for only in ("5 latents", "5 tokens, tokenised", "5 tokens, raster order", "7 far laplaces", "8 masked"):
        out += run(
            "compare_heads", str(tmp_path / "noise"), "--steps", "1", "--only", only,
            monkeypatch=monkeypatch, capsys=capsys,
        )  # fmt: skip
    assert out.count("per horizon") == 5 and out.count(" nats") == 3
