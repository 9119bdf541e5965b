"""HeadsConfig: what is predicted from a position, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mfwm_kernels import Horizons

from ..checks import check_choices


@dataclass(frozen=True)
class HeadsConfig:
    """What is predicted from a position, and how.

    horizons: how many frames ahead each horizon predicts, and the factor by which its target is smaller. Presets of
        Horizons: far targets at one low resolution (low_res), the cascade, one offset at several factors
        (multi_resolution).
    patch_sizes: side of the output patch of each horizon, in pixels of its target. Horizon i then works on the token
        grid pooled by patch_sizes[i] * factors[i] / patch_size. None: patch_size / factor, which means no pooling
        (1 if the factor exceeds the patch).
    blocks: number of transformer blocks of each horizon, on its pooled grid; None: no blocks. Without blocks the
        actions in between only shift the input of a linear head.
    mlp_ratios: width of the MLP in each horizon's blocks, as a multiple of the model's width; None: 4.
    attend: what position n of those blocks attends to in time: the conditioned "states" of positions <= n, or the
        trunk's action-conditioned "inputs" of frames <= n followed by the conditioned state of n.
    conditioning: what a far horizon is told about the frames in between. "actions" adds the sum of the actions in
        between to the hidden state. "frames" joins the real frames and actions in between to it one after another, as
        in DeepSeek-V3's multi-token prediction: a training signal for the trunk, not a forecast. "none" is for video
        without actions.
    lag_gate: a learned gate per horizon, lag and channel on those actions, because a plain sum loses their order.
    norm: RMSNorm of the conditioned states, with a weight per horizon, and after the blocks.
    residual: predict the change from the last frame seen, with heads that start at zero, so that the untrained model
        copies that frame. Not for tokens.
    upsampler: channels of a convolutional upsampler that computes horizon 0, at full size, from the prediction of
        horizon 1, the same frame at a lower size. The hidden state then learns from small targets only.
    output: "pixels" in [-1, 1], "latents", which are unbounded, or "tokens".
    vocabulary: number of ids; for tokens.
    token_targets: of far tokens. "pooled": the mix of the ids in each larger cell. "tokenised": the ids of the smaller
        frame, tokenised on its own.
    shared_head: one matrix from states to tokens for all horizons.
    weights: of the horizons in the loss. None: equal weights, with which far losses, which are larger, dominate the
        near one early in training.
    weighting: "fixed": `weights` as given. "uncertainty": times exp(-s_i), s_i learned (Uncertainty). "gradients":
        `weights` are shares of the gradient into the shared hidden state (GradientNorms).
    surgery: if two horizons' gradients into the shared hidden state conflict, each loses its component along the other
        (PCGrad). Costs a second forward and backward of the heads.
    consistency: weight of the consistency term between each far prediction and the later near one (entry 0 is
        unused); or K rows of K, where [i][j] is for horizon j and a nearer one i.
    detach: which side of that term gets no gradient; None: both learn.
    tap: number of trunk layers, from the input, below the hidden state that the far horizons share; the layers above
        it serve the near horizon only. None: all horizons read the trunk's output.
    """

    horizons: Horizons = field(default_factory=lambda: Horizons.cascade(4))
    patch_sizes: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    mlp_ratios: tuple[int, ...] | None = None
    attend: Literal["states", "inputs"] = "states"
    conditioning: Literal["actions", "frames", "none"] = "actions"
    lag_gate: bool = False
    norm: bool = True
    residual: bool = True
    upsampler: int | None = None
    output: Literal["pixels", "latents", "tokens"] = "pixels"
    vocabulary: int = 0
    token_targets: Literal["pooled", "tokenised"] = "pooled"
    shared_head: bool = False
    weights: tuple[float, ...] | None = None
    weighting: Literal["fixed", "uncertainty", "gradients"] = "fixed"
    surgery: bool = False
    consistency: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None
    detach: Literal["near", "far"] | None = "near"
    tap: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.consistency is not None:
            rows = tuple(tuple(row) if isinstance(row, list | tuple) else row for row in self.consistency)
            object.__setattr__(self, "consistency", rows)
        for name in ("patch_sizes", "blocks", "mlp_ratios", "weights", "consistency"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.horizons):
                raise ValueError(f"{name} must have one entry per horizon, {len(self.horizons)}; got {value}")
        for name, least in (("blocks", 0), ("patch_sizes", 1), ("mlp_ratios", 1)):
            value = getattr(self, name)
            if value is not None and min(value) < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self._check_output()
        if self.attend == "inputs" and not any(self.blocks or ()):
            raise ValueError('blocks must be given with attend "inputs", which says what they attend to')
        if self.lag_gate and self.conditioning != "actions":
            raise ValueError(f'lag_gate needs conditioning "actions", got {self.conditioning!r}')

        if self.weighting == "gradients" or self.surgery:
            if self.conditioning == "frames":
                raise ValueError(
                    'weighting "gradients" and surgery need horizons that reach the hidden state on their own, not '
                    'conditioning "frames"'
                )
            if self.sharing < 2:
                raise ValueError(
                    f'weighting "gradients" and surgery need two horizons on one hidden state, got {self.sharing} of '
                    f"{self.horizons}"
                )

    @property
    def sharing(self) -> int:
        """The number of horizons that branch from the shared hidden state: the last ones."""
        return len(self.horizons) - (self.upsampler is not None) - (self.tap is not None)

    def _check_output(self) -> None:
        if (self.output == "tokens") != (self.vocabulary > 0):
            raise ValueError(
                f'vocabulary must be above 0 for output "tokens" and 0 for others, got {self.vocabulary} for '
                f"{self.output!r}"
            )
        if self.output == "tokens":
            if self.patch_sizes is not None:
                raise ValueError(f'patch_sizes must be None for output "tokens", got {self.patch_sizes}')
            pairs = any(isinstance(row, tuple) for row in self.consistency or ())
            if pairs or (self.consistency is not None and self.token_targets == "tokenised"):
                raise ValueError(
                    "consistency of tokens must be [K], with pooled targets: cells tokenised on their own are not "
                    f"those of the near horizon; got {self.consistency}"
                )
        elif self.shared_head or self.token_targets != "pooled":
            raise ValueError(f'shared_head and token_targets need output "tokens", got {self.output!r}')
        if self.upsampler is not None:
            offsets, factors = self.horizons.offsets[:2], self.horizons.factors[:2]
            if self.output == "tokens" or len(offsets) < 2 or offsets[0] != offsets[1] or factors[0] != 1:
                raise ValueError(
                    "upsampler needs pixels or latents, and a horizon 0 of the offset of horizon 1 and factor 1; got "
                    f"{self.output!r}, {self.horizons}"
                )
            if self.blocks is not None and self.blocks[0]:
                raise ValueError(f"blocks[0] must be 0 if the upsampler computes horizon 0, got {self.blocks[0]}")

    def layout(self, patch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Output patch and token pooling of every horizon, for a trunk whose tokens are patch_size pixels wide."""
        factors = self.horizons.factors
        if self.output == "tokens":
            return (1,) * len(factors), factors
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

    def check_frame(self, frame: tuple[int, int, int], patch_size: int) -> None:
        """ValueError where a horizon's patches, and so its pooling, do not divide frames (channels, height, width)."""
        patches, _ = self.layout(patch_size)
        for i, (factor, patch) in enumerate(zip(self.horizons.factors, patches, strict=True)):
            if any(side % (factor * patch) for side in frame[1:]):
                raise ValueError(
                    f"frame must be a multiple of {factor * patch} pixels for horizon {i}, whose target is 1/{factor} "
                    f"of it in patches of {patch}; got {frame[1]} x {frame[2]}"
                )
