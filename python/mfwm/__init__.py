"""Model layer, data, trainer, evaluation and command line around the ops of mfwm_kernels.

Shape suffixes, for the whole package: B batch, T positions, V frames (V >= T), H and W the token grid, S = H * W tokens
of a frame, D width, C channels, K horizons, P features of a patch, N outputs of a head. `x_BTSD` is [B, T, S, D].

Actions, for the whole package: `actions[:, n]` is the action taken at frame n; it leads to frame n + 1.
Pixels are in [-1, 1]: uint8 frames are mapped there by 1/127.5 and -1.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# OpenMP reads this when torch is loaded. By default its threads spin while they wait, which slows several processes on
# one machine many times over; a process alone takes the same time either way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from .models import (
        HeadsConfig,
        MultiFrameHeads,
        WorldModel,
        WorldModelConfig,
        random_actions,
        rollout,
        rollout_in_jumps,
        rollout_with_drift,
    )

__all__ = [
    "HeadsConfig",
    "MultiFrameHeads",
    "WorldModel",
    "WorldModelConfig",
    "random_actions",
    "rollout",
    "rollout_in_jumps",
    "rollout_with_drift",
]


def __getattr__(name: str) -> Any:
    """Load what __all__ names on first use, because the command line starts before torch is loaded."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".models", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
