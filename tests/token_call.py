"""A call of multi_horizon_linear_cross_entropy for tests, and the backends that serve it here."""

from __future__ import annotations

from typing import Any

import torch
from conftest import device_of, kernels_of

from mfwm_kernels import Horizons

KERNELS = kernels_of("multi_horizon_linear_cross_entropy")
BACKENDS = ["reference", *KERNELS]
CASCADE = Horizons.cascade(3)


def call_of(backend: str, horizons: Horizons = CASCADE, batch: int = 2, vocabulary: int = 37, **changes: Any) -> Any:
    """The arguments of a call: random states for 5 positions of 4 x 8 tokens in `batch` clips."""
    device = device_of(backend)
    dtype = torch.float32 if backend == "triton" else torch.float64
    return {
        "inputs": [torch.randn(batch, 5, 4 // f, 8 // f, 6, device=device, dtype=dtype) for f in horizons.factors],
        "weight": torch.randn(vocabulary, 6, device=device, dtype=dtype),
        "tokens": torch.randint(0, vocabulary, (batch, 6, 4, 8), device=device),
        "horizons": horizons,
        **changes,
    }
