"""The replay buffer on disk, and the clips that training draws from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from mfwm.collect import collect, source_of
from mfwm.data import Clips, ClipSampler, Replay, ReplayWriter, split_levels

LENGTHS = (5, 3, 9, 1, 12, 7)


def write(path: Path, lengths: tuple[int, ...] = LENGTHS) -> None:
    rng = np.random.default_rng(0)
    writer = ReplayWriter(path, 8, 8, actions=4, env="synthetic")
    for level, length in enumerate(lengths):
        img = rng.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8)
        img[:, 0, 0, 0] = level
        writer.append(img, rng.integers(0, 4, length), level=level % 4)


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "set")
    replay = Replay(tmp_path / "set")
    assert replay.episode_lengths.tolist() == list(LENGTHS)
    assert replay.actions == 4 and replay.attributes["env"] == "synthetic"
    assert replay.episode_level.tolist() == [0, 1, 2, 3, 0, 1]
    on_disk = Replay(tmp_path / "set", memory_limit=0)
    frames = np.array([[0, 1, 2], [20, 21, 22], [3, 9, 4]])
    assert not on_disk.in_memory and np.array_equal(on_disk.read(frames), replay.read(frames))


def test_clips_know_their_episodes(tmp_path: Path) -> None:
    write(tmp_path / "set")
    replay = Replay(tmp_path / "set")
    clips = Clips(replay, 6)
    for index in range(len(clips)):
        clip = clips[index]
        assert torch.equal(clip["video"][:, 0, 0, 0].long(), clip["segment_ids"])
    # The video is the frames' own memory, channels last, seen channels first.
    assert clips[0]["video"].permute(0, 2, 3, 1).is_contiguous()
    inside = Clips(replay, 6, within_episode=True)
    assert len(inside) == sum(max(0, length - 5) for length in LENGTHS)


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    write(tmp_path / "set")
    first = ClipSampler(Replay(tmp_path / "set"), 4, 3, seed=5)
    again = ClipSampler(Replay(tmp_path / "set"), 4, 3, seed=5)
    for step, ahead in zip(range(2, 7), again.batches(2, 7), strict=True):
        assert all(torch.equal(first.batch(step)[name], ahead[name]) for name in ahead)
    assert not torch.equal(
        first.batch(0)["video"], ClipSampler(Replay(tmp_path / "set"), 4, 3, seed=6).batch(0)["video"]
    )


def test_levels_are_split(tmp_path: Path) -> None:
    write(tmp_path / "set")
    replay = Replay(tmp_path / "set")
    training, held_out = split_levels(replay, 0.25)
    assert len(held_out) and not set(replay.episode_level[training]) & set(replay.episode_level[held_out])
    assert sorted([*training, *held_out]) == list(range(len(LENGTHS)))
    write(tmp_path / "one", (5,))
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_levels(Replay(tmp_path / "one"))


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    write(tmp_path / "set")
    with pytest.raises(FileExistsError, match="is not empty"):
        write(tmp_path / "set")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="no Zarr group"):
        ReplayWriter(tmp_path / "mine", 8, 8, actions=4, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def damage_ends(root: zarr.Group) -> None:
    root["meta/episode_ends"][2] = 4


def damage_beyond(root: zarr.Group) -> None:
    root["meta/episode_ends"][5] = 999


def damage_action(root: zarr.Group) -> None:
    root["data/action"][7] = 17


def damage_missing(root: zarr.Group) -> None:
    del root["data/action"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_ends, "episode_ends must increase, got 4 after 8"),
        (damage_beyond, "ends at 999, but data/img has 37 frames"),
        (damage_action, r"data/action must be in 0..3, got 0..17"),
        (damage_missing, "array data/action is missing"),
    ],
)
def test_a_damaged_set_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path / "set")
    damage(zarr.open_group(str(tmp_path / "set"), mode="r+"))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        Replay(tmp_path / "set")


def test_unknown_sources_list_the_choices() -> None:
    with pytest.raises(ValueError, match=r"env must be one of .*coinrun.*atari:<Game>.*got 'pong'"):
        source_of("pong")
    with pytest.raises(ValueError, match="frames must be >= 1, got 0"):
        collect("doom", 0, Path("nowhere"))


@pytest.mark.parametrize("env", ["atari:Breakout", "doom"])
def test_real_frames(tmp_path: Path, env: str) -> None:
    pytest.importorskip("ale_py" if env.startswith("atari") else "vizdoom")
    collect(env, 150, tmp_path / "set", size=32, seed=3, progress=False)
    replay = Replay(tmp_path / "set")
    assert replay.frames == 150 and replay.img.shape[1:] == (32, 32, 3)
    assert np.diff(replay.img.astype(int), axis=0).any(axis=(1, 2, 3)).mean() > 0.3
    collect(env, 150, tmp_path / "again", size=32, seed=3, progress=False)
    again = Replay(tmp_path / "again")
    assert np.array_equal(again.action, replay.action) and np.array_equal(again.img, replay.img)
