"""docs/notebooks/demo_small.ipynb runs from its first cell to its last, and is committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "demo_small.ipynb"
SMALL = "FRAMES, STEPS = 700, 3"


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_notebook_has_no_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


def test_notebook_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Without Jupyter, with fewer frames and steps."""
    matplotlib.use("Agg")
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(), 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            exec(SMALL, scope)
    out = capfd.readouterr().out
    assert "million parameters" in out and out.count("drift of the far horizons") == 4
