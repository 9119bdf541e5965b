"""Triton's own launcher, without a GPU: do a kernel's arguments reach the driver as they were given?"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mfwm_kernels.op import OPS

HERE = Path(__file__).parent / "fake_cuda"

if importlib.util.find_spec("triton") is None or shutil.which("gcc") is None:
    pytest.skip("needs Triton and gcc", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a real driver is loaded", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in libcuda.so.1."""
    made = tmp_path_factory.mktemp("fake_cuda")
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    headers = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}", str(HERE / "fake_cuda.c")]
    subprocess.run([*command, "-o", str(made / "libcuda.so.1")], check=True)
    return made


def launched(folder: Path, *fault: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, str(HERE / "launch_all.py"), str(folder / "libcuda.so.1"), *fault],
        capture_output=True, text=True, env={**environment, "TRITON_INTERPRET": "0"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_kernel_is_launched_with_the_arguments_that_it_was_given(folder: Path) -> None:
    rows = launched(folder)
    assert [row for row in rows if row["wrong"]] == []
    listed = {name for op in OPS.values() if "triton" in op.backends for name in op.backends["triton"].kernels}
    assert {row["kernel"] for row in rows} == listed
    kinds = {kind for row in rows for kind in row["kinds"]}
    assert kinds - listed == {
        "1", "None", "pointer", "1 in a tuple", "None in a tuple", "pointer in a tuple",
    }  # fmt: skip


@pytest.mark.parametrize(
    "fault, found",
    [
        ("one too few", "bytes are passed, the kernel takes"),
        ("two swapped", "parameters arrive as"),
        ("too narrow", "bytes are passed, the kernel takes"),
    ],
)
def test_a_launcher_that_passes_its_arguments_wrongly_is_found(folder: Path, fault: str, found: str) -> None:
    (row,) = launched(folder, fault)
    assert any(found in sentence for sentence in row["wrong"]), row
