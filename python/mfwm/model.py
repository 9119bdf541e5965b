"""WorldModel: a space-time transformer over pixel patches, with multi-frame heads on its hidden state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mfwm_kernels import GradMonitor, HorizonLoss, video_pyramid

from .blocks import SpaceTimeBlock, compute_dtype, initialise, time_mask
from .heads import HeadsConfig, MultiFrameHeads


@dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of a world model.

    frame: (channels, height, width) in pixels.
    patch: side of a token in pixels.
    width, layers, head_width, mlp_ratio: of the transformer; width / head_width attention heads.
    context: positions of the hidden state; a rollout remembers that many frames.
    actions: number of discrete actions; 0 where there are none.
    action_size: length of a continuous action vector; 0 where actions are discrete.
    heads: what is predicted, and how.
    """

    frame: tuple[int, int, int] = (3, 64, 64)
    patch: int = 8
    width: int = 192
    layers: int = 4
    head_width: int = 32
    mlp_ratio: int = 4
    context: int = 16
    actions: int = 15
    action_size: int = 0
    heads: HeadsConfig = field(default_factory=HeadsConfig)

    def __post_init__(self) -> None:
        _, height, width = self.frame
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch = {self.patch} does not divide the frame {height} x {width}")
        if self.width % self.head_width:
            raise ValueError(f"head_width must divide width = {self.width}, got {self.head_width}")
        if self.actions and self.action_size:
            raise ValueError(
                f"actions are discrete or continuous: got actions = {self.actions}, action_size = {self.action_size}"
            )
        if not (self.actions or self.action_size) and self.heads.conditioning == "actions":
            raise ValueError('heads.conditioning must be "none" for a model without actions')
        tap = self.heads.tap
        if tap is not None and not 1 <= tap < self.layers:
            raise ValueError(f"heads.tap must be in 1..{self.layers - 1} for {self.layers} layers, got {tap}")


