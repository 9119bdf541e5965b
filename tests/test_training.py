"""Training: the first losses against recorded ones, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mfwm.export import export, load_exported
from mfwm.models.world_model import WorldModel
from mfwm.training.checkpoints import Checkpoints
from mfwm.training.optimisation import learning_rate
from mfwm.training.run_log import Log, read_log
from mfwm.training.trainer import Objective, Run, Trainer
from mfwm.training.world_model import TrainingConfig, WorldModelLoss, load_model, train
from small_run import moving_squares, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    moving_squares(tmp_path / "data")
    return small_config(tmp_path / "data")


# Of a run of this test in fp32 on two threads. Other CPUs sum in another order, and 20 steps of Adam amplify that: a
# wrong gradient moves the last loss by far more than the 2% allowed.
GOLDEN = {0: 0.120673, 9: 0.0804667, 19: 0.133048}


def test_twenty_steps(config: TrainingConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run", progress=False)
    losses = {row["step"]: row["loss"] for row in read_log(tmp_path / "run" / "log.jsonl")}
    assert len(losses) == 20
    for step, golden in GOLDEN.items():
        assert losses[step] == pytest.approx(golden, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one(config: TrainingConfig, tmp_path: Path, dtype: str) -> None:
    config = replace(config, steps=8, dtype=dtype, checkpoint_every=3)
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "parts", progress=False, stop_after=4)
    parts = train(config, tmp_path / "parts", progress=False)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("whole", "parts")]
    assert [[row["step"], row["loss"]] for row in logs[0]] == [[row["step"], row["loss"]] for row in logs[1]]


class Noisy(Objective):
    """A module with random numbers in its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = torch.nn.Parameter(torch.zeros(3))

    def forward(self, clips: dict[str, Tensor], shares: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = clips["video"].float().mean(dim=(1, 3, 4)) / 255 + torch.randn(3)
        return (self.guess - noisy).square().mean(), {"brightness": noisy.mean(0).detach()}


def test_another_module_with_random_numbers(config: TrainingConfig, tmp_path: Path) -> None:
    def run(name: str, steps: int) -> Tensor:
        with Trainer(replace(config, accumulate=2, steps=6), tmp_path / name, progress=False) as trainer:
            objective = Noisy()
            trainer.fit(objective, trainer.sampler(), stop_after=steps)
        return objective.guess.detach()

    whole, half, parts = run("whole", 6), run("parts", 2), run("parts", 6)
    assert torch.equal(whole, parts) and not torch.equal(half, parts)
    rows, others = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    assert [row["brightness"] for row in rows] == [row["brightness"] for row in others]
    assert rows[0]["brightness"] != rows[1]["brightness"]


@pytest.mark.parametrize(("signal", "kills"), [("KILL", os.environ.get("MFWM_KILLS", "3")), ("TERM", "1")])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, signal: str, kills: str) -> None:
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, "--signal", signal, "--kills", kills], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} x SIG{signal}" in done.stdout


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file grows past `size` bytes: the write fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoint_before(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, steps=4)
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "run", progress=False, stop_after=2)
    with (
        disk_of(200_000),
        pytest.raises(OSError, match=r"of step 3 could not be written .*; the one of step 2 is complete"),
    ):
        train(config, tmp_path / "run", progress=False, stop_after=3)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["00000002"]
    resumed = train(config, tmp_path / "run", progress=False)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def mounted(folder: Path, options: str) -> bool:
    """Whether a tmpfs is there, or changed, by these options; only the superuser may."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
    return done.returncode == 0


@pytest.mark.slow
def test_a_disk_that_fills_leaves_the_checkpoint_before(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, steps=4)
    whole = train(config, tmp_path / "whole", progress=False)
    saved = tmp_path / "whole" / "checkpoints" / "00000004"
    size = sum(path.stat().st_size for path in saved.iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, f"size={size * 3 // 2}"):
        pytest.skip("mounting a tmpfs needs the superuser")
    try:
        train(config, disk / "run", progress=False, stop_after=2)
        with pytest.raises(
            OSError, match=r"of step 3 could not be written .*No space.*; the one of step 2 is complete"
        ):
            train(config, disk / "run", progress=False, stop_after=3)
        assert os.listdir(disk / "run" / "checkpoints") == ["00000002"]
        assert mounted(disk, f"remount,size={size * 4}")
        resumed = train(config, disk / "run", progress=False)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_log_on_a_full_disk_says_so(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    log.file = open("/dev/full", "ab", buffering=0)
    with closing(log), pytest.raises(OSError, match=r"step 7 could not be logged \(No space .*the newest checkpoint"):
        log.write({"step": 7})


def test_rows_of_steps_that_run_again_are_dropped(tmp_path: Path) -> None:
    for first, last in ((0, 4), (2, 5)):
        with closing(Log(tmp_path / "log.jsonl", first)) as log:
            for step in range(first, last):
                log.write({"step": step, "loss": first})
    rows = read_log(tmp_path / "log.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 2)]


@pytest.mark.slow
def test_memory_is_flat(config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer run of the smallest model, with checkpoints, validations and event files on the way."""
    step, seen = Run.step, []

    def measured(self: Run, *args: Any) -> Any:
        done = step(self, *args)
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return done

    monkeypatch.setattr(Run, "step", measured)
    heads = replace(config.model.heads, blocks=None, patch_sizes=None)
    model = replace(config.model, layers=1, width=16, heads=heads)
    steps = int(os.environ.get("MFWM_STEPS", "300"))
    often = {"checkpoint_every": steps // 10, "look_every": steps // 10, "tensorboard": True, "ema": 0.9}
    train(replace(config, steps=steps, batch=1, model=model, **often), tmp_path / "run", progress=False)
    growth = max(seen[steps // 2 :]) - max(seen[: steps // 2])
    assert growth < 3 * 2**20, [size >> 10 for size in seen[:: steps // 20]]


def test_the_newest_checkpoints_stay_and_a_damaged_one_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, steps=4, checkpoint_every=1, keep=2)
    train(config, tmp_path / "run", progress=False, stop_after=3)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [2, 3]
    shard = next(checkpoints.path(3).glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"00000003 cannot be read .*; delete it to resume from step 2"):
        train(config, tmp_path / "run", progress=False)


def test_a_run_keeps_its_config(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, steps=1)
    train(config, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"lr is 0.5, but the run in .* was started with 0.001"):
        train(replace(config, lr=0.5), tmp_path / "run", progress=False)
    path = tmp_path / "run" / "config.json"
    written = path.read_text()
    path.write_text(json.dumps({**json.loads(written), "glance_every": 50}))
    with pytest.raises(ValueError, match=r"only the run in .* has the option glance_every: .* another version; choose"):
        train(config, tmp_path / "run", progress=False)
    path.write_text(written)
    _, loaded, step = load_model(tmp_path / "run")
    assert loaded == config and step == 1


def test_the_schedules() -> None:
    def rate(step: int, schedule: str) -> float:
        return learning_rate(step, peak=1.0, warmup=10, steps=100, schedule=schedule, decay=0.2)

    for schedule in ("cosine", "wsd"):
        assert [rate(step, schedule) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
        assert rate(100, schedule) == pytest.approx(0.1)
    assert rate(55, "cosine") == pytest.approx(0.55)
    assert [rate(step, "wsd") for step in (10, 79, 80)] == [1, 1, 1] and rate(90, "wsd") == pytest.approx(0.55)


def test_the_moving_average_is_kept_and_evaluated(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, steps=3, ema=0.75, checkpoint_every=1, keep=4)
    train(config, tmp_path / "run", progress=False, stop_after=2)
    train(config, tmp_path / "run", progress=False)
    torch.manual_seed(config.seed)
    objective = WorldModelLoss(WorldModel(config.model))
    averages = {name: p.detach().clone() for name, p in objective.named_parameters()}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    for step in (1, 2, 3):
        weights = {name: torch.empty_like(p) for name, p in averages.items()}
        checkpoints.load({"model": weights}, step)
        averages = {name: 0.75 * p + 0.25 * weights[name] for name, p in averages.items()}
    model, _, _ = load_model(tmp_path / "run")
    for name, p in model.named_parameters():
        assert torch.allclose(p, averages[f"model.{name}"], atol=1e-6), name


def test_how_a_run_is_run_may_change(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, steps=4, deterministic=True, schedule="wsd")
    whole = train(config, tmp_path / "whole", progress=False)
    assert not torch.are_deterministic_algorithms_enabled()
    train(config, tmp_path / "parts", progress=False, stop_after=2)
    parts = train(replace(config, workers=2, keep=1, checkpoint_every=1), tmp_path / "parts", progress=False)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for row in read_log(tmp_path / "parts" / "log.jsonl"):
        assert 0 <= row["data_wait"] < 1 and row["seconds"] > 0


def test_validates_on_held_out_clips(config: TrainingConfig, tmp_path: Path) -> None:
    plain = train(replace(config, steps=4), tmp_path / "plain", progress=False)
    validated = replace(config, steps=4, look_every=2, tensorboard=True)
    train(validated, tmp_path / "run", progress=False, stop_after=3)
    model = train(validated, tmp_path / "run", progress=False)
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert ["held_out" in row for row in rows] == [False, True, False, True]
    seen = rows[3]["held_out"]
    cosines = torch.tensor(seen["gradient_cosines"])
    assert torch.allclose(cosines.diagonal(), torch.ones(3)) and torch.equal(cosines, cosines.T) and cosines[0, 1] < 1
    assert min(seen["gradient_norms"]) > 0
    assert seen["psnr"] == pytest.approx([10 * math.log10(4 / error) for error in seen["per_horizon"]])

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for i, offset in enumerate((1, 2, 4)):
        assert [event.step for event in events.Scalars(f"per_horizon/{offset}")] == [0, 1, 2, 3]
        assert events.Scalars(f"held_out/psnr/{offset}")[-1].value == pytest.approx(seen["psnr"][i], rel=1e-5)
    assert events.Scalars("held_out/gradient_cosines/1-4")[-1].value == pytest.approx(cosines[0, 2].item(), rel=1e-5)
    assert {(image.width, image.height) for image in events.Images("rollout")} == {(8 * 17, 2 * 17)}
    assert {(image.width, image.height) for image in events.Images("horizons")} == {(4 * 17, 2 * 17)}


def test_what_wandb_is_given(config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(replace(config, steps=2, look_every=2, wandb=True), tmp_path / "run", progress=False)
    calls = wandb.init.return_value.log.call_args_list
    assert [call.kwargs["step"] for call in calls] == [0, 1]
    assert {"loss", "per_horizon/4", "held_out/psnr/1", "rollout"} <= set(calls[1].args[0])
    wandb.init.return_value.finish.assert_called_once()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb must be False if the package is not installed"):
        train(replace(config, steps=3, wandb=True), tmp_path / "other", progress=False)


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph alone, of a smaller model: inductor's C++ takes minutes to compile."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    heads = replace(config.model.heads, blocks=None, patch_sizes=None)
    config = replace(config, steps=2, model=replace(config.model, layers=1, heads=heads))
    train(config, tmp_path / "eager", progress=False)
    train(replace(config, compile=True), tmp_path / "compiled", progress=False)
    losses = [[row["loss"] for row in read_log(tmp_path / run / "log.jsonl")] for run in ("eager", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_exported_weights(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, steps=2, ema=0.5)
    train(config, tmp_path / "run", progress=False)
    averaged, _, _ = load_model(tmp_path / "run")
    out = tmp_path / "model.safetensors"
    export(tmp_path / "run", out)
    model, exported, step = load_exported(out)
    assert exported == config and step == 2 and not list(tmp_path.glob("*.tmp"))
    for (name, a), b in zip(averaged.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(FileExistsError, match="choose another file"):
        export(tmp_path / "run", out)


def test_a_gradient_that_is_not_finite_stops_the_run(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, tmp_path / "run", progress=False, stop_after=5)
    forward = WorldModel.forward

    def exploding(*args: Any, **kwargs: Any) -> Any:
        loss = forward(*args, **kwargs)
        return loss._replace(total=loss.total * 1e39)

    monkeypatch.setattr(WorldModel, "forward", exploding)
    with pytest.raises(FloatingPointError, match=r"step 5: the gradient norm is (inf|nan)"):
        train(config, tmp_path / "run", progress=False)
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 4}, r"clip must be >= 5 .* got 4"),
        ({"schedule": "linear"}, "schedule must be one of 'cosine', 'wsd', 'constant'; got 'linear'"),
        ({"parallel": "tpu"}, "parallel must be one of 'none', 'ddp', 'fsdp'; got 'tpu'"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"accumulate": 0}, "accumulate must be >= 1, got 0"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0, got 0.0"),
    ],
)
def test_bad_options_are_refused(config: TrainingConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_batch_that_does_not_divide_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch must be a multiple of processes \* accumulate = 1 \* 3, got 4"):
        train(replace(config, accumulate=3), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="needs torchrun"):
        train(replace(config, parallel="ddp"), tmp_path / "run", progress=False)
