"""The ops, one module each. Importing this package defines torch.ops.mfwm.<name> for all of them."""

from ..op import OPS
from ..torch_library import define
from . import (
    action_window_sum,
    fan_out,
    mtp_combine,
    multi_horizon_linear,
    multi_horizon_linear_cross_entropy,
    multi_horizon_loss,
    video_pyramid,
)

for op in OPS.values():
    define(op)

__all__ = [
    "action_window_sum",
    "fan_out",
    "mtp_combine",
    "multi_horizon_linear",
    "multi_horizon_linear_cross_entropy",
    "multi_horizon_loss",
    "video_pyramid",
]
