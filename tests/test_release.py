"""What a release is made of: sdist, wheels, workflows, versions, and the figures that the README states."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mfwm_kernels
from benchmarks.wheel import problems
from mfwm_kernels import native

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def parsed(path: str) -> Any:
    """A YAML file, in which the key `on` is the boolean True."""
    return pytest.importorskip("yaml").safe_load((ROOT / path).read_text())


def test_the_readme_lists_the_extras() -> None:
    table = re.findall(r"^\| `(\w+)` \|", README[README.index("| extra |") : README.index("## Example")], re.MULTILINE)
    assert sorted([*table, "dev"]) == sorted(PROJECT["project"]["optional-dependencies"])


def test_dev_has_every_extra() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (whole,) = (wanted for wanted in extras["dev"] if wanted.startswith("mfwm-kernels["))
    assert {*re.findall(r"\w+", whole)[2:], "dev"} == set(extras)


def test_the_sdist_has_every_source() -> None:
    patterns = re.findall(r"^recursive-include csrc (.+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)[0].split()
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 20
    assert [s for s in sources if not any(fnmatch.fnmatch(s.name, pattern) for pattern in patterns)] == []
    included = re.findall(r"^include (.+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)[0].split()
    assert "CMakeLists.txt" in included and all((ROOT / name).is_file() for name in included)


def test_every_package_is_packaged() -> None:
    folders = {"mfwm_kernels": ROOT / "mfwm_kernels", "mfwm": ROOT / "python" / "mfwm"}
    found = set()
    for name, folder in folders.items():
        for path in folder.rglob("*.py"):
            found.add(".".join((name, *path.parent.relative_to(folder).parts)))
    assert found | {"mfwm.play.page"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_one_version() -> None:
    version = mfwm_kernels.__version__
    assert parsed("CITATION.cff")["version"] == version
    assert re.search(r"^## ([\d.]+),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version  # type: ignore[index]


def test_workflows_and_wheels_are_for_the_same_pythons() -> None:
    tags = [f"cp{python.replace('.', '')}" for python in PYTHONS]
    assert PROJECT["tool"]["cibuildwheel"]["build"] == [f"{tag}-*" for tag in tags]
    release, ci = parsed(".github/workflows/release.yml"), parsed(".github/workflows/ci.yml")
    assert release["jobs"]["wheels"]["strategy"]["matrix"]["python"] == tags
    tested = [step["with"]["python-version"] for step in ci["jobs"]["test"]["steps"] if "setup-python" in str(step)]
    assert [*tested, *ci["jobs"]["quick"]["strategy"]["matrix"]["python"]] == list(PYTHONS)
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert [c.split(" :: ")[-1] for c in PROJECT["project"]["classifiers"] if ":: 3." in c] == list(PYTHONS)


def test_only_publishing_may_identify_itself() -> None:
    release = parsed(".github/workflows/release.yml")
    assert release["permissions"] == {"contents": "read"}
    permissions = {name: job.get("permissions", {}) for name, job in release["jobs"].items()}
    assert permissions.pop("publish") == {"id-token": "write"} and not any(permissions.values())
    assert set(release["jobs"]["publish"]["needs"]) == {"sdist", "wheels", "beside-torch"}


@pytest.mark.parametrize("name", ["bug", "slow"])
def test_a_report_says_what_is_installed(name: str) -> None:
    fields = {field["id"]: field for field in parsed(f".github/ISSUE_TEMPLATE/{name}.yml")["body"] if "id" in field}
    assert "python -m mfwm_kernels.info" in fields["info"]["attributes"]["label"]
    assert fields["info"]["validations"]["required"]


def test_a_module_of_other_sources_is_refused_with_the_cure(tmp_path: Path) -> None:
    stub, module = tmp_path / "_native.pyi", ModuleType("_native")
    module.__file__ = "there/_native.so"
    native.check_signatures(module, stub)  # Without a stub there is nothing to compare with.
    stub.write_text("def kernel() -> None: ...")
    with pytest.raises(ImportError, match=r"there/_native\.so was compiled from other sources .*pip install"):
        native.check_signatures(module, stub)
    module.build_info = {"signatures": hashlib.sha256(stub.read_bytes()).hexdigest()}  # type: ignore[attr-defined]
    native.check_signatures(module, stub)
    stub.write_text("def kernel(threads: int, /) -> None: ...")
    with pytest.raises(ImportError, match="compiled from other sources"):
        native.check_signatures(module, stub)


WHEEL = json.loads((ROOT / "benchmarks" / "results" / "wheel.json").read_text())


def test_the_readme_states_what_was_measured_of_the_wheel() -> None:
    wheel, environments = WHEEL["wheel"], WHEEL["environments"]
    words = " ".join(README.split())
    versions = [found["torch"] for found in environments]
    assert f"beside {', '.join(versions[:-1])} and {versions[-1]})" in words
    slowest = max(found["import_s"] for found in environments)
    assert f"It is {wheel['bytes'] / 1e6:.1f} MB, {wheel['installed_bytes'] / 1e6:.1f} MB installed," in words
    assert f"adds {slowest * 1e3:.0f} ms of CPU time to importing torch" in words


def test_the_wheel_worked_beside_old_and_new_builds_of_torch() -> None:
    oldest = re.search(r"torch>=([\d.]+)", str(PROJECT["project"]["dependencies"]))
    environments = WHEEL["environments"]
    assert oldest is not None and len(environments) >= 3
    assert any(found["torch"].startswith(oldest[1]) for found in environments)
    assert {found["cuda"] is None for found in environments} == {True, False}
    for found in environments:
        assert found["check"]["failed"] == 0 < found["check"]["passed"]
        assert len(found["openmp"]["runtimes"]) == 1 and found["openmp"]["added_threads"] == [0, 2]
        assert found["ddp_losses"][1] < found["ddp_losses"][0] and found["import_s"] < 0.05


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"native": None}, "the compiled module did not load"),
        ({"check": {"passed": 55, "failed": 1}}, "self-check"),
        ({"check": {"passed": 0, "failed": 0}}, "self-check"),
        ({"openmp": {"runtimes": ["a/libgomp.so.1", "b/libgomp-4a.so.1"], "added_threads": [0, 2]}}, "OpenMP"),
        ({"openmp": {"runtimes": ["a/libgomp.so.1"], "added_threads": [1, 1]}}, "OpenMP"),
        ({"ddp_losses": [0.13, 0.13]}, "the losses did not fall"),
    ],
)
def test_what_counts_as_a_problem_of_a_wheel(changes: dict[str, Any], problem: str) -> None:
    for found in WHEEL["environments"]:
        assert problems(found) == []
        (told,) = problems({**found, **changes})
        assert told.startswith(f"torch {found['torch']}: {problem}")


def test_the_wheel_is_for_any_linux_and_needs_no_other_library() -> None:
    assert re.fullmatch(r"manylinux_2_\d+_x86_64", WHEEL["wheel"]["platform_tag"])
    # What the standard for such wheels expects of every Linux, and libgomp, which torch has.
    allowed = {"libc.so.6", "libgcc_s.so.1", "libgomp.so.1", "libm.so.6", "libstdc++.so.6"}
    assert set(WHEEL["wheel"]["libraries"]) <= allowed
