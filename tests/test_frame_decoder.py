"""The convolutional decoder of the near horizon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mfwm.models.frame_decoder import FrameDecoder
from mfwm.models.upsampler import unpatchify
from small_model import build, clip
from torch import Tensor, nn

from mfwm_kernels import video_pyramid


def cells_of(frames: Tensor, side: int) -> Tensor:
    return video_pyramid(frames, (1,), patch_sizes=(side,))[0]


@pytest.mark.parametrize(("patch", "cell"), [(8, 4), (4, 4), (6, 2), (5, 1), (1, 1)])
@pytest.mark.parametrize("parts", [1, 2])
def test_values_are_those_of_its_formula(patch: int, cell: int, parts: int) -> None:
    """Written with images, where a token's scale and shift are pictures of patch / cell pixels."""
    torch.manual_seed(0)
    decoder = FrameDecoder(16, patch, 2, parts, 8)
    assert decoder.cell == cell
    states, seen = torch.randn(2, 3, 2, 3, 16), torch.randn(2, 3, 2, 2 * patch, 3 * patch)
    found = decoder(states, cells_of(seen, cell)).flatten(2, 3).chunk(parts, -1)

    split = patch // cell
    images = F.pixel_unshuffle(seen.flatten(0, 1), cell).unflatten(1, (2, cell, cell)).permute(0, 2, 3, 1, 4, 5)
    modulation = decoder.modulation(states).flatten(0, 1).unflatten(-1, (split, split, 16)).permute(0, 5, 1, 3, 2, 4)
    scale, shift = modulation.reshape(6, 16, 2 * split, 3 * split).chunk(2, 1)
    x = decoder.conv_out(F.gelu(decoder.conv_in(images.flatten(1, 3)) * (1 + scale) + shift))
    for part, features in zip(found, x.chunk(parts, 1), strict=True):
        pixels = features.unflatten(1, (cell, cell, 2)).permute(0, 3, 1, 2, 4, 5).flatten(1, 3)
        expected = F.pixel_shuffle(pixels, cell).view(seen.shape)
        torch.testing.assert_close(unpatchify(part, patch, 2, 2 * patch, 3 * patch), expected)


def test_a_pixel_reads_across_patches_at_its_own_position() -> None:
    decoder = FrameDecoder(16, 4, 3, 1, 8)
    states, seen = torch.randn(2, 4, 5, 5, 16, requires_grad=True), torch.randn(2, 4, 3, 20, 20, requires_grad=True)
    frames = unpatchify(decoder(states, cells_of(seen, 4)).flatten(2, 3), 4, 3, 20, 20)
    of_states, of_seen = torch.autograd.grad(frames[:, 2, 0, 8, 8].sum(), (states, seen))
    for found in (of_states, of_seen):
        assert (found.flatten(2).norm(dim=-1) > 0).tolist() == [[False, False, True, False]] * 2
    # One cell around its own for states, which the last convolution reads; two for the frame.
    assert (of_states[:, 2].norm(dim=-1) > 0).int().tolist() == [(F.pad(torch.ones(3, 3), (1,) * 4)).int().tolist()] * 2
    assert (of_seen[:, 2] != 0).all()


@pytest.mark.parametrize("kind", ["mse", "gaussian"])
def test_an_untrained_model_copies_the_last_frame(kind: str) -> None:
    model, clips = build(near_decoder=8, kind=(kind, "mse", "mse")), clip(6)
    head: Any = model.heads.heads[0]
    nn.init.zeros_(head.conv_out.weight)
    (last,) = video_pyramid(clips["video"], (1,))
    torch.testing.assert_close(model.predict(**clips)[0], last)


@pytest.mark.parametrize(("batch", "frames"), [(0, 6), (2, 0)], ids=["no clips", "no positions"])
def test_an_empty_batch_has_loss_0(batch: int, frames: int) -> None:
    heads = build(near_decoder=8).heads
    hidden, actions = torch.randn(batch, frames, 4, 4, 32), torch.randn(batch, 6, 32)
    video = torch.randint(0, 256, (batch, 6, 3, 16, 16), dtype=torch.uint8)
    assert heads(hidden, actions, video).total == 0
    assert heads.predict(hidden, actions, video)[0].shape == (batch, frames, 3, 16, 16)


def test_it_learns_to_move_what_the_last_frame_shows() -> None:
    """Frames of noise that shift by one pixel: no state of one token has what its next patch will show."""
    torch.manual_seed(0)
    noise = torch.rand(8, 3, 16, 16 + 12) * 2 - 1
    video = torch.stack([noise[..., n : n + 16] for n in range(12)], dim=1)
    clips: dict[str, Any] = {"video": video, "actions": torch.zeros(8, 12, dtype=torch.long)}
    losses = {}
    for channels in (None, 32):
        torch.manual_seed(1)
        model = build(near_decoder=channels, weights=(1.0, 0.0, 0.0))
        optimiser = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            loss = model(**clips)
            optimiser.zero_grad()
            loss.total.backward()
            optimiser.step()
        losses[channels] = loss.per_horizon[0].item()
    assert losses[32] < 0.8 * losses[None]
