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
from mfwm_kernels.op import OPS

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


def test_the_kernels_load_neither_the_compiler_nor_triton_nor_the_driver() -> None:
    """Every program that imports them would pay: torch._dynamo takes 1.4 s, Triton 0.15 s, and after a question to
    CUDA's driver no forked child can use the GPU."""
    code = """
import sys, torch
torch.cuda.is_available = torch.cuda.device_count = None
import mfwm_kernels
print([name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("torch._dynamo")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("first", ["mfwm_kernels", "torch.utils.flop_counter"])
def test_products_are_counted_whichever_is_imported_first(first: str) -> None:
    code = f"""
import inspect, sys, torch, {first}, mfwm_kernels
from torch.utils import flop_counter
hooks = [finder for finder in sys.meta_path if type(finder).__module__.startswith("mfwm_kernels")]
names = sorted(str(op).split(".")[-1].rstrip("')>") for op in flop_counter.flop_registry if "mfwm" in str(op))
print(*names, len(hooks), "class FlopCounterMode" in inspect.getsource(flop_counter))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = {f"{op.name}{end}" for op in OPS.values() if op.counts_flops for end in ("", "_backward")}
    expected -= {f"{op.name}_backward" for op in OPS.values() if op.gradients_in_forward}
    assert (done.stdout.split(), done.stderr) == ([*sorted(expected), "0", "True"], "")


@pytest.mark.parametrize("module", ["mfwm.commands", "mfwm.evaluation"])
def test_a_command_loads_no_more_than_it_needs(module: str) -> None:
    """Each of these takes as long as torch itself, or a good part of it, and `mfwm --help` uses none of them."""
    heavy = ("triton", "matplotlib", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


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
