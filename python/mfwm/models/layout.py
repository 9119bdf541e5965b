"""The token grid of a host: states, frames, ids and masks with their tokens in one dimension or in two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfwm_kernels import arguments as check


@dataclass(frozen=True)
class Layout:
    """How a host lays out the tokens of a frame: [.., H, W, ..], or with a grid (H, W) in rows, [.., S, ..].

    tokens: whether frames are ids. ids_per_token: how many. patch_size: side of a token in pixels.
    """

    grid: tuple[int, int] | None
    tokens: bool
    ids_per_token: int
    patch_size: int

    def __post_init__(self) -> None:
        if self.grid is not None:
            check.grid_sizes(self.grid)

    def states(self, name: str, x: Tensor) -> Tensor:
        """[B, T, H, W, D]."""
        if self.grid is None:
            return check.tensor(name, x, 5, "[B, T, H, W, D] ([B, T, S, D] needs grid=(H, W))")
        check.tensor(name, x, 4, "[B, T, S, D] with grid")
        return x.unflatten(2, check.grid(self.grid, name, x))

    @property
    def rank_in_rows(self) -> int:
        """Dimensions of frames in rows: [B, V, S, C] or ids [B, V, S(, ids_per_token)]."""
        return 3 if self.tokens and self.ids_per_token == 1 else 4

    def in_rows(self, video: Tensor) -> bool:
        return self.grid is not None and isinstance(video, Tensor) and video.dim() == self.rank_in_rows

    def frames(self, video: Tensor) -> Tensor:
        """Frames as the ops take them: images [B, V, C, height, width] or ids [B, V, H, W(, ids_per_token)]."""
        if not self.in_rows(video):
            return video
        if not self.tokens and self.patch_size != 1:
            raise ValueError(
                f"video must be images [B, V, C, height, width] for a patch_size of {self.patch_size}, got shape "
                f"{list(video.shape)}"
            )
        cells = self.cells("video", video, self.rank_in_rows)
        return cells if self.tokens else cells.permute(0, 1, 4, 2, 3)

    def check_frames(self, video: Tensor, hidden: Tensor, channels: int) -> None:
        """ValueError or TypeError unless `video`, as `frames` gives it, has the frames of hidden [B, T, H, W, D]."""
        batch, positions, height, width, _ = hidden.shape
        if self.tokens:
            ids = (self.ids_per_token,) if self.ids_per_token > 1 else ()
            size: tuple[int, ...] = (height, width, *ids)
            letters = "[B, V, H, W, ids_per_token]" if ids else "[B, V, H, W]"
        else:
            size = (channels, height * self.patch_size, width * self.patch_size)
            letters = "[B, V, C, H * patch_size, W * patch_size]"
        dtypes = check.INTEGER_IDS if self.tokens else (torch.uint8, *check.FLOATING)
        check.tensor("video", video, 2 + len(size), letters, dtypes)
        check.same_device("video", video, "hidden", hidden)
        # A masked model's last position has no ids yet.
        if not self.tokens and video.shape[1] < positions:
            raise ValueError(
                f"video must have V >= T = {positions} frames, the positions of hidden; got {video.shape[1]}"
            )
        check.shape("video", video, (batch, video.shape[1], *size), letters)

    def ids(self, name: str, ids: Tensor, factor: int) -> Tensor:
        """Ids of frames smaller by `factor`, [B, V, H / factor, W / factor(, ids_per_token)]."""
        return self.cells(name, ids, self.rank_in_rows, factor)

    def cells(self, name: str, x: Any, rank: int, factor: int = 1) -> Any:
        """[B, V, H / factor, W / factor, ...] from [B, V, S / factor^2, ...], which has `rank` dimensions."""
        if self.grid is None or not isinstance(x, Tensor) or x.dim() != rank:
            return x
        return x.unflatten(2, check.grid([side // factor for side in self.grid], name, x))
