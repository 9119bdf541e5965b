"""examples/engines: the same small world model in several training engines, which compute what one process does."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_processes import STEPS, gradients
from world import BATCH, Clips, World

ENGINES = Path(__file__).parent.parent / "examples" / "engines"


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Gradients of the first global batch and the losses of a run, in one process."""
    torch.manual_seed(0)
    model = World()
    first = {name: gradient.clone() for name, gradient in gradients(model, 0, BATCH, 1).items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for video, actions in torch.utils.data.DataLoader(Clips(STEPS), BATCH):
        total, _ = model(video, actions)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        losses.append(total.item())
    return {"gradients": first, "losses": losses}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    script = Path(__file__).with_name("engines_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_equal_one(engine: str, together: Path, alone: dict[str, Any]) -> None:
    found = torch.load(together / f"{engine}.pt")
    assert found["gradients"].keys() == alone["gradients"].keys()
    assert any(name.startswith("heads.") for name in found["gradients"])
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def example(name: str, package: str) -> Any:
    """An example, unless the package that it is for is not installed."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    return importlib.import_module(name)


def test_lightning_trains(alone: dict[str, Any]) -> None:
    lightning_module = example("lightning_module", "lightning")
    trainer = lightning_module.train(STEPS, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    metrics = trainer.callback_metrics
    assert metrics["loss"].item() == pytest.approx(alone["losses"][-1], rel=1e-5)
    assert [name for name in metrics if name != "loss"] == [f"loss of n + {offset}" for offset in (1, 2, 4, 8)]


def test_accelerate_trains(alone: dict[str, Any]) -> None:
    accelerate_loop = example("accelerate_loop", "accelerate")
    losses = accelerate_loop.train(STEPS, sys.modules["accelerate"].Accelerator(cpu=True))
    assert losses == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize("path", sorted(ENGINES.glob("*.py")), ids=lambda path: path.stem)
def test_an_engine_takes_few_lines(path: Path) -> None:
    assert len([line for line in path.read_text().splitlines() if line.strip()]) < 80
