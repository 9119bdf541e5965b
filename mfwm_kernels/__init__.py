"""Fused kernels for world models that predict several frames at once.

Letters of shapes: B batch, T positions, T_v frames of a video or of tokens, T_a actions, Hp x Wp token grid, S tokens,
D width of a state, C channels, H x W pixels, K horizons, P side of a patch, V vocabulary, F ids per token, N outputs of
a head.
"""

from .backends import BackendError, use_backend
from .dtypes import multiplies_bf16
from .grad_monitor import GradMonitor
from .horizon_loss import HorizonLoss
from .horizons import Horizons
from .ops.action_window_sum import action_window_sum
from .ops.fan_out import fan_out
from .ops.mtp_combine import mtp_combine
from .ops.multi_horizon_linear import multi_horizon_linear
from .ops.multi_horizon_linear_cross_entropy import multi_horizon_linear_cross_entropy
from .ops.multi_horizon_loss import multi_horizon_loss
from .ops.token_ids import check_errors
from .ops.video_pyramid import video_pyramid

__version__ = "0.2.0"
__all__ = [
    "BackendError",
    "GradMonitor",
    "HorizonLoss",
    "Horizons",
    "action_window_sum",
    "check_errors",
    "fan_out",
    "mtp_combine",
    "multiplies_bf16",
    "multi_horizon_linear",
    "multi_horizon_linear_cross_entropy",
    "multi_horizon_loss",
    "use_backend",
    "video_pyramid",
]
