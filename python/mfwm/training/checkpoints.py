"""Checkpoints of a run: whole or not there at all, the last few kept.

A checkpoint is a directory `checkpoints/00000100`, 100 being the steps done, in the format of
torch.distributed.checkpoint: each process writes its share, and any number of processes reads it back. It is written
under a name that begins with a dot, flushed to the disk, and renamed; so a name without a dot is a whole checkpoint.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException


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
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write `state`; OSError where the disk does not take it, and then the checkpoints before are as they were."""
        unfinished = self.folder / f".{step:08d}"
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*"):
                shutil.rmtree(leftover)
        barrier()
        try:
            with alone_is_fine():
                dcp.save(state, checkpoint_id=unfinished)
        except CheckpointException as error:
            if is_first():
                shutil.rmtree(unfinished, ignore_errors=True)
            cause = next(iter(error.failures.values()))[0]
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
                shutil.rmtree(dropped)
        barrier()

    def load(self, state: dict[str, Any], step: int) -> None:
        """Fill the tensors of `state`, and replace its other values, by those saved. A part of what was saved will do.

        ValueError where the checkpoint is damaged or of something else.
        """
        try:
            with alone_is_fine():
                dcp.load(state, checkpoint_id=self.path(step))
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            others = [other for other in self.steps() if other != step]
            advice = f"; delete it to go on from step {others[-1]}" if others else ""
            raise ValueError(f"{self.path(step)} cannot be read ({cause}){advice}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Whole or not at all: written beside, flushed to the disk, then renamed."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    flush_directory(path.parent)


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
