"""The versions of pyproject.toml install together, the README states them, and the type information is complete."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

from mfwm_kernels import native

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


def stub_functions() -> dict[str, list[str]]:
    """The functions of mfwm_kernels/_native.pyi and the names of their arguments, all of them positional."""
    functions = {}
    for node in ast.parse((ROOT / "mfwm_kernels" / "_native.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert not (node.args.args or node.args.kwonlyargs), f"{node.name} takes positional arguments only"
            assert all(argument.annotation for argument in node.args.posonlyargs), node.name
            functions[node.name] = [argument.arg for argument in node.args.posonlyargs]
    return functions


def compiled_functions(module: ModuleType) -> dict[str, int]:
    """The functions of a pybind11 module and their numbers of arguments, which it gives in their docstrings only."""
    signatures = {name: value.__doc__.splitlines()[0] for name, value in vars(module).items() if callable(value)}
    return {name: len(re.findall(r"\barg\d+: ", signature)) for name, signature in signatures.items()}


def test_the_stub_lists_the_functions_of_the_compiled_module() -> None:
    module = native.module
    if module is None:
        pytest.fail("the module mfwm_kernels._native is part of a test installation")
    expected = {name: len(names) for name, names in stub_functions().items()}
    if not module.has_cuda:
        expected = {name: count for name, count in expected.items() if not name.startswith("cuda_")}
    assert compiled_functions(module) == expected


def test_the_stub_names_the_arguments_of_the_bindings() -> None:
    """Read the source too: a module built without CUDA lacks the CUDA functions, and docstrings name no argument."""
    source = (ROOT / "csrc" / "bindings.cpp").read_text()
    bindings = re.findall(r'module\.def\(\s*"(\w+)",\s*\[\]\(([^)]*)\)', source)
    assert len(bindings) == source.count("module.def(")
    assert stub_functions() == {name: re.findall(r"(\w+)(?:,|$)", arguments) for name, arguments in bindings}


def test_the_stub_describes_the_build() -> None:
    body = ast.parse((ROOT / "mfwm_kernels" / "_native.pyi").read_text()).body
    (build_info,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == "BuildInfo")
    assert native.module is not None
    assert {ast.unparse(field.target) for field in build_info.body if isinstance(field, ast.AnnAssign)} == set(
        native.module.build_info
    )


def test_type_information_and_pages_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type checker ignores a package without py.typed, and the compiled module without its stub. `mfwm play` serves
    the files of its page."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    build = distribution.get_command_obj("build_py")
    build.build_lib = str(tmp_path)
    build.ensure_finalized()
    outputs = {str(Path(output).relative_to(tmp_path)) for output in build.get_outputs(include_bytecode=False)}
    assert {"mfwm_kernels/_native.pyi", "mfwm_kernels/py.typed", "mfwm/py.typed"} <= outputs
    assert {f"mfwm/play/page/{name}" for name in ("index.html", "play.css", "play.js")} <= outputs
