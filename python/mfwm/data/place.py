"""Where a replay buffer is stored, a directory or a URL, and how a new set replaces an old one in one step.

A set in DIR/set is written to DIR/.set.writing/new and renamed at the end. An old DIR/set is first renamed to
DIR/.set.writing/old; if the writer is killed between the two renames, `restore` renames it back. The next writer
deletes what a killed one left in DIR/.set.writing. A lock in that directory tells whether its writer is alive.
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
# A file that Zarr was writing when it was killed.
PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.partial")
# Files that operating systems put into any folder. They hold no data: they are ignored, and deleted with a set.
LITTER = re.compile(r"\._.*|\.nfs.*|\.DS_Store|Thumbs\.db|desktop\.ini", re.IGNORECASE)

PATIENCE = 10.0  # seconds to wait for a writer between its two renames, which take microseconds


def location(path: str | Path) -> Path | str:
    """A local directory as a Path, also if given as file://...; any other URL that fsspec supports as text."""
    text = str(path)
    if text.startswith("file:"):
        # As Path.as_uri() writes them, with %20 for a space; the host may be localhost.
        return Path(unquote(LocalFileSystem._strip_protocol(re.sub(r"^file://localhost(?=/)", "file://", text))))
    if text.startswith("local:"):
        return Path(LocalFileSystem._strip_protocol(text))
    if "://" in text:
        return text
    if re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise ValueError(f"{text} is a URL that lost a slash in a Path: pass it as a str")
    return Path(path)


def absolute(path: str | Path) -> Path | str:
    """A path that is valid from any directory; URLs are unchanged."""
    place = location(path)
    return place.absolute() if isinstance(place, Path) else place


