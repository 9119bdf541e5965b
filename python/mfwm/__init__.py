"""Model layer, data, trainer, evaluation and command line around the ops of mfwm_kernels.

Shape suffixes, for the whole package: B batch, T positions, V frames (V >= T), H and W the token grid, S = H * W tokens
of a frame, D width, C channels, K horizons, P features of a patch, N outputs of a head. `x_BTSD` is [B, T, S, D].

Actions, for the whole package: `actions[:, n]` is the action taken at frame n; it leads to frame n + 1.
Pixels are in [-1, 1]: uint8 frames are mapped there by 1/127.5 and -1.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# OpenMP reads it when torch is loaded. Its threads otherwise spin while they wait, and slow a machine that is shared
# by several processes many times over; alone, both take the same time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from .models.heads import MultiFrameHeads
    from .models.heads_config import HeadsConfig
    from .models.world_model import WorldModel, WorldModelConfig

__all__ = ["HeadsConfig", "MultiFrameHeads", "WorldModel", "WorldModelConfig"]
MODULES = {
    "HeadsConfig": "heads_config",
    "MultiFrameHeads": "heads",
    "WorldModel": "world_model",
    "WorldModelConfig": "world_model",
}


def __getattr__(name: str) -> Any:
    """The classes of __all__, loaded when they are used: the command line begins before torch is there."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".models.{MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
