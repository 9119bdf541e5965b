"""LatentActions: actions inferred from video alone, the latent action model of Genie (arXiv 2402.15391)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfwm_kernels import HorizonLoss, Horizons
from mfwm_kernels import arguments as check

from ..checks import check_ids, options_repr
from .blocks import RMSNorm
from .heads_config import HeadsConfig
from .tokenizer import CausalStack, Patches, check_levels, quantiser
from .world_model import WorldModel, WorldModelConfig


@dataclass(frozen=True)
class LatentActionsConfig:
    """Sizes of a latent action model.

    Args:
        frame: (channels, height, width) of pixels.
        patch: side of a patch in pixels.
        levels: of the finite scalar quantisation of a code; their product is the number of codes. Few codes, so that a
            code tells what was done and not what came of it.
        width, layers, head_width, mlp_ratio: of the encoder, and of the decoder.
        window: frames that a layer of the encoder sees in time, the current one included; at least 2.
        context: frames that the decoder sees.
    """

    frame: tuple[int, int, int] = (3, 64, 64)
    patch: int = 8
    levels: tuple[int, ...] = (2, 2, 2)
    width: int = 96
    layers: int = 2
    head_width: int = 32
    mlp_ratio: int = 4
    window: int = 2
    context: int = 8

    def __post_init__(self) -> None:
        check_levels(self.levels)
        if check.integer("window", self.window, least=0) < 2:
            raise ValueError(f"window must be >= 2 (a frame and the next), got {self.window}")
        _ = self.decoder

    @property
    def codes(self) -> int:
        return math.prod(self.levels)

    @property
    def decoder(self) -> WorldModelConfig:
        """A world model whose actions are the quantised vectors, and which predicts only the next frame."""
        return WorldModelConfig(
            self.frame,
            self.patch,
            self.width,
            self.layers,
            self.head_width,
            self.mlp_ratio,
            self.context,
            actions=0,
            action_size=len(self.levels),
            heads=HeadsConfig(Horizons.next_frame(), conditioning="none"),
        )


class LatentActions(nn.Module):
    """Codes of what happens between a frame and the next, learned by predicting that next frame.

    The encoder sees frames up to n + 1 and chooses one of a few codes. The decoder, a world model with that code in
    place of action n, predicts frame n + 1 from frames <= n and the code alone, so the code must tell what changes.
    """

    def __init__(self, config: LatentActionsConfig) -> None:
        super().__init__()
        self.config = config
        height, width = config.frame[1] // config.patch, config.frame[2] // config.patch
        self.patches = Patches(config.frame, config.patch, config.width)
        # Each frame is embedded together with the one before it, so that the first layer sees what moved.
        self.before = Patches(config.frame, config.patch, config.width)
        self.encoder = CausalStack(
            config.width, config.layers, config.head_width, config.mlp_ratio, config.window, height * width
        )
        self.norm = RMSNorm(config.width)
        self.project = nn.Linear(config.width, len(config.levels))
        self.quantiser = quantiser(config.levels, len(config.levels))
        self.decoder = WorldModel(config.decoder)

    def extra_repr(self) -> str:
        return options_repr(self.config, "frame", "patch", "levels", "width", "layers", "context")

    @property
    def reach(self) -> int:
        """How many frames back a code depends on."""
        return self.encoder.reach

    def forward(self, video: Tensor, segment_ids: Tensor | None = None) -> HorizonLoss:
        """The mean squared error of each next frame, given its code.

        video [B, V, C, height, width], uint8 or floating in [-1, 1]; segment_ids [B, V], the episode of each frame. The
        first `context` frames are predicted from, frames past it are targets only.
        """
        vectors, _ = self._quantised(video, segment_ids)
        return self.decoder(video, vectors, segment_ids)

    @torch.no_grad()
    def infer(self, video: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Codes [B, V], int64 in 0..codes - 1: entry n leads from frame n to n + 1, as an action does.

        The last entry is 0, because the frame after the last is unknown.
        """
        _, ids = self._quantised(video, segment_ids)
        return ids.long()

    @torch.no_grad()
    def predict(self, video: Tensor, codes: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """The next frames [B, T, C, height, width] that codes [B, V] lead to from the first T <= context frames."""
        check.tensor("codes", codes, 2, "[B, V]", check.INTEGER_IDS)
        check_ids("codes", codes, self.config.codes)
        vectors = self.quantiser.indices_to_codes(codes.flatten()).view(*codes.shape, -1)
        return self.decoder.predict(video, vectors, segment_ids)[0]

    def _quantised(self, video: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Quantised vectors [B, V, A] and their ids [B, V], at the frame that they lead from; zeros at the last."""
        before_BVSD = self.before(video[:, :-1])
        if segment_ids is not None:
            before_BVSD = before_BVSD * (segment_ids[:, 1:] == segment_ids[:, :-1])[..., None, None]
        x_BVSD = self.patches(video) + F.pad(before_BVSD, (0, 0, 0, 0, 1, 0))
        summary_BVD = self.norm(self.encoder(x_BVSD, segment_ids).mean(2))
        vectors, ids = self.quantiser(self.project(summary_BVD[:, 1:]))
        return F.pad(vectors, (0, 0, 0, 1)), F.pad(ids, (0, 1))
