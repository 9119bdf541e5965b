"""What is kept of a run while it trains: log.jsonl, one row a step, and on wish TensorBoard and Weights & Biases."""

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
    """log.jsonl, one row a step; rows of steps that will be run again are dropped when a run goes on.

    names: of the entries of the lists in a row, for the viewers; the last ones where a list is shorter.
    """

    def __init__(self, path: Path, first: int, viewers: Sequence[Viewer] = (), names: Sequence[str] = ()) -> None:
        kept = [row for row in read_log(path) if row["step"] < first] if path.exists() else []
        write_atomically(path, "".join(as_json(row) + "\n" for row in kept).encode())
        self.path, self.viewers, self.names = path, viewers, names
        # Unbuffered: what a full disk refuses is not tried again when the file is closed.
        self.file = open(path, "ab", buffering=0)

    def write(self, row: dict[str, Any], pictures: dict[str, Tensor] | None = None) -> None:
        line = (as_json(row) + "\n").encode()
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                error.errno,
                f"step {row['step']} could not be logged ({error.strerror}); the newest checkpoint is whole",
                str(self.path),
            ) from error
        for viewer in self.viewers:
            viewer.show(row["step"], dict(scalars(row, self.names)), pictures or {})

    def close(self) -> None:
        for viewer in self.viewers:
            viewer.close()
        self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line cut short by a kill is left out. ValueError names the line that is no row of one."""
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
    """A number of every row; ValueError names the step that lacks it, and the log where it has no rows."""
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
                # Of a square of pairs what stands above the diagonal.
                for other, number in zip(labels[i + 1 :], entry[i + 1 :], strict=True):
                    yield f"{prefix}{name}/{label}-{other}", number
        elif name != "step":
            yield prefix + name, value


class Viewer(Protocol):
    def show(self, step: int, numbers: dict[str, float], pictures: dict[str, Tensor]) -> None:
        """Numbers by tag, and pictures [3, height, width] in 0..1."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; what was written of step `first` and later is dropped."""

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError(
                "tensorboard must be False where the package is not installed: pip install 'mfwm-kernels[train]'"
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
    """A wandb run that goes on with that of the same run directory."""

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ValueError("wandb must be False where the package is not installed: pip install wandb") from error
        self.wandb: Any = wandb
        name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        self.run: Any = wandb.init(project="mfwm", name=out.name, dir=str(out), id=name, resume="allow", config=config)

    def show(self, step: int, numbers: dict[str, float], pictures: dict[str, Tensor]) -> None:
        images = {tag: self.wandb.Image(picture.permute(1, 2, 0).numpy()) for tag, picture in pictures.items()}
        self.run.log({**numbers, **images}, step=step)

    def close(self) -> None:
        self.run.finish()
