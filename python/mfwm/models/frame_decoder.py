"""FrameDecoder: a frame from the states of its tokens and the last frame seen."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrameDecoder(nn.Module):
    """Two convolutions over the last frame seen, between which every token's state scales and shifts their channels.

        scale, shift = linear(states)
        output = conv_out(gelu(conv_in(seen) * (1 + scale) + shift))

    The pixels of the convolutions are cells of 4 x 4 pixels, or of fewer where these do not divide a patch, and each
    cell has its own scale and shift. A linear head predicts every patch without its neighbours, so edges show between
    patches; these convolutions reach across them, and a state need not hold the detail that the last frame shows.
    Scale and shift are FiLM's (arXiv 1709.07871).

    Args:
        width: of the states.
        patch: side of a token in pixels of the output.
        channels: of the frames.
        parts: 2 to predict log-scales beside the frame, else 1.
        hidden_channels: between the convolutions.
    """

    def __init__(self, width: int, patch: int, channels: int, parts: int, hidden_channels: int):
        super().__init__()
        self.cell = math.gcd(patch, 4)
        self.split, self.parts = patch // self.cell, parts
        features = channels * self.cell**2
        self.modulation = nn.Linear(width, 2 * hidden_channels * self.split**2)
        self.conv_in = nn.Conv2d(features, hidden_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(hidden_channels, parts * features, 3, padding=1)

    def forward(self, states: Tensor, seen: Tensor) -> Tensor:
        """Patches [B, T, H, W, parts * P * P * C] from states [B, T, H, W, D].

        seen: [B, T, H * W * (P / cell)^2, cell * cell * C], the cells of the last frame seen, in row order.
        """
        (B, T, H, W), r, c = states.shape[:4], self.split, self.cell
        # Sizes are written out, because -1 is ambiguous for an empty batch.
        hidden_channels, features = self.conv_in.out_channels, self.conv_in.in_channels
        modulation = self.modulation(states).view(B * T, H, W, r, r, 2 * hidden_channels)
        modulation = modulation.transpose(2, 3).reshape(B * T, H * r, W * r, 2 * hidden_channels)
        scale, shift = modulation.permute(0, 3, 1, 2).chunk(2, dim=1)
        x = self.conv_in(seen.reshape(B * T, H * r, W * r, features).permute(0, 3, 1, 2))
        x = self.conv_out(F.gelu(torch.addcmul(shift, x, 1 + scale))).permute(0, 2, 3, 1)
        cells = x.reshape(B * T, H, r, W, r, self.parts, c, features // c)
        return cells.permute(0, 1, 3, 5, 2, 6, 4, 7).reshape(B, T, H, W, self.parts * r * r * features)
