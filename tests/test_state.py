"""The state of the world beside the frames of a replay buffer: written, read, handed out, checked and copied."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from mfwm.data import Clips, ClipSampler, Replay, ReplayWriter, split_levels
from mfwm.data.check import check
from mfwm.encode import encode
from mfwm.models.tokenizer import TokenizerConfig
from mfwm.training.tokenizer import TokenizerTraining, train_tokenizer

LENGTHS, STATE = (5, 9, 1, 12), "data/state"
NAMES, UNITS = ["ball_x", "ball_y", "angle"], ["pixels", "pixels", "degrees"]
FRAMES = sum(LENGTHS)


def write(path: Path, *, state: bool = True, side: int = 8) -> np.ndarray:
    """A set whose frames and state both hold the frame's number; the state has a NaN now and then."""
    numbers = np.arange(FRAMES, dtype=np.float32)
    states = np.stack([numbers, -numbers, np.where(numbers % 5 == 3, np.nan, numbers / 7)], axis=1).astype(np.float32)
    named = {"state_names": NAMES, "state_units": tuple(UNITS)} if state else {}
    with ReplayWriter(path, side, side, actions=4, **named) as writer:  # type: ignore[arg-type]
        for begin, end in zip(np.cumsum((0, *LENGTHS)), np.cumsum(LENGTHS), strict=False):
            video = np.broadcast_to(numbers[begin:end, None, None, None], (end - begin, side, side, 3)).astype(np.uint8)
            given = states[begin:end] if state else None
            writer.append(video, np.arange(begin, end) % 4, state=given)
    return states


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "set"
    write(path)
    return path


def test_a_state_is_read_as_it_was_written(sound: Path, tmp_path: Path) -> None:
    assert check(sound, 1) == []
    replay = Replay(sound)
    assert replay.state_names == NAMES and replay.attributes["state_units"] == UNITS
    states = write(tmp_path / "set")
    assert replay.state.dtype == np.float32 and np.array_equal(replay.state, states, equal_nan=True)
    assert np.isnan(replay.state).sum() == 5
    other = zarr.open_group(str(tmp_path / "set"), mode="r+")
    del other[STATE]
    other.create_array(STATE, data=states.astype(">f8"))
    assert np.array_equal(Replay(tmp_path / "set").state, states, equal_nan=True)


def test_clips_hand_it_out_where_asked(sound: Path) -> None:
    replay = Replay(sound)
    assert "state" not in Clips(replay, 6)[0] and "state" not in ClipSampler(replay, 6, 2).batch(0)
    assert "state" not in vars(replay), "opening a set must not read its state"
    chosen = np.array([1, 3])
    for clips in (Clips(replay, 6, state=True), Clips(replay, 4, episodes=chosen, within_episode=True, state=True)):
        for clip in (clips[index] for index in range(len(clips))):
            assert clip["state"].dtype == torch.float32
            assert torch.equal(clip["state"][:, 0], clip["video"][:, 0, 0, 0].float())
            assert torch.equal(clip["state"][:, 1], -clip["state"][:, 0])
    sampler = ClipSampler(replay, 6, 4, state=True)
    for step, batch in enumerate(sampler.batches(0, 5, workers=2)):
        assert batch["state"].shape == (4, 6, 3)
        assert torch.equal(batch["state"][..., 0], batch["video"][:, :, 0, 0, 0].float())
        without = ClipSampler(replay, 6, 4).batch(step)
        assert all(torch.equal(batch[name], without[name]) for name in without)
    parts = [ClipSampler(replay, 6, 4, part=(i, 2), state=True).batch(1)["state"] for i in range(2)]
    assert torch.equal(torch.cat(parts)[..., :2], sampler.batch(1)["state"][..., :2])


def test_sets_without_state_stay_valid(tmp_path: Path) -> None:
    write(tmp_path / "set", state=False)
    assert check(tmp_path / "set", 1) == []
    replay = Replay(tmp_path / "set")
    assert replay.state_names == [] and replay.state.shape == (FRAMES, 0)
    with pytest.raises(ValueError, match=r"state = True needs a set with data/state"):
        Clips(replay, 4, state=True)
    # Another project's array of that name, of any type and length, is none of ours.
    zarr.open_group(str(tmp_path / "set"), mode="r+").create_array(STATE, data=np.full((3, 2, 2), np.inf))
    assert check(tmp_path / "set", 1) == [] and Replay(tmp_path / "set").state.shape == (FRAMES, 0)


