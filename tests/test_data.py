"""The replay buffer on disk, and the clips that training draws from it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from mfwm.cli import main
from mfwm.data import Clips, ClipSampler, Replay, ReplayWriter, split_levels
from mfwm.data.check import check
from mfwm.data.collect import collect, source_of
from mfwm.training import train
from small_run import small_config

LENGTHS = (5, 3, 9, 1, 12, 7)
Damage = Callable[[Path], object]


def write(path: Path | str, lengths: tuple[int, ...] = LENGTHS, kind: str = "pixels") -> None:
    """Episodes whose number stands in every frame; kind: "pixels", "continuous" (actions), "tokens" or "no actions"."""
    rng = np.random.default_rng(0)
    sizes: dict[str, Any] = {
        "pixels": {"actions": 4},
        "continuous": {"actions": None, "action_size": 2},
        "tokens": {"actions": 4, "vocabulary": 100, "ids": 2},
        "no actions": {"actions": None},
    }[kind]
    writer = ReplayWriter(path, 16, 16, **sizes, env="synthetic")
    for level, length in enumerate(lengths):
        video = rng.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8)
        if kind == "tokens":
            video = rng.integers(0, 100, (length, 16, 16, 2))
        video[:, 0, 0, 0] = level
        action = rng.normal(size=(length, 2)) if kind == "continuous" else rng.integers(0, 4, length)
        writer.append(video, None if kind == "no actions" else action, level=level % 4)


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


def test_the_actions_of_a_clip_are_those_of_its_frames(tmp_path: Path) -> None:
    numbers = np.arange(20)
    writer = ReplayWriter(tmp_path / "set", 2, 2, actions=20)
    for episode in (numbers[:12], numbers[12:]):
        writer.append(np.broadcast_to(episode[:, None, None, None], (len(episode), 2, 2, 3)).astype(np.uint8), episode)
    clips = Clips(Replay(tmp_path / "set"), 5)
    assert len(clips) == 16
    for clip in (clips[index] for index in range(len(clips))):
        assert torch.equal(clip["actions"], clip["video"][:, 0, 0, 0].long())


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
    with pytest.raises(ValueError, match="not a Zarr group"):
        ReplayWriter(tmp_path / "mine", 8, 8, actions=4, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def cut(path: Path, size: int | None = None) -> None:
    os.truncate(path, path.stat().st_size // 2 if size is None else size)


def on_chunk(array: str, number: int, damage: Damage) -> Damage:
    return lambda path: damage(sorted((path / array).glob(f"{number}*"))[0])


def halve(array: str, number: int, size: int | None = None) -> Damage:
    return on_chunk(array, number, lambda file: cut(file, size))


def flip(array: str, number: int) -> Damage:
    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return on_chunk(array, number, damage)


def lose(array: str, number: int) -> Damage:
    return on_chunk(array, number, Path.unlink)


def overwrite(array: str, number: int) -> Damage:
    return on_chunk(array, number, lambda file: file.write_text("x" * 999))


def assign(name: str, index: Any, value: object) -> Damage:
    def damage(path: Path) -> None:
        zarr.open_group(str(path), mode="r+")[name][index] = value

    return damage


def resize(name: str, *shape: int) -> Damage:
    return lambda path: zarr.open_group(str(path), mode="r+")[name].resize(shape)


def remove(name: str) -> Damage:
    return lambda path: shutil.rmtree(path / name)


def exchange(name: str, values: np.ndarray) -> Damage:
    def damage(path: Path) -> None:
        root = zarr.open_group(str(path), mode="r+")
        del root[name]
        root.create_array(name, data=values)

    return damage


def attribute(name: str, value: object) -> Damage:
    return lambda path: zarr.open_group(str(path), mode="r+").attrs.update({name: value})


# What is done to a sound set of which kind, and what is said of it.
IMG, ACTION, ENDS, LEVELS = "data/img", "data/action", "meta/episode_ends", "meta/episode_level"
REFUSED: dict[str, tuple[str, Damage, str]] = {
    "frames cut short": ("pixels", halve(IMG, 1), r"data/img: chunk 1.0.0.0 .rows 64 to 101. cannot be decoded"),
    "a flipped bit in frames": ("pixels", flip(IMG, 0), r"data/img: chunk 0.0.0.0 .* cannot be decoded"),
    "frames missing": ("pixels", lose(IMG, 1), r"data/img: chunk 1.0.0.0 .* is missing"),
    "frames of no bytes": ("pixels", halve(IMG, 0, 0), r"data/img: chunk 0.0.0.0 .* cannot be decoded"),
    "frames overwritten": ("pixels", overwrite(IMG, 0), r"data/img: chunk 0.0.0.0 .* cannot be decoded"),
    "actions cut short": ("pixels", halve(ACTION, 0), r"data/action: chunk 0 .* cannot be decoded"),
    "actions missing": ("pixels", lose(ACTION, 0), r"data/action: chunk 0 .* is missing"),
    "ends cut short": ("pixels", halve(ENDS, 0), r"meta/episode_ends: chunk 0 .* cannot be decoded"),
    "levels missing": ("pixels", lose(LEVELS, 0), r"meta/episode_level: chunk 0 .* is missing"),
    "a NaN action": ("continuous", assign(ACTION, 7, np.nan), r"data/action must be finite, got .*nan.* at frame 7"),
    "an infinite action": ("continuous", assign(ACTION, 9, np.inf), r"data/action must be finite, .* at frame 9"),
    "an action too large": ("pixels", assign(ACTION, 7, 17), r"data/action must be in 0..3, got 0..17, .* frame 7"),
    "a negative action": ("pixels", assign(ACTION, 8, -1), r"data/action must be in 0..3, got -1..3, .* frame 8"),
    "too few actions": ("pixels", resize(ACTION, 90), r"data/action must have 102 rows, one per frame, got shape .90"),
    "no actions": ("pixels", remove(ACTION), r"array data/action is missing"),
    "no frames": ("pixels", remove(IMG), r"either data/img or data/tokens, got neither"),
    "no ends": ("pixels", remove(ENDS), r"array meta/episode_ends is missing"),
    "ends that go back": ("pixels", assign(ENDS, 2, 4), r"episode_ends must increase, got 4 after 8, episode 2"),
    "ends past the frames": ("pixels", assign(ENDS, 6, 999), r"ends at 999, but data/img has 102 frames"),
    "no episodes": ("pixels", resize(ENDS, 0), r"episode_ends must hold at least one episode, got none"),
    "too few levels": ("pixels", resize(LEVELS, 3), r"episode_level must have 7 rows, one per episode"),
    "frames in floats": ("pixels", exchange(IMG, np.full((102, 16, 16, 3), 0.5, "f4")), r"integers in .*got 0.5"),
    "frames of four channels": ("pixels", exchange(IMG, np.zeros((102, 16, 16, 4), "u1")), r"data/img must be .*, 4"),
    "actions of two ranks": ("pixels", exchange(ACTION, np.zeros((102, 2), "i8")), r"data/action must be integers"),
    "metadata cut short": ("pixels", lambda p: cut(p / IMG / ".zarray"), r"array data/img is missing or unreadable"),
    "actions said in words": ("pixels", attribute("actions", "four"), r"attribute actions must be an integer .*'four'"),
    "tokens cut short": ("tokens", halve("data/tokens", 1), r"data/tokens: chunk 1.0.0.0 .* cannot be decoded"),
    "a token too large": ("tokens", assign("data/tokens", (70, 3, 5, 1), 100), r"got 100 in frame 70, token .3, 5, 1"),
    "no vocabulary": ("tokens", attribute("vocabulary", None), r"attribute vocabulary must be .*, got None"),
    "no set at all": ("pixels", shutil.rmtree, r"does not exist"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set of every kind, to copy."""
    folder = tmp_path_factory.mktemp("sound")
    for kind in ("pixels", "continuous", "tokens"):
        write(folder / kind, (*LENGTHS, 65), kind)
        assert check(folder / kind, clip=1) == []
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_set_is_found_and_refused(sound: Path, tmp_path: Path, name: str) -> None:
    kind, damage, message = REFUSED[name]
    path = tmp_path / "set"
    shutil.copytree(sound / kind, path)
    damage(path)
    found = check(path, clip=1)
    assert any(problem.invalid and re.search(message, str(problem)) for problem in found), found
    with pytest.raises(ValueError, match=message):
        train(small_config(path), tmp_path / "run", progress=False)
    log = tmp_path / "run" / "log.jsonl"
    assert not log.exists() or not log.read_text()
    # A set too large for memory is refused when the damage is read, at the latest.
    with pytest.raises(ValueError, match=message):
        for _ in ClipSampler(Replay(path, memory_limit=0), clip_length=12, batch_size=8).batches(0, 20, workers=2):
            pass


