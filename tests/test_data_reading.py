"""What must not happen to a reader: trust in a set that changed, and code of a stranger that runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from mfwm.data import ClipSampler, Replay, ReplayWriter
from mfwm.data.check import check
from mfwm.data.place import Place
from small_set import OLD, value_of, write


@pytest.fixture
def far(tmp_path: Path) -> tuple[Path, Replay]:
    """A set of three chunks of frames, read as it is used."""
    with ReplayWriter(tmp_path / "set", 8, 8, actions=4) as writer:
        for level in range(3):
            writer.append(np.full((64, 8, 8, 3), 100 + level, np.uint8), np.full(64, level), level)
    return tmp_path / "set", Replay(tmp_path / "set", memory_limit=0)


def test_a_chunk_that_vanishes_is_missed(far: tuple[Path, Replay]) -> None:
    path, replay = far
    replay.read(np.arange(192))
    (path / "data/img/1.0.0.0").unlink()
    assert (replay.read(np.arange(64)) == 100).all()
    for frames in (np.arange(64, 128), np.array([127]), np.arange(60, 66)):
        with pytest.raises(ValueError, match=r"set: data/img: chunk 1.0.0.0 \(rows 64 to 127\) is missing"):
            replay.read(frames)
    with pytest.raises(ValueError, match=r"chunk 1.0.0.0"):
        for _ in ClipSampler(replay, 8, 32).batches(0, 4, workers=2):
            pass
    shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"set: data/img: chunk 0.0.0.0 .* is missing"):
        replay.read(np.arange(4))


def test_a_set_that_was_replaced_is_another(far: tuple[Path, Replay]) -> None:
    path, replay = far
    with ReplayWriter(path, 8, 8, actions=4, overwrite=True) as writer:
        writer.append(np.zeros((192, 8, 8, 3), np.uint8), np.zeros(192, np.int64))
    with pytest.raises(ValueError, match=r"set has been replaced or removed since it was opened"):
        replay.read(np.arange(4))


def test_a_relative_path_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = ReplayWriter("set", 8, 8, actions=4)
    writer.append(np.full((4, 8, 8, 3), OLD, np.uint8), np.full(4, OLD))
    replay = Replay("set", memory_limit=0)
    monkeypatch.chdir("/")
    writer.append(np.full((4, 8, 8, 3), OLD, np.uint8), np.full(4, OLD))
    assert (replay.read(np.arange(4)) == OLD).all() and value_of(tmp_path / "set") == OLD


def layout(path: Path, **arrays: np.ndarray) -> Path:
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    given = {"data/img": np.zeros((10, 8, 8, 3), np.uint8), "meta/episode_ends": np.array([5, 10])}
    for name, values in {**given, **{name.replace("__", "/"): values for name, values in arrays.items()}}.items():
        array = root.create_array(
            name, shape=values.shape, chunks=values.shape, dtype=values.dtype, config={"write_empty_chunks": True}
        )
        array[...] = values
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data__action": np.full((10, 2), 1e300)}, r"data/action must be finite, got .1e\+300, 1e\+300. at frame 0"),
        ({"data__action": np.full((10, 2), -3.5e38)}, r"data/action must be finite, got .-3.5e\+38"),
        ({"data__action": np.full((10, 2), np.nan, np.float16)}, r"data/action must be finite, got .nan"),
        ({"data__action": np.full(10, 2**63 + 5, np.uint64)}, r"data/action must be in 0..*, got 9223372036854775813"),
        ({"data__action": np.full(10, 2**64 - 1, np.uint64)}, r"data/action must be in 0..*, got 18446744073709551615"),
        (
            {"data__action": np.zeros(10, "i8"), "meta__episode_ends": np.array([5, 2**63 + 10], np.uint64)},
            r"meta/episode_ends must fit into signed 64 bits, .* got 9223372036854775818",
        ),
        (
            {"data__action": np.zeros(10, "i8"), "meta__episode_level": np.full(2, 2**63, np.uint64)},
            r"meta/episode_level must fit into signed 64 bits, .* got 9223372036854775808",
        ),
    ],
)  # fmt: skip
def test_what_is_checked_is_what_is_used(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    path = layout(tmp_path / "set", **arrays)
    with pytest.raises(ValueError, match=message):
        Replay(path)
    assert any(problem.invalid and re.search(message, str(problem)) for problem in check(path, 5))


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_float_frames_of_whole_numbers_are_read_as_bytes(tmp_path: Path, memory_limit: int) -> None:
    """As diffusion-policy's own PushT set stores them; in memory and as they are needed."""
    pixels = np.random.default_rng(0).integers(256, size=(10, 8, 8, 3)).astype(np.uint8)
    for dtype in ("f4", ">f8"):
        path = layout(tmp_path / "set", data__img=pixels.astype(dtype), data__action=np.zeros(10, int))
        read = Replay(path, memory_limit=memory_limit).read(np.array([[3, 4], [9, 0]]))
        assert read.dtype == np.uint8 and np.array_equal(read, pixels[[[3, 4], [9, 0]]])
        assert not [problem for problem in check(path, 5) if problem.invalid]
    for value in (0.5, 256.0, -1.0, np.nan, np.inf):
        odd = pixels.astype("f4")
        odd[7, 2, 3, 1] = value
        path = layout(tmp_path / "set", data__img=odd, data__action=np.zeros(10, int))
        message = r"data/img must hold integers in 0..255 .* in frame 7, pixel \[2, 3, 1\]"
        with pytest.raises(ValueError, match=message):
            Replay(path, memory_limit=memory_limit).read(np.arange(10))
        assert any(re.search(message, str(problem)) for problem in check(path, 5))