class WorldModel(nn.Module):
    """Frames and actions up to n in, frames n + 1, n + 2, n + 4, n + 8 out.

    Genie's ST-transformer (arXiv 2402.15391) on pixel patches, without a tokenizer: the embedding of action n, which is
    taken at frame n and leads to frame n + 1, is added to every token of frame n. The hidden state of position n so
    knows all that frame n + 1 needs, and horizon k lacks the actions n + 1 .. n + k - 1, its action window.
    """

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config
        channels, height, width = config.frame
        self.grid = (height // config.patch, width // config.patch)
        self.embed = nn.Linear(channels * config.patch**2, config.width)
        self.place = nn.Parameter(0.1 * torch.randn(self.grid[0] * self.grid[1], config.width))
        self.time = nn.Parameter(0.1 * torch.randn(config.context, 1, config.width))
        # Actions that are seen and actions that are still to come mean different things: a table each.
        self.action, self.window_action = self._action_embedding(), None
        if config.heads.conditioning == "actions":
            self.window_action = self._action_embedding()
        self.layers = nn.ModuleList(
            SpaceTimeBlock(config.width, config.head_width, config.mlp_ratio) for _ in range(config.layers)
        )
        initialise(self, depth=config.layers)
        self.heads = MultiFrameHeads(
            config.width, config.patch, config.heads, channels=channels, head_width=config.head_width
        )

    def _action_embedding(self) -> nn.Module | None:
        if self.config.actions:
            table = nn.Embedding(self.config.actions, self.config.width)
            nn.init.normal_(table.weight, std=0.5)
            return table
        return nn.Linear(self.config.action_size, self.config.width) if self.config.action_size else None

    def hidden(
        self, video: Tensor, actions: Tensor | None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The hidden state [B, T, H, W, D] that the horizons share, and the near horizon's own where heads.tap is set.

        Args:
            video: [B, T, C, height, width], uint8 or floating in [-1, 1]; at most `context` frames.
            actions: [B, T] ids or [B, T, A] vectors.
            segment_ids: [B, T]; attention stays within a segment.
        """
        positions, tap = video.shape[1], self.config.heads.tap
        if positions > self.config.context:
            raise ValueError(f"video must have at most context = {self.config.context} frames, got {positions}")
        if tuple(video.shape[2:]) != self.config.frame:
            raise ValueError(f"video must have frames of shape {self.config.frame}, got {tuple(video.shape[2:])}")
        dtype = compute_dtype(self.place)
        (patches,) = video_pyramid(video, (1,), patch_sizes=(self.config.patch,), dtype=dtype)
        x_BTSD = self.embed(patches) + self.place + self.time[:positions]
        if self.action is not None:
            if actions is None:
                raise ValueError("actions must be given: this model is conditioned on them")
            x_BTSD = x_BTSD + self.action(actions)[:, :, None]
        mask = time_mask(segment_ids, positions)
        shared = None
        for depth, layer in enumerate(self.layers, start=1):
            x_BTSD = layer(x_BTSD, mask)
            if depth == tap:
                shared = x_BTSD.unflatten(2, self.grid)
        last = x_BTSD.unflatten(2, self.grid)
        return (last, None) if shared is None else (shared, last)

    def forward(
        self,
        video: Tensor,
        actions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        grad_monitor: GradMonitor | None = None,
    ) -> HorizonLoss:
        """The loss over the first `context` positions of a clip.

        video [B, V, C, height, width], actions [B, V] or [B, V, A], segment_ids [B, V]. Frames past the context are
        targets only: with V = context + the longest offset every position has all its targets.
        """
        hidden, near_hidden, window_BVD, _ = self._states(video, actions, segment_ids)
        return self.heads(
            hidden, window_BVD, video, near_hidden=near_hidden, segment_ids=segment_ids, grad_monitor=grad_monitor
        )

    def patch_predictions(
        self, video: Tensor, actions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What the heads give for the first `context` positions, [B, T, S_i, P_i] per horizon: heads.loss takes it."""
        hidden, near_hidden, window_BVD, _ = self._states(video, actions, segment_ids)
        return self.heads.patch_predictions(hidden, window_BVD, near_hidden, segment_ids)

    @torch.no_grad()
    def predict(
        self,
        video: Tensor,
        actions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        near_only: bool = False,
    ) -> tuple[Tensor, ...]:
        """The predicted frames [B, T, C, height / f_i, width / f_i] of every horizon and position, in [-1, 1]."""
        hidden, near_hidden, window_BVD, seen = self._states(video, actions, segment_ids)
        return self.heads.predict(
            hidden, window_BVD, seen, near_hidden=near_hidden, segment_ids=segment_ids, near_only=near_only
        )

    @torch.no_grad()
    def rollout(self, video: Tensor, actions: Tensor | None, steps: int) -> Tensor:
        """Closed loop: `steps` frames [B, steps, C, height, width] after `video`, each fed back, in [-1, 1].

        actions [B, T0 + steps - 1 or more], for T0 frames of video: the action taken at every frame, real or generated.
        The model remembers the last `context` frames.
        """
        horizons = self.config.heads.horizons
        if (horizons.offsets[0], horizons.factors[0]) != (1, 1):
            raise ValueError(f"a rollout needs a near horizon of offset 1 and factor 1, got {horizons}")
        needed = video.shape[1] + steps - 1
        if actions is not None and actions.shape[1] < needed:
            raise ValueError(f"actions must cover frames 0..{needed - 1}, got {actions.shape[1]} of them")
        (frames,) = video_pyramid(video, (1,), dtype=torch.float32)
        for _ in range(steps):
            end = frames.shape[1]
            start = max(0, end - self.config.context)
            taken = None if actions is None else actions[:, start:end]
            (following,) = self.predict(frames[:, start:end], taken, near_only=True)
            frames = torch.cat([frames, following[:, -1:]], dim=1)
        return frames[:, video.shape[1] :]

    def _states(
        self, video: Tensor, actions: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Hidden states, window embeddings of all V actions, and the frames at the positions."""
        seen = video[:, : self.config.context]
        positions = seen.shape[1]
        taken = None if actions is None else actions[:, :positions]
        segments = None if segment_ids is None else segment_ids[:, :positions]
        hidden, near_hidden = self.hidden(seen, taken, segments)
        window_BVD = None if self.window_action is None else self.window_action(actions)
        return hidden, near_hidden, window_BVD, seen


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
