"""planted_faults.py on a small tree: what it reports of a fault that is seen, and of one that is not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from faults import FAULTS, Fault
from planted_faults import ROOT, Place, check_texts, judge

RULE = """
def window(n, size):
    # The last `size` numbers up to n.
    return range(max(0, n - size + 1), n + 1)
"""
TEST = """
from rule import window

def test_window():
    assert list(window(5, 2)) == [4, 5]

def test_that_fails_anyway():
    assert not list(window(5, 2))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "project"
    (tree / "tests").mkdir(parents=True)
    for name, text in {"rule.py": RULE, "tests/test_rule.py": TEST, "pytest.ini": "[pytest]\n"}.items():
        (tree / name).write_text(text)
    subprocess.run(["git", "init", "--quiet", str(tree)], check=True)
    return tree


def fault(name: str, right: str, wrong: str, test: str = "tests/test_rule.py::test_window") -> Fault:
    return Fault(name, "kernel", "rule.py", right, wrong, test)


def test_what_becomes_of_a_fault(tree: Path, tmp_path: Path) -> None:
    faults = [
        fault("one too many", "n - size + 1", "n - size"),
        fault("other words", "The last", "Those last"),
        fault("no test", "n + 1", "n", "tests/test_rule.py::test_that_fails_anyway"),
    ]
    verdicts = {verdict.fault.name: verdict for verdict in judge(faults, tree, tmp_path / "work", jobs=2)}
    assert {name: verdict.status for name, verdict in verdicts.items()} == {
        "one too many": "CAUGHT", "other words": "MISSED", "no test": "NOT JUDGED",
    }  # fmt: skip
    assert verdicts["one too many"].by == "tests/test_rule.py::test_window"
    assert "assert [3, 4, 5] == [4, 5]" in verdicts["one too many"].why
    assert str(verdicts["one too many"]).startswith(
        "CAUGHT     kernel     one too many by tests/test_rule.py::test_window"
    )
    assert (tree / "rule.py").read_text() == RULE


@pytest.mark.parametrize(
    ("right", "found"), [("n + 2", "found 0 times in rule.py"), ("size", "found 3 times in rule.py")]
)
def test_a_text_that_is_not_there_once_names_its_fault(tree: Path, tmp_path: Path, right: str, found: str) -> None:
    faults = [fault("sound", "n + 1", "n"), fault("moved", right, "n")]
    with pytest.raises(SystemExit, match=f"moved: {found}"):
        list(judge(faults, tree, tmp_path / "work"))


def test_every_fault_can_be_planted() -> None:
    check_texts(FAULTS, ROOT)


def test_the_tests_of_every_fault_exist() -> None:
    """A test that moved would judge nothing: its files must contain a word of the expression after -k."""
    for planted in FAULTS:
        paths, _, expression = planted.tests.partition(" -k ")
        words = set(expression.strip("'").split()) - {"and", "or", "not"}
        text = "".join((ROOT / path).read_text() for path in paths.split())
        assert any(word in text for word in words), f"{planted.name}: {planted.tests}"


def test_cmake_finds_all_that_it_reads_in_a_copy(tmp_path: Path) -> None:
    """Or no fault in csrc/cpu would be judged."""
    place = Place(tmp_path, ROOT)
    place.fresh(compiled=False)
    place.configure()


def test_a_level_must_be_known(tmp_path: Path) -> None:
    place = Place(tmp_path, ROOT, "avx2")
    place.fresh(compiled=False)
    with pytest.raises(RuntimeError, match="MFWM_SIMD must be baseline, v3 or v4, got avx2"):
        place.configure()