def test_numbers_of_other_types_are_read_as_they_are(tmp_path: Path) -> None:
    values = np.linspace(-3, 3, 20).reshape(10, 2)
    for dtype in (">f4", "<f8", ">f8", "f2"):
        replay = Replay(layout(tmp_path / "set", data__action=values.astype(dtype)))
        assert replay.action.dtype == np.float32 and np.allclose(replay.action, values, atol=2e-3)
    for dtype in ("u1", ">i4", ">u8", "i2"):
        replay = Replay(layout(tmp_path / "set", data__action=np.arange(10).astype(dtype)))
        assert replay.actions == 10 and replay.action.tolist() == list(range(10))
    root = zarr.open_group(str(tmp_path / "set"), mode="r+")
    del root["data/img"]
    root.attrs["vocabulary"] = 300
    root.create_array("data/tokens", data=np.arange(40).reshape(10, 2, 2).astype(">i4") + 1)
    for limit in (0, 1 << 30):
        video = ClipSampler(Replay(tmp_path / "set", memory_limit=limit), 10, 1).batch(0)["video"]
        assert video.flatten().tolist() == list(range(1, 41))


@pytest.mark.parametrize(
    ("sizes", "action", "level", "message"),
    [
        ({"actions": None, "action_size": 2}, np.full((4, 2), 1e300), None, r"action must be finite, got .1e\+300"),
        ({"actions": None, "action_size": 2}, np.full((4, 2), np.inf), None, r"action must be finite, got .inf"),
        ({"actions": 4}, np.full(4, 2**63 + 1, np.uint64), None, r"action must be in 0..3, got 9223372036854775809"),
        ({"actions": 4}, np.full(4, -1), None, r"action must be in 0..3, got -1"),
        ({"actions": 4}, np.zeros(4, np.int64), 2**63, r"level must fit into 64 bits"),
        ({"actions": 4}, np.zeros(4, np.int64), 1.5, r"cannot be interpreted as an integer"),
    ],
)
def test_a_writer_writes_what_its_reader_takes(
    tmp_path: Path, sizes: Any, action: np.ndarray, level: Any, message: str
) -> None:
    writer = ReplayWriter(tmp_path / "set", 8, 8, **sizes)
    with pytest.raises((ValueError, TypeError), match=message):
        writer.append(np.zeros((4, 8, 8, 3), np.uint8), action, level)
    with pytest.raises(TypeError, match=r"video must be a NumPy array, got list"):
        writer.append([[0]], action)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"vocabulary must be 0 for pixels or up to 2147483648"):
        ReplayWriter(tmp_path / "set", 8, 8, actions=4, vocabulary=2**31 + 1)
    with pytest.raises(ValueError, match="attributes must be representable in JSON"):
        ReplayWriter(tmp_path / "set", 8, 8, actions=4, rate=float("nan"))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("array", ["data/img", "data/action", "meta/episode_ends"])
