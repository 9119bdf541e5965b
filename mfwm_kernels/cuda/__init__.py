"""Launchers of the CUDA C++ kernels in csrc/cuda, one module per op, called by autograd.call."""

from __future__ import annotations

from typing import Any

import torch

from ..native import kernels


def launch(name: str, device: torch.device, *args: Any) -> None:
    """Call a kernel of csrc/bindings.cpp on the device's current stream."""
    with torch.cuda.device(device):
        getattr(kernels, name)(*args, torch.cuda.current_stream(device).cuda_stream)
