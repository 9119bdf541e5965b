"""MaskGIT (Chang et al., arXiv 2202.04200) on the tokens of frames, trained and sampled as in Genie (2402.15391)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def training_mask(clips: int, frames: int, grid: tuple[int, int], device: torch.device | str) -> Tensor:
    """[B, T, H, W] bool, True where a token is hidden from the trunk: a random share in 0.5..1 of each clip.

    The first frame is never masked, because a rollout starts from a whole frame.
    """
    share = 0.5 + 0.5 * torch.rand(clips, 1, 1, 1, dtype=torch.float32, device=device)
    mask = torch.rand(clips, frames, *grid, dtype=torch.float32, device=device) < share
    mask[:, :1] = False
    return mask


def sample(
    logits: Tensor, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Ids [...] from logits [..., V]: the most likely at temperature 0, else sampled from the top_k most likely."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        least = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(-1)
    sampled = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return sampled.view(logits.shape[:-1])


def sample_frame(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    steps: int,
    temperature: float,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample a frame of tokens, the most confident ones first.

    After step s of `steps`, the least confident tokens are masked again, a share cos(pi / 2 * s / steps) of them all.
    F: ids per token.

    Args:
        logits_of: (ids, mask) to logits [B, H, W, F, V], for ids [B, H, W, F] and mask [B, H, W], True = not known yet.
        ids: [B, H, W, F], for their shape and device; their values are not used.
    """
    ids = torch.zeros_like(ids)
    mask = torch.ones(ids.shape[:3], dtype=torch.bool, device=ids.device)
    count = mask[0].numel()
    for step in range(1, steps + 1):
        logits = logits_of(ids, mask).float()
        sampled = sample(logits, temperature, top_k, generator)
        confidence = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0].sum(-1)
        ids = torch.where(mask[..., None], sampled, ids)
        left = int(count * math.cos(math.pi / 2 * step / steps))
        # Tokens that are known stay known.
        rank = confidence.masked_fill(~mask, torch.inf).flatten(1).argsort(-1).argsort(-1)
        mask = (rank < left).view_as(mask) & mask
    return ids
