"""What must not happen to data that a writer replaces or extends, and to what is not its own."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfwm.cli import main
from mfwm.data import Replay, ReplayWriter
from mfwm.data import collect as collect_module
from mfwm.data.collect import collect
from mfwm.data.import_tokens import import_tokens
from mfwm.data.place import Place, location, locked
from mfwm.data.recording import Recording
from mfwm.encode import encode
from small_set import NEW, OLD, beside, value_of, write


def broken_tokens(folder: Path) -> Path:
    """Whose second episode holds an id that is none."""
    folder.mkdir()
    (folder / "metadata.json").write_text('{"num_images": 4, "s": 2, "vocab_size": 8}')
    tokens = np.zeros((4, 2, 2), np.uint32)
    tokens[3] = 99
    tokens.tofile(folder / "video.bin")
    np.array([0, 0, 1, 1], np.int32).tofile(folder / "segment_ids.bin")
    return folder


def interrupted(env: str, recording: Recording) -> Iterator[Any]:
    yield {"action_names": ["a", "b"], "noop": 0}
    yield collect_module.Episode(np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int64), None)
    raise KeyboardInterrupt


def in_a_block(out: Path, last: Callable[[ReplayWriter], object]) -> None:
    with ReplayWriter(out, 8, 8, actions=2, overwrite=True) as writer:
        writer.append(np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int64))
        last(writer)


FAILURES: dict[str, Callable[[Path, Path], object]] = {
    "a game that is none": lambda out, tmp: collect("atari:Brekaout", 10, out, overwrite=True, progress=False),
    "a scenario that is none": lambda out, tmp: collect("doom:none", 10, out, overwrite=True, progress=False),
    "a source that is none": lambda out, tmp: collect("pong", 10, out, overwrite=True, progress=False),
    "a negative seed": lambda out, tmp: collect("coinrun", 10, out, seed=-1, overwrite=True, progress=False),
    "a seed of 40 bits": lambda out, tmp: collect("doom", 10, out, seed=2**40, overwrite=True, progress=False),
    "levels past 31 bits": lambda out, tmp: collect("coinrun", 10, out, seed=2**30, overwrite=True, progress=False),
    "no frames": lambda out, tmp: collect("doom", 0, out, overwrite=True, progress=False),
    "Ctrl-C": lambda out, tmp: collect("stub", 10, out, size=8, overwrite=True, progress=False),
    "a damaged second episode": lambda out, tmp: import_tokens(
        broken_tokens(tmp / "tokens"), out, overwrite=True, progress=False
    ),
    "arguments of no set": lambda out, tmp: ReplayWriter(out, 8, 8, actions=0, overwrite=True),
    "attributes that JSON lacks": lambda out, tmp: ReplayWriter(out, 8, 8, actions=2, overwrite=True, a={1}),
    "a first episode of another size": lambda out, tmp: ReplayWriter(out, 8, 8, actions=2, overwrite=True).append(
        np.zeros((3, 9, 8, 3), np.uint8), np.zeros(3, np.int64)
    ),
    "a block that raises": lambda out, tmp: in_a_block(out, lambda writer: 1 / 0),
    "a block with a bad episode": lambda out, tmp: in_a_block(out, lambda w: w.append(np.zeros((0, 8, 8, 3)), [])),
    "a block without an episode": lambda out, tmp: ReplayWriter(out, 8, 8, actions=2, overwrite=True)
    .__enter__()
    .__exit__(None, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_overwrite_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source_of = collect_module.source_of
    monkeypatch.setattr(collect_module, "source_of", lambda env: interrupted if env == "stub" else source_of(env))
    if "game" in name:
        pytest.importorskip("ale_py")
    path = tmp_path / "there" / "set"
    write(path)
    with pytest.raises(BaseException) as raised:
        FAILURES[name](path, tmp_path)
    assert isinstance(raised.value, (ValueError, ZeroDivisionError, KeyboardInterrupt)), raised.value
    assert value_of(path) == OLD and beside(path) == []
    # The same where there was nothing: then nothing is there.
    with pytest.raises(type(raised.value)):
        FAILURES[name](tmp_path / "else" / "set", tmp_path / "there")
    assert not (tmp_path / "else" / "set").exists() and not list((tmp_path / "else").glob("*"))


def test_an_overwrite_replaces_the_whole_set(tmp_path: Path) -> None:
    path = tmp_path / "set"
    write(path, episodes=9)
    path.chmod(0o2750)
    with ReplayWriter(path, 8, 8, actions=4, overwrite=True) as writer:
        for _ in range(2):
            writer.append(np.full((4, 8, 8, 3), NEW, np.uint8), np.full(4, NEW))
            assert Replay(path).episodes == 9
    assert value_of(path) == NEW and beside(path) == [] and path.stat().st_mode & 0o7777 == 0o2750
    # Without a block the old set stays until the first episode is there.
    writer = ReplayWriter(path, 8, 8, actions=4, overwrite=True)
    assert value_of(path) == NEW
    for _ in range(2):
        writer.append(np.full((4, 8, 8, 3), OLD, np.uint8), np.full(4, OLD))
    assert value_of(path) == OLD and beside(path) == []


class Killed(BaseException):
    pass


def kill_at(rename: int, path: Path) -> None:
    """Overwrite the set, and stop before this rename as a killed process does: nothing is cleaned up."""
    renames: list[Path] = []

    def counted(self: Path, target: Path) -> Path:
        if len(renames) == rename:
            raise Killed
        renames.append(self)
        return Path(shutil.move(self, target))

    def dies(self: Place) -> None:
        assert self._lock is not None
        self._lock.close()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", counted)
        patch.setattr(Place, "_release", dies)
        with ReplayWriter(path, 8, 8, actions=4, overwrite=True) as writer:
            for _ in range(2):
                writer.append(np.full((4, 8, 8, 3), NEW, np.uint8), np.full(4, NEW))


def test_a_writer_killed_at_a_rename_loses_nothing(tmp_path: Path) -> None:
    for rename in (0, 1):
        path = tmp_path / f"set{rename}"
        write(path)
        kill_at(rename, path)
        assert path.exists() == (rename == 0)
        # A reader puts back what was moved aside; so does a writer, which refuses to overwrite it unasked.
        with pytest.raises(FileExistsError, match="is not empty"):
            write(path, NEW)
        assert value_of(path) == OLD
        kill_at(rename, path)
        assert value_of(path) == OLD and beside(path)
        write(path, NEW, overwrite=True)
        assert value_of(path) == NEW
    assert beside(tmp_path / "set0") == ["set1"]


def test_a_writer_that_stopped_between_its_renames_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "set")
    work = tmp_path / ".set.writing"
    work.mkdir()
    (tmp_path / "set").rename(work / "old")
    monkeypatch.setattr("mfwm.data.place.PATIENCE", 0.05)
    with locked(work, create=True):
        with pytest.raises(ValueError, match="set is being replaced: its writer has moved it to"):
            Replay(tmp_path / "set")
    assert value_of(tmp_path / "set") == OLD


def test_a_writer_whose_block_raised_writes_no_more(tmp_path: Path) -> None:
    episode = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int64)
    with pytest.raises(ZeroDivisionError), ReplayWriter(tmp_path / "set", 8, 8, actions=2) as writer:
        writer.append(*episode)
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="set: the `with` block that wrote it raised"):
        writer.append(*episode)
    assert not list(tmp_path.iterdir())
    with ReplayWriter(tmp_path / "set", 8, 8, actions=2) as writer:
        writer.append(*episode)
    writer.append(*episode)
    assert Replay(tmp_path / "set").frames == 6


def test_two_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "set"
    write(path)
    with ReplayWriter(path, 8, 8, actions=4, overwrite=True) as writer:
        with pytest.raises(FileExistsError, match="is being written by another process"):
            write(path, 3, overwrite=True)
        for _ in range(2):
            writer.append(np.full((4, 8, 8, 3), NEW, np.uint8), np.full(4, NEW))
    assert value_of(path) == NEW
    # Each of two that began before there was a set: the second does not overwrite the first's.
    first, second = (ReplayWriter(tmp_path / "new", 8, 8, actions=4) for _ in range(2))
    first.append(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64))
    with pytest.raises(FileExistsError, match="is not empty"):
        second.append(np.zeros((5, 8, 8, 3), np.uint8), np.zeros(5, np.int64))
    assert Replay(tmp_path / "new").frames == 4 and beside(tmp_path / "new") == ["set"]


def test_an_append_that_failed_leaves_no_rows_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ReplayWriter(tmp_path / "set", 8, 8, actions=4)
    writer.append(np.full((4, 8, 8, 3), OLD, np.uint8), np.full(4, OLD))
    whole = ReplayWriter._write

    def full(self: ReplayWriter, name: str, begin: int, values: np.ndarray) -> None:
        if name == "data/action":
            raise OSError("no space left on device")
        whole(self, name, begin, values)

    with monkeypatch.context() as patch:
        patch.setattr(ReplayWriter, "_write", full)
        with pytest.raises(OSError, match="no space"):
            writer.append(np.full((6, 8, 8, 3), 77, np.uint8), np.full(6, 3))
    # The failed episode has no end yet, so a reader does not see it.
    with pytest.warns(UserWarning, match="after the last episode"):
        assert Replay(tmp_path / "set").episode_ends.tolist() == [4]
    writer.append(np.full((4, 8, 8, 3), OLD, np.uint8), np.full(4, OLD))
    assert value_of(tmp_path / "set") == OLD


@pytest.mark.slow
def test_killed_commands_leave_the_old_set_or_the_new_one(tmp_path: Path) -> None:
    pytest.importorskip("av")
    script = Path(__file__).with_name("killed_writer.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "--kills", "8"], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0 and run.stdout.startswith("8 killed"), run.stdout + run.stderr


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set")
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "set")
    (tmp_path / "file").write_text("x")
    for place in (
        tmp_path / "file/set",
        "/proc/mfwm/set",
        f"zip://new::file://{tmp_path}/zipped.zip",
        "nonsense://set",
        Path("memory://set"),
    ):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"cannot be written|lost a slash"):
                write(place, overwrite=overwrite)
    for place in (f"zip://::file://{tmp_path}/zipped.zip", tmp_path / "file"):
        with pytest.raises((ValueError, FileExistsError), match=r"is not empty"):
            write(place)
        with pytest.raises(ValueError, match=r"cannot be overwritten|not a Zarr group"):
            write(place, overwrite=True)
    assert value_of(f"zip://::file://{tmp_path}/zipped.zip") == OLD
    monkeypatch.chdir(tmp_path / "set")
    with pytest.raises(ValueError, match=r"cannot be overwritten: .* the working directory"):
        write(".", NEW, overwrite=True)
    assert value_of(tmp_path / "set") == OLD


def test_urls_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (f"file://{tmp_path}/set", "file:relative", f"memory://{tmp_path}/set", Path(f"file://{tmp_path}/p")):
        write(place)
        assert value_of(place) == OLD
    assert location(f"file://{tmp_path}/set") == location(f"file://localhost{tmp_path}/set") == tmp_path / "set"
    for name in ("a b", "100%", "a%20b", "é", "a#b?c"):
        assert location((tmp_path / name).as_uri()) == location(tmp_path / name) == tmp_path / name
    assert value_of(tmp_path / "set") == value_of("relative") == OLD
    write(f"file://{tmp_path}/set", NEW, overwrite=True)
    assert value_of(tmp_path / "set") == NEW
    with pytest.raises(ValueError, match=r"memory://.*set cannot be overwritten: a URL"):
        write(f"memory://{tmp_path}/set", NEW, overwrite=True)
    assert value_of(f"memory://{tmp_path}/set") == OLD
    # A block that fails leaves nothing at a URL, either.
    with pytest.raises(ZeroDivisionError), ReplayWriter(f"memory://{tmp_path}/new", 8, 8, actions=4) as writer:
        writer.append(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64))
        raise ZeroDivisionError
    write(f"memory://{tmp_path}/new")
    monkeypatch.setattr("sys.argv", ["mfwm", "collect", "stub", "--frames", "3", "--out", f"file://{tmp_path}/c"])
    monkeypatch.setattr(collect_module, "source_of", lambda env: interrupted)
    main()
    assert Replay(tmp_path / "c").frames == 3


def test_a_place_that_cannot_be_renamed_is_written_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point, patched to be one: the directory itself is neither renamed nor removed."""
    path = tmp_path / "mounted"
    path.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == path)
    remove = os.rmdir

    def busy(place: Any, **options: Any) -> None:
        if Path(place) == path or Path(place) == Path(path.name):
            raise OSError(errno.EBUSY, "Device or resource busy", str(place))
        remove(place, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    with pytest.raises(ZeroDivisionError):
        in_a_block(path, lambda writer: 1 / 0)
    assert path.is_dir() and not list(path.iterdir())
    inode = path.stat().st_ino
    (path / ".DS_Store").write_bytes(b"kept")
    write(path)
    assert (path / ".DS_Store").read_bytes() == b"kept"
    assert value_of(path) == OLD and path.stat().st_ino == inode and beside(path) == []
    with pytest.raises(ValueError, match=r"cannot be overwritten: .*a mount point"):
        write(path, NEW, overwrite=True)
    assert value_of(path) == OLD


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/set")
    write(tmp_path / "link")
    write(tmp_path / "link", NEW, overwrite=True)
    assert (tmp_path / "link").is_symlink() and value_of(tmp_path / "disk/set") == NEW
    assert beside(tmp_path / "disk/set") == []


@pytest.mark.parametrize(
    "mine", ["notes.txt", "data/raw/a.mp4", "meta/notes.txt", ".git/HEAD", "data/img/x.png", "7/a"]
)
def test_an_overwrite_deletes_nothing_but_a_replay_buffer(tmp_path: Path, mine: str) -> None:
    write(tmp_path / "set")
    (tmp_path / "set" / mine).parent.mkdir(exist_ok=True)
    (tmp_path / "set" / mine).write_text("mine")
    with pytest.raises(ValueError, match="which is not part of a replay buffer"):
        write(tmp_path / "set", NEW, overwrite=True)
    assert value_of(tmp_path / "set") == OLD and (tmp_path / "set" / mine).read_text() == "mine"


def test_the_operating_systems_files_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "set")
    for name in (".DS_Store", "data/._img", "data/img/._0.0.0.0", "data/img/.nfs0001", "meta/Thumbs.db"):
        (tmp_path / "set" / name).write_bytes(b"\0\5\x16\7")
    # What Zarr leaves when it is killed is part of a set.
    (tmp_path / "set/data/img" / f"0.0.0.{'0' * 32}.partial").write_bytes(b"x")
    assert value_of(tmp_path / "set") == OLD
    write(tmp_path / "set", NEW, overwrite=True)
    assert value_of(tmp_path / "set") == NEW
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.DS_Store").write_bytes(b"x")
    write(tmp_path / "empty")
    assert value_of(tmp_path / "empty") == OLD


@pytest.mark.parametrize("out", ["set", "set/", "./set", "link", "file://{}/set", "set/inside", "."])
def test_encode_refuses_its_own_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    write(tmp_path / "set")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="out must be another place than data"):
            encode(tmp_path / "set", out.format(tmp_path), tokenizer=tmp_path / "none", overwrite=overwrite)
        with pytest.raises(ValueError, match="out must be another place than data"):
            encode("link", out.format(tmp_path), tokenizer=tmp_path / "none", overwrite=overwrite)
    assert value_of(tmp_path / "set") == OLD