def overlap(first: str | Path, second: str | Path) -> bool:
    """Whether these are the same place, however spelled, or one is inside the other."""
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
    """Where a set is to be written. `begin` returns the directory or URL to write to, `publish` moves the written set
    to its place, and `discard` deletes it.

    FileExistsError if `path` holds anything, unless `overwrite`. With `overwrite`, ValueError if it holds anything that
    is not part of a replay buffer, because the user's files must not be deleted. Nothing changes before `begin`.

    A URL, a mount point, the working directory and a directory whose parent is not writable cannot be renamed. A set is
    written there directly if it is empty, and `overwrite` raises ValueError.
    """

    def __init__(self, path: Path | str, *, overwrite: bool) -> None:
        self.path, self.overwrite = path, overwrite
        # For a symbolic link, the directory that it points to.
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
            held = self.target.exists() and (not self.target.is_dir() or any(entries_of(self.target)))
        if not held:
            return
        if not self.overwrite:
            raise FileExistsError(
                f"{self.path} is not empty: choose another directory, or pass overwrite (--overwrite) to delete its "
                "contents"
            )
        if self.in_place:
            raise ValueError(
                f"{self.path} cannot be overwritten: a URL, a mount point, the working directory or a directory whose "
                "parent is not writable cannot be replaced in one step; delete its contents, or choose another place"
            )
        assert self.target is not None
        if not any((self.target / name).is_file() for name in GROUP):
            raise ValueError(
                f"{self.path} is not empty and not a Zarr group, so overwrite does not delete it: delete it yourself"
            )
        for path in foreign_files(self.target):
            raise ValueError(
                f"{self.path} holds {path.relative_to(self.target)}, which is not part of a replay buffer, so "
                "overwrite does not delete it: move it away yourself"
            )

    def _check_writable(self, target: Path) -> None:
        folder = next(place for place in (target, *target.parents) if place.exists())
        if folder == target and not self.in_place:
            folder = target.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{self.path} cannot be written: {folder} is not a writable directory")

    def _held_at_url(self) -> bool:
        try:
            files, root = url_to_fs(str(self.path))
            return files.exists(root) and not (files.isdir(root) and not files.ls(root))
        except (OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from error

    def begin(self) -> Path | str:
        """Lock the place. Returns the directory or URL to write to until `publish` or `discard`."""
        if self.target is None or self.in_place:
            self._begun = True
            return self.target or self.path
        work = writing_folder(self.target)
        try:
            self._lock = locked(work, create=True)
        except BlockingIOError as error:
            raise FileExistsError(f"{self.path} is being written by another process") from error
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from error
        self._begun = True
        # Remove what a killed writer left.
        put_back(self.target)
        for name in ("new", "old"):
            shutil.rmtree(work / name, ignore_errors=True)
        return work / "new"

    def publish(self) -> Path | str:
        """Move the written set to its place. Returns where it is."""
        self._begun = False
        if self._lock is None:
            return self.target or self.path
        assert self.target is not None
        old, new = writing_folder(self.target) / "old", writing_folder(self.target) / "new"
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
        work = writing_folder(self.target)
        put_back(self.target)
        if delete(work):
            warnings.warn(f"{work} cannot be deleted; the next writer of {self.path} will try again", stacklevel=4)
        self._lock.close()
        self._lock = None
        # A network file system keeps the directory until the lock file in it is closed.
        with suppress(OSError):
            work.rmdir()


def delete(work: Path) -> bool:
    """Delete a writer's directory. Returns whether anything of a set is left. It retries for two seconds, because
    Zarr's tasks of an interrupted write may still be adding files."""
    deadline = time.monotonic() + 2
    while True:
        shutil.rmtree(work, ignore_errors=True)
        left = any((work / name).exists() for name in ("new", "old"))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def identity(path: Path | str) -> tuple[int, int] | None:
    """Device and inode of a directory, which differ after a set was replaced. None for a URL or a missing directory."""
    if not isinstance(path, Path) or not path.exists():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino


def writing_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")


def put_back(target: Path) -> None:
    old = writing_folder(target) / "old"
    if old.exists() and not target.exists():
        old.rename(target)


def restore(path: Path) -> None:
    """Rename a set back whose writer was killed after moving it aside and before moving the new one in."""
    target = Path(os.path.realpath(path))
    work = writing_folder(target)
    deadline = time.monotonic() + PATIENCE
    while not target.exists() and (work / "old").exists():
        if time.monotonic() > deadline:
            raise ValueError(f"{path} is being replaced: its writer has moved it to {work / 'old'} and not finished")
        try:
            with locked(work, create=False):
                put_back(target)
        except (BlockingIOError, FileNotFoundError):
            # Its writer is alive, between its two renames.
            time.sleep(0.01)


def locked(work: Path, *, create: bool) -> IO[bytes]:
    """Take the lock in this directory. Closing the file releases it, and so does the end of the process.

    BlockingIOError if another process has the lock.
    """
    while True:
        if create:
            work.mkdir(parents=True, exist_ok=True)
        try:
            file = open(work / "lock", "wb")
        except FileNotFoundError:
            # Its holder deleted the directory meanwhile.
            if create:
                continue
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks. There, a second writer at the same time is not noticed.
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                file.close()
                raise
        # If its holder has deleted the directory and the lock with it, this lock is of no use: try again.
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(work / "lock")):
                return file
        except FileNotFoundError:
            pass
        file.close()


def entries_of(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder, without an operating system's litter."""
    with os.scandir(folder) as entries:
        yield from (
            entry for entry in entries if entry.is_dir(follow_symlinks=False) or not LITTER.fullmatch(entry.name)
        )


def foreign_files(folder: Path) -> Iterator[Path]:
    """Files in the folder of a replay buffer that are not part of it."""
    for entry in entries_of(folder):
        if entry.name in ("data", "meta") and entry.is_dir(follow_symlinks=False):
            yield from foreign_files_in_group(Path(entry.path))
        # mfwm demo writes how long the set took into `complete`.
        elif entry.is_dir() or not (entry.name in (*METADATA, "complete") or PARTIAL.fullmatch(entry.name)):
            yield Path(entry.path)


def foreign_files_in_group(folder: Path) -> Iterator[Path]:
    """The same for the folder of a group, an array or its chunks."""
    holds_chunks = CHUNK.fullmatch(folder.name) or any((folder / name).exists() for name in (".zarray", "zarr.json"))
    for entry in entries_of(folder):
        path = Path(entry.path)
        chunk = holds_chunks and CHUNK.fullmatch(entry.name)
        if entry.is_dir(follow_symlinks=False):
            if chunk or any((path / name).exists() for name in METADATA):
                yield from foreign_files_in_group(path)
            else:
                yield path
        elif not (chunk or entry.name in METADATA or PARTIAL.fullmatch(entry.name)):
            yield path
