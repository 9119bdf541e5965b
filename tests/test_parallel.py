"""Two processes equal one: DDP and FSDP2 over gloo, accumulated gradients, and checkpoints that change hands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mfwm.training import load_model, train
from mfwm.training.run_log import read_log
from small_run import moving_squares, small_config


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Runs of one process and of two, at one global batch. Episodes end within clips, so that counts differ."""
    folder = tmp_path_factory.mktemp("runs")
    moving_squares(folder / "data")
    config = small_config(folder / "data")

    def half(run: str, name: str) -> None:
        """A copy of the run as it was after 10 steps."""
        shutil.copytree(folder / run, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "00000020")

    config = replace(config, checkpoint_every=10, look_every=20)
    train(config, folder / "one", progress=False)
    half("one", "one-then-ddp")
    half("one", "one-then-fsdp")
    script = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    half("ddp", "ddp-then-one")
    half("fsdp", "fsdp-then-one")
    train(replace(config, accumulate=4), folder / "ddp-then-one", progress=False)
    train(config, folder / "fsdp-then-one", progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-then-ddp", "one-then-fsdp", "ddp-then-one", "fsdp-then-one"])
def test_it_equals_one_process(runs: Path, name: str) -> None:
    logs = [read_log(runs / run / "log.jsonl") for run in ("one", name)]
    assert [row["step"] for row in logs[1]] == list(range(20))
    for row, other in zip(*logs, strict=True):
        for key in ("loss", "per_horizon", "consistency", "gradient_norm"):
            assert other[key] == pytest.approx(row[key], rel=1e-5, abs=1e-7), (row["step"], key)
    validations = [log[-1]["held_out"] for log in logs]
    for key in ("per_horizon", "gradient_norms"):
        assert validations[1][key] == pytest.approx(validations[0][key], rel=1e-4), key
    (model, _, step), (other_model, _, other_step) = load_model(runs / "one"), load_model(runs / name)
    assert step == other_step == 20
    a, b = (torch.cat([p.flatten() for p in m.parameters()]) for m in (model, other_model))
    assert (a - b).norm() <= 1e-5 * a.norm()
