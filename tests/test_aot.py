"""Ahead-of-time compilation: what is compiled, and which faults fail a row."""

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

from mfwm_kernels import launches
from mfwm_kernels.launches import Call, Pointer, calls, flat_arguments, recorded
from mfwm_kernels.op import OPS

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

TRITON_OPS = [op for op in OPS.values() if "triton" in op.backends]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=3600)


def aot_with(planted: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """aot's main on sm_90, after `planted` has been run in the same process."""
    return python("-c", f"from mfwm_kernels import aot\n{planted}\naot.main()", "--arch", "sm_90", *arguments)


@pytest.mark.parametrize("op", TRITON_OPS, ids=lambda op: op.name)
def test_the_calls_launch_the_kernels_that_are_listed(op: Any) -> None:
    launched = {launch.kernel.fn.__name__ for call in calls(op) for launch in recorded(call)}
    assert launched == set(op.backends["triton"].kernels)


def test_a_recorded_pointer_is_as_aligned_as_the_tensor_is() -> None:
    op, want = OPS["action_window_sum"], {"actions": False, "lag_weight": None}
    hidden = torch.empty(2, 7, 40, dtype=torch.bfloat16, device="meta")
    addresses = {}
    for first in (0, 1, 8):
        args = flat_arguments(op, {"actions": hidden[..., first : first + 32], "offsets": (1, 2)})
        (launch,) = recorded(Call(op, "", torch.bfloat16, args, want))
        actions, *others = (value for value in launch.given if isinstance(value, Pointer))
        addresses[first] = actions.address
        assert all(abs(actions.address - other.address) > hidden.nbytes for other in others)
    assert [addresses[first] % 16 for first in (0, 1, 8)] == [0, 2, 0]
    assert addresses[8] - addresses[0] == 16


def test_a_recorded_pointer_to_nothing_is_null() -> None:
    assert launches._Memory().placed((torch.empty(0, device="meta"),)) == (Pointer(torch.float32, 0),)


def test_variants_are_what_triton_would_compile() -> None:
    # The hook stops Triton before it compiles, and is given its key.
    done = python(
        "-c",
        "from triton import knobs\n"
        "from mfwm_kernels.aot import variants\n"
        "from mfwm_kernels.launches import calls, recorded\n"
        "from mfwm_kernels.op import OPS\n"
        "ops = [op for op in OPS.values() if 'triton' in op.backends]\n"
        "keys = set()\n"
        "knobs.runtime.jit_cache_hook = lambda *, key, fn, **_: not keys.add((fn.name, key))\n"
        "count = len(variants(ops))\n"
        "for launch in (launch for op in ops for call in calls(op) for launch in recorded(call)):\n"
        "    launch.kernel.run(*launch.given, grid=(1,), warmup=True, **launch.constants)\n"
        "print(count, len(keys))\n",
    )
    assert done.returncode == 0, done.stderr
    count, by_triton = map(int, done.stdout.split())
    assert count == by_triton > 400


@pytest.mark.slow
def test_kernels_compile_for_sm_90_without_a_problem(tmp_path: Path) -> None:
    """In bf16 and fp32, whatever is aligned. The kernels have no branch for fp16, and `python -m mfwm_kernels.aot`
    compiles that and all else in twice the time."""
    fewer = ("--fewer", "--dtype", "bfloat16", "float32")
    done = python("-m", "mfwm_kernels.aot", "--arch", "sm_90", *fewer, "--json", str(tmp_path / "aot.json"))
    rows = json.loads((tmp_path / "aot.json").read_text())
    assert [row for row in rows if row["problem"]] == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["op"] for row in rows} == {op.name for op in TRITON_OPS}
    assert all(row["arch"] == "sm_90" and row["registers"] > 0 and row["local_bytes"] == 0 for row in rows)


def test_a_tile_far_too_large_spills_and_fails() -> None:
    planted = (
        "from mfwm_kernels.triton import video_pyramid as kernels\n"
        "kernels.TILE_ELEMENTS = 262144\n"
        "right = aot.calls\n"
        "aot.calls = lambda op: [call for call in right(op) if call.name == 'pixels'][:1]\n"
    )
    done = aot_with(planted, "--op", "video_pyramid")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED video_pyramid of video_pyramid on sm_90, pixels: spills " in done.stdout


def test_shared_memory_that_no_block_has_fails() -> None:
    done = aot_with("aot.SHARED_BYTES['sm_90'] = 1000", "--op", "action_window_sum", "video_pyramid")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED video_pyramid of video_pyramid on sm_90, genie: needs " in done.stdout
    assert "bytes of shared memory, a block has 1000 " in done.stdout


@pytest.mark.parametrize(
    "fault, problem",
    [
        ("raise RuntimeError('the compiler went wrong')", "RuntimeError: the compiler went wrong"),
        ("os._exit(3)", "the compiler ended its process"),
    ],
)
def test_a_kernel_that_does_not_compile_fails_alone(fault: str, problem: str, tmp_path: Path) -> None:
    planted = (
        "import os\n"
        "right = aot.compile_for\n"
        "def faulty(architecture, variant):\n"
        "    if variant.call == 'sample 1' and 'float16' in str(variant.given):\n"
        f"        {fault}\n"
        "    return right(architecture, variant)\n"
        "aot.compile_for = faulty\n"
    )
    done = aot_with(planted, "--op", "video_pyramid", "--json", str(tmp_path / "aot.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())
    failed = [row for row in rows if row["problem"]]
    assert failed and all(row["problem"] == problem and row["call"] == "sample 1" for row in failed)
    assert sum(row.get("registers", 0) > 0 for row in rows) == len(rows) - len(failed) > 20
    assert f"FAILED video_pyramid of video_pyramid on sm_90, sample 1: {problem}" in done.stdout


def test_a_copy_into_a_slot_that_a_dot_still_reads_fails() -> None:
    done = python(str(Path(__file__).with_name("racing_kernels.py")))
    assert done.returncode == 0, done.stderr
    *rows, text = map(json.loads, done.stdout.splitlines())
    problems = {(row["arch"], row["stages"], row["twice"]): row["problem"] for row in rows}
    for stages in (2, 3, 4):
        found = f"a copy of tile overwrites the tile that a dot in flight reads: {stages - 1} slots, {stages} stages"
        assert problems.pop(("sm_90", stages, False)) == found
        # Loaded once more for the norm, the tile of the dot has a ring as long as the loop has stages.
        assert problems.pop(("sm_90", stages, True)) == ""
    assert set(problems.values()) == {""}
    assert "a copy of tile overwrites the tile that a dot in flight reads: 3 slots, 3 stages" in text["unguarded"]
