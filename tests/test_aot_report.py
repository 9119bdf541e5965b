"""The report on machine code: what it counts, and that no kernel is worse than when the report was committed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from mfwm_kernels.aot_report import compact, worse
from mfwm_kernels.cuda_launches import absent
from mfwm_kernels.launches import TorchOp, _TorchOps, calls, phases
from mfwm_kernels.op import OPS
from mfwm_kernels.traffic import Argument, accesses_of, fewest_bytes

ROOT = Path(__file__).parent.parent
LOSS_KERNELS = ("strip_kernel", "finish_kernel", "scale_kernel")
COMMITTED = ROOT / "benchmarks" / "results" / "sass-sm_90.json"


def compared(planted: str, *arguments: str, committed: Path = COMMITTED) -> subprocess.CompletedProcess[str]:
    """The report at genie in bf16 against the committed one, after `planted` has been run in the same process."""
    return subprocess.run(
        [
            *(sys.executable, "-c", f"from mfwm_kernels import aot\n{planted}\naot.main()", "--report"),
            *("--compare", str(committed), "--size", "genie", "--dtype", "bfloat16", "--jobs", "2"),
            *(arguments or ("--backend", "triton")),
        ],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, timeout=3600,
    )  # fmt: skip


@pytest.mark.slow
def test_no_kernel_at_genie_is_worse_than_the_committed_one() -> None:
    """At one size in one dtype, for the sake of time. `python -m mfwm_kernels.aot --report --compare` covers all."""
    done = compared("")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(COMMITTED.read_text())["kernels"]
    expected = sum((row["backend"], row["size"], row["dtype"]) == ("triton", "genie", "bf16") for row in rows)
    assert f"{expected} kernels compared with {COMMITTED}: 0 figures are worse" in done.stdout
    assert {row["op"] for row in rows} == {op.name for op in OPS.values() if "triton" in op.backends}


@pytest.mark.slow
@pytest.mark.skipif(bool(absent()), reason=absent())
def test_no_cuda_kernel_at_genie_is_worse_than_the_committed_one() -> None:
    done = compared("", "--backend", "cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(COMMITTED.read_text())["kernels"]
    expected = {
        (row["op"], row["kernel"])
        for row in rows
        if (row["backend"], row["size"], row["dtype"]) == ("cuda", "genie", "bf16")
    }
    of_the_loss = {("multi_horizon_loss", name) for name in LOSS_KERNELS}
    assert expected == {("video_pyramid", "pyramid_strip_kernel"), *of_the_loss}
    assert f"{len(expected)} kernels compared with {COMMITTED}: 0 figures are worse" in done.stdout


def test_a_worse_tile_is_caught() -> None:
    # Each thread has an eighth of the elements: eight times the warps for the same work.
    planted = "from mfwm_kernels.triton import video_pyramid as kernels\nkernels.TILE_ELEMENTS //= 8\n"
    done = compared(planted, "--op", "video_pyramid", "--backend", "triton")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WORSE video_pyramid triton genie bf16 forward video_pyramid: instructions " in done.stdout


def rows(**changes: Any) -> dict[str, list[dict[str, Any]]]:
    case = {"op": "fan_out", "backend": "triton", "size": "genie", "dtype": "bf16", "phase": "forward"}
    kernel = {"instructions": 100, "barriers": 2.0, "spilled_bytes": 0, "blocks_per_sm": 4, "launches": 1}
    call = {"launches": 2, "products": 1, "small_ops": 3}
    return {
        "kernels": [{**case, "kernel": "fan_out_forward", **{n: changes.get(n, v) for n, v in kernel.items()}}],
        "calls": [{**case, **{n: changes.get(f"call_{n}", v) for n, v in call.items()}}],
    }


@pytest.mark.parametrize(
    "changes, problems",
    [
        ({}, []),
        ({"instructions": 105, "blocks_per_sm": 5, "barriers": 0.0}, []),
        ({"instructions": 106}, ["fan_out triton genie bf16 forward fan_out_forward: instructions 100 -> 106"]),
        ({"blocks_per_sm": 3}, ["fan_out triton genie bf16 forward fan_out_forward: blocks per SM 4 -> 3"]),
        ({"barriers": 3.0}, ["fan_out triton genie bf16 forward fan_out_forward: barriers 2.0 -> 3.0"]),
        ({"spilled_bytes": 8}, ["fan_out triton genie bf16 forward fan_out_forward: spilled_bytes 0 -> 8"]),
        ({"call_launches": 3}, ["fan_out triton genie bf16 forward: launches 2 -> 3"]),
        ({"call_small_ops": 4}, ["fan_out triton genie bf16 forward: small_ops 3 -> 4"]),
    ],
)
def test_what_counts_as_worse(changes: dict[str, Any], problems: list[str]) -> None:
    assert worse(rows(**changes), rows()) == problems


def test_a_kernel_that_was_not_committed_is_not_passed_over() -> None:
    old = rows()
    old["kernels"] = []
    (problem,) = worse(rows(), old)
    assert problem == "fan_out triton genie bf16 forward fan_out_forward: not compared, because it is new"


def test_the_file_has_a_line_per_row() -> None:
    text = compact(rows())
    assert json.loads(text) == rows()
    assert len(text.splitlines()) == 8


def test_pointers_are_followed_through_loops_to_loads_and_stores() -> None:
    accesses = accesses_of(
        """
        tt.func public @kernel(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x"(#loc)), %n: i32 loc("n"(#loc)), \
%out: !tt.ptr<f32> loc("out"(#loc)), %total: !tt.ptr<f32> loc("t"(#loc)), %unused: !tt.ptr<f32> loc("u"(#loc))) {
          %c0 = arith.constant 0 : i32 loc(#loc1)
          %0 = tt.splat %x : !tt.ptr<bf16> -> tensor<4x!tt.ptr<bf16>> loc(#loc1)
          %1 = tt.addptr %0, %offsets : tensor<4x!tt.ptr<bf16>>, tensor<4xi32> loc(#loc1)
          %r:2 = scf.for %i = %c0 to %n step %c0 iter_args(%p = %1, %s = %0) -> (tensor<4xi32>, tensor<4xf32>)  : i32 {
            %v = tt.load %p, %mask : tensor<4x!tt.ptr<bf16>> loc(#loc1)
            %q = tt.addptr %p, %step : tensor<4x!tt.ptr<bf16>>, tensor<4xi32> loc(#loc1)
            scf.yield %q, %v : tensor<4xi32>, tensor<4xf32> loc(#loc1)
          } loc(#loc1)
          %2 = tt.addptr %out, %c0 : !tt.ptr<f32>, i32 loc(#loc1)
          tt.store %2, %r#1 : tensor<4x!tt.ptr<f32>> loc(#loc1)
          %3 = tt.atomic_rmw fadd, acq_rel, gpu, %total, %r#1, %mask : (!tt.ptr<f32>, f32, i1) -> f32 loc(#loc1)
          tt.return loc(#loc1)
        } loc(#loc)
        """
    )
    assert (accesses.read, accesses.written) == ({0, 3}, {2, 3})
    x, n, out, total, unused = (Argument(i << 40, 8, size) for i, size in enumerate((100, 0, 20, 4, 7)))
    assert fewest_bytes([x, n, out, total, unused], accesses) == (100 + 4, 20 + 4)
    # The same tensor twice is moved once.
    assert fewest_bytes([x, n, out, x, unused], accesses) == (100, 20 + 100)


def test_values_of_two_regions_may_share_a_name() -> None:
    accesses = accesses_of(
        """
        tt.func public @kernel(%x: !tt.ptr<f32>, %y: !tt.ptr<f32>, %out: !tt.ptr<f32>) attributes {noinline = false} {
          scf.if %c {
            %p = tt.addptr %x, %n : !tt.ptr<f32>, i32 loc(#loc1)
            %v = tt.load %p : !tt.ptr<f32> loc(#loc1)
          } else {
            %p = tt.addptr %out, %n : !tt.ptr<f32>, i32 loc(#loc1)
            tt.store %p, %c0 : !tt.ptr<f32> loc(#loc1)
          } loc(#loc1)
          %r = scf.for %i = %c0 to %n step %c0 iter_args(%p = %y) -> (!tt.ptr<f32>)  : i32 {
            %v = tt.load %p : !tt.ptr<f32> loc(#loc1)
            scf.yield %p : !tt.ptr<f32> loc(#loc1)
          } loc(#loc1)
          tt.return loc(#loc1)
        } loc(#loc)
        """
    )
    assert (accesses.read, accesses.written) == ({0, 1}, {2})


def test_a_pointer_from_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="no argument leads to the pointer"):
        accesses_of("tt.store %2, %1 : tensor<4x!tt.ptr<f32>> loc(#loc1)")


def test_torch_ops_that_launch_something_are_counted() -> None:
    found: list[TorchOp] = []
    a, b = torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")
    with _TorchOps(found):
        product = a[1:] @ b
        product.view(10).unsqueeze(0).expand(7, 10).sum(0)
        torch.empty_like(product)
        product.add_(1)
        torch.ones(3)
    assert found == [TorchOp("mm", 2 * 2 * 4 * 5, 4 * (8 + 20 + 10)), TorchOp("sum", 0, 4 * (10 + 10)),
                     TorchOp("add_", 0, 4 * (10 + 10))]  # fmt: skip


def test_forward_and_backward_are_told_apart() -> None:
    (call,) = (c for c in calls(OPS["fan_out"]) if c.name == "genie" and c.dtype == torch.bfloat16)
    found = phases(call)
    assert [launch.kernel.fn.__name__ for launch in found["forward"].launches][-1] == "fan_out_forward"
    assert "fan_out_backward" in [launch.kernel.fn.__name__ for launch in found["backward"].launches]
