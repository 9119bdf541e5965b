"""The versions that pyproject.toml names install together, and the README states the same ones."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [*PROJECT["project"]["dependencies"], *(wanted for extra in EXTRAS.values() for wanted in extra)]


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def lowest(name: str) -> tuple[int, ...]:
    """The one lower bound of a package, in whatever extras it is."""
    bounds = {version(wanted.split(";")[0]) for wanted in REQUIREMENTS if re.match(rf"{name}\b", wanted)}
    (bound,) = bounds
    return bound


PYTHON = version(PROJECT["project"]["requires-python"])


@pytest.mark.parametrize("name", sorted({re.split(r"[\[><=; ]", wanted)[0] for wanted in REQUIREMENTS}))
def test_every_requirement_runs_on_the_oldest_python(name: str) -> None:
    try:
        needed = metadata(name).get("Requires-Python") or ""
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    match = re.search(r">=\s*(\d+\.\d+)", needed)
    assert match is None or version(match[1]) <= PYTHON, (name, needed)


def test_the_versions_that_are_tested_are_within_the_bounds() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in ("torch", "triton", "zarr", "av"):
        assert version(pinned[name]) >= lowest(name) > (), name


def test_triton_is_that_of_the_oldest_torch() -> None:
    """torch 2.11.0 for Linux depends on triton == 3.6.0."""
    assert (lowest("torch"), lowest("triton")) == ((2, 11), (3, 6))


def test_the_readme_and_the_linter_know_the_bounds() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, bound in (("Python", PYTHON), ("torch", lowest("torch")), ("Triton", lowest("triton"))):
        assert f"{name} {'.'.join(map(str, bound))} or newer" in readme
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + "".join(map(str, PYTHON))
