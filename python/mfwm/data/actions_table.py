"""Reads actions.csv of import-videos, as people and spreadsheets write it.

Its columns are video, frame, and action or action_0, action_1, ...; others are ignored. Accepted are: UTF-8 with or
without a byte order mark, and UTF-16 with one; commas, semicolons or tabs between columns, whichever separates video
and frame in the header, and a first line "sep=;"; quotes and spaces around cells; names in capitals; integers written
as 3.0; a separator at the end of lines; and decimal commas, unless commas separate the columns.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .check import INT64


def read_actions(path: Path) -> dict[str, np.ndarray]:
    """By video name, the actions int64 [T] or float32 [T, A], in the order of frames.

    ValueError names file, line, rule and value.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a table with columns video, frame, action")
    text = text_of(path)
    try:
        lines, delimiter = split(text)
        header: list[str] = next((cells for _, cells in lines), [])
        names = [name.strip().lower() for name in header]
        columns = action_columns(path, names)
        least = 1 + max(column for column, name in enumerate(names) if name)
        discrete = names[columns[0]] == "action"
        tables: dict[str, dict[int, list[Any]]] = {}
        for line, cells in lines:
            where = f"{path}, line {line}"
            cells = [cell.strip() for cell in cells]
            # An empty last name may come from a comma at the end of the first line only.
            if len(cells) < least or any(cells[len(names) :]):
                raise ValueError(f"{where} must have {len(names)} cells, as the first line has, got {len(cells)}")
            video = cells[names.index("video")]
            if not video:
                raise ValueError(f"{where}: video is empty")
            if PurePosixPath(video).is_absolute() or ".." in PurePosixPath(video).parts:
                raise ValueError(f"{where}: video must be a file in the folder of the table, got {video!r}")
            if delimiter != ",":
                for column in (names.index("frame"), *columns):
                    cells[column] = cells[column].replace(",", ".")
            frame = integer_in(f"{where}: frame", cells[names.index("frame")])
            frames_to_actions = tables.setdefault(video, {})
            if frame in frames_to_actions:
                raise ValueError(f"{where}: frame {frame} of {video} appears twice")
            read = integer_in if discrete else number_in
            frames_to_actions[frame] = [read(f"{where}: an action", cells[column]) for column in columns]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if not tables:
        raise ValueError(f"{path} has no rows")
    for video, frames_to_actions in tables.items():
        if max(frames_to_actions) != len(frames_to_actions) - 1:
            missing = next(frame for frame in range(len(frames_to_actions)) if frame not in frames_to_actions)
            raise ValueError(f"{path}: frame {missing} of {video} has no action")
    rows = {
        video: [frames_to_actions[frame] for frame in range(len(frames_to_actions))]
        for video, frames_to_actions in tables.items()
    }
    if discrete:
        return {video: np.array(values, np.int64)[:, 0] for video, values in rows.items()}
    return {video: np.array(values, np.float32) for video, values in rows.items()}


def text_of(path: Path) -> str:
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} must be text in UTF-8, or in UTF-16 with a byte order mark: {error}") from error


def split(text: str) -> tuple[Any, str]:
    """(line number, cells) of every line that is not empty, and the separator of the cells."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    hint = re.fullmatch(r'"?sep=([^" ])"?[,;\t]*', first, re.IGNORECASE)
    delimiter = hint[1] if hint else next((mark for mark in ",;\t" if is_header(text, mark)), ",")
    reader = parsed(text, delimiter)
    lines = ((reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells))
    if hint:
        next(lines)
    return lines, delimiter


def parsed(text: str, delimiter: str) -> Any:
    # Python's reader accepts spaces before a quoted cell but not after it, so remove these.
    end = rf"[{re.escape(delimiter)}\r\n]"
    text = re.sub(rf'((?:\A|(?<={end})) *"(?:[^"]|"")*") +(?={end}|\Z)', r"\1", text)
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)


def is_header(text: str, delimiter: str) -> bool:
    """Whether the first line that is not empty, split at this separator, names the columns."""
    try:
        cells: list[str] = next((cells for cells in parsed(text, delimiter) if any(cell.strip() for cell in cells)), [])
    except csv.Error:
        return False
    return {"video", "frame"} <= {cell.strip().lower() for cell in cells}


def action_columns(path: Path, names: list[str]) -> list[int]:
    """Column numbers of action_0, action_1, ... or of action."""
    actions = [name for name in names if name == "action" or name.startswith("action_")]
    twice = [name for name in {"video", "frame", *actions} if names.count(name) > 1]
    if not {"video", "frame"} <= set(names) or not actions or ("action" in actions and len(actions) > 1) or twice:
        raise ValueError(
            f"{path} must have columns video, frame and action, or action_0, action_1, ..., each once; got {names}"
        )
    if all(re.fullmatch(r"action_\d+", name) for name in actions):
        numbered = {name.removeprefix("action_").lstrip("0") or "0": name for name in actions}
        if numbered.keys() != {str(number) for number in range(len(actions))}:
            raise ValueError(f"{path} must have columns action_0, action_1, ... without a gap; got {names}")
        actions = [numbered[str(number)] for number in range(len(actions))]
    return [names.index(name) for name in actions]


def integer_in(what: str, text: str) -> int:
    """An integer, also if written as 3.0, as pandas writes a column that had a gap."""
    value = number_in(what, text, limit=False)
    if not value.is_integer():
        raise ValueError(f"{what} must be an integer, got {text!r}")
    # Python parses at most 4,300 digits, leading zeros included.
    digits = re.fullmatch(r"[+-]?0*([0-9]+)", text) if 0 <= value <= INT64 else None
    exact = int(digits[1]) if digits else int(value)
    # Below INT64, so that the number of actions, one more, fits into 64 bits too.
    if not 0 <= exact < INT64:
        raise ValueError(f"{what} must be an integer >= 0 that fits into 64 bits, got {text!r}")
    return exact


def number_in(what: str, text: str, *, limit: bool = True) -> float:
    """A number; with `limit`, one that float32 can hold."""
    try:
        if "_" in text:
            raise ValueError("Python's own notation")
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{what} must be a number, got {text!r}") from error
    with np.errstate(over="ignore"):
        if not math.isfinite(value) or (limit and not np.isfinite(np.float32(value))):
            raise ValueError(f"{what} must be finite{' as float32' if limit else ''}, got {text!r}")
    return value
