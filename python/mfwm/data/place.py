"""Where a replay buffer is: a directory or a URL, and how a directory takes another's place whole.

A set in DIR/set is written to DIR/.set.writing/new and renamed at the end. What DIR/set held is DIR/.set.writing/old
between the two renames; a writer that is killed there leaves it to `restore`. The next writer deletes what a killed one
left in DIR/.set.writing; the lock in it tells a killed writer from a live one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import unquote

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

GROUP = (".zgroup", "zarr.json")
METADATA = (*GROUP, ".zarray", ".zattrs", ".zmetadata")
CHUNK = re.compile(r"c|(c\.)?\d+(\.\d+)*")
# What Zarr leaves of a file that it was writing when it was killed.
PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.partial")
# What operating systems put into any folder. It is nobody's data: it is not read, and may be deleted with a set.
LITTER = re.compile(r"\._.*|\.nfs.*|\.DS_Store|Thumbs\.db|desktop\.ini", re.IGNORECASE)

PATIENCE = 10.0  # seconds, for a writer between its two renames, which take microseconds


def location(path: str | Path) -> Path | str:
    """A local directory as a Path, also where it is given as file://...; any other URL that fsspec knows as text."""
    text = str(path)
    if text.startswith("file:"):
        # As Path.as_uri() writes them: %20 for a space, maybe with the name of this machine.
        return Path(unquote(LocalFileSystem._strip_protocol(re.sub(r"^file://localhost(?=/)", "file://", text))))
    if text.startswith("local:"):
        return Path(LocalFileSystem._strip_protocol(text))
    if "://" in text:
        return text
    if re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise ValueError(f"{text} is a URL that has lost a slash, as in a Path: give it as text")
    return Path(path)


def absolute(path: str | Path) -> Path | str:
    """So that it is found from any directory; URLs are as they are."""
    place = location(path)
    return place.absolute() if isinstance(place, Path) else place


def overlap(first: str | Path, second: str | Path) -> bool:
    """Whether these are one place, however spelled, or one is inside the other."""
    one, two = location(first), location(second)
    if isinstance(one, Path) and isinstance(two, Path):
        return inside(one, two) or inside(two, one)
    if isinstance(one, Path) or isinstance(two, Path):
        return False
    (files, root), (others, other) = url_to_fs(one), url_to_fs(two)
    return type(files) is type(others) and f"{root}/".startswith(f"{other}/") | f"{other}/".startswith(f"{root}/")


def inside(inner: Path, outer: Path) -> bool:
    real = Path(os.path.realpath(inner))
    places = [place for place in (real, *real.parents) if place.exists()]
    return Path(os.path.realpath(outer)) in (real, *real.parents) or (
        outer.exists() and any(place.samefile(outer) for place in places)
    )


