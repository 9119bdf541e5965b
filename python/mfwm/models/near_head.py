"""A host's own module as the head of the near horizon: what it may be, and what it returns as patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfwm_kernels import video_pyramid

from .heads_config import HeadsConfig


def check_near_head(near_head: object, config: HeadsConfig, width: int, ids_per_token: int) -> None:
    """ValueError or TypeError unless `near_head` can compute horizon 0 under this config."""
    if not isinstance(near_head, nn.Module):
        raise TypeError(f"near_head must be an nn.Module, got {type(near_head).__name__}")
    if config.upsampler is not None:
        raise ValueError(f"near_head must be None if an upsampler computes horizon 0, got upsampler {config.upsampler}")
    if config.near_decoder is not None:
        raise ValueError(
            f"near_head must be None with near_decoder, which takes its place; got near_decoder {config.near_decoder}"
        )
    if config.raster is not None:
        raise ValueError(
            f"near_head must be None with raster, whose decoder is in its place; got raster {config.raster}"
        )
    if config.blocks is not None and config.blocks[0]:
        raise ValueError(f"blocks[0] must be 0 with near_head, which reads the hidden state; got {config.blocks[0]}")
    if config.output != "tokens":
        return
    if config.horizons.factors[0] != 1:
        raise ValueError(f"factors[0] must be 1 for tokens with near_head, got {config.horizons.factors[0]}")
    own = type(near_head).forward is not nn.Linear.forward or "forward" in vars(near_head)
    if not isinstance(near_head, nn.Linear) or own or near_head._forward_pre_hooks or near_head._forward_hooks:
        raise ValueError(
            "near_head must be an nn.Linear for tokens, with the forward of nn.Linear and without hooks, because the "
            f"fused loss reads its weight and bias and never calls it; got {type(near_head).__name__}. Fold what else "
            "it computes into weight and bias, or into the hidden state given as near_hidden"
        )
    expected = (ids_per_token * config.vocabulary, width)
    if tuple(near_head.weight.shape) != expected:
        raise ValueError(
            f"near_head must have a weight [ids_per_token * vocabulary, width] = {list(expected)}, got "
            f"{list(near_head.weight.shape)}"
        )


def near_patches(
    output: object, hidden: Tensor, grid: tuple[int, int], patch: int, channels: int, parts: int
) -> Tensor:
    """Patches [B, T, S, parts * P * P * C] of horizon 0, from what its near_head returned for `hidden`.

    grid: rows and columns of its patches; patch: P; channels: C; parts: 2 for a distribution, else 1.
    """
    features, cells = parts * patch * patch * channels, grid[0] * grid[1]
    rows = (*hidden.shape[:2], cells, features)
    tokens = (*hidden.shape[:2], *grid, features)
    images = (*hidden.shape[:2], parts * channels, grid[0] * patch, grid[1] * patch)
    if not isinstance(output, Tensor) or tuple(output.shape) not in (rows, tokens, images):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"near_head must return patches [B, T, H, W, N] = {list(tokens)} or [B, T, S, N] = {list(rows)}, or frames "
            f"[B, T, C, h, w] = {list(images)}, for a hidden state {list(hidden.shape)}; got {got}"
        )
    if tuple(output.shape) == rows:
        return output
    if tokens == images:
        raise ValueError(
            f"near_head must return patches as [B, T, S, N] = {list(rows)} where [B, T, H, W, N] and frames "
            f"[B, T, C, h, w] have the same shape, {list(images)}"
        )
    if tuple(output.shape) == tokens:
        return output.flatten(2, 3)
    frames = output.chunk(parts, dim=2)
    return torch.cat([video_pyramid(frame, (1,), patch_sizes=(patch,))[0] for frame in frames], dim=-1)
