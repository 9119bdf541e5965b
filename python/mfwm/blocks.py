"""The transformer block that the trunk and the horizons share: attention in space, attention in time, one MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32, in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of a frame ("space") or over the frames at a token ("time").

    Queries, keys and values have a matrix each: their outputs are then contiguous, and the head split of either axis is
    a view that scaled_dot_product_attention takes without a copy.
    """

    def __init__(self, width: int, head_width: int, axis: str):
        super().__init__()
        self.axis, self.head_width = axis, head_width
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTSD: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        B, T, S, D = x_BTSD.shape
        if self.axis == "space":
            shape, mask, causal = (B * T, S, -1, self.head_width), None, False
        else:
            # Tokens and heads share one dimension, so that one mask per clip broadcasts over both.
            shape, mask, causal = (B, T, -1, self.head_width), mask_B1TT, mask_B1TT is None
        q, k, v = (layer(x_BTSD).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = attend(q, k, v, mask, causal)
        return self.out(mixed.transpose(1, 2).reshape(B, T, S, D))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """scaled_dot_product_attention.

    Written out on the CPU: a world model has very many very short sequences (16 frames or 64 tokens), for which torch
    2.13's fused CPU backward took 69 ms (space) and 121 ms (time) against 11 and 13 ms for two batched products, at 8
    clips of 16 frames of 64 tokens, width 192, bf16, 2 cores.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class SpaceTimeBlock(nn.Module):
    """Pre-norm block of a spatio-temporal transformer (Genie, arXiv 2402.15391): space, time, one MLP.

    Position n attends to positions <= n of its own segment, so what it gives depends on nothing later.
    """

    def __init__(self, width: int, head_width: int, mlp_ratio: int = 4):
        super().__init__()
        self.space_norm, self.space = RMSNorm(width), Attention(width, head_width, "space")
        self.time_norm, self.time = RMSNorm(width), Attention(width, head_width, "time")
        self.mlp_norm = RMSNorm(width)
        self.up = nn.Linear(width, mlp_ratio * width, bias=False)
        self.down = nn.Linear(mlp_ratio * width, width, bias=False)

    def forward(self, x_BTSD: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        x_BTSD = x_BTSD + self.space(self.space_norm(x_BTSD), None)
        x_BTSD = x_BTSD + self.time(self.time_norm(x_BTSD), mask_B1TT)
        return x_BTSD + self.down(F.gelu(self.up(self.mlp_norm(x_BTSD)), approximate="tanh"))


def time_mask(segment_ids: Tensor | None, positions: int) -> Tensor | None:
    """[B, 1, T, T] bool, True where position n (row) may attend to m (column): m <= n in the segment of n.

    None without segments: scaled_dot_product_attention then makes the causal mask itself.
    """
    if segment_ids is None:
        return None
    ids = segment_ids[:, :positions]
    return (ids[:, :, None] == ids[:, None, :]).tril()[:, None]


def initialise(module: nn.Module, depth: int) -> None:
    """Normal weights of standard deviation fan_in^-0.5; those that end a branch are smaller by (3 * depth)^0.5."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            scale = (3 * depth) ** -0.5 if name.split(".")[-1] in ("out", "down") else 1.0
            nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on for the tensor's device, else the tensor's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
