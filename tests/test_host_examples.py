"""examples/hosts: one trainer per kind of host, whose MultiFrame class is the whole change."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from mfwm.data import ClipSampler, Replay
from small_run import moving_squares

from mfwm_kernels import Horizons

HOSTS = Path(__file__).parent.parent / "examples" / "hosts"
KINDS = ("pixels", "shifted_tokens", "maskgit_tokens", "latent_features", "diffusion")
# What makes MultiFrame train the host's own loss alone.
OWN_LOSS: dict[str, dict[str, Any]] = {
    "pixels": {"horizons": Horizons((1,), (1,))},
    "shifted_tokens": {"horizons": Horizons((1,), (1,))},
    "maskgit_tokens": {"horizons": Horizons((0,), (1,))},
    "latent_features": {"horizons": Horizons((1,), (1,)), "side": 16},
    "diffusion": {"weights": (0.0, 0.0, 0.0)},
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "squares"
    moving_squares(path)
    return path


@pytest.fixture(scope="module")
def clip(squares: Path) -> tuple[torch.Tensor, torch.Tensor]:
    clips = next(iter(ClipSampler(Replay(squares), 12, 4).batches(0, 1)))
    return clips["video"] / 127.5 - 1, clips["actions"]


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HOSTS))
    return importlib.import_module(request.param)


def copy_of_host(module: Any, **options: Any) -> tuple[Any, Any]:
    """A Host, and a MultiFrame with its weights."""
    plain, multi = module.Host(4), module.MultiFrame(4, **options)
    multi.load_state_dict(plain.state_dict(), strict=False)
    return plain, multi


def loss_and_gradients(model: Any, clip: tuple[torch.Tensor, torch.Tensor], like: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(3)
    total, shown = model.loss(*clip)
    total.backward()
    return (total, shown), {name: model.get_parameter(name).grad for name, _ in like.named_parameters()}


@pytest.mark.parametrize("host", KINDS, indirect=True)
def test_the_hosts_own_loss_is_unchanged(host: Any, clip: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(0)
    plain, multi = copy_of_host(host, **OWN_LOSS[host.__name__])
    (expected, _), gradients = loss_and_gradients(plain, clip, plain)
    (total, shown), multi_gradients = loss_and_gradients(multi, clip, plain)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(shown[0], expected, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(multi_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("host", KINDS, indirect=True)
def test_every_horizon_learns(host: Any, clip: tuple[torch.Tensor, torch.Tensor]) -> None:
    """One clip over and over, so that the first loss and the last are of the same frames."""
    torch.manual_seed(0)
    _, multi = copy_of_host(host, **({"side": 16} if host.__name__ == "latent_features" else {}))
    optimiser = torch.optim.AdamW(multi.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(3)
        total, shown = multi.loss(*clip)
        losses.append(shown)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    assert len(shown) == (3 if host.__name__ == "latent_features" else 4)
    assert (losses[-1] < losses[0]).all(), torch.stack(losses)
    assert all(parameter.grad is not None for parameter in multi.parameters())


@pytest.mark.parametrize("host", KINDS, indirect=True)
def test_the_change_is_under_40_lines(host: Any) -> None:
    changed = [line for line in inspect.getsource(host.MultiFrame).splitlines() if line.strip()]
    assert 5 < len(changed) < 40


@pytest.mark.parametrize("multi_frame", [False, True])
def test_a_host_runs_from_the_command_line(
    multi_frame: bool, squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(HOSTS))
    pixels = importlib.import_module("pixels")
    monkeypatch.setattr("sys.argv", ["pixels", str(squares), "--steps", "2", *["--multi-frame"][: int(multi_frame)]])
    importlib.import_module("small_trainer").main(pixels.__doc__, pixels.Host, pixels.MultiFrame)
    lines = capsys.readouterr().out.splitlines()
    assert [len(ast.literal_eval(line.split("losses ")[1])) for line in lines] == [4 if multi_frame else 1] * 2
