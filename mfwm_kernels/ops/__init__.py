"""The ops, by name."""

from . import (
    action_window_sum,
    fan_out,
    mtp_combine,
    multi_horizon_linear,
    multi_horizon_linear_cross_entropy,
    multi_horizon_loss,
    video_pyramid,
)

__all__ = [
    "action_window_sum",
    "fan_out",
    "mtp_combine",
    "multi_horizon_linear",
    "multi_horizon_linear_cross_entropy",
    "multi_horizon_loss",
    "video_pyramid",
]
