"""What docs/study.md and README.md say of the study is computed from its committed cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mfwm.study.plan import Plan
from mfwm.study.results import Results

from benchmarks.study_report import Core, Sizes, read, written

plan, _ = read("core")


def column(error: float, psnr: float, rng: np.random.Generator) -> dict[str, Any]:
    clips = error + rng.normal(0, 0.002, 6)
    figures = {"psnr": {"1": psnr}, "gain": [1.0, 0.5, -0.5], "gain_zero_step": 3}
    return {"at": plan.steps, "clips": clips.tolist(), **figures}


def results_of(errors: dict[str, float], psnr: dict[str, float], shift: dict[str, float], plan: Plan = plan) -> Results:
    """Three seeds of some arms on some worlds. shift: by world, what far horizons add to the error of B4."""
    rng = np.random.default_rng(0)
    cells = {}
    for cell in plan.cells():
        if cell.seed < 3 and cell.arm in errors:
            error = errors[cell.arm] + (shift.get(cell.world, 0.0) if cell.arm == "B4" else 0.0)
            columns = {name: column(error, psnr.get(cell.arm, 30.0), rng) for name in ("steps", "flops", "time")}
            cells[str(cell)] = columns
    return Results({"cells": cells})


ERRORS = {"A0": 6.0, "A1": 5.0, "B2": 5.0, "B3": 5.5, "B4": 4.0, "B8e": 5.0, "B8a": 5.0}


@pytest.mark.parametrize(
    "errors, psnr, shift, verdicts",
    [
        # The gain over A1 is 1 px, more under noise, and equal weights cost the next frame.
        ({}, {"B8e": 28.0}, {"noisy": -0.5, "skip2": 0.1, "skip4": 0.2}, ["yes"] * 5),
        # B3 beats B2, B4 loses to A1, and all arms have the same next frame.
        ({"B3": 4.5, "B4": 5.2}, {}, {}, ["no", "no", "cannot be asked: there is no gain to shrink", "no", "no"]),
        # B4 beats the others on the balls alone, and loses a decibel with decayed weights too.
        (
            {},
            {"B8e": 28.0, "B4": 29.0},
            {"noisy": 2.0, "freeway": 2.0, "skip2": 0.5, "skip4": 0.1},
            ["yes", "in part", "no", "in part", "no"],
        ),
    ],
)
def test_predictions_are_answered(
    errors: dict[str, float], psnr: dict[str, float], shift: dict[str, float], verdicts: list[str]
) -> None:
    study = Core(plan, results_of({**ERRORS, **errors}, psnr, shift))
    assert [answer for answer, _ in study.answers()] == verdicts


def test_the_figures_of_the_tables() -> None:
    study = Core(plan, results_of(ERRORS, {"A0": 31.5}, {}))
    report = study.report()
    assert f"{len(study.results.cells)} of {len(plan.cells())} cells have been run" in report
    assert "3 seeds on balls" in report and all(text in report for text in plan.predictions)
    row = next(line for line in study.arms_table("balls").splitlines() if line.startswith("| B4:"))
    fields = [field.strip() for field in row.split("|")[1:-1]]
    assert fields[:7] == ["B4: cascade", "3", "30.00", "2.0", "4.00", "4.00", "4.00"]
    assert fields[7].startswith("-1.0") and float(fields[8]) < 0.01
    assert "| B4: cascade, 4.00 | 3 |" in study.short() and "A0: next frame | 3 | 31.50" in report


def test_the_price_is_paired_by_seed() -> None:
    """Seed 1 of A1 is missing, and A0 is better by 10 dB there."""
    results = results_of({"A0": 6.0, "A1": 5.0, "B4": 4.0}, {"A0": 31.5, "B4": 31.0}, {})
    for (world, arm, seed), columns in list(results.cells.items()):
        if seed == 1 and arm != "A1":
            columns["flops"]["psnr"] = {"1": columns["flops"]["psnr"]["1"] + 10}
        elif seed != 0 and arm == "A1":
            del results.cells[world, arm, seed]
    rows = {line.split("|")[1].strip(): line for line in Core(plan, results).price_table().splitlines()[2:]}
    assert list(rows) == ["A1: next frame, context noise", "B4: cascade"]
    assert "| -1.50 |" in rows["A1: next frame, context noise"]
    assert "| -0.50 (-0.50 to -0.50) |" in rows["B4: cascade"]


def test_the_readme_compares_arms_over_the_same_seeds() -> None:
    """The next frame of seed 2 is far worse, and no other arm has that seed."""
    results = results_of({"A0": 6.0, "A1": 5.0, "B3": 1.0, "B4": 4.0}, {}, {})
    for (world, arm, seed), columns in list(results.cells.items()):
        if seed == 2 and arm == "A0":
            columns["steps"]["clips"] = [60.0] * 6
        elif seed == 2 or (seed == 1 and arm == "B3" and world == "balls"):
            del results.cells[world, arm, seed]
    balls, noisy, _ = [line.split("|")[2:-1] for line in Core(plan, results).short().splitlines()[2:]]
    assert [field.strip() for field in balls] == ["6.00", "5.00", "4.00", "B4: cascade, 4.00", "2"]
    assert noisy[3].strip() == "B3: skip 1, 2, 4, 8, full size, 1.00"


def test_arms_without_seeds_in_common_are_said_not_to_be_run() -> None:
    study = Core(plan, results_of({"A0": 6.0, "A1": 5.0}, {}, {}))
    assert next(figures for _, figures in study.answers()) == "B3 minus B2: not run"
    assert all(answer == "not run" for answer, _ in study.answers())


@pytest.mark.parametrize(
    "errors, verdicts",
    [
        ({"A0": 6.0, "B3": 2.0, "B4": 6.0, "C1": 2.5, "C2": 5.0, "C3": 3.0}, ["yes", "yes", "yes", "no"]),
        ({"A0": 6.0, "B3": 6.5, "B4": 6.2, "C1": 6.4, "C2": 6.3, "C3": 6.1}, ["no", "no", "no", "yes"]),
        ({"A0": 6.0, "B4": 6.2}, ["not run", "not run", "not run", "yes"]),
    ],
)
def test_predictions_of_sizes_are_answered(errors: dict[str, float], verdicts: list[str]) -> None:
    sizes, _ = read("sizes")
    study = Sizes(sizes, results_of(errors, {}, {}, sizes))
    assert [answer for answer, _ in study.answers()] == verdicts


def test_docs_and_readme_say_what_the_committed_cells_say() -> None:
    assert read("core")[1].cells
    for path, text in written().items():
        assert path.read_text() == text, f"run python -m benchmarks.study_report: {path} differs"
