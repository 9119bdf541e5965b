"""The error of positions: what a reader sees, how it is stored, and what is measured with it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mfwm.data import Replay, ReplayWriter
from mfwm.data.collect import collect
from mfwm.data.recording import Balls
from mfwm.data.replay import split_levels
from mfwm.evaluation import positions as module
from mfwm.evaluation.positions import (
    PositionReader,
    blurred,
    load_reader,
    objects_of,
    position_measures,
    position_summary,
    positions,
    reader_of,
    save_reader,
    train_reader,
)
from mfwm.metrics.intervals import interval, interval_of_defined
from torch import Tensor


def two_squares(path: Path, *, shift: int = 0) -> Replay:
    """A red and a green square of 4 pixels that jump about, 16 x 24 pixels. The green one keeps to its row, and is gone
    in a third of the frames. A third object is never visible, and a fourth never moves."""
    rng = np.random.default_rng(0)
    names = [f"{name}_{axis}" for name in ("red", "green", "ghost", "post") for axis in "xy"]
    units = ["pixels"] * len(names)
    writer = ReplayWriter(
        path, 16, 24, actions=2, env="two", state_names=[*names, "far_x", "far_y"], state_units=[*units, "m", "m"]
    )
    for level in range(10):
        img, state = np.full((30, 16, 24, 3), 20, np.uint8), np.full((30, 10), np.nan, np.float32)
        for frame in range(30):
            x, y = rng.integers(2, 22), rng.integers(2, 14)
            img[frame, y - 2 : y + 2, x - 2 : x + 2, 0] = 220
            state[frame, :2] = x + shift, y
            if rng.random() < 2 / 3:
                x = rng.integers(2, 22)
                img[frame, 6:10, x - 2 : x + 2, 1] = 220
                state[frame, 2:4] = x, 8
        state[:, 6:8], state[:, 8:] = 3, frame
        writer.append(img, np.zeros(30, np.int64), level, state=state)
    return Replay(path)


def test_objects_are_pairs_of_pixels_that_move(tmp_path: Path) -> None:
    replay = two_squares(tmp_path / "data")
    assert objects_of(replay) == {"red": (0, 1), "green": (2, 3)}
    known = positions(replay, np.arange(60).reshape(2, 30), [(0, 1), (2, 3)])
    assert known.shape == (2, 30, 2, 2) and not np.isnan(known[:, :, 0]).any()
    assert 0.2 < np.isnan(known[:, :, 1]).all(-1).mean() < 0.5
    # An object is visible only if both its coordinates are known.
    replay.state[0, 0] = np.nan
    assert np.isnan(positions(replay, np.arange(1), [(0, 1)])).all()


def frames_at(replay: Replay, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(replay.read(numbers)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_a_reader_finds_objects_that_are_not_always_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = two_squares(tmp_path / "data")
    monkeypatch.setattr(module, "STEPS", 250)
    reader = train_reader(replay, np.arange(8), seed=0)
    assert reader.objects == ["red", "green"] and reader.levels.tolist() == list(range(8))
    held_out = np.arange(240, 300)
    truth = torch.from_numpy(positions(replay, held_out, [(0, 1), (2, 3)]))
    read = reader.read(frames_at(replay, held_out))
    # The green square's row never changes, so it is known exactly.
    assert (read[:, 1, 1] == 8).all() and reader.fixed[1].tolist()[1] == 8
    error = (read - truth).norm(dim=-1)
    visible = ~truth.isnan().any(-1)
    assert error[:, 0].mean() < 1 and error[:, 1][visible[:, 1]].mean() < 1


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_reader_of_balls_is_exact_to_half_a_pixel(
    tmp_path: Path, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect("balls", 4000, tmp_path / "data", size=32, seed=1, balls=Balls(noise=noise), progress=False)
    replay = Replay(tmp_path / "data")
    trained, held_out = split_levels(replay, 0.1, seed=0)
    monkeypatch.setattr(module, "STEPS", 120)
    reader = train_reader(replay, trained, seed=0)
    numbers = module.frames_of(replay, held_out)[::7]
    truth = torch.from_numpy(positions(replay, numbers, list(objects_of(replay).values())))
    frames = frames_at(replay, numbers)
    # Also in pictures as blurred as predictions are.
    for shown in (frames, blurred(frames, 1.5)):
        error = (reader.read(shown) - truth).norm(dim=-1)
        assert error.mean() < 0.5, error.mean()
    # A fault that it must not survive: x and y exchanged.
    assert (reader.read(frames).flip(-1) - truth).norm(dim=-1).mean() > 3


def test_blur_is_gaussian_and_keeps_the_mean() -> None:
    point = torch.zeros(1, 3, 31, 31)
    point[:, :, 15, 15] = 1
    for sigma in (0.0, 1.0, 1.5):
        found = blurred(point, sigma)
        assert found.sum() == pytest.approx(3, abs=1e-5)
        spread = (found[0, 0].sum(0) * (torch.arange(31) - 15) ** 2).sum()
        assert spread == pytest.approx(sigma**2, rel=0.03, abs=1e-9)
    assert torch.allclose(blurred(torch.ones(1, 1, 5, 7), 1.5), torch.ones(1, 1, 5, 7))


def test_a_reader_is_stored_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = two_squares(tmp_path / "data")
    monkeypatch.setattr(module, "STEPS", 3)
    file = tmp_path / "reader.safetensors"
    reader = reader_of(replay, np.arange(8), seed=0, path=file)
    frames = frames_at(replay, np.arange(5))
    monkeypatch.setattr(module, "train_reader", None)
    again = reader_of(replay, np.arange(5), seed=3, path=file)
    assert torch.equal(reader.read(frames), again.read(frames))
    assert (again.frame, again.objects, again.data) == (reader.frame, reader.objects, reader.data)
    assert again.seen(np.array([0, 7, 8, 9, 9])) == 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "reader.safetensors"]
    with pytest.raises(ValueError, match=r"reader must have been trained on the frames of .*other"):
        collect("balls", 300, tmp_path / "other", size=32, progress=False)
        reader_of(Replay(tmp_path / "other"), np.arange(1), seed=0, path=file)
    (tmp_path / "broken").write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="broken is not a safetensors file"):
        load_reader(tmp_path / "broken")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"weights must be a reader of positions .* its header lacks position_reader"):
        load_reader(tmp_path / "weights")
    # A run that is interrupted while it writes leaves the old reader.
    before = file.read_bytes()
    monkeypatch.setattr(module, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_reader(reader, file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 5


def test_sets_without_positions_are_refused(tmp_path: Path) -> None:
    writer = ReplayWriter(tmp_path / "plain", 16, 16, actions=2, env="plain")
    writer.append(np.zeros((5, 16, 16, 3), np.uint8), np.zeros(5, np.int64), 0)
    replay = Replay(tmp_path / "plain")
    assert objects_of(replay) == {}
    with pytest.raises(ValueError, match="plain: a reader needs pixels, and columns NAME_x and NAME_y"):
        train_reader(replay, np.arange(1), seed=0)


class Bright(PositionReader):
    """Reads the position of the one pixel of each channel that is bright."""

    def forward(self, frames: Tensor) -> Tensor:
        place = frames.flatten(2).argmax(-1)
        return torch.stack([place % frames.shape[-1], place // frames.shape[-1]], -1).float()


def test_positions_are_measured_against_the_true_ones() -> None:
    """Two clips of three steps, and two objects, of which the second is gone in the first clip's last frame."""
    positions_BTO2 = torch.tensor([[0.0, 0], [5, 5]]).expand(2, 4, 2, 2).clone()
    positions_BTO2[:, :, 0, 0] = torch.arange(4.0)
    positions_BTO2[0, 3, 1] = math.nan

    def drawn(at: Tensor) -> Tensor:
        pictures = torch.full((2, 3, 2, 10, 10), -1.0)
        for clip, step, number in np.ndindex(2, 3, 2):
            x, y = at[clip, step, number].nan_to_num().int().tolist()
            pictures[clip, step, number, y, x] = 1
        return pictures

    predicted = positions_BTO2[:, 1:].clone()
    predicted[1, 1, 0] += torch.tensor([3.0, 4.0])
    predicted[:, :, 1] += torch.tensor([0.0, 1.0])
    reader = Bright((2, 10, 10), ["a", "b"], "")
    found = position_measures(reader, drawn(predicted), drawn(positions_BTO2[:, 1:]), positions_BTO2)
    np.testing.assert_allclose(found["object_position_error"][0], [[0, 1], [0, 1], [0, math.nan]])
    np.testing.assert_allclose(found["position_error"], [[0.5, 0.5, 0], [0.5, 3, 0.5]])
    np.testing.assert_allclose(found["position_error_copy"], [[0.5, 1, 3], [0.5, 1, 1.5]])
    assert np.nansum(found["reader_error"]) == 0 and np.isnan(found["reader_error"]).sum() == 1
    metrics = position_summary(found, ["a", "b"], 0)
    assert metrics["position_error"] == [0.5, 1.75, 0.25] and metrics["position_error_copy"] == [0.5, 1, 2.25]
    assert metrics["position_error_by_object"] == {"a": [0, 2.5, 0], "b": [1, 1, 1]}
    assert metrics["reader_error"] == 0 and metrics["reader_error_by_object"] == {"a": 0, "b": 0}
    assert metrics["position_error_95"] == [[0.5, 0.5], [0.5, 3], [0, 0.5]]


def test_an_interval_leaves_out_what_is_undefined() -> None:
    values = np.random.default_rng(0).normal(size=(60, 3))
    assert np.allclose(interval_of_defined(0, values), interval(0, np.asarray, values))
    values[:, 2] = np.nan
    values[::2, 1] = np.nan
    found = np.array(interval_of_defined(0, values))
    assert np.isnan(found[2]).all()
    half = 1.96 * np.nanstd(values[:, 1]) / 30**0.5
    assert np.allclose(found[1], np.nanmean(values[:, 1]) + np.array([-half, half]), rtol=0, atol=0.25 * half)
