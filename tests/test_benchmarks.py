"""What the benchmarks compare does the same work, is checked before it is timed, and needs few packages."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mfwm import HeadsConfig
from mfwm.commands import command_of
from mfwm.models.world_model import WorldModel, WorldModelConfig

import benchmarks.__main__ as program
from benchmarks import bench_ops, bench_train, measure, reading_list, report, rivals
from mfwm_kernels import Horizons
from mfwm_kernels.op import OPS

CPU = torch.device("cpu")


@pytest.mark.parametrize("only_next", [False, True], ids=["multi-frame", "next frame"])
def test_the_written_out_training_step_is_the_same_step(only_next: bool) -> None:
    config = bench_train.SIZES["tiny"][1]
    config = bench_train.next_frame(config) if only_next else config

    def loss_and_gradients(written_out: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = WorldModel(config)
        video, actions = clips(config)
        with bench_train.written_out() if written_out else contextlib.nullcontext():
            loss = model(video, actions).total
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours, plain = loss_and_gradients(False), loss_and_gradients(True)
    assert len(ours) == len(plain) > 10
    for got, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def clips(config: WorldModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    frames = config.context + max(bench_train.OFFSETS)
    video = torch.randint(0, 256, (2, frames, *config.frame), dtype=torch.uint8)
    return video, torch.randint(0, config.actions, (2, frames))


# ---- contenders


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, op in OPS.items() for size in op.bench])
def test_the_eager_formula_takes_the_call_of_every_size(name: str, size: str) -> None:
    """On meta tensors: a formula that cannot express a call would leave the op without rivals."""
    kwargs = OPS[name].bench[size](torch.bfloat16, torch.device("meta"))
    found, want = (formula(**kwargs) for formula in (rivals.formula_of(name), bench_ops.ours(OPS[name], "reference")))
    assert [tuple(x.shape) for x in found] == [tuple(x.shape) for x in want]


@pytest.mark.parametrize("detach", ["near", "far", None])
def test_the_eager_formula_of_the_loss_detaches_what_the_op_does(detach: str | None) -> None:
    horizons, op = Horizons((1, 2, 4), (1, 2, 4)), OPS["multi_horizon_loss"]
    preds = [torch.randn(2, 5, 3, 8 // f, 8 // f, requires_grad=True) for f in horizons.factors]
    video = torch.randn(2, 7, 3, 8, 8)
    call = {"preds": preds, "video": video, "horizons": horizons, "consistency_weights": [0, 0.5, 0.25]}
    results = []
    for formula in (rivals.multi_horizon_loss, bench_ops.ours(op, "reference")):
        (total,) = formula(**call, detach=detach)
        results.append([total.detach(), *torch.autograd.grad(total, preds)])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want)


class OneState(torch.autograd.Function):
    """What modded-nanogpt's FusedSoftcappedCrossEntropy computes, by its interface: row n has targets n, n + 1, ..."""

    @staticmethod
    def forward(ctx: Any, x: Any, targets: Any, weights: Any, *rest: Any) -> torch.Tensor:
        _, _, head, _, _, _, scale, a, b, c = rest
        with torch.enable_grad():
            x, head = x.detach().requires_grad_(), head.detach().requires_grad_()
            logits = a * torch.sigmoid((x @ head + b) / c)
            losses = logits.new_zeros(x.shape[0])
            for k, weight in enumerate(weights.tolist()):
                rows = slice(0, x.shape[0] - k)
                ids = targets[k:, None]
                losses = losses + torch.nn.functional.pad(
                    weight * (logits[rows].logsumexp(-1) - logits[rows].gather(-1, ids)[:, 0]), (0, k)
                )
            ctx.gradients = torch.autograd.grad(losses.sum() * scale, (x, head))
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return ctx.gradients[0], None, None, None, None, ctx.gradients[1], None, None, None


