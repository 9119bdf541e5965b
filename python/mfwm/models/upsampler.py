"""A full-size frame from a small prediction of it, and patches of frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Upsampler(nn.Module):
    """The small prediction, enlarged, plus what two convolutions add to it in sight of the last frame seen.

    They work at the small size, on factor x factor pixels of the last frame at a time, and start by adding nothing.

    Args:
        channels: of the frames.
        factor: how much smaller the prediction is.
        width: channels between the convolutions.
    """

    def __init__(self, channels: int, factor: int, width: int):
        super().__init__()
        self.factor = factor
        self.take = nn.Conv2d(channels * (factor**2 + 1), width, 3, padding=1)
        self.give = nn.Conv2d(width, channels * factor**2, 3, padding=1)
        nn.init.zeros_(self.give.weight)
        assert self.give.bias is not None
        nn.init.zeros_(self.give.bias)

    def forward(self, small: Tensor, seen: Tensor) -> Tensor:
        """small [B, T, C, h, w] and seen [B, T, C, h * factor, w * factor] to the shape of seen."""
        low, last = small.flatten(0, 1), seen.flatten(0, 1)
        x = torch.cat([low, F.pixel_unshuffle(last, self.factor)], dim=1)
        added = F.pixel_shuffle(self.give(F.gelu(self.take(x))), self.factor)
        return (F.interpolate(low, scale_factor=self.factor, mode="nearest") + added).view(seen.shape)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, T, C, height, width] to [B, T, S, patch * patch * C], features in (row, column, channel) order."""
    grid = images.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return grid.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)


def unpatchify(patches: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    """The inverse of patchify, for images [B, T, C, height, width]."""
    B, T = patches.shape[:2]
    grid = patches.view(B, T, height // patch, width // patch, patch, patch, channels)
    return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, T, channels, height, width)
