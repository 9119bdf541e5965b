"""WorldModel: a space-time transformer over patches or tokens, with multi-frame heads on its hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfwm_kernels import GradMonitor, HorizonLoss, video_pyramid

from .blocks import SpaceTimeBlock, compute_dtype, initialise, time_mask
from .heads import MultiFrameHeads
from .heads_config import HeadsConfig


@dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of a world model.

    frame: (channels, height, width) of pixels or latents; of tokens (ids per token, rows, columns).
    patch: side of a token in pixels; 1 for frames of tokens.
    width, layers, head_width, mlp_ratio: of the transformer; width / head_width attention heads.
    context: positions of the hidden state; a rollout remembers that many frames.
    actions: number of discrete actions; 0 where there are none.
    action_size: length of a continuous action vector; 0 where actions are discrete.
    positions: how the trunk knows the time of a frame: an embedding "learned" for each position of the context, or
        queries and keys rotated by it ("rope").
    recompute: activation checkpointing: keep only what enters a trunk layer, and run it again in the backward.
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
    positions: Literal["learned", "rope"] = "learned"
    recompute: bool = False
    heads: HeadsConfig = field(default_factory=HeadsConfig)

    def __post_init__(self) -> None:
        _, height, width = self.frame
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch = {self.patch} does not divide the frame {height} x {width}")
        if self.heads.output == "tokens" and self.patch != 1:
            raise ValueError(f"patch must be 1 for frames of tokens, got {self.patch}")
        if self.width % self.head_width:
            raise ValueError(f"head_width must divide width = {self.width}, got {self.head_width}")
        if self.head_width % 2 and (self.positions == "rope" or self.heads.attend == "inputs"):
            raise ValueError(f"head_width must be even for rotary positions, got {self.head_width}")
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

    Genie's ST-transformer (arXiv 2402.15391) on patches or tokens: the embedding of action n, which is taken at frame n
    and leads to frame n + 1, is added to every token of frame n. The hidden state of position n so knows all that
    frame n + 1 needs, and horizon k lacks the actions n + 1 .. n + k - 1, its action window.
    """

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.heads.output == "tokens"
        channels, height, width = config.frame
        self.grid = (height // config.patch, width // config.patch)
        # Shape of a frame in `video`: images have their channels first, tokens their ids last.
        self.frame_shape = config.frame
        if self.tokens:
            self.frame_shape = (height, width, channels) if channels > 1 else (height, width)  # type: ignore[assignment]
            self.embed: nn.Module = nn.Embedding(channels * config.heads.vocabulary, config.width)
        else:
            self.embed = nn.Linear(channels * config.patch**2, config.width)
        self.place = nn.Parameter(0.1 * torch.randn(self.grid[0] * self.grid[1], config.width))
        self.time = None
        if config.positions == "learned":
            self.time = nn.Parameter(0.1 * torch.randn(config.context, 1, config.width))
        # Actions that are seen and actions that are still to come mean different things: a table each.
        self.action, self.window_action = self._action_embedding(), None
        if config.heads.conditioning == "actions":
            self.window_action = self._action_embedding()
        rotary = config.positions == "rope"
        self.layers = nn.ModuleList(
            SpaceTimeBlock(config.width, config.head_width, config.mlp_ratio, rotary) for _ in range(config.layers)
        )
        initialise(self, depth=config.layers)
        self.heads = MultiFrameHeads(
            config.width, config.patch, config.heads, channels=channels, head_width=config.head_width, rotary=rotary
        )

    def _action_embedding(self) -> nn.Module | None:
        if self.config.actions:
            table = nn.Embedding(self.config.actions, self.config.width)
            nn.init.normal_(table.weight, std=0.5)
            return table
        return nn.Linear(self.config.action_size, self.config.width) if self.config.action_size else None

    def inputs(self, video: Tensor, actions: Tensor | None) -> Tensor:
        """[B, V, H, W, D]: the embedding of every frame, with that of its action, without a time.

        Args:
            video: [B, V, C, height, width], uint8 or floating; for tokens, ids [B, V, rows, columns], or
                [..., ids per token] where there are several.
            actions: [B, V] ids or [B, V, A] vectors.
        """
        if tuple(video.shape[2:]) != self.frame_shape:
            raise ValueError(f"video must have frames of shape {self.frame_shape}, got {tuple(video.shape[2:])}")
        dtype = compute_dtype(self.place)
        if self.tokens:
            parts, vocabulary = self.config.frame[0], self.config.heads.vocabulary
            ids = video.unflatten(-1, (-1, parts)) if parts == 1 else video
            rows = ids + vocabulary * torch.arange(parts, device=ids.device)
            x_BVSD = self.embed(rows).sum(-2).flatten(2, 3).to(dtype)
        else:
            (patches,) = video_pyramid(video, (1,), patch_sizes=(self.config.patch,), dtype=dtype)
            x_BVSD = self.embed(patches)
        x_BVSD = x_BVSD + self.place
        if self.action is not None:
            if actions is None:
                raise ValueError("actions must be given: this model is conditioned on them")
            x_BVSD = x_BVSD + self.action(actions)[:, :, None]
        return x_BVSD.unflatten(2, self.grid)

    def trunk(self, inputs: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The hidden state [B, T, H, W, D] that the horizons share, and the near horizon's own where heads.tap is set.

        inputs [B, T, H, W, D] as from `inputs`, T at most `context`; segment_ids [B, T]: attention stays within one.
        """
        positions, tap = inputs.shape[1], self.config.heads.tap
        if positions > self.config.context:
            raise ValueError(f"video must have at most context = {self.config.context} frames, got {positions}")
        x_BTSD = inputs.flatten(2, 3)
        if self.time is not None:
            x_BTSD = x_BTSD + self.time[:positions]
        mask = time_mask(segment_ids, positions)
        shared = None
        for depth, layer in enumerate(self.layers, start=1):
            if self.config.recompute and torch.is_grad_enabled():
                x_BTSD = checkpoint(layer, x_BTSD, mask, use_reentrant=False)
            else:
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
        low_tokens: Mapping[int, Tensor] | None = None,
        grad_monitor: GradMonitor | None = None,
    ) -> HorizonLoss:
        """The loss over the first `context` positions of a clip.

        video [B, V, C, height, width] or ids [B, V, rows, columns(, ids per token)], actions [B, V] or [B, V, A],
        segment_ids [B, V], low_tokens as in MultiFrameHeads. Frames past the context are targets only: with
        V = context + the longest offset every position has all its targets.
        """
        states = self._states(video, actions, segment_ids)
        return self.heads(video=video, low_tokens=low_tokens, grad_monitor=grad_monitor, **states)

    def outputs(
        self, video: Tensor, actions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What the heads give for the first `context` positions: heads.loss takes it."""
        return self.heads.outputs(video=video, **self._states(video, actions, segment_ids))

    @torch.no_grad()
    def predict(
        self,
        video: Tensor,
        actions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        near_only: bool = False,
    ) -> tuple[Tensor, ...]:
        """What every horizon predicts at the first `context` positions.

        Frames [B, T, C, height / f_i, width / f_i], or logits of tokens [B, T, H / f_i, W / f_i, (C,) vocabulary].
        """
        return self.heads.predict(video=video, near_only=near_only, **self._states(video, actions, segment_ids))

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

    def _states(self, video: Tensor, actions: Tensor | None, segment_ids: Tensor | None) -> dict[str, Any]:
        """What the heads read: hidden states of the positions, inputs and window embeddings of all V frames."""
        positions = min(video.shape[1], self.config.context)
        frames = video.shape[1] if self.config.heads.conditioning == "frames" else positions
        inputs = self.inputs(video[:, :frames], None if actions is None else actions[:, :frames])
        segments = None if segment_ids is None else segment_ids[:, :positions]
        hidden, near_hidden = self.trunk(inputs[:, :positions], segments)
        return {
            "hidden": hidden,
            "near_hidden": near_hidden,
            "inputs": inputs,
            "actions": None if self.window_action is None else self.window_action(actions),
            "segment_ids": segment_ids,
        }


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
