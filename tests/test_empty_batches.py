"""Heads of no clips and of no positions, as the last batch of a filtered data set may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import OPTIONS, build

# Contrast and differences in time refuse an empty batch by name, and torch's pixel_unshuffle leaves one as it is.
SERVED = [name for name in OPTIONS if not {"contrast", "temporal_difference", "upsampler"} & OPTIONS[name].keys()]


@pytest.mark.parametrize("size", [(0, 6), (2, 0)], ids=["no clips", "no positions"])
@pytest.mark.parametrize("name", SERVED)
def test_the_loss_is_0(name: str, size: tuple[int, int]) -> None:
    model = build(**OPTIONS[name])
    config, side, frames = model.config.heads, 8 if model.tokens else 4, (size[0], 9)

    def states(frames: int) -> torch.Tensor:
        return torch.randn(size[0], frames, side, side, 32)

    optional: dict[str, Any] = {"inputs": states(9)}
    if config.tap is not None:
        optional["near_hidden"] = states(size[1])
    if config.token_targets == "tokenised":
        optional["low_tokens"] = {f: torch.randint(0, 7, (*frames, 8 // f, 8 // f)) for f in (2, 4)}
    if model.config.masked:
        optional["token_mask"] = torch.rand(*frames, 8, 8) < 0.5
    video = torch.rand(*frames, 3, 16, 16)
    if model.tokens:
        video = torch.randint(0, 7, (*frames, *model.frame_shape))
    actions = torch.randn(*frames, 32) if config.conditioning == "actions" else None
    hidden = states(size[1]).requires_grad_()
    loss = model.heads(hidden, actions, video, **optional)
    assert loss.total == 0 and not loss.counts.any()
    loss.total.backward()
