"""The training log: log.jsonl, one row per step, and optionally TensorBoard and Weights & Biases."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .checkpoints import write_atomically
from .json_values import as_json


class Log:
    """log.jsonl, one row per step. When a run is resumed, rows of steps that will be run again are dropped.

    names: names for the entries of lists in a row, for the viewers; a shorter list takes the last ones.
    """

    def __init__(self, path: Path, first: int, viewers: Sequence[Viewer] = (), names: Sequence[str] = ()) -> None:
        rows = [row for row in read_log(path) if row["step"] < first] if path.exists() else []
        write_atomically(path, "".join(as_json(row) + "\n" for row in rows).encode())
        self.path, self.viewers, self.names = path, viewers, names
        # Unbuffered, so that what a full disk refused is not written again when the file is closed.
        self.file = open(path, "ab", buffering=0)

    def write(self, row: dict[str, Any], pictures: dict[str, Tensor] | None = None) -> None:
        line = (as_json(row) + "\n").encode()
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                error.errno,
                f"step {row['step']} could not be logged ({error.strerror}); the newest checkpoint is complete",
                str(self.path),
            ) from error
        for viewer in self.viewers:
            viewer.show(row["step"], dict(scalars(row, self.names)), pictures or {})

    def close(self) -> None:
        for viewer in self.viewers:
            viewer.close()
        self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log, without a last line that a kill cut short. ValueError names a line that is not a row."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: a run logs each step there") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} must be JSON: {error}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{path}, line {number} must be an object with the integer step, got {line[:80]!r}")
        rows.append(row)
    return rows


def column(rows: list[dict[str, Any]], name: str, path: Path) -> list[float]:
    """One number of every row. ValueError names the step that lacks it, or the log if it has no rows."""
    if not rows:
        raise ValueError(f"{path} must have a row for each step of the run, got none")
    for row in rows:
        if type(row.get(name)) not in (int, float):
            raise ValueError(f"{path}, step {row['step']}: {name} must be a number, got {row.get(name)!r}")
    return [row[name] for row in rows]


def scalars(row: dict[str, Any], names: Sequence[str], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by tag: loss, per_horizon/8, held_out/gradient_cosines/1-8 ..."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, names, f"{prefix}{name}/")
        elif isinstance(value, list):
            labels = names[-len(value) :] if len(value) <= len(names) else [str(i) for i in range(len(value))]
            for i, (label, entry) in enumerate(zip(labels, value, strict=True)):
                if not isinstance(entry, list):
                    yield f"{prefix}{name}/{label}", entry
                    continue
                # Of a [K, K] matrix only the upper triangle.
                for other, number in zip(labels[i + 1 :], entry[i + 1 :], strict=True):
                    yield f"{prefix}{name}/{label}-{other}", number
        elif name != "step":
            yield prefix + name, value


class Viewer(Protocol):
    def show(self, step: int, numbers: dict[str, float], pictures: dict[str, Tensor]) -> None:
        """Show numbers by tag, and pictures [3, height, width] in 0..1."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; events of step `first` and later are dropped."""

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError(
                "tensorboard must be False if the package is not installed: pip install 'mfwm-kernels[train]'"
            ) from error
        self.writer: Any = SummaryWriter(str(folder), purge_step=first)

    def show(self, step: int, numbers: dict[str, float], pictures: dict[str, Tensor]) -> None:
        for tag, number in numbers.items():
            self.writer.add_scalar(tag, number, step)
        for tag, picture in pictures.items():
            self.writer.add_image(tag, picture, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, which continues the earlier one of the same run directory."""

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ValueError("wandb must be False if the package is not installed: pip install wandb") from error
        self.wandb: Any = wandb
        name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        self.run: Any = wandb.init(project="mfwm", name=out.name, dir=str(out), id=name, resume="allow", config=config)

    def show(self, step: int, numbers: dict[str, float], pictures: dict[str, Tensor]) -> None:
        images = {tag: self.wandb.Image(picture.permute(1, 2, 0).numpy()) for tag, picture in pictures.items()}
        self.run.log({**numbers, **images}, step=step)

    def close(self) -> None:
        self.run.finish()
