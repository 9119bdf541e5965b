"""How many kernels a call launches at the benchmark sizes in bf16: ours, torch's matrix products and its small ops.

Each costs 2 us in a CUDA graph and 5 to 20 us of the host's time without one.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mfwm_kernels.launches import calls, phases
from mfwm_kernels.op import OPS

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

# op: benchmark size -> the most launches of a forward and of a backward
MOST = {
    "action_window_sum": {"genie": (1, 1), "pixels": (1, 1), "latents": (1, 1), "1x": (1, 1)},
    "fan_out": {"genie": (2, 6), "pixels": (2, 6), "latents": (2, 6), "1x": (2, 6), "wide": (2, 6)},
    "mtp_combine": {"genie": (6, 11), "pixels": (6, 11), "latents": (6, 11), "1x": (6, 11), "wide": (6, 11)},
    "multi_horizon_linear": {"genie": (4, 11), "pixels": (4, 12), "latents": (4, 11)},
    "multi_horizon_linear_cross_entropy": {"genie": (24, 1), "1x": (20, 1), "text-shared": (22, 1)},
    "multi_horizon_loss": {"genie": (4, 1), "pixels": (4, 1), "latents": (4, 1)},
    "video_pyramid": {"genie": (1, 0), "pixels": (1, 0), "latents": (1, 1)},
}


@pytest.mark.parametrize("name", MOST)
def test_a_call_launches_no_more_than_this(name: str) -> None:
    found = {}
    for call in calls(OPS[name]):
        if call.name in MOST[name] and call.dtype == torch.bfloat16:
            counts = {phase: len(work.launches) + len(work.torch_ops) for phase, work in phases(call).items()}
            found[call.name] = (counts["forward"], counts.get("backward", 0))
    assert found.keys() == MOST[name].keys()
    assert all(a <= b for size, most in MOST[name].items() for a, b in zip(found[size], most, strict=True)), found