def test_a_writer_refuses_what_a_reader_would(tmp_path: Path) -> None:
    frames, action = np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64)
    for names, units, message in (
        ([], [], "at least one name"),
        (["x", "x"], ["pixels"] * 2, "each once"),
        (["x", "y"], ["pixels"], "as many units"),
        (["x"], None, "state_units must be a list of strings.*got None"),
        (None, ["pixels"], "state_names must be a list of strings.*got None"),
        ("xy", ["pixels"] * 2, "state_names must be a list of strings.*got 'xy'"),
        ([1], ["pixels"], r"state_names must be a list of strings.*got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ReplayWriter(tmp_path / "set", 8, 8, actions=4, state_names=names, state_units=units)  # type: ignore[arg-type]
    writer = ReplayWriter(tmp_path / "set", 8, 8, actions=4, state_names=["x", "y"], state_units=["pixels"] * 2)
    for state, message in (
        (None, "state must be given for this set"),
        (np.zeros((3, 2)), r"state must be floats \[4, 2\] for this set, got float64 \[3, 2\]"),
        (np.zeros((4, 3)), r"got float64 \[4, 3\]"),
        (np.zeros((4, 2), int), r"got int64 \[4, 2\]"),
        (np.array([[0, 0], [0, 0], [0, -np.inf], [0, 0]]), "got -inf at frame 2, column 1"),
        (np.array([[0, 0], [1e39, 0], [0, 0], [0, 0]]), r"got 1e\+39 at frame 1, column 0"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.append(frames, action, state=state)
    assert not list(tmp_path.iterdir())
    writer.append(frames, action, state=np.full((4, 2), np.nan))
    assert np.isnan(Replay(tmp_path / "set").state).all()
    with pytest.raises(ValueError, match="state must be None for this set"):
        ReplayWriter(tmp_path / "other", 8, 8, actions=4).append(frames, action, state=np.zeros((4, 2)))


def exchange(values: np.ndarray | None) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        root = zarr.open_group(str(path), mode="r+")
        del root[STATE]
        if values is not None:
            root.create_array(STATE, data=values)

    return damage


def attributes(**values: object) -> Callable[[Path], None]:
    return lambda path: zarr.open_group(str(path), mode="r+").attrs.update(values)


def infinite(path: Path) -> None:
    zarr.open_group(str(path), mode="r+")[STATE][17, 1] = np.inf  # type: ignore[index]


def cut(path: Path) -> None:
    chunk = path / STATE / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:40])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an infinite number": (infinite, r"data/state must be finite, or NaN .* got inf at frame 17, column 1, and 0 more"),
    "too few rows": (exchange(np.ones((20, 3), "f4")), r"data/state must have 27 rows, one per frame, got shape .20"),
    "too few columns": (exchange(np.ones((27, 2), "f4")), r"data/state must have 3 columns, .* got shape .27, 2"),
    "integers": (exchange(np.ones((27, 3), "i4")), r"data/state must be floats .N, S., got int32"),
    "one rank": (exchange(np.ones(27, "f4")), r"data/state must be floats .N, S., got float32 .27"),
    "no array": (exchange(None), r"array data/state is missing or unreadable"),
    "a chunk cut short": (cut, r"data/state: chunk 0.0 .* cannot be decoded"),
    "a missing chunk": (lambda path: (path / STATE / "0.0").unlink(), r"data/state: chunk 0.0 .* is missing"),
    "a number as names": (attributes(state_names=3), r"attribute state_names must be a list of strings.* got 3"),
    "a name twice": (attributes(state_names=["x", "x", "y"]), r"must have at least one name, each once"),
    "no units": (attributes(state_units=None), r"attribute state_units must be a list of strings.* got None"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_found_and_refused(sound: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    shutil.copytree(sound, tmp_path / "set")
    damage(tmp_path / "set")
    found = check(tmp_path / "set", 1)
    assert any(problem.invalid and re.search(message, str(problem)) for problem in found), found
    with pytest.raises(ValueError, match=message):
        Clips(Replay(tmp_path / "set"), 4, state=True)


def test_encode_keeps_it(tmp_path: Path) -> None:
    states = write(tmp_path / "set", side=32)
    assert len(split_levels(Replay(tmp_path / "set"), 0.25)[1]) == 1
    model = TokenizerConfig(frame=(3, 32, 32), patch=8, width=32, layers=1, head_width=16)
    run = TokenizerTraining(
        str(tmp_path / "set"), steps=1, clip=4, warmup=1, dtype="float32", held_out=0.25, look_every=0,
        tensorboard=False, model=model,
    )  # fmt: skip
    train_tokenizer(run, tmp_path / "tokenizer", progress=False)
    encode(tmp_path / "set", tmp_path / "tokens", tokenizer=tmp_path / "tokenizer", progress=False)
    tokens = Replay(tmp_path / "tokens")
    assert tokens.vocabulary and check(tmp_path / "tokens", 1) == []
    assert tokens.state_names == NAMES and tokens.attributes["state_units"] == UNITS
    assert np.array_equal(tokens.state, states, equal_nan=True)
