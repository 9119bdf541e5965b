"""A full-size frame from a small prediction of it, in two ways, and frames from patches."""

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
        self.conv_out = zero_conv(width, channels * factor**2)

    def forward(self, small: Tensor, seen: Tensor) -> Tensor:
        """small [B, T, C, h, w] and seen [B, T, C, h * factor, w * factor] to the shape of seen."""
        low, last = small.flatten(0, 1), seen.flatten(0, 1)
        x = torch.cat([low, F.pixel_unshuffle(last, self.factor)], dim=1)
        correction = F.pixel_shuffle(self.conv_out(F.gelu(self.conv_in(x))), self.factor)
        return (enlarged(low, self.factor) + correction).view(seen.shape)


class Analogy(nn.Module):
    """The frame that relates to the last one seen as the small prediction does to the small version of that one.

    Visual analogy as in Villegas et al. (arXiv 1704.05831), whose structure is here a frame of low resolution:

        x = structure(small) - structure(last at 1/factor) + appearance(last)
        correction, gate = decoder(x)
        frame = small, enlarged + sigmoid(gate) * (last - last at 1/factor, enlarged) + correction

    The detail of the last frame, which its small version lacks, is kept where the gate finds that nothing moved. All
    convolutions work at the small size. Correction and gate start at zero.

    Args:
        channels: of the frames.
        factor: by which the prediction is smaller.
        width: channels between the convolutions.
    """

    def __init__(self, channels: int, factor: int, width: int):
        super().__init__()
        self.factor = factor
        # A bias of the last convolution would cancel in the difference of two structures.
        self.structure, self.appearance = (
            nn.Sequential(
                nn.Conv2d(read, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1, bias=bias)
            )
            for read, bias in ((channels, False), (channels * factor**2, True))
        )
        self.conv_mid = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = zero_conv(width, (channels + 1) * factor**2)

    def forward(self, small: Tensor, seen: Tensor) -> Tensor:
        """small [B, T, C, h, w] and seen [B, T, C, h * factor, w * factor] to the shape of seen."""
        low, last = small.flatten(0, 1), seen.flatten(0, 1)
        last_low = F.avg_pool2d(last, self.factor)
        change = self.structure(low) - self.structure(last_low)
        x = change + self.appearance(F.pixel_unshuffle(last, self.factor))
        decoded = self.conv_out(F.gelu(self.conv_mid(F.gelu(x))))
        correction, gate = F.pixel_shuffle(decoded, self.factor).tensor_split([last.shape[1]], dim=1)
        detail = last - enlarged(last_low, self.factor)
        return (enlarged(low, self.factor) + torch.sigmoid(gate) * detail + correction).view(seen.shape)


def zero_conv(channels: int, out_channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution whose weight and bias start at zero."""
    conv = nn.Conv2d(channels, out_channels, 3, padding=1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def enlarged(pictures: Tensor, factor: int) -> Tensor:
    """Every pixel of [..., height, width] repeated factor x factor times."""
    return pictures.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def unpatchify(patches: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    """Images [B, T, C, height, width] from patches [B, T, S, patch * patch * C]: the inverse of video_pyramid's."""
    B, T = patches.shape[:2]
    grid = patches.view(B, T, height // patch, width // patch, patch, patch, channels)
    return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, T, channels, height, width)