def test_what_does_not_train_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "set"
    write(path)
    assert [str(p) for p in check(path, clip=6)] == [
        "note: 3 of 6 episodes are shorter than a clip of 6 frames (0, 1, 3): they are trained on in clips that "
        "span episodes, and cannot be evaluated"
    ]
    # A writer that was interrupted after the frames of an episode.
    zarr.open_group(str(path), mode="r+")["meta/episode_ends"][5] = 0
    said = "data/img: 7 frames after the last episode's end are left out"
    assert [str(p) for p in check(path, clip=1)] == [f"note: {said}"]
    with pytest.warns(UserWarning, match=said):
        replay = Replay(path)
    assert replay.frames == 30 and replay.episodes == 5


def test_data_check_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set"
    write(path)
    assign(ACTION, 7, 17)(path)
    monkeypatch.setattr("sys.argv", ["mfwm", "data", "check", str(path), "--clip", "5"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    found, short, verdict = capsys.readouterr().out.splitlines()
    assert "got 0..17, first at frame 7" in found and short.startswith("note: 2 of 6 episodes are shorter")
    assert verdict == f"{path}: invalid: 1 problem"


def test_a_set_lives_at_a_url(tmp_path: Path) -> None:
    write(tmp_path / "set")
    write("memory://far/set")
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "set")
    near = Replay(tmp_path / "set")
    with pytest.raises(ValueError, match=r"zipped.zip is a file: .* give zip://::file://.*/zipped.zip"):
        Replay(tmp_path / "zipped.zip")
    for url in (f"file://{tmp_path}/set", "memory://far/set", f"zip://::file://{tmp_path}/zipped.zip"):
        assert check(url, 1) == []
        far = Replay(url, memory_limit=0)
        assert np.array_equal(far.read(np.arange(37)), near.video) and np.array_equal(far.action, near.action), url
    with pytest.raises(FileExistsError, match=r"memory://far/set is not empty"):
        write("memory://far/set")
    with pytest.raises(ValueError, match=r"memory://nowhere"):
        Replay("memory://nowhere")


def test_tokens_are_clips_too(tmp_path: Path) -> None:
    write(tmp_path / "set", kind="tokens")
    replay = Replay(tmp_path / "set", memory_limit=0)
    assert replay.frame == (2, 16, 16) and replay.vocabulary == 100
    clip = Clips(replay, 6)[0]
    assert clip["video"].shape == (6, 16, 16, 2) and clip["video"].dtype == torch.int64
    assert torch.equal(clip["video"][:, 0, 0, 0], clip["segment_ids"])


def test_video_without_actions(tmp_path: Path) -> None:
    write(tmp_path / "set", kind="no actions")
    assert check(tmp_path / "set", 1) == []
    replay = Replay(tmp_path / "set")
    assert replay.actions is None and Clips(replay, 6)[0]["actions"].shape == (6, 0)


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
    assert replay.frames == 150 and replay.video.shape[1:] == (32, 32, 3)
    assert np.diff(replay.video.astype(int), axis=0).any(axis=(1, 2, 3)).mean() > 0.3
    collect(env, 150, tmp_path / "again", size=32, seed=3, progress=False)
    again = Replay(tmp_path / "again")
    assert np.array_equal(again.action, replay.action) and np.array_equal(again.video, replay.video)


def test_ids_of_smaller_frames_are_checked(tmp_path: Path) -> None:
    ids, low = np.zeros((5, 4, 4), np.int64), {2: np.zeros((5, 2, 2), np.int64)}
    for factors, vocabulary in (((1,), 7), ((3,), 7), ((4, 2), 7), ((2, 2), 7), ((2,), 0)):
        with pytest.raises(ValueError, match="low_factors must be increasing, >= 2 and divide frames of tokens, got"):
            ReplayWriter(tmp_path / "set", 4, 4, actions=3, vocabulary=vocabulary, low_factors=factors)
    writer = ReplayWriter(tmp_path / "set", 4, 4, actions=3, vocabulary=7, low_factors=(2,))
    for given, message in (
        (None, r"low_tokens must have the factors \[2\] of this set, got \[\]"),
        ({4: low[2]}, r"low_tokens must have the factors \[2\] of this set, got \[4\]"),
        ({2: low[2][:4]}, r"low_tokens\[2\] must be integers \[5, 2, 2\], got int64 \[4, 2, 2\]"),
        ({2: low[2].astype(float)}, r"low_tokens\[2\] must be integers \[5, 2, 2\], got float64 \[5, 2, 2\]"),
        ({2: low[2] + 7}, r"low_tokens\[2\] must be in 0\.\.6, got 7 in frame 0, token \[0, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.append(ids, np.zeros(5, np.int64), low_tokens=given)
    writer.append(ids, np.zeros(5, np.int64), low_tokens=low)
    assert Replay(tmp_path / "set").low_factors == (2,) and check(tmp_path / "set", 4) == []
    root = zarr.open_group(str(tmp_path / "set"))
    for stated in ([1], "2", [4, 2], [2.0]):
        root.attrs["low_factors"] = stated
        with pytest.raises(ValueError, match="attribute low_factors must be a list of increasing factors >= 2"):
            Replay(tmp_path / "set")
    root.attrs["low_factors"] = [2]
    root["data/tokens_2"].resize((4, 2, 2))
    with pytest.raises(ValueError, match=r"data/tokens_2 must have 5 rows, one per frame, got shape \[4, 2, 2\]"):
        Replay(tmp_path / "set")
    del root["data/tokens_2"]
    root.create_array("data/tokens_2", shape=(5, 4, 2), dtype="int32", chunks=(5, 4, 2), fill_value=0)[:] = 1
    with pytest.raises(ValueError, match="data/tokens_2 must be integers with 2 times fewer rows and columns than"):
        Replay(tmp_path / "set")
