"""Pictures of what a model predicts: of pixels as they are, of tokens through their tokenizer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..models.tokenizer import Tokenizer


def as_bytes(picture_CHW: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] from -1..1."""
    shown = ((picture_CHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(shown.permute(1, 2, 0).cpu().numpy())


class TokenPictures:
    """Decodes the newest frame of a walk, and what is expected after it, by the frames that the decoder reaches."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: Tensor | None = None

    def begin(self, ids: Tensor) -> None:
        self.ids = ids[:, -self.tokenizer.reach - 1 :]

    def add(self, ids: Tensor) -> None:
        assert self.ids is not None
        self.ids = torch.cat([self.ids, ids.to(self.ids.dtype)], dim=1)[:, -self.tokenizer.reach - 1 :]

    def newest(self) -> np.ndarray:
        assert self.ids is not None
        return as_bytes(self.tokenizer.decode(self.ids)[0, -1])

    def expected(self, logits: list[Tensor], factors: list[int]) -> list[np.ndarray]:
        """The most likely ids of every cell, decoded after the newest frames, at 1/factor of the size."""
        assert self.ids is not None
        seen = self.ids[:, -self.tokenizer.reach :] if self.tokenizer.reach else self.ids[:, :0]
        guesses = []
        for cells, factor in zip(logits, factors, strict=True):
            ids = cells.argmax(-1)
            guesses.append(ids.repeat_interleave(factor, 2).repeat_interleave(factor, 3).to(self.ids.dtype))
        batch = torch.cat([torch.cat([seen, guess], dim=1) for guess in guesses])
        decoded = self.tokenizer.decode(batch)[:, -1]
        pairs = zip(decoded, factors, strict=True)
        return [as_bytes(torch.nn.functional.avg_pool2d(picture.float(), factor)) for picture, factor in pairs]
