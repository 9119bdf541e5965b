"""HeadsConfig: what is predicted from a position, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mfwm_kernels import Horizons
from mfwm_kernels import arguments as check

from ..checks import check_choices
from .distributions import DISTRIBUTIONS, Kind


@dataclass(frozen=True)
class HeadsConfig:
    """What is predicted from a position, and how.

    Args:
        horizons: how many frames ahead each horizon predicts, and the factor by which its target is smaller. Presets of
            Horizons: far targets at one low resolution (low_res), the cascade, one offset at several factors
            (multi_resolution).
        patch_sizes: side of the output patch of each horizon, in pixels of its target. Horizon i then works on the
            token grid pooled by patch_sizes[i] * factors[i] / patch_size. None: patch_size / factor, which means no
            pooling (1 if the factor exceeds the patch).
        blocks: number of transformer blocks of each horizon, on its pooled grid; None: no blocks. Without blocks the
            actions in between only shift the input of a linear head.
        mlp_ratios: width of the MLP in each horizon's blocks, as a multiple of the model's width; None: 4.
        attend: what position n of those blocks attends to in time: the conditioned "states" of positions <= n, or the
            trunk's action-conditioned "inputs" of frames <= n followed by the conditioned state of n.
        conditioning: what a far horizon is told about the frames in between. "actions" adds the sum of the actions in
            between to the hidden state. "frames" joins the real frames and actions in between to it one after another,
            as in DeepSeek-V3's multi-token prediction: a training signal for the trunk, not a forecast. "none" is for
            video without actions.
        lag_gate: a learned gate per horizon, lag and channel on those actions, because a plain sum loses their order.
        norm: of the conditioned states, with weights per horizon, and after the blocks: "rms" (RMSNorm), "layer"
            (LayerNorm with a bias) or None.
        residual: predict the change from the last frame seen, with heads that start at zero, so that the untrained
            model copies that frame. Not for tokens.
        kind: of the loss of pixels and latents, one for all horizons or one for each: a function of the difference,
            "mse", "l1", "huber" or "charbonnier", or the likelihood of a distribution, "gaussian" or "laplace", whose
            scale the head predicts beside the mean: for far frames that cannot be known. multi_horizon_loss has the
            formulas.
        beta: of "gaussian": from 0, the likelihood, to 1, which weighs the mean's gradient as "mse" does.
        motion_gain: every element of a horizon's loss is weighted by 1 + motion_gain * |change from frame n|.
        delta: of "huber".
        eps: of "charbonnier".
        upsampler: channels of a convolutional upsampler that computes horizon 0, at full size, from the prediction of
            horizon 1, the same frame at a lower size. The hidden state then learns from small targets only.
        upsampling: what the upsampler computes. "correction": from the small prediction and the last frame seen.
            "analogy": from that frame, and the change from its small version to the small prediction, as in Villegas et
            al.
        near_decoder: channels of a convolutional decoder (FrameDecoder) that computes the near horizon in place of a
            linear head, from the state and the last frame seen. For pixels and latents.
        output: "pixels" in [-1, 1], "latents", which are unbounded, or "tokens".
        vocabulary: number of ids; for tokens.
        token_targets: of far tokens. "pooled": the mix of the ids in each larger cell. "tokenised": the ids of the
            smaller frame, tokenised on its own.
        raster: number of blocks of a causal decoder that predicts the tokens of the near frame one after another in
            raster order, each given those before it (RasterDecoder), so that their loss is a joint likelihood. None:
            all tokens at once, independent of each other.
        shared_head: one matrix from states to tokens for all horizons.
        bias: whether heads of tokens have biases; those of pixels and latents always do.
        weights: of the horizons in the loss. None: 1, 0.5, 0.2, 0.1, 0.05, ... for the nearest offset, the next one and
            so on, because far losses, which are larger, would otherwise dominate the near one early in training.
        weighting: "fixed": `weights` as given. "uncertainty": times exp(-s_i), s_i learned (Uncertainty). "gradients":
            `weights` are shares of the gradient into the shared hidden state (GradientNorms).
        surgery: if two horizons' gradients into the shared hidden state conflict, each loses its component along the
            other (PCGrad). Costs a second forward and backward of the heads.
        consistency: weight of the consistency term between each far prediction and the later near one (entry 0 is
            unused); or K rows of K, where [i][j] is for horizon j and a nearer one i.
        detach: which side of that term gets no gradient; None: both learn.
        contrast: weight of temporal_contrast of the shared hidden state, averaged over its tokens, from one position to
            the next; mfwm.losses has the formulas of these three.
        latent_consistency: weight of latent_consistency of every far horizon: the state that its head reads against the
            shared hidden state of the frame it predicts, both divided by their RMS. Of several far horizons of one
            offset, the first.
        temporal_difference: weight of temporal_difference of every horizon, times the weight of the horizon. For pixels
            and latents; of a distribution, that of the means.
        latent: size of a Gaussian z for each far horizon (FrameLatents), for what of its frame cannot be known:
            inferred from that frame in training, and in a prediction drawn from what the hidden state tells of it. For
            pixels and latents; of several far horizons of one offset, for the first. None: no z.
        kl: weight of the KL divergence from inferred to predicted z, times the weight of the horizon.
        tap: number of trunk layers, from the input, below the hidden state that the far horizons share; the layers
            above it serve the near horizon only. None: all horizons read the trunk's output.
    """

    horizons: Horizons = field(default_factory=lambda: Horizons.cascade(4))
    patch_sizes: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    mlp_ratios: tuple[int, ...] | None = None
    attend: Literal["states", "inputs"] = "states"
    conditioning: Literal["actions", "frames", "none"] = "actions"
    lag_gate: bool = False
    norm: Literal["rms", "layer"] | None = "rms"
    residual: bool = True
    kind: Kind | tuple[Kind, ...] = "mse"
    beta: float = 0.0
    motion_gain: float = 0.0
    delta: float = 1.0
    eps: float = 1e-3
    upsampler: int | None = None
    upsampling: Literal["correction", "analogy"] = "correction"
    near_decoder: int | None = None
    output: Literal["pixels", "latents", "tokens"] = "pixels"
    vocabulary: int = 0
    token_targets: Literal["pooled", "tokenised"] = "pooled"
    raster: int | None = None
    shared_head: bool = False
    bias: bool = False
    weights: tuple[float, ...] | None = None
    weighting: Literal["fixed", "uncertainty", "gradients"] = "fixed"
    surgery: bool = False
    consistency: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None
    detach: Literal["near", "far"] | None = "near"
    contrast: float = 0.0
    latent_consistency: float = 0.0
    temporal_difference: float = 0.0
    latent: int | None = None
    kl: float = 1e-4
    tap: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.kind, list):
            object.__setattr__(self, "kind", tuple(self.kind))
        check_choices(self)
        self._check_types()
        for name in ("patch_sizes", "blocks", "mlp_ratios", "weights", "consistency"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.horizons):
                raise ValueError(f"{name} must have one entry per horizon, {len(self.horizons)}; got {value}")
        self._check_output()
        self._check_kinds()
        for name in ("latent_consistency", "latent"):
            if getattr(self, name) and not self.far:
                raise ValueError(
                    f"{name} needs a horizon of a larger offset than the first, got {getattr(self, name)} with "
                    f"{self.horizons}"
                )
        if self.latent is not None and self.conditioning == "frames":
            raise ValueError(
                'latent must be None with conditioning "frames", which is given what cannot be known; got '
                f"{self.latent}"
            )
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
        """The number of horizons that branch from the shared hidden state. They are the last ones."""
        return len(self.horizons) - (self.upsampler is not None) - (self.tap is not None)

    @property
    def far(self) -> tuple[int, ...]:
        """The horizons of larger offsets than the first one; of several with one offset, the first.

        >>> HeadsConfig(Horizons((1, 1, 2, 4, 4), (1, 2, 2, 2, 4))).far
        (2, 3)
        """
        offsets = self.horizons.offsets
        return tuple(i for i in range(1, len(offsets)) if offsets[i] > offsets[i - 1])

    @property
    def horizon_weights(self) -> tuple[float, ...]:
        """`weights`, or the default ones.

        >>> HeadsConfig(Horizons.cascade(5)).horizon_weights
        (1.0, 0.5, 0.2, 0.1, 0.05)
        """
        if self.weights is not None:
            return self.weights
        offsets = self.horizons.offsets
        ranks = (sorted(set(offsets)).index(offset) for offset in offsets)
        return tuple((1.0, 0.5, 0.2)[rank % 3] / 10 ** (rank // 3) for rank in ranks)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each horizon's loss."""
        return self.kind if isinstance(self.kind, tuple) else (self.kind,) * len(self.horizons)

    def _check_types(self) -> None:
        if not isinstance(self.horizons, Horizons):
            raise TypeError(f"horizons must be a Horizons, got {type(self.horizons).__name__}")
        for name in ("lag_gate", "residual", "shared_head", "bias", "surgery"):
            check.flag(name, getattr(self, name))
        check.integer("vocabulary", self.vocabulary, least=0)
        for name in ("upsampler", "near_decoder", "tap", "latent", "raster"):
            if getattr(self, name) is not None:
                check.integer(name, getattr(self, name), least=1)
        for name, least in (("blocks", 0), ("patch_sizes", 1), ("mlp_ratios", 1)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check.integers(name, getattr(self, name), least=least))
        for name, nested in (("weights", False), ("consistency", True)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, numbers(name, getattr(self, name), nested=nested))

    def _check_kinds(self) -> None:
        if len(self.kinds) != len(self.horizons):
            raise ValueError(f"kind must be one or have one entry per horizon, {len(self.horizons)}; got {self.kind}")
        for name in ("beta", "motion_gain", "contrast", "latent_consistency", "temporal_difference", "kl"):
            check.number(name, getattr(self, name), least=0)
        for name in ("delta", "eps"):
            check.number(name, getattr(self, name), above=0)
        if self.output == "tokens":
            for name, default in (
                ("kind", "mse"),
                ("beta", 0),
                ("motion_gain", 0),
                ("temporal_difference", 0),
                ("latent", None),
            ):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is of the loss of pixels and latents, and the output is tokens; got "
                        f"{getattr(self, name)!r}"
                    )
        if self.beta and "gaussian" not in self.kinds:
            raise ValueError(f'beta needs a horizon of kind "gaussian", got {self.beta} with {self.kind!r}')
        if set(self.kinds) & set(DISTRIBUTIONS):
            if self.weighting == "uncertainty":
                raise ValueError(
                    'weighting "uncertainty" must not go with "gaussian" or "laplace", which predict their own '
                    f"uncertainty: its total has no lower bound where a loss is negative; got kind {self.kind!r}"
                )
            if self.upsampler is not None and self.kinds[0] in DISTRIBUTIONS:
                raise ValueError(
                    f"kind[0] must be a function of the difference if the upsampler, which predicts no scale, "
                    f"computes horizon 0; got {self.kinds[0]!r}"
                )

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
        elif self.shared_head or self.bias or self.token_targets != "pooled":
            raise ValueError(f'shared_head, bias and token_targets need output "tokens", got {self.output!r}')
        if self.raster is not None:
            near = (self.horizons.offsets[0], self.horizons.factors[0])
            if self.output != "tokens" or near[0] < 1 or near[1] != 1 or self.consistency is not None:
                raise ValueError(
                    'raster needs output "tokens", a near horizon of offset 1 or more and factor 1, and no consistency '
                    f"term, which is of independent tokens; got {self.output!r}, {self.horizons}, {self.consistency}"
                )
        if self.near_decoder is not None and (self.output == "tokens" or self.upsampler is not None):
            raise ValueError(
                "near_decoder must be None for tokens, and with an upsampler, which computes the near horizon; got "
                f"{self.near_decoder} with output {self.output!r} and upsampler {self.upsampler}"
            )
        if self.upsampler is None and self.upsampling != "correction":
            raise ValueError(f"upsampling {self.upsampling!r} needs an upsampler, a number of channels; got None")
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


def numbers(name: str, values: Any, *, nested: bool) -> tuple[Any, ...]:
    """A tuple of finite numbers; if `nested`, it may hold such tuples instead."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a tuple of numbers, got {type(values).__name__}")
    if nested and any(isinstance(row, (list, tuple)) for row in values):
        return tuple(numbers(f"{name}[{i}]", row, nested=False) for i, row in enumerate(values))
    for i, value in enumerate(values):
        check.number(f"{name}[{i}]", value)
    return tuple(values)
