"""MultiFrameHeads: several future frames from one shared hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfwm_kernels import (
    GradMonitor,
    HorizonLoss,
    Horizons,
    fan_out,
    multi_horizon_linear,
    multi_horizon_loss,
    video_pyramid,
)

from .blocks import RMSNorm, SpaceTimeBlock, compute_dtype, initialise, time_mask


@dataclass(frozen=True)
class HeadsConfig:
    """What is predicted from a position, and how.

    horizons: offsets in frames and factors by which the targets are smaller.
    patch_sizes: side of the output patch of each horizon, in pixels of its target. Horizon i then works on the token
        grid pooled by patch_sizes[i] * factors[i] / patch_size. None: patch_size / factor, which pools nothing
        (1 where the factor exceeds the patch).
    blocks: transformer blocks of each horizon, on its pooled grid; None gives none. They attend to the conditioned
        states of positions <= n. Without blocks the actions in between only shift what a linear head reads.
    conditioning: "actions" adds the sum of the actions in between to the hidden state; "none" is for plain video.
    lag_gate: a learned gate per horizon, lag and channel on those actions; a plain sum forgets their order.
    norm: RMSNorm of the conditioned states, with a weight per horizon, and after the blocks.
    residual: predict the change against the last frame seen, from heads that start at zero: the untrained model
        copies that frame.
    weights: of the horizons in the loss; None weighs them equally, and far losses, which are larger, then crowd out
        the near one early in training.
    consistency: weight of the agreement of each far prediction with the later near one (entry 0 is unused).
    detach: which side of that agreement gets no gradient; None lets both learn.
    tap: the trunk layers below the hidden state that the far horizons share, counted from the input; the remaining
        layers serve the near horizon alone. None: all horizons read the trunk's output.
    """

    horizons: Horizons = field(default_factory=lambda: Horizons.cascade(4))
    patch_sizes: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    conditioning: Literal["actions", "none"] = "actions"
    lag_gate: bool = False
    norm: bool = True
    residual: bool = True
    weights: tuple[float, ...] | None = None
    consistency: tuple[float, ...] | None = None
    detach: Literal["near", "far"] | None = "near"
    tap: int | None = None

    def __post_init__(self) -> None:
        for name in ("patch_sizes", "blocks", "weights", "consistency"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.horizons):
                raise ValueError(f"{name} must have one entry per horizon, {len(self.horizons)}; got {value}")
        if self.blocks is not None and min(self.blocks) < 0:
            raise ValueError(f"blocks must be >= 0, got {self.blocks}")
        if self.patch_sizes is not None and min(self.patch_sizes) < 1:
            raise ValueError(f"patch_sizes must be >= 1, got {self.patch_sizes}")

    def layout(self, patch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Output patch and token pooling of every horizon, over a trunk whose tokens are patch_size pixels wide."""
        factors = self.horizons.factors
        patches = self.patch_sizes or tuple(max(1, patch_size // factor) for factor in factors)
        pools = []
        for i, (patch, factor) in enumerate(zip(patches, factors, strict=True)):
            if patch * factor % patch_size:
                raise ValueError(
                    f"patch_sizes[{i}] * factors[{i}] = {patch} * {factor} must be a multiple of the trunk's "
                    f"patch_size, {patch_size}"
                )
            pools.append(patch * factor // patch_size)
        return patches, tuple(pools)


class MultiFrameHeads(nn.Module):
    """Drop-in heads that predict several future frames from a hidden state [B, T, H, W, D].

    Per horizon i, of offset k and factor f, with the hidden state at position n having seen frames and actions <= n:

        state_i = RMSNorm(avg_pool(hidden, pool_i) + sum(actions[:, n + 1 : n + k]))        (fan_out)
        pred_i  = linear_i(blocks_i(state_i))          patches of frame n + k at 1/f of its size
        loss    = sum_i weights_i * mse(pred_i + frame n at 1/f, frame n + k at 1/f) + consistency

    Where no horizon has blocks or pools, all K linear heads run as one multi_horizon_linear.

    Args:
        width: D, the width of the hidden state and of the action embeddings.
        patch_size: side of a token in pixels: frames are H * patch_size by W * patch_size.
        config: the options.
        channels: of the frames.
        head_width: of the attention in the horizons' blocks; it divides width.
    """

    def __init__(
        self,
        width: int,
        patch_size: int,
        config: HeadsConfig | None = None,
        *,
        channels: int = 3,
        head_width: int = 32,
    ):
        super().__init__()
        if width % head_width:
            raise ValueError(f"head_width must divide width = {width}, got {head_width}")
        self.config = config = config or HeadsConfig()
        self.channels, self.patch_size = channels, patch_size
        self.patches, self.pools = config.layout(patch_size)
        count = len(config.horizons)
        blocks = config.blocks or (0,) * count
        self.blocks = nn.ModuleList(
            nn.ModuleList(SpaceTimeBlock(width, head_width) for _ in range(depth)) for depth in blocks
        )
        for stack in self.blocks:
            initialise(stack, depth=max(blocks))
        # The blocks' residual stream is unnormed; without blocks fan_out's norm stands right before the head.
        self.last_norms = nn.ModuleList(RMSNorm(width) if depth and config.norm else nn.Identity() for depth in blocks)
        self.heads = nn.ModuleList(nn.Linear(width, patch * patch * channels) for patch in self.patches)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.bias)
            if config.residual:
                nn.init.zeros_(head.weight)
            else:
                nn.init.normal_(head.weight, std=width**-0.5)
        self.norm_weight = nn.Parameter(torch.ones(count, width)) if config.norm else None
        longest = max(1, *config.horizons.offsets)
        self.lag_weight = nn.Parameter(torch.ones(count, longest, width)) if config.lag_gate else None

    def forward(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        near_hidden: Tensor | None = None,
        segment_ids: Tensor | None = None,
        grad_monitor: GradMonitor | None = None,
    ) -> HorizonLoss:
        """The loss of all horizons.

        Args:
            hidden: [B, T, H, W, D]. Position n has seen frames and actions <= n.
            actions: [B, V, D] embeddings of the action taken at each frame; None with conditioning "none".
            video: [B, V, C, H * patch_size, W * patch_size], uint8 or floating in [-1, 1], V >= T.
            near_hidden: the hidden state of the near horizon, where it is not the one that the far ones share.
            segment_ids: [B, V], the episode of each frame: predictions across an end are not counted.
            grad_monitor: for the horizons that share `hidden`: K of them, K - 1 where near_hidden is given.
        """
        preds = self.patch_predictions(hidden, actions, near_hidden, segment_ids, grad_monitor)
        return self.loss(preds, video, segment_ids=segment_ids)

    def loss(self, preds: Sequence[Tensor], video: Tensor, *, segment_ids: Tensor | None = None) -> HorizonLoss:
        """The loss of patch predictions, as forward gives it."""
        config = self.config
        return multi_horizon_loss(
            preds,
            video,
            config.horizons,
            weights=config.weights,
            consistency_weights=config.consistency,
            detach=config.detach,
            patch_sizes=self.patches,
            residual=config.residual,
            segment_ids=segment_ids,
        )

    def predict(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        near_hidden: Tensor | None = None,
        segment_ids: Tensor | None = None,
        near_only: bool = False,
    ) -> tuple[Tensor, ...]:
        """The predicted frames [B, T, C, height / f_i, width / f_i] of every horizon, fp32, clamped to [-1, 1].

        near_only gives the near horizon alone, which is what a closed-loop rollout feeds back.
        """
        preds = self.patch_predictions(hidden, actions, near_hidden, segment_ids, near_only=near_only)
        positions, (height, width) = hidden.shape[1], video.shape[-2:]
        factors = self.config.horizons.factors[: len(preds)]
        frames = [
            unpatchify(pred.float(), patch, self.channels, height // factor, width // factor)
            for pred, patch, factor in zip(preds, self.patches, factors, strict=False)
        ]
        if self.config.residual:
            seen = video_pyramid(video[:, :positions], factors, dtype=torch.float32)
            frames = [frame + last for frame, last in zip(frames, seen, strict=True)]
        return tuple(frame.clamp(-1, 1) for frame in frames)

    def patch_predictions(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        near_hidden: Tensor | None = None,
        segment_ids: Tensor | None = None,
        grad_monitor: GradMonitor | None = None,
        *,
        near_only: bool = False,
    ) -> tuple[Tensor, ...]:
        """What the heads give: [B, T, S_i, P_i] patches per horizon, of the change where config.residual."""
        if (self.config.conditioning == "actions") != (actions is not None):
            wanted = "embeddings [B, V, D]" if actions is None else "None"
            raise ValueError(f'actions must be {wanted} with conditioning "{self.config.conditioning}"')
        dtype = compute_dtype(hidden)
        hidden = hidden.to(dtype)
        if actions is None:
            actions = hidden.new_zeros(hidden.shape[0], hidden.shape[1], hidden.shape[-1])
            segments = None
        else:
            actions, segments = actions.to(dtype), segment_ids
        count = len(self.config.horizons)
        groups: list[tuple[Tensor, int, int, GradMonitor | None]]
        if near_only:
            groups = [(hidden if near_hidden is None else near_hidden.to(dtype), 0, 1, None)]
        elif near_hidden is None:
            groups = [(hidden, 0, count, grad_monitor)]
        else:
            groups = [(near_hidden.to(dtype), 0, 1, None)]
            if count > 1:
                groups.append((hidden, 1, count, grad_monitor))
        preds: list[Tensor] = []
        for state, first, end, monitor in groups:
            preds += self._project(state, actions, range(first, end), segments, segment_ids, monitor)
        return tuple(preds)

    def _project(
        self,
        hidden: Tensor,
        actions: Tensor,
        chosen: range,
        action_segments: Tensor | None,
        segment_ids: Tensor | None,
        grad_monitor: GradMonitor | None,
    ) -> list[Tensor]:
        """Patches of the horizons `chosen`, which share `hidden`."""
        part = slice(chosen.start, chosen.stop)
        offsets, factors = self.config.horizons.offsets[part], self.config.horizons.factors[part]
        horizons = Horizons(offsets, factors)
        conditioning: dict[str, Any] = {
            "norm_weight": None if self.norm_weight is None else self.norm_weight[part].to(hidden.dtype),
            "lag_weight": None if self.lag_weight is None else self._lag_weight(part, offsets).to(hidden.dtype),
            "segment_ids": action_segments,
            "grad_monitor": grad_monitor,
        }
        heads = [self.heads[i] for i in chosen]
        if all(self.pools[i] == 1 and not self.blocks[i] for i in chosen):
            outputs = multi_horizon_linear(
                hidden,
                actions,
                [head.weight for head in heads],  # type: ignore[misc]
                horizons,
                biases=[head.bias for head in heads],  # type: ignore[misc]
                **conditioning,
            )
            return [out.flatten(2, 3) for out in outputs]
        states = fan_out(hidden, actions, horizons, pool=self.pools[part], **conditioning)
        mask = time_mask(segment_ids, hidden.shape[1])
        preds = []
        for i, state in zip(chosen, states, strict=True):
            x_BTSD = state.flatten(2, 3)
            for block in self.blocks[i]:  # type: ignore[attr-defined]
                x_BTSD = block(x_BTSD, mask)
            preds.append(self.heads[i](self.last_norms[i](x_BTSD)))
        return preds

    def _lag_weight(self, part: slice, offsets: tuple[int, ...]) -> Tensor:
        assert self.lag_weight is not None
        return self.lag_weight[part, : max(1, *offsets)]


def unpatchify(patches: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    """[B, T, S, patch * patch * C], features in (row, column, channel) order, to images [B, T, C, height, width]."""
    B, T = patches.shape[:2]
    grid = patches.view(B, T, height // patch, width // patch, patch, patch, channels)
    return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(B, T, channels, height, width)