@pytest.mark.parametrize("where", ["filters", "compressor"])
def test_no_code_of_a_set_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: str, where: str) -> None:
    # Of older numcodecs, whose pickle codec asks nobody.
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    write(tmp_path / "set")
    codec = {"id": "pickle"}
    edit(tmp_path / "set" / array / ".zarray", lambda m: {**m, where: [codec] if where == "filters" else codec})
    for chunk in (tmp_path / "set" / array).glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    message = rf"array {array} is missing or unreadable: its codec 'pickle' is not one that a set may use"
    with pytest.raises(ValueError, match=message):
        Replay(tmp_path / "set")
    assert any(message.partition(":")[0] in str(problem) for problem in check(tmp_path / "set", 4))
    edit(tmp_path / "set" / array / ".zarray", lambda m: {**m, "dtype": "|O"})
    with pytest.raises(ValueError, match=message):
        Replay(tmp_path / "set")
    edit(tmp_path / "set" / array / ".zarray", lambda m: {**m, "filters": None, "compressor": None})
    with pytest.raises(ValueError, match=rf"{array} "):
        Replay(tmp_path / "set")
    assert not (tmp_path / "ran").exists()


def test_sets_of_zarr_3_are_read(tmp_path: Path) -> None:
    root = zarr.open_group(str(tmp_path / "set"), mode="w", zarr_format=3)
    pixels = np.random.default_rng(0).integers(1, 256, (10, 8, 8, 3)).astype(np.uint8)
    root.create_array("data/img", data=pixels, chunks=(2, 8, 8, 3), shards=(4, 8, 8, 3))
    root.create_array("data/action", data=np.arange(1, 11))
    root.create_array("meta/episode_ends", data=np.array([5, 10]))
    replay = Replay(tmp_path / "set", memory_limit=0)
    assert np.array_equal(replay.read(np.arange(10)), pixels) and check(tmp_path / "set", 5) == []

    shutil.rmtree(tmp_path / "set/data/img/c/1")
    with pytest.raises(ValueError, match=r"chunk c/1/0/0/0 .rows 4 to 7. is missing"):
        replay.read(np.arange(10))
    document = tmp_path / "set/data/action/zarr.json"
    edit(document, lambda m: {**m, "codecs": [*m["codecs"], {"name": "numcodecs.pickle"}]})
    with pytest.raises(ValueError, match=r"array data/action is .*: its codec 'numcodecs.pickle' is not one"):
        Replay(tmp_path / "set")


VALUES: tuple[Any, ...] = (None, -1, 0, 3, 2**70, 1.5, True, "x", "", [], [0], [-1, 8, 8, 3], {}, {"id": "zstd"}, [[]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "file", [".zgroup", ".zattrs", "data/img/.zarray", "data/action/.zarray", "meta/episode_ends/.zarray"]
)
def test_broken_metadata_is_told(tmp_path: Path, file: str) -> None:
    """Whatever stands there, the set is read or refused by ValueError, and `check` says the same."""
    write(tmp_path / "set")
    path = tmp_path / "set" / file
    good = json.loads(path.read_text())
    contents = [json.dumps({**good, name: value}) for name in good for value in VALUES]
    contents += [json.dumps({k: v for k, v in good.items() if k != name}) for name in good]
    contents += ["", "{", "[]", "null", "3", '"x"', "\xff\xfe{", "[" * 100_000]
    refused = 0
    for content in contents:
        path.write_text(content, encoding="latin-1")
        told = [problem for problem in check(tmp_path / "set", 4) if problem.invalid]
        try:
            Replay(tmp_path / "set")
        except ValueError as error:
            refused += 1
            assert told and str(tmp_path / "set") in str(error), content
        else:
            assert not told, (content, told)
    assert refused > len(contents) // 3 or file == ".zattrs"


def test_what_is_after_the_last_end_is_not_missed(tmp_path: Path) -> None:
    """A killed writer may have made an array longer and not yet written the chunk."""
    write(tmp_path / "set")
    for array, shape in (("data/img", (200, 8, 8, 3)), ("data/action", (9000,)), ("meta/episode_level", (5000,))):
        edit(tmp_path / "set" / array / ".zarray", lambda m, shape=shape: {**m, "shape": shape})
    assert not any(problem.invalid for problem in check(tmp_path / "set", 4))
    with pytest.warns(UserWarning, match="192 frames after the last episode's end are left out"):
        assert Replay(tmp_path / "set").frames == 8


def test_nothing_is_written_by_a_look(tmp_path: Path) -> None:
    Place(tmp_path / "deep/set", overwrite=True)
    ReplayWriter(tmp_path / "deep/set", 8, 8, actions=4)
    assert not list(tmp_path.iterdir())