def test_modded_nanogpt_computes_the_same_loss() -> None:
    """Of clips in a row, without a target from the next clip."""
    op = OPS["multi_horizon_linear_cross_entropy"]
    state = torch.randn(3, 5, 1, 1, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    call = {
        "inputs": [state] * 3, "weight": weight, "tokens": torch.randint(0, 11, (3, 8, 1, 1)),
        "horizons": Horizons((1, 2, 3), (1, 1, 1)), "softcap": 2.0,
    }  # fmt: skip
    for formula in (rivals.of_modded_nanogpt(OneState), bench_ops.ours(op, "reference")):
        found = [formula(**call)[0]]
        found += torch.autograd.grad(found[0], (state, weight))
        want = [rivals.multi_horizon_linear_cross_entropy(**call)[0]]
        want += torch.autograd.grad(want[0], (state, weight))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (None, "does not name"),
        ("", "does not name"),
        ("absent.py", "names no Python file"),
        ("broken.py", "ValueError: no GPU"),
    ],
)
def test_a_checkout_of_modded_nanogpt_that_cannot_be_loaded_is_absent(
    file: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('no GPU')")
    monkeypatch.delenv("MFWM_MODDED_NANOGPT", raising=False)
    if file is not None:
        monkeypatch.setenv("MFWM_MODDED_NANOGPT", str(tmp_path / file) if file else "")
    rivals._modded_nanogpt.cache_clear()
    with pytest.raises(ImportError, match=why):
        rivals._modded_nanogpt()


def test_libraries_for_shared_states() -> None:
    """One call per horizon where a library takes ids alone; modded-nanogpt in its own sizes."""
    bench = OPS["multi_horizon_linear_cross_entropy"].bench
    meta = torch.device("meta")

    def names(size: str, dtype: torch.dtype) -> set[str]:
        kwargs = bench[size](dtype, meta)
        return {name for name, library in rivals.LIBRARIES.items() if rivals.expresses(library, kwargs)}

    assert names("text-shared", torch.bfloat16) == {"Liger", "CCE", "modded-nanogpt"}
    assert names("text-shared", torch.float32) == {"Liger", "CCE"}
    assert names("cpu-shared", torch.bfloat16) == {"F.linear_cross_entropy", "Liger", "CCE", "QuACK"}


def compiled_as(factor: float, batches: list[int]) -> Callable[..., Any]:
    """A torch.compile whose code multiplies its outputs by `factor`; it lists the clips of each call."""

    def compile(formula: Any, **_: Any) -> Any:
        def compiled(actions: torch.Tensor, **rest: Any) -> Any:
            batches.append(actions.shape[0])
            return tuple(output * factor for output in formula(actions=actions, **rest))

        return compiled

    return compile


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.01, False)])
def test_torch_compile_is_checked_at_the_size_that_it_is_timed_at(
    factor: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, batches = OPS["action_window_sum"], []
    monkeypatch.setattr(torch, "compile", compiled_as(factor, batches))
    rows = {
        row["contender"]: row
        for row in bench_ops.measure(op, "cpu", "fp32", CPU, 1e-3, ("eager", "mfwm", "torch.compile"))
    }
    assert set(rows) == {"eager", "mfwm cpu", "torch.compile"}
    assert rows["eager"]["status"] == rows["mfwm cpu"]["status"] == "ok"
    assert rows["torch.compile"]["status"].startswith("ok" if right else "wrong: relative error 1.0e-02")
    assert set(batches) == {op.bench["cpu"](torch.float32, CPU)["actions"].shape[0]}
    assert rows["torch.compile"]["error"] >= rows["eager"]["error"]


def test_a_contender_that_fails_is_reported_and_kept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows a fault on a GPU fails too, and can end the program."""

    def faulty(op: Any, backend: str) -> Any:
        def formula(**_: Any) -> Any:
            raise RuntimeError("an illegal memory access was encountered")

        return formula

    def dead(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(bench_ops, "ours", faulty)
    monkeypatch.setattr(bench_ops, "release", dead)
    monkeypatch.setattr(measure, "keep_blocks", lambda: None)
    out = tmp_path / "results.json"
    command = "--only ops --op action_window_sum --size cpu --dtype fp32 --contender mfwm --out"
    monkeypatch.setattr(sys, "argv", ["benchmarks", *command.split(), str(out)])
    with pytest.raises(RuntimeError, match="the device is gone"):
        program.main()
    (row,) = json.loads(out.read_text())["ops"]
    assert row["status"] == "failed: RuntimeError: an illegal memory access was encountered"
    assert "illegal memory access" in capsys.readouterr().out


# ---- a machine with torch, Triton, numpy, pytest and pybind11 alone

ABSENT = (
    "av", "einops", "imageio", "matplotlib", "numcodecs", "PIL", "pyarrow", "pytest_benchmark",
    "safetensors", "tensorboard", "torchmetrics", "tqdm", "tyro", "vector_quantize_pytorch", "zarr",
)  # fmt: skip
# Python imports a module of this name as it starts.
SITECUSTOMIZE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


@pytest.mark.parametrize(
    "command",
    [
        "benchmarks --only ops --op action_window_sum --size cpu --dtype fp32 --budget 0.01 --contender eager mfwm",
        "benchmarks --only train --size tiny --budget 0.01 --contender eager mfwm",
        "mfwm_kernels.check --no-timing --op action_window_sum multi_horizon_loss",
        "benchmarks --only rollout --help",
    ],
)
def test_a_bare_machine_checks_and_measures(command: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    module, *arguments = command.split()
    if module == "benchmarks":
        arguments += ["--out", str(tmp_path / "results.json")]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **measure.ALLOCATOR, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "--contender" in command:
        results = json.loads((tmp_path / "results.json").read_text())
        rows = [*results["ops"], *results["train"]]
        assert {row["status"] for row in rows} == {"ok"} and len(rows) == 2


# ---- the reading list


@pytest.mark.parametrize("name", reading_list.ROWS)
def test_every_row_of_the_reading_list_is_trained_and_evaluated(name: str) -> None:
    row = reading_list.ROWS[name]
    train, evaluate = reading_list.commands_of(row, Path("runs/a"), "data", 7, 5)
    at = train.index("--preset")
    preset, flags = train[at + 1], [*train[:at], *train[at + 2 :]]
    config = command_of(preset, flags, "").config
    assert config.steps == 7 and row.tokens == (config.model.heads.output == "tokens")
    assert config.model.heads != HeadsConfig() and (config.model.width, config.model.layers) == (64, 2)
    measured = command_of("plain", evaluate, "")
    assert measured.clips == 5 and str(measured.run_directory) == "runs/a"
    assert measured.against in (None, Path("runs/next-frame"))


def test_a_row_takes_the_place_of_the_one_of_its_name(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    for row in ({"name": "svg", "a": 1}, {"name": "var"}, {"name": "svg", "a": 2}):
        reading_list.write_row(out, row)
    assert json.loads(out.read_text()) == [{"name": "svg", "a": 2}, {"name": "var"}]
    metrics = {"psnr": {"1": 20.123456}, "rollout_psnr": [3.00001, 2.0, 1.0], "seconds": 3, "latent_kl": None}
    expected = {"psnr": {"1": 20.1235}, "latent_kl": None, "rollout_psnr": {"1": 3.0, "2": 2.0}}
    assert reading_list.kept(metrics) == expected


def test_a_row_has_means_of_both_ends_and_no_nan() -> None:
    log: list[dict[str, Any]] = [
        {"step": n, "loss": float(n), "kl": [0.0, float(-n)], "seconds": 1.0} for n in range(100)
    ]
    found = reading_list.measures(log)
    assert found == {
        "steps": 100,
        "first": {"loss": 4.5, "kl": [0.0, -4.5]},
        "last": {"loss": 74.5, "kl": [0.0, -74.5]},
    }
    log[60]["kl"] = [0.0, float("nan")]
    with pytest.raises(ValueError, match="kl must be finite in every step, got nan in step 60"):
        reading_list.measures(log)


def test_the_readme_shows_the_newest_results_of_each_kind_of_device() -> None:
    def results(name: str, date: str, *, driver: str | None = None, bf16: bool = False) -> dict[str, Any]:
        committed = next(iter(report.devices(report.load())))[1]
        new = {"device": name, "date": date, "driver": driver, "cpu_multiplies_bf16": bf16}
        return {**committed, "environment": {**committed["environment"], **new}}

    shown = report.short(
        {
            "old": results("old CPU", "2026-01-01", bf16=True),
            "new": results("new CPU", "2026-01-02", bf16=True),
            "avx2": results("CPU without bf16", "2025-01-01"),
            "gpu": results("GPU", "2025-01-01", driver="580"),
            "untrained": {**results("untrained CPU", "2026-02-01"), "train": []},
        }
    )
    heads = [line.split(",")[0] for line in shown.splitlines() if line.endswith(":") and "torch" in line]
    assert [head.split(" (")[0] for head in heads] == ["GPU", "new CPU", "CPU without bf16"]
    dtypes = [line.split("|")[2].split(",")[1].strip() for line in shown.splitlines() if "`fan_out`" in line]
    assert dtypes == ["bf16", "bf16", "fp32"]
