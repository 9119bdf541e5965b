"""log.jsonl of a run: one row a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoints import write_atomically


class Log:
    """log.jsonl, one row a step; rows of steps that will be run again are dropped when a run goes on."""

    def __init__(self, path: Path, first: int) -> None:
        kept = [row for row in read_log(path) if row["step"] < first] if path.exists() else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(path, "a")

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
