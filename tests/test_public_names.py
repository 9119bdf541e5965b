"""What is public: every package says so in __all__, and mfwm uses nothing private of mfwm_kernels."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import mfwm
import pytest

import mfwm_kernels

PACKAGES = ("mfwm", "mfwm.data", "mfwm.evaluation", "mfwm.losses", "mfwm.metrics", "mfwm.models", "mfwm.training")
# Modules of mfwm_kernels that are public beside its __all__.
MODULES = {"mfwm_kernels": {*mfwm_kernels.__all__, "__version__", "arguments"}, "mfwm_kernels.info": {"cpu_name"}}


@pytest.mark.parametrize("name", PACKAGES)
def test_all_names_exist(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__doc__ and list(package.__all__) == sorted(set(package.__all__))
    for public in package.__all__:
        assert getattr(package, public).__doc__, public


def test_mfwm_loads_torch_on_first_use() -> None:
    """Its command line answers Ctrl-C before."""
    code = "import mfwm, sys; assert 'torch' not in sys.modules; mfwm.rollout; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Rollouts'"):
        _ = mfwm.Rollouts


def test_the_kernels_do_not_load_the_compiler() -> None:
    """torch._dynamo takes 1.4 s to import, at every start of a program that may never compile."""
    code = "import sys, mfwm_kernels; print([name for name in sys.modules if name.startswith('torch._dynamo')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_mfwm_uses_public_names_of_the_kernels() -> None:
    private = []
    for path in Path(mfwm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("mfwm_kernels"):
                allowed = MODULES.get(str(node.module), set())
                private += [f"{path.name}: {node.module}.{n.name}" for n in node.names if n.name not in allowed]
            if isinstance(node, ast.Import):
                private += [f"{path.name}: {n.name}" for n in node.names if n.name.startswith("mfwm_kernels.")]
    assert not private, private
