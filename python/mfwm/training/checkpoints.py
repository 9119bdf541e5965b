"""Checkpoints of a run: each is complete or absent, and only the newest few are kept.

torch.distributed.checkpoint takes as long to import as torch itself, so only what saves and loads imports it.

A checkpoint is a directory `checkpoints/00000100`, 100 being the steps done, in the format of
torch.distributed.checkpoint: each process writes its share, and any number of processes can read it. It is written
under a name that begins with a dot, flushed to disk, and renamed, so a name without a dot is a complete checkpoint.

Other files in that directory (from the desktop, the file system or the user) are not counted and not deleted.
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

# Names in `checkpoints/`: complete, or being written or deleted; and names of files in a checkpoint.
COMPLETE = re.compile(r"[0-9]{8,}")
PARTIAL = re.compile(r"\.[0-9]{8,}(\.old)?")
PART = re.compile(r"__[0-9]+_[0-9]+\.distcp|\.metadata(\.tmp)?")


class Checkpoints:
    """The checkpoints in `folder`; the newest `keep` are kept.

    In a distributed run every process creates one, and all call `save` and `load` together.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name) for path in self.folder.iterdir() if COMPLETE.fullmatch(path.name) and is_checkpoint(path)
        )

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def check_room(self, first: int, last: int) -> None:
        """FileExistsError where something else has the name of a checkpoint of a step, first < step <= last."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            number = path.name.removeprefix(".")
            if COMPLETE.fullmatch(number) and first < int(number) <= last:
                self._check_name_is_free(path)

    def _check_name_is_free(self, path: Path) -> None:
        if os.path.lexists(path) and not is_checkpoint(path) and (path.is_symlink() or not is_empty(path)):
            raise FileExistsError(f"{path} is not a checkpoint but has the name of one: move it away")

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write `state`. OSError if the disk refuses it; earlier checkpoints are then unchanged."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        unfinished = self.folder / f".{step:08d}"
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.iterdir():
                if PARTIAL.fullmatch(leftover.name) and (is_checkpoint(leftover) or is_empty(leftover)):
                    delete(leftover)
            for path in (self.path(step), unfinished):
                self._check_name_is_free(path)
        barrier()
        try:
            with without_single_process_warning():
                dcp.save(state, checkpoint_id=unfinished)
        except CheckpointException as error:
            if is_first():
                delete(unfinished)
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            latest = self.latest()
            left = "there is no earlier one" if latest is None else f"the one of step {latest} is complete"
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
                # Rename first, so that a half-deleted checkpoint never has the name of a complete one.
                dropped = self.folder / f".{old:08d}.old"
                os.replace(self.path(old), dropped)
                delete(dropped)
        barrier()

    def load(self, state: dict[str, Any], step: int) -> None:
        """Fill the tensors of `state`, and replace its other values, from a checkpoint, which may hold more than these.

        Nothing in the checkpoint is executed. ValueError if it is damaged, holds something else, or names anything that
        is not part of a checkpoint.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        from .checkpoint_reading import Planner, Reader

        try:
            with without_single_process_warning():
                dcp.load(state, storage_reader=Reader(self.path(step)), planner=Planner())
        except (CheckpointException, ValueError) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            others = [other for other in self.steps() if other != step]
            advice = f"; delete it to resume from step {others[-1]}" if others else ""
            raise ValueError(f"{self.path(step)} cannot be read ({cause}){advice}") from error


def is_checkpoint(path: Path) -> bool:
    """Whether a directory holds a checkpoint or part of one. Links do not count: they may lead to other data."""
    return path.is_dir() and not path.is_symlink() and any(PART.fullmatch(name) for name in os.listdir(path))


def is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)


def delete(checkpoint: Path) -> None:
    """Delete the files of a checkpoint, and its directory if nothing else is in it.

    Other files stay, under the plain name. Files that NFS keeps open disappear when they are closed.
    """
    if not checkpoint.is_dir():
        return
    for path in list(checkpoint.iterdir()):
        if PART.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            path.unlink()
    others = os.listdir(checkpoint)
    if not others:
        checkpoint.rmdir()
        return
    plain = checkpoint.with_name(checkpoint.name.removeprefix(".").removesuffix(".old"))
    if not all(name.startswith(".nfs") for name in others) and not os.path.lexists(plain):
        os.replace(checkpoint, plain)
        warnings.warn(
            f"{plain} holds files that are not part of a checkpoint ({', '.join(others)}): kept", stacklevel=2
        )


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """An empty file to write to, in the directory of `path`; flushed to disk and renamed to `path` at the end.

    Its name is hidden and unique, so that it replaces no file of the user's. It is deleted if the block raises.
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex}.partial")
    with open(unfinished, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        yield unfinished
        # The writer may have replaced the file by one that only its owner can read.
        unfinished.chmod(stat.S_IMODE(mode))
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write the file completely or not at all."""
    with written_beside(path) as unfinished:
        unfinished.write_bytes(content)


def flush_directory(path: Path) -> None:
    """Flush a directory: a rename is on disk only after its directory is."""
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
def without_single_process_warning() -> Iterator[None]:
    """Silence torch.distributed's warning about single-process checkpoints."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
