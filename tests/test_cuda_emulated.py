"""The CUDA C++ kernels on the CPU (cuda_emulator): every sample of every op that has one, values and gradients."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import differentiable_outputs, gradients, leaves, require_grad
from cuda_emulator import ROOT, Fences, emulated_cuda, emulated_module

import mfwm_kernels  # noqa: F401  (registers the ops)
from mfwm_kernels.check import TOLERANCE, doubled, relative_error, tensors_of
from mfwm_kernels.registry import OPS, use_backend

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

CUDA_OPS = [op for op in OPS.values() if "cuda" in op.backends]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [
    pytest.param(op, dtype, id=f"{op.name}-{str(dtype)[6:]}")
    for op in CUDA_OPS
    for dtype in DTYPES
    if dtype in op.backends["cuda"].dtypes
]


def check_sample(op: Any, sample: dict[str, Any], dtype: torch.dtype, edge: str, module: Any = None) -> None:
    """Outputs and gradients against the reference in fp64, and nothing touched outside the tensors."""
    fences = Fences(edge)
    kwargs = {name: fences.copy(value) for name, value in sample.items()}
    for tensor in [t for name in op.differentiable for t in tensors_of(kwargs.get(name))]:
        tensor.requires_grad_(tensor.is_floating_point())
    before = [t.detach().clone() for t in tensors_of(list(kwargs.values()))]
    exact_kwargs = require_grad(op, doubled(sample))
    with use_backend("reference"):
        exact = op.public(**exact_kwargs)
    upstream = [torch.randn_like(output) for output in differentiable_outputs(exact)]
    want = [*tensors_of(exact), *gradients(op, exact_kwargs, exact, upstream)]
    with emulated_cuda(fences, module), use_backend("cuda"):
        result = op.public(**kwargs)
        got = [*tensors_of(result), *gradients(op, kwargs, result, upstream)]
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        if a.is_floating_point():
            error = relative_error(a, b)
            assert error <= TOLERANCE[dtype], f"result {place} {list(a.shape)}: relative error {error:.2e}"
        else:
            assert torch.equal(a, b), f"result {place}"
    assert [leaf.dtype for leaf in leaves(op, kwargs)] == [t.dtype for t in got[len(tensors_of(result)) :]]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(list(kwargs.values())), strict=True))


@pytest.mark.parametrize("edge", ["start", "end"])
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_values_and_gradients(op: Any, dtype: torch.dtype, edge: str) -> None:
    torch.manual_seed(1)
    for sample in op.samples(dtype, torch.device("cpu")):
        check_sample(op, sample, dtype, edge)


FAULTS = {
    "no barrier": ("video_pyramid", "      __syncthreads();\n    }\n    for", "    }\n    for", "relative error"),
    "a wrong stride": ("video_pyramid", "(k / columns) * s[3]", "(k / columns) * s[4]", "relative error"),
    "a row too far": ("video_pyramid", "start = b * s[0]", "start = s[3] + b * s[0]", "outside all tensors"),
    "a collective that not all reach": (
        "video_pyramid", "const Output& output = p.outputs[i];", "\\g<0> if (threadIdx.x != 3) __syncwarp();",
        "never come",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    name, right, wrong, seen = FAULTS[fault]
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources, ignore=shutil.ignore_patterns("cpu"))
    file = sources / "cuda" / f"{name}.cu"
    text, count = re.subn(re.escape(right), wrong, file.read_text())
    assert count == 1
    file.write_text(text)
    op = OPS[name]
    torch.manual_seed(1)
    with pytest.raises((AssertionError, RuntimeError), match=seen):
        for sample in op.samples(torch.float32, torch.device("cpu")):
            check_sample(op, sample, torch.float32, "end", emulated_module(sources))
