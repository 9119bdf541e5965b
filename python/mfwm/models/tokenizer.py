"""Tokenizer: a causal video tokenizer, Genie's ST-ViViT (arXiv 2402.15391) with finite scalar quantisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfwm_kernels import HorizonLoss, Horizons, video_pyramid
from mfwm_kernels import arguments as check

from ..checks import check_frame, check_ids, options_repr
from .blocks import RMSNorm, SpaceTimeBlock, compute_dtype, initialise, time_mask
from .heads import MultiFrameHeads
from .heads_config import HeadsConfig


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer.

    Args:
        frame: (channels, height, width) of pixels.
        patch: side of a token in pixels: ids are [height / patch, width / patch].
        levels: of finite scalar quantisation (arXiv 2309.15505), each at least 2; the vocabulary is their product.
        width, layers, head_width, mlp_ratio: of the encoder, and of the decoder.
        window: frames that attention in time sees, the current one included. Every layer reaches further back, so an id
            depends on the last layers * (window - 1) + 1 frames; videos may have any length.
    """

    frame: tuple[int, int, int] = (3, 64, 64)
    patch: int = 8
    levels: tuple[int, ...] = (8, 5, 5, 5)
    width: int = 96
    layers: int = 2
    head_width: int = 32
    mlp_ratio: int = 4
    window: int = 4

    def __post_init__(self) -> None:
        for name in ("patch", "width", "head_width", "mlp_ratio"):
            check.integer(name, getattr(self, name), least=1)
        check_frame(self.frame)
        _, height, width = self.frame
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch = {self.patch} does not divide the frame {height} x {width}")
        check_levels(self.levels)
        if self.head_width % 2 or self.width % self.head_width:
            raise ValueError(f"head_width must be even and divide width = {self.width}, got {self.head_width}")
        for name in ("layers", "window"):
            check.integer(name, getattr(self, name), least=1)

    @property
    def vocabulary(self) -> int:
        return math.prod(self.levels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of ids."""
        return self.frame[1] // self.patch, self.frame[2] // self.patch


def check_levels(levels: tuple[int, ...]) -> None:
    if not check.integers("levels", levels) or min(levels) < 2:
        raise ValueError(f"levels must be one or more numbers >= 2, got {levels}")


def quantiser(levels: tuple[int, ...], width: int) -> Any:
    """An FSQ module for [B, N, width] that returns the quantised vectors and their ids."""
    # Imported here, because the package takes two seconds to load and every command of mfwm loads this file.
    from vector_quantize_pytorch import FSQ

    return FSQ(list(levels), dim=width, preserve_symmetry=True)


class CausalStack(nn.Module):
    """Space-time blocks whose attention in time sees the last `window` frames, by rotary positions."""

    def __init__(self, width: int, layers: int, head_width: int, mlp_ratio: int, window: int, tokens: int):
        super().__init__()
        self.window = window
        # Receptive field in time: output n depends on frames n - reach .. n.
        self.reach = layers * (window - 1)
        self.token_position = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(SpaceTimeBlock(width, head_width, mlp_ratio, rotary=True) for _ in range(layers))
        initialise(self, depth=layers)

    def forward(self, x_BTSD: Tensor, segment_ids: Tensor | None) -> Tensor:
        mask = time_mask(segment_ids, x_BTSD.shape[1], self.window, x_BTSD.device)
        x_BTSD = x_BTSD + self.token_position.to(x_BTSD.dtype)
        for layer in self.layers:
            x_BTSD = layer(x_BTSD, mask)
        return x_BTSD


class Patches(nn.Module):
    """Embeddings [B, T, S, D] of the patches of frames [B, T, C, height, width], uint8 or floating in [-1, 1]."""

    def __init__(self, frame: tuple[int, int, int], patch: int, width: int):
        super().__init__()
        self.frame, self.patch = frame, patch
        self.embed = nn.Linear(frame[0] * patch**2, width)
        nn.init.normal_(self.embed.weight, std=self.embed.in_features**-0.5)
        nn.init.zeros_(self.embed.bias)

    def forward(self, video: Tensor) -> Tensor:
        if video.ndim != 5 or tuple(video.shape[2:]) != self.frame:
            raise ValueError(f"video must be [B, T, {', '.join(map(str, self.frame))}], got {list(video.shape)}")
        dtype = compute_dtype(self.embed.weight)
        (patches,) = video_pyramid(video, (1,), patch_sizes=(self.patch,), dtype=dtype)
        return self.embed(patches)


class Tokenizer(nn.Module):
    """Encodes frames as ids and decodes ids to frames. Frame n depends only on frames <= n of its own episode."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.width, config.layers, config.head_width, config.mlp_ratio, config.window)
        tokens = config.grid[0] * config.grid[1]
        self.patches = Patches(config.frame, config.patch, config.width)
        self.encoder = CausalStack(*sizes, tokens)
        self.norm = RMSNorm(config.width)
        self.quantiser = quantiser(config.levels, config.width)
        self.decoder = CausalStack(*sizes, tokens)
        # Position n predicts frame n itself.
        same_frame = HeadsConfig(Horizons((0,), (1,)), conditioning="none", residual=False)
        self.heads = MultiFrameHeads(
            config.width, config.patch, same_frame, channels=config.frame[0], head_width=config.head_width
        )

    def extra_repr(self) -> str:
        return options_repr(self.config, "frame", "patch", "levels", "width", "layers", "window")

    @property
    def reach(self) -> int:
        """How many frames back the ids of a frame reach, and a decoded frame."""
        return self.encoder.reach

    def forward(self, video: Tensor, segment_ids: Tensor | None = None) -> HorizonLoss:
        """The mean squared reconstruction error.

        video [B, T, C, height, width], uint8 or floating in [-1, 1]; segment_ids [B, T], the episode of each frame:
        nothing passes from one episode to another.
        """
        codes, _ = self._quantised(video, segment_ids)
        return self.heads(self._decoded(codes, segment_ids), None, video)

    @torch.no_grad()
    def encode(self, video: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Ids [B, T, H, W], int64 in 0..vocabulary - 1, of frames [B, T, C, height, width]."""
        _, ids = self._quantised(video, segment_ids)
        return ids.long().unflatten(2, self.config.grid)

    @torch.no_grad()
    def decode(self, ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Frames [B, T, C, height, width] in [-1, 1], fp32, of ids [B, T, H, W]."""
        if ids.ndim != 4 or tuple(ids.shape[2:]) != self.config.grid:
            raise ValueError(f"ids must be [B, T, {self.config.grid[0]}, {self.config.grid[1]}], got {list(ids.shape)}")
        check.tensor("ids", ids, 4, "[B, T, H, W]", check.INTEGER_IDS)
        check_ids("ids", ids, self.config.vocabulary)
        codes = self.quantiser.indices_to_codes(ids.flatten(1)).unflatten(1, (ids.shape[1], -1))
        hidden = self._decoded(codes, segment_ids)
        # predict() reads only the shape of the frames here (offset 0, no residual), so an expanded scalar will do.
        shape = (*ids.shape[:2], *self.config.frame)
        return self.heads.predict(hidden, None, hidden.new_empty(()).expand(shape))[0]

    def _quantised(self, video: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes [B, T, S, D] and their ids [B, T, S]."""
        check.non_zero_sizes("video", video, ())
        x_BTSD = self.norm(self.encoder(self.patches(video), segment_ids))
        codes, ids = self.quantiser(x_BTSD.flatten(1, 2))
        return codes.view(x_BTSD.shape), ids.view(x_BTSD.shape[:3])

    def _decoded(self, codes_BTSD: Tensor, segment_ids: Tensor | None) -> Tensor:
        return self.decoder(codes_BTSD, segment_ids).unflatten(2, self.config.grid)
