"""Checkpoints of a run: whole or not there at all, the last few kept.

A checkpoint is a directory `checkpoints/00000100`, 100 being the steps done, in the format of
torch.distributed.checkpoint: each process writes its share, and any number of processes reads it back. It is written
under a name that begins with a dot, flushed to the disk, and renamed; so a name without a dot is a whole checkpoint.

Whatever else is in that directory (of the desktop, the file system or the user) is not counted and not deleted.
"""

from __future__ import annotations

import os
import re
import stat
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from .checkpoint_reading import Planner, Reader

# Names in `checkpoints/`, whole or on the way in or out; and names in those directories.
WHOLE = re.compile(r"[0-9]{8,}")
PARTIAL = re.compile(r"\.[0-9]{8,}(\.old)?")
PART = re.compile(r"__[0-9]+_[0-9]+\.distcp|\.metadata(\.tmp)?")


class Checkpoints:
    """The checkpoints in `folder`, of which the newest `keep` stay.

    In a distributed run every process makes one and calls `save` and `load` together.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if WHOLE.fullmatch(path.name) and ours(path))

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def check_room(self, first: int, last: int) -> None:
        """FileExistsError where what is no checkpoint has the name of one of a step, first < step <= last."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            number = path.name.removeprefix(".")
            if WHOLE.fullmatch(number) and first < int(number) <= last:
                self._check_place(path)

    def _check_place(self, path: Path) -> None:
        if os.path.lexists(path) and not ours(path) and (path.is_symlink() or not is_empty(path)):
            raise FileExistsError(f"{path} is no checkpoint and has the name of one: move it away")

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write `state`; OSError where the disk does not take it, and then the checkpoints before are as they were."""
        unfinished = self.folder / f".{step:08d}"
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.iterdir():
                if PARTIAL.fullmatch(leftover.name) and (ours(leftover) or is_empty(leftover)):
                    delete(leftover)
            for place in (self.path(step), unfinished):
                self._check_place(place)
        barrier()
        try:
            with alone_is_fine():
                dcp.save(state, checkpoint_id=unfinished)
        except CheckpointException as error:
            if is_first():
                delete(unfinished)
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            latest = self.latest()
            left = "there is none before it" if latest is None else f"the one of step {latest} is whole"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({cause}); {left}"
            ) from error
        if is_first():
            if self.path(step).exists():
                os.replace(self.path(step), self.folder / f".{step:08d}.old")
            flush_directory(unfinished)
            os.replace(unfinished, self.path(step))
            flush_directory(self.folder)
            for old in self.steps()[: -self.keep]:
                # Renamed first: a half-deleted checkpoint must not bear the name of a whole one.
                dropped = self.folder / f".{old:08d}.old"
                os.replace(self.path(old), dropped)
                delete(dropped)
        barrier()

    def load(self, state: dict[str, Any], step: int) -> None:
        """Fill the tensors of `state`, and replace its other values, by those saved. A part of what was saved will do.

        Nothing that a checkpoint holds is run. ValueError where it is damaged, of something else, or names what is no
        part of a checkpoint.
        """
        try:
            with alone_is_fine():
                dcp.load(state, storage_reader=Reader(self.path(step)), planner=Planner())
        except (CheckpointException, ValueError) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            others = [other for other in self.steps() if other != step]
            advice = f"; delete it to resume from step {others[-1]}" if others else ""
            raise ValueError(f"{self.path(step)} cannot be read ({cause}){advice}") from error


def ours(path: Path) -> bool:
    """Whether a directory holds a checkpoint, or a part of one; a link is somebody else's."""
    return path.is_dir() and not path.is_symlink() and any(PART.fullmatch(name) for name in os.listdir(path))


def is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)


def delete(checkpoint: Path) -> None:
    """Delete the files of a checkpoint, and its directory where nothing else is in it.

    What else there is stays, under the plain name; files that NFS keeps open go when they are closed.
    """
    if not checkpoint.is_dir():
        return
    for path in list(checkpoint.iterdir()):
        if PART.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            path.unlink()
    left = os.listdir(checkpoint)
    if not left:
        checkpoint.rmdir()
        return
    plain = checkpoint.with_name(checkpoint.name.removeprefix(".").removesuffix(".old"))
    if not all(name.startswith(".nfs") for name in left) and not os.path.lexists(plain):
        os.replace(checkpoint, plain)
        warnings.warn(f"{plain} holds what is no part of a checkpoint ({', '.join(left)}): kept", stacklevel=2)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """An empty file to write to, in the directory of `path`; flushed to the disk and renamed to `path` at the end.

    Its name is hidden and unique, so that no file of the user's is in its place. It is deleted where the block raises.
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex}.partial")
    with open(unfinished, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        yield unfinished
        # What wrote to it may have put another file in its place, which only its owner can read.
        unfinished.chmod(stat.S_IMODE(mode))
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    with written_beside(path) as unfinished:
        unfinished.write_bytes(content)


def flush_directory(path: Path) -> None:
    """A rename is on the disk only when its directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def alone_is_fine() -> Iterator[None]:
    """Without torch's warning that a run of one process is one of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
