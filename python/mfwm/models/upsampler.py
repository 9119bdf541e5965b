"""A full-size frame from a small prediction of it, and frames from patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Upsampler(nn.Module):
    """The small prediction, enlarged, plus a correction that two convolutions compute from it and the last frame seen.

    The convolutions work at the small size, on factor x factor pixels of the last frame as channels. The correction
    starts at zero.

    Args:
        channels: of the frames.
        factor: by which the prediction is smaller.
        width: channels between the convolutions.
    """

    def __init__(self, channels: int, factor: int, width: int):
        super().__init__()
        self.factor = factor
        self.conv_in = nn.Conv2d(channels * (factor**2 + 1), width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, channels * factor**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, small: Tensor, seen: Tensor) -> Tensor:
        """small [B, T, C, h, w] and seen [B, T, C, h * factor, w * factor] to the shape of seen."""
        low, last = small.flatten(0, 1), seen.flatten(0, 1)
        x = torch.cat([low, F.pixel_unshuffle(last, self.factor)], dim=1)
        correction = F.pixel_shuffle(self.conv_out(F.gelu(self.conv_in(x))), self.factor)
        return (F.interpolate(low, scale_factor=self.factor, mode="nearest") + correction).view(seen.shape)


def unpatchify(patches: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    """Images [B, T, C, height, width] from patches [B, T, S, patch * patch * C]: the inverse of video_pyramid's."""
    B, T = patches.shape[:2]
    grid = patches.view(B, T, height // patch, width // patch, patch, patch, channels)
    return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, T, channels, height, width)
