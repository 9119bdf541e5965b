"""actions.csv of import-videos, as people and spreadsheets write it.

Columns video, frame, and action or action_0, action_1, ...; others are left alone. Read are: UTF-8 and UTF-16, with or
without a byte order mark; commas, semicolons or tabs between the columns, whichever separates video and frame in the
header, and a first line "sep=;"; quotes and spaces around cells; names in capitals; whole numbers written as 3.0; a
separator at the end of lines; and, where no comma separates columns, decimal commas.
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
    """Video name -> int64 [T] or float32 [T, A], rows in the order of their frames.

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
            place = f"{path}, line {line}"
            cells = [cell.strip() for cell in cells]
            # A name that is empty may be a comma at the end of the first line only.
            if len(cells) < least or any(cells[len(names) :]):
                raise ValueError(f"{place}: there must be {len(names)} cells, as in the first line, got {len(cells)}")
            video = cells[names.index("video")]
            if not video:
                raise ValueError(f"{place}: video is empty")
            if PurePosixPath(video).is_absolute() or ".." in PurePosixPath(video).parts:
                raise ValueError(f"{place}: video must be a name in the folder of the table, got {video!r}")
            if delimiter != ",":
                for column in (names.index("frame"), *columns):
                    cells[column] = cells[column].replace(",", ".")
            frame = whole_number(f"{place}: frame", cells[names.index("frame")])
            taken = tables.setdefault(video, {})
            if frame in taken:
                raise ValueError(f"{place}: frame {frame} of {video} stands twice")
            read = whole_number if discrete else real_number
            taken[frame] = [read(f"{place}: an action", cells[column]) for column in columns]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if not tables:
        raise ValueError(f"{path} holds no rows")
    for video, taken in tables.items():
        if max(taken) != len(taken) - 1:
            absent = next(frame for frame in range(len(taken)) if frame not in taken)
            raise ValueError(f"{path}: frame {absent} of {video} has no action")
    rows = {video: [taken[frame] for frame in range(len(taken))] for video, taken in tables.items()}
    if discrete:
        return {video: np.array(values, np.int64)[:, 0] for video, values in rows.items()}
    return {video: np.array(values, np.float32) for video, values in rows.items()}


def text_of(path: Path) -> str:
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path} must be text in UTF-8, or in UTF-16 with its mark: {error}") from error


def split(text: str) -> tuple[Any, str]:
    """(line number, cells) of every line that is not empty, and what separates the cells."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    hint = re.fullmatch(r'"?sep=([^" ])"?[,;\t]*', first, re.IGNORECASE)
    delimiter = hint[1] if hint else next((mark for mark in ",;\t" if is_header(text, mark)), ",")
    reader = parsed(text, delimiter)
    lines = ((reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells))
    if hint:
        next(lines)
    return lines, delimiter


def parsed(text: str, delimiter: str) -> Any:
    # Python's reader takes spaces before a quoted cell, and none after it.
    end = rf"[{re.escape(delimiter)}\r\n]"
    text = re.sub(rf'((?:\A|(?<={end})) *"(?:[^"]|"")*") +(?={end}|\Z)', r"\1", text)
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)


def is_header(text: str, delimiter: str) -> bool:
    """Whether the first line that is not empty names the columns where this separates them."""
    try:
        cells: list[str] = next((cells for cells in parsed(text, delimiter) if any(cell.strip() for cell in cells)), [])
    except csv.Error:
        return False
    return {"video", "frame"} <= {cell.strip().lower() for cell in cells}


def action_columns(path: Path, names: list[str]) -> list[int]:
    """Numbers of the columns of the action, in the order of its numbers."""
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


def whole_number(what: str, text: str) -> int:
    """int or whole float, as pandas writes a column that once had a gap."""
    value = real_number(what, text, limit=False)
    if not value.is_integer():
        raise ValueError(f"{what} must be a whole number, got {text!r}")
    # Python reads an integer of 4,300 digits at most, zeros included.
    digits = re.fullmatch(r"[+-]?0*([0-9]+)", text) if 0 <= value <= INT64 else None
    exact = int(digits[1]) if digits else int(value)
    # One more is their number, which has 64 bits, too.
    if not 0 <= exact < INT64:
        raise ValueError(f"{what} must be a whole number that is not negative, of 64 bits, got {text!r}")
    return exact


def real_number(what: str, text: str, *, limit: bool = True) -> float:
    """What float32 can hold."""
    try:
        if "_" in text:
            raise ValueError("Python's own notation")
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{what} must be a number, got {text!r}") from error
    with np.errstate(over="ignore"):
        if not math.isfinite(value) or (limit and not np.isfinite(np.float32(value))):
            raise ValueError(f"{what} must be finite, as a float of 32 bits, got {text!r}")
    return value
