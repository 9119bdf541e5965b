"""Other layouts of action-labelled video, imported as replay buffers: videos, LeRobot data sets, token memmaps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from mfwm import HeadsConfig, WorldModelConfig
from mfwm.data import Replay
from mfwm.data.check import check
from mfwm.data.import_lerobot import import_lerobot
from mfwm.data.import_tokens import import_tokens
from mfwm.data.import_videos import import_videos
from mfwm.training import for_replay, train
from mfwm.training.run_log import read_log
from small_run import moving_squares, small_config

from mfwm_kernels import Horizons

LENGTHS = (7, 9, 6)
RATE = 10


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Frames of three episodes, uint8 [T, 32, 32, 3]."""
    folder = tmp_path_factory.mktemp("squares")
    moving_squares(folder / "set")
    replay = Replay(folder / "set")
    episodes = zip(replay.episode_starts, LENGTHS, strict=False)
    return [replay.video[start : start + length].repeat(2, 1).repeat(2, 2) for start, length in episodes]


def write_mp4(path: Path, frames: np.ndarray, leave_out: int | None = None) -> None:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.flags |= av.codec.context.Flags.qscale
        stream.codec_context.global_quality = 2 * 118
        for number, img in enumerate(frames):
            if number != leave_out:
                frame = av.VideoFrame.from_ndarray(img, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def same_pictures(replay: Replay, squares: list[np.ndarray]) -> None:
    assert replay.episode_lengths.tolist() == [len(frames) for frames in squares]
    assert np.abs(replay.video.astype(int) - np.concatenate(squares)).mean() < 4


# ---- a folder of videos


def write_table(path: Path, lengths: dict[str, int], action: Callable[[int], str] = lambda t: f"{t / 10},{-t}") -> None:
    rows = [f"{name},{t},{action(t)}" for name, length in lengths.items() for t in range(length)]
    path.write_text("video,frame,action_0,action_1\n" + "\n".join(reversed(rows)))


@pytest.fixture
def videos(squares: list[np.ndarray], tmp_path: Path) -> Path:
    names = ("c.mp4", "b.mp4", "a.mp4")
    for name, frames in zip(names, reversed(squares), strict=True):
        write_mp4(tmp_path / "videos" / name, frames)
    write_table(tmp_path / "videos/actions.csv", dict(zip(names, reversed(LENGTHS), strict=True)))
    return tmp_path / "videos"


def test_videos_are_imported(squares: list[np.ndarray], videos: Path, tmp_path: Path) -> None:
    assert import_videos(videos, tmp_path / "set", progress=False) == []
    assert check(tmp_path / "set", clip=6) == []
    replay = Replay(tmp_path / "set")
    same_pictures(replay, squares)
    assert np.allclose(replay.action[:7, 0], np.arange(7) / 10) and replay.action[16:, 1].tolist() == [
        0,
        -1,
        -2,
        -3,
        -4,
        -5,
    ]
    import_videos(videos, tmp_path / "small", size=(16, 16), progress=False)
    assert Replay(tmp_path / "small").video.shape == (22, 16, 16, 3)


def table(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "actions.csv").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p / "b.mp4"), r"b.mp4 (cannot be decoded|yields \d frames)"),
        (lambda p: (p / "b.mp4").unlink(), r"b.mp4 cannot be decoded after 0 frames: .*No such file"),
        (
            lambda p: write_table(p / "actions.csv", {"b.mp4": 2}),
            r"b.mp4 has 9 frames, but actions.csv has 2 rows for it",
        ),
        (table("video,frame,action\nb.mp4,0,1\nb.mp4,2,0\n"), r"frame 1 of b.mp4 has no action"),
        (table("video,frame,action\nb.mp4,0,1\nb.mp4,0,0\n"), r"line 3: frame 0 of b.mp4 appears twice"),
        (table("video,frame,action_0\nb.mp4,0,nan\n"), r"line 2: an action must be finite"),
        (table("video,time,action\nb.mp4,0,1\n"), r"actions.csv must have columns video, frame and action"),
    ],
)
def test_damaged_videos_are_refused(
    videos: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(videos)
    with pytest.raises(ValueError, match=message):
        import_videos(videos, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


def test_an_import_of_nothing_deletes_nothing(videos: Path, tmp_path: Path) -> None:
    import_videos(videos, tmp_path / "set", progress=False)
    with pytest.raises(FileExistsError, match="set is not empty"):
        import_videos(videos, tmp_path / "set", progress=False)
    for path in videos.glob("*.mp4"):
        cut(path)
    with pytest.raises(ValueError, match=r"no episode can be read: .*a.mp4"):
        import_videos(videos, tmp_path / "set", skip_damaged=True, overwrite=True, progress=False)
    assert Replay(tmp_path / "set").episodes == 3


def test_damaged_videos_are_left_out_when_asked(squares: list[np.ndarray], videos: Path, tmp_path: Path) -> None:
    cut(videos / "b.mp4")
    (left_out,) = import_videos(videos, tmp_path / "set", skip_damaged=True, progress=False)
    assert "b.mp4" in left_out
    same_pictures(Replay(tmp_path / "set"), [squares[0], squares[2]])


# ---- LeRobot


def write_lerobot(
    folder: Path, squares: list[np.ndarray], version: str, *, leave_out: int | None = None, value: float | None = None
) -> None:
    """The parts of a LeRobot data set that say what belongs together, with the paths of LeRobot's own writer.

    leave_out: a frame that the (first) video lacks; value: of action 4 of episode 1.
    """
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tables, rows, start = [], [], 0
    for e, frames in enumerate(squares):
        steps = np.arange(len(frames))
        actions = np.stack([e + steps / 10, -steps], axis=1).astype(np.float32)
        if e == 1 and value is not None:
            actions[4, 1] = value
        columns = {"action": actions.tolist(), "timestamp": steps / RATE, "frame_index": steps}
        tables.append(pa.table({**columns, "episode_index": np.full(len(frames), e), "index": start + steps}))
        rows.append({"episode_index": e, "tasks": ["move"], "length": len(frames)})
        rows[-1] |= {f"{part}/{name}_index": 0 for part in ("data", f"videos/{CAMERA}") for name in ("chunk", "file")}
        rows[-1] |= {f"videos/{CAMERA}/from_timestamp": start / RATE, "stats/action/mean": [0.0, 0.0]}
        start += len(frames)
    info = {
        "codebase_version": version, "fps": RATE, "chunks_size": 1000,
        "total_episodes": len(squares), "total_frames": start,
        "features": {
            "action": {"dtype": "float32", "shape": [2]},
            CAMERA: {"dtype": "video", "shape": [32, 32, 3]},
        },
    }  # fmt: skip
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    if version.startswith("v2"):
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        for e, frames in enumerate(squares):
            pq.write_table(tables[e], folder / f"data/chunk-000/episode_{e:06d}.parquet")
            write_mp4(folder / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4", frames, leave_out)
        lines = [json.dumps({name: row[name] for name in ("episode_index", "tasks", "length")}) for row in rows]
        (folder / "meta/episodes.jsonl").write_text("\n".join(lines))
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        pq.write_table(pa.concat_tables(tables), folder / "data/chunk-000/file-000.parquet")
        write_mp4(folder / f"videos/{CAMERA}/chunk-000/file-000.mp4", np.concatenate(squares), leave_out)
        pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    (folder / "meta/info.json").write_text(json.dumps(info))


def pictures_in_the_table(folder: Path, squares: list[np.ndarray]) -> None:
    """Pictures where the videos stood, and discrete actions: the number of the episode."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    shutil.rmtree(folder / "videos")
    for e, (path, frames) in enumerate(zip(sorted(folder.glob("data/*/*.parquet")), squares, strict=True)):
        cells = [{"bytes": iio.imwrite("<bytes>", img, extension=".png"), "path": None} for img in frames]
        table = pq.read_table(path).drop_columns(["action"])
        table = table.append_column("action", pa.array([e] * len(frames))).append_column(CAMERA, pa.array(cells))
        pq.write_table(table, path)
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"] = {"action": {"dtype": "int64", "shape": [1]}, CAMERA: {"dtype": "image", "shape": [32, 32, 3]}}
    (folder / "meta/info.json").write_text(json.dumps(info))


def test_pictures_of_lerobot_are_imported(squares: list[np.ndarray], tmp_path: Path) -> None:
    write_lerobot(tmp_path / "lerobot", squares, "v2.1")
    pictures_in_the_table(tmp_path / "lerobot", squares)
    import_lerobot(tmp_path / "lerobot", tmp_path / "set", progress=False)
    replay = Replay(tmp_path / "set")
    assert np.array_equal(replay.video, np.concatenate(squares)) and replay.actions == 3
    assert np.array_equal(replay.action, np.repeat([0, 1, 2], LENGTHS))


CAMERA = "observation.images.top"


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_is_imported(squares: list[np.ndarray], tmp_path: Path, version: str) -> None:
    write_lerobot(tmp_path / "lerobot", squares, version)
    assert import_lerobot(tmp_path / "lerobot", tmp_path / "set", progress=False) == []
    assert check(tmp_path / "set", clip=6) == []
    replay = Replay(tmp_path / "set")
    same_pictures(replay, squares)
    starts = replay.action[replay.episode_starts]
    assert starts.tolist() == [[0, 0], [1, 0], [2, 0]] and replay.action[15].tolist() == pytest.approx([1.8, -8])
    with pytest.raises(ValueError, match=r"camera must be one of observation.images.top, got 'wrist'"):
        import_lerobot(tmp_path / "lerobot", tmp_path / "wrist", camera="wrist", progress=False)


def lose_places(folder: Path) -> None:
    pq, path = pytest.importorskip("pyarrow.parquet"), folder / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns([f"videos/{CAMERA}/from_timestamp"]), path)


def lengthen(folder: Path) -> None:
    path = folder / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 9', '"length": 8'))


@pytest.mark.parametrize(
    ("version", "action", "damage", "message", "left"),
    [
        ("v2.1", {"value": np.nan}, None, r"episode 1: action must be finite, got .*nan.* at frame 4", 2),
        ("v3.0", {"value": np.nan}, None, r"episode 1: action must be finite, got .*nan.* at frame 4", 2),
        ("v2.1", {}, lambda p: cut(p / f"videos/chunk-000/{CAMERA}/episode_000001.mp4"), r"episode_000001.mp4", 2),
        ("v2.1", {}, lambda p: cut(p / "data/chunk-000/episode_000001.parquet"), r"000001.parquet cannot be read", 2),
        ("v3.0", {"leave_out": 12}, None, r"file-000.mp4 must have a frame at 1.200 s, got one at 1.300 s", 2),
        ("v2.1", {}, lengthen, r"info.json says total_frames = 22, but its episodes have 21", 0),
        ("v3.0", {}, lose_places, r"the episodes in meta must have videos/observation.images.top/from_timestamp", 0),
        ("v1.6", {}, None, r"codebase_version must be v2 or v3, got 'v1.6'", 0),
    ],
)  # fmt: skip
def test_a_damaged_lerobot_is_refused(
    squares: list[np.ndarray],
    tmp_path: Path,
    version: str,
    action: dict[str, Any],
    damage: Any,
    message: str,
    left: int,
) -> None:
    write_lerobot(tmp_path / "lerobot", squares, version, **action)
    if damage:
        damage(tmp_path / "lerobot")
    with pytest.raises(ValueError, match=message):
        import_lerobot(tmp_path / "lerobot", tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()
    if left:
        (reason,) = import_lerobot(tmp_path / "lerobot", tmp_path / "set", skip_damaged=True, progress=False)
        assert "episode 1" in reason
        same_pictures(Replay(tmp_path / "set"), [squares[0], squares[2]])


# ---- token memmaps


@pytest.fixture
def memmaps(tmp_path: Path) -> Path:
    """22 frames of 4 x 4 tokens of 64 in three episodes, with two files of actions."""
    folder, rng = tmp_path / "memmaps", np.random.default_rng(0)
    (folder / "actions").mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"num_images": 22, "s": 4, "vocab_size": 64, "hz": 30}))
    rng.integers(0, 64, (22, 4, 4), np.uint32).tofile(folder / "video.bin")
    np.repeat(np.array([5, 2, 9], np.int32), LENGTHS).tofile(folder / "segment_ids.bin")
    for name, width in (("joint_pos", 3), ("driving_command", 2)):
        rng.normal(size=(22, width)).astype(np.float32).tofile(folder / "actions" / f"{name}.bin")
    return folder


def test_tokens_are_imported(memmaps: Path, tmp_path: Path) -> None:
    assert import_tokens(memmaps, tmp_path / "set", progress=False) == []
    assert check(tmp_path / "set", clip=6) == []
    replay, stored = Replay(tmp_path / "set"), np.fromfile(memmaps / "video.bin", np.uint32).reshape(22, 4, 4)
    assert replay.episode_lengths.tolist() == list(LENGTHS) and replay.vocabulary == 64 and replay.frame == (1, 4, 4)
    assert np.array_equal(replay.video, stored)
    assert np.array_equal(replay.action[:, 2:].ravel(), np.fromfile(memmaps / "actions/joint_pos.bin", np.float32))
    import_tokens(memmaps, tmp_path / "split", ids=2, progress=False)
    split = Replay(tmp_path / "split")
    assert split.vocabulary == 8 and np.array_equal(split.video @ np.array([1, 8]), stored)


def test_imported_tokens_train(memmaps: Path, tmp_path: Path) -> None:
    import_tokens(memmaps, tmp_path / "set", ids=2, progress=False)
    heads = HeadsConfig(Horizons((1, 2), (1, 2)), output="tokens", vocabulary=8)
    model = WorldModelConfig((1, 1, 1), 1, 16, 1, 16, context=4, actions=4, heads=heads)
    small = replace(small_config(tmp_path / "set"), steps=2, clip=6, held_out=0.3, model=model)
    config = for_replay(small, Replay(tmp_path / "set"))
    assert config.model.frame == (2, 4, 4) and (config.model.actions, config.model.action_size) == (0, 5)
    train(config, tmp_path / "run", progress=False)
    rows = read_log(tmp_path / "run" / "log.jsonl")
    # Two ids of eight each: a model that knows nothing pays log 8 for both.
    assert len(rows) == 2 and rows[0]["per_horizon"] == pytest.approx([2 * np.log(8)] * 2, rel=0.3)
    with pytest.raises(ValueError, match=r"vocabulary must be that of the data, 8 .0 for pixels., got 0"):
        for_replay(small_config(tmp_path / "set"), Replay(tmp_path / "set"))


def change(name: str, place: int, value: float, dtype: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = np.fromfile(folder / name, dtype)
        values[place] = value
        values.tofile(folder / name)

    return damage


@pytest.mark.parametrize(
    ("damage", "message", "left"),
    [
        (lambda p: cut(p / "video.bin"), r"video.bin must have 1408 bytes for 22 frames, got 704", 0),
        (lambda p: cut(p / "segment_ids.bin"), r"segment_ids.bin must have 88 bytes for 22 frames, got 44", 0),
        (lambda p: (p / "segment_ids.bin").unlink(), r"segment_ids.bin is missing", 0),
        (lambda p: cut(p / "actions/joint_pos.bin"), r"joint_pos.bin must have a multiple of 88 bytes .* got 132", 0),
        (lambda p: cut(p / "metadata.json"), r"metadata.json cannot be read", 0),
        (change("video.bin", 130, 64, np.uint32), r"frames 7 to 15: ids must be in 0..63, got 0..64", 15),
        (change("actions/joint_pos.bin", 30, np.nan, np.float32), r"7 to 15: action must be finite, .* at frame 3", 13),
    ],
)  # fmt: skip
def test_damaged_memmaps_are_refused(memmaps: Path, tmp_path: Path, damage: Any, message: str, left: int) -> None:
    damage(memmaps)
    with pytest.raises(ValueError, match=message):
        import_tokens(memmaps, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()
    if left:
        (reason,) = import_tokens(memmaps, tmp_path / "set", skip_damaged=True, progress=False)
        assert "frames 7 to 15" in reason and Replay(tmp_path / "set").episode_lengths.tolist() == [7, 6]