class Place:
    """Where a set is going to be. `begin` gives the directory or URL to write to; `publish` puts it in its place,
    and `discard` deletes it.

    FileExistsError where `path` holds anything, unless `overwrite`; and with it, ValueError where anything in it is no
    part of a replay buffer, since deleting that would cost somebody else's files. Nothing is changed before `begin`.

    What cannot be renamed is written in its place, where that is empty: a URL, a mount point, the working directory, a
    directory whose parent is not writable. There `overwrite` deletes nothing: ValueError.
    """

    def __init__(self, path: Path | str, *, overwrite: bool) -> None:
        self.path, self.overwrite = path, overwrite
        # Of a symbolic link, the directory that it names.
        self.target = Path(os.path.realpath(path)) if isinstance(path, Path) else None
        self._lock: IO[bytes] | None = None
        self._begun = False
        self.check()

    @property
    def in_place(self) -> bool:
        target = self.target
        return target is None or (
            target.is_dir()
            and (target.is_mount() or target.samefile(os.curdir) or not os.access(target.parent, os.W_OK))
        )

    def check(self) -> None:
        if self.target is None:
            held = self._held_at_url()
        else:
            restore(self.target)
            self._check_writable(self.target)
            held = self.target.exists() and (not self.target.is_dir() or any(ours_or_users(self.target)))
        if not held:
            return
        if not self.overwrite:
            raise FileExistsError(
                f"{self.path} is not empty: choose another directory, or say overwrite to delete what it holds"
            )
        if self.in_place:
            raise ValueError(
                f"{self.path} cannot be overwritten: a URL, a mount point, the working directory or a directory in one "
                "that is not writable cannot be replaced in one step; delete what it holds, or choose another place"
            )
        assert self.target is not None
        if not any((self.target / name).is_file() for name in GROUP):
            raise ValueError(
                f"{self.path} is not empty and no Zarr group, so overwrite does not delete it: remove it yourself"
            )
        for path in strangers(self.target):
            raise ValueError(
                f"{self.path} holds {path.relative_to(self.target)}, which is no part of a replay buffer, so overwrite "
                "does not delete it: remove it yourself"
            )

    def _check_writable(self, target: Path) -> None:
        there = next(place for place in (target, *target.parents) if place.exists())
        if there == target and not self.in_place:
            there = target.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{self.path} cannot be written: {there} is not a directory that can be written to")

    def _held_at_url(self) -> bool:
        try:
            files, root = url_to_fs(str(self.path))
            return files.exists(root) and not (files.isdir(root) and not files.ls(root))
        except (OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from error

    def begin(self) -> Path | str:
        """The directory or URL to write to, until `publish` or `discard`."""
        if self.target is None or self.in_place:
            self._begun = True
            return self.target or self.path
        work = beside(self.target)
        try:
            self._lock = locked(work, create=True)
        except BlockingIOError as error:
            raise FileExistsError(f"{self.path} is being written by another process") from error
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from error
        self._begun = True
        # What a killed writer left.
        put_back(self.target)
        for name in ("new", "old"):
            shutil.rmtree(work / name, ignore_errors=True)
        return work / "new"

    def publish(self) -> Path | str:
        """Where the set is then."""
        self._begun = False
        if self._lock is None:
            return self.target or self.path
        assert self.target is not None
        old, new = beside(self.target) / "old", beside(self.target) / "new"
        try:
            self.check()
            if self.target.exists():
                shutil.copymode(self.target, new)
                self.target.rename(old)
            new.rename(self.target)
        finally:
            self._release()
        return self.target

    def discard(self) -> None:
        if not self._begun:
            return
        self._begun = False
        if self._lock is not None:
            self._release()
        elif self.target is not None:
            for name in ("data", "meta"):
                shutil.rmtree(self.target / name, ignore_errors=True)
            for name in METADATA:
                (self.target / name).unlink(missing_ok=True)
        else:
            files, root = url_to_fs(str(self.path))
            if files.exists(root):
                files.rm(root, recursive=True)

    def _release(self) -> None:
        assert self._lock is not None and self.target is not None
        work = beside(self.target)
        put_back(self.target)
        if delete(work):
            warnings.warn(f"{work} cannot be deleted: the next writer of {self.path} tries again", stacklevel=4)
        self._lock.close()
        self._lock = None
        # A network file system keeps an open file's name, and so its directory, until here.
        with suppress(OSError):
            work.rmdir()


def delete(work: Path) -> bool:
    """Delete a writer's directory; whether anything of a set is left. Zarr's tasks of an interrupted write may still be
    adding files to it, so for two seconds it is tried again."""
    deadline = time.monotonic() + 2
    while True:
        shutil.rmtree(work, ignore_errors=True)
        left = any((work / name).exists() for name in ("new", "old"))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def identity(path: Path | str) -> tuple[int, int] | None:
    """Of a directory: a set that is put in another's place is another. None of a URL, and where there is nothing."""
    if not isinstance(path, Path) or not path.exists():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino


def beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")


def put_back(target: Path) -> None:
    old = beside(target) / "old"
    if old.exists() and not target.exists():
        old.rename(target)


def restore(path: Path) -> None:
    """Put back a set whose writer was killed after it had moved it aside, and before it had moved the new one in."""
    target = Path(os.path.realpath(path))
    work = beside(target)
    deadline = time.monotonic() + PATIENCE
    while not target.exists() and (work / "old").exists():
        if time.monotonic() > deadline:
            raise ValueError(f"{path} is being replaced: its writer has moved it to {work / 'old'} and not gone on")
        try:
            with locked(work, create=False):
                put_back(target)
        except (BlockingIOError, FileNotFoundError):
            # Its writer lives, and is between its two renames.
            time.sleep(0.01)


def locked(work: Path, *, create: bool) -> IO[bytes]:
    """The lock in a directory of this name: closing it releases it, as does the process's end.

    BlockingIOError where another process has it.
    """
    while True:
        if create:
            work.mkdir(parents=True, exist_ok=True)
        try:
            file = open(work / "lock", "wb")
        except FileNotFoundError:
            # Its holder deleted the directory since.
            if create:
                continue
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks: there, two writers at once are not told apart from one.
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                file.close()
                raise
        # Its holder deletes the directory, and the lock with it: then this one locks nothing.
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(work / "lock")):
                return file
        except FileNotFoundError:
            pass
        file.close()


def ours_or_users(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What a folder holds, without an operating system's litter."""
    with os.scandir(folder) as entries:
        yield from (
            entry for entry in entries if entry.is_dir(follow_symlinks=False) or not LITTER.fullmatch(entry.name)
        )


def strangers(folder: Path) -> Iterator[Path]:
    """What is in the folder of a replay buffer and no part of one."""
    for entry in ours_or_users(folder):
        if entry.name in ("data", "meta") and entry.is_dir(follow_symlinks=False):
            yield from strangers_in_group(Path(entry.path))
        # In `complete`, mfwm demo says how long the set took.
        elif entry.is_dir() or not (entry.name in (*METADATA, "complete") or PARTIAL.fullmatch(entry.name)):
            yield Path(entry.path)


def strangers_in_group(folder: Path) -> Iterator[Path]:
    """Of a group or an array, and of the folders of its chunks."""
    holds_chunks = CHUNK.fullmatch(folder.name) or any((folder / name).exists() for name in (".zarray", "zarr.json"))
    for entry in ours_or_users(folder):
        path = Path(entry.path)
        chunk = holds_chunks and CHUNK.fullmatch(entry.name)
        if entry.is_dir(follow_symlinks=False):
            if chunk or any((path / name).exists() for name in METADATA):
                yield from strangers_in_group(path)
            else:
                yield path
        elif not (chunk or entry.name in METADATA or PARTIAL.fullmatch(entry.name)):
            yield path
