"""MultiFrameHeads: several future frames from one shared hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfwm_kernels import (
    GradMonitor,
    HorizonLoss,
    Horizons,
    fan_out,
    multi_horizon_linear,
    multi_horizon_linear_cross_entropy,
    multi_horizon_loss,
    video_pyramid,
)
from mfwm_kernels import arguments as check

from ..checks import options_repr
from .balance import GradientNorms, Uncertainty, set_surgery_scale, times_shares
from .blocks import Join, LayerNorm, RMSNorm, SpaceTimeBlock, compute_dtype, initialise, pool_grid, time_mask
from .distributions import DISTRIBUTIONS, LOG_SCALE_LIMIT, Distribution, check_sampling
from .heads_config import HeadsConfig
from .layout import Layout
from .near_head import check_near_head, near_patches
from .tokenised import tokenised_loss
from .upsampler import Upsampler, unpatchify

# Where predicted log standard deviations (of "laplace": log mean deviations) start: frames that move differ from the
# last one by about 0.4 in pixels of -1..1, and latents usually have unit variance.
LOG_SCALE_START = {"pixels": -1.0, "latents": 0.0}


class OptionalInputs(TypedDict, total=False):
    """What some heads read beside hidden states, actions and frames; described in MultiFrameHeads.forward."""

    inputs: Tensor | None
    near_hidden: Tensor | None
    segment_ids: Tensor | None


class HeadInputs(OptionalInputs):
    """All that heads read of a clip beside its frames."""

    hidden: Tensor
    actions: Tensor | None


class MultiFrameHeads(nn.Module):
    """Drop-in heads that predict several future frames from a hidden state [B, T, H, W, D].

    Per horizon i, of offset k and factor f, with the hidden state at position n having seen frames and actions <= n:

        state_i = norm(avg_pool(hidden, pool_i) + sum(actions[:, n + 1 : n + k]))        (fan_out)
        pred_i  = linear_i(blocks_i(state_i))          patches of frame n + k at 1/f of its size
        loss    = sum_i weights_i * kind_i(pred_i + frame n at 1/f, frame n + k at 1/f) + consistency

    where kind_i is the mean squared error unless the config says otherwise; or, for tokens, the cross-entropy of
    linear_i's logits against the ids of frame n + k, pooled by f. With conditioning "frames", state_i is that of an
    earlier horizon, after its blocks, joined with the real frames from there to n + k - 1 (mtp_combine), on the grid of
    horizon i.
    If no horizon has blocks or pools, all K linear heads run as one multi_horizon_linear.

    A host that has a trained head for the near horizon keeps it, with its weights and its state_dict keys under
    `near_head.`: near_head(hidden), with the hidden state as it was given, neither normed nor conditioned, takes the
    place of linear_0(blocks_0(state_0)). For pixels and latents it is any module that returns patches,
    [B, T, H, W, P * P * C] or [B, T, S, P * P * C], or frames [B, T, C, height, width], at 1/f_0 and with twice the
    features (channels) for a distribution. With config.residual that is the change from frame n: a head that predicts
    the frame itself needs residual False. For tokens it is an nn.Linear, whose weight and bias the fused loss reads.

    Args:
        width: D, the width of the hidden state and of the action embeddings.
        patch_size: side of a token in pixels: frames are H * patch_size by W * patch_size. 1 for tokens.
        config: the options.
        channels: of pixels or latents.
        ids_per_token: for tokens: how many ids make up one token.
        head_width: width of an attention head in the horizons' blocks, if there are any; it divides width.
        rotary: whether these blocks rotate queries and keys by their position in time. With attend "inputs" they always
            do, because the inputs carry no time.
        window: how many frames these blocks attend to, the current one included; None: all.
        window_start: first lag of the action window: 1, or 0 if the hidden state of n has not seen action n.
        near_head: the host's own head of horizon 0.
        grid: (H, W), for a host whose tokens are in one dimension, in row order. Hidden states and inputs are then
            [B, T, S, D], ids and token masks [B, V, S(, ids_per_token)], low_tokens [B, V, S / f^2(, ids_per_token)],
            latents [B, V, S, C] (with patch_size 1) or images, and predictions have the layout of the frames.
    """

    def __init__(
        self,
        width: int,
        patch_size: int,
        config: HeadsConfig | None = None,
        *,
        channels: int = 3,
        ids_per_token: int = 1,
        head_width: int = 32,
        rotary: bool = False,
        window: int | None = None,
        window_start: int = 1,
        near_head: nn.Module | None = None,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.config = config = HeadsConfig() if config is None else config
        if not isinstance(config, HeadsConfig):
            raise TypeError(f"config must be a HeadsConfig, got {type(config).__name__}")
        check.integer("width", width, least=1)
        check.integer("patch_size", patch_size, least=1)
        check.integer("channels", channels, least=1)
        check.integer("ids_per_token", ids_per_token, least=1)
        check.integer("head_width", head_width, least=1)
        check.flag("rotary", rotary)
        if window is not None:
            check.integer("window", window, least=1)
        if any(config.blocks or ()) and width % head_width:
            raise ValueError(f"head_width must divide width = {width}, got {head_width}")
        if near_head is not None:
            check_near_head(near_head, config, width, ids_per_token)
        self.width, self.patch_size = width, patch_size
        self.channels, self.ids_per_token = channels, ids_per_token
        self.window, self.window_start = window, check.integer("window_start", window_start, least=0)
        self.near_head, self.grid = near_head, grid
        self.layout = Layout(grid, config.output == "tokens", ids_per_token, patch_size)
        self.patches, self.pools = config.layout(patch_size)
        self.tokens, self.residual = config.output == "tokens", config.residual and config.output != "tokens"
        count = len(config.horizons)
        # 2 where the head predicts a scale beside each mean.
        self.parts = tuple(2 if kind in DISTRIBUTIONS else 1 for kind in config.kinds)
        # The first horizon with a branch: near_head computes horizon 0, or the upsampler does, from horizon 1.
        self.first = 0 if config.upsampler is None and near_head is None else 1
        # How many horizons branch from the shared hidden state.
        self.sharing = config.sharing - (near_head is not None and config.tap is None)
        if (config.weighting == "gradients" or config.surgery) and self.sharing < 2:
            raise ValueError(
                f'weighting "gradients" and surgery need two horizons beside near_head, got {config.horizons}'
            )
        blocks, ratios = config.blocks or (0,) * count, config.mlp_ratios or (4,) * count
        rotary = rotary or config.attend == "inputs"
        self.blocks = nn.ModuleList(
            nn.ModuleList(SpaceTimeBlock(width, head_width, ratio, rotary) for _ in range(depth))
            for depth, ratio in zip(blocks, ratios, strict=True)
        )
        for stack in self.blocks:
            initialise(stack, depth=max(blocks))
        # Blocks and joins leave their output without a norm. Without them fan_out's norm comes right before the head.
        chained = config.conditioning == "frames"
        norms: dict[str | None, Any] = {"rms": RMSNorm, "layer": LayerNorm, None: lambda _: nn.Identity()}
        self.last_norms = nn.ModuleList(
            norms[config.norm](width) if (depth or chained) and i >= self.first else nn.Identity()
            for i, depth in enumerate(blocks)
        )
        self.heads = nn.ModuleList()
        for i, patch in enumerate(self.patches):
            if i < self.first:
                self.heads.append(nn.Identity())
            elif self.tokens:
                columns = ids_per_token * config.vocabulary
                shared = config.shared_head and i > 0
                self.heads.append(self._head(0) if shared else nn.Linear(width, columns, bias=config.bias))
            else:
                self.heads.append(nn.Linear(width, self.parts[i] * patch * patch * channels))
        for i, head in enumerate(self.heads):
            if isinstance(head, nn.Linear) and head is not near_head:
                self._initialise_head(i, head)
        fused = config.norm is not None and not chained and self.first < count
        self.norm_weight = nn.Parameter(torch.ones(count, width)) if fused else None
        self.norm_bias = nn.Parameter(torch.zeros(count, width)) if fused and config.norm == "layer" else None
        longest = max(1, *config.horizons.offsets)
        gated = config.lag_gate and self.first < count
        self.lag_weight = nn.Parameter(torch.ones(count, longest, width)) if gated else None
        self.joins = nn.ModuleList(Join(width) for _ in range(longest - 1) if chained)
        self.upsampler = None
        if config.upsampler is not None:
            self.upsampler = Upsampler(channels, config.horizons.factors[1], config.upsampler)
        weights = config.horizon_weights
        self.uncertainty = Uncertainty(weights) if config.weighting == "uncertainty" else None
        self.gradient_norms = GradientNorms(weights[-self.sharing :]) if config.weighting == "gradients" else None

    def _initialise_head(self, i: int, head: nn.Linear) -> None:
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        if self.residual:
            nn.init.zeros_(head.weight)
        else:
            nn.init.normal_(head.weight, std=self.width**-0.5)
        if self.parts[i] == 2:
            means = head.out_features // 2
            start = LOG_SCALE_START[self.config.output] * (2 if self.config.kinds[i] == "gaussian" else 1)
            nn.init.zeros_(head.weight[means:])
            nn.init.constant_(head.bias[means:], start)

    def extra_repr(self) -> str:
        frames = f"ids_per_token={self.ids_per_token}" if self.tokens else f"channels={self.channels}"
        grid = "" if self.grid is None else f", grid={self.grid}"
        sizes = f"width={self.width}, patch_size={self.patch_size}, {frames}{grid}"
        return f"{sizes}, {options_repr(self.config, 'horizons')}"

    def forward(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        low_tokens: Mapping[int, Tensor] | None = None,
        token_mask: Tensor | None = None,
        position_weights: Tensor | None = None,
        return_predictions: bool = False,
        grad_monitor: GradMonitor | None = None,
        shares: Tensor | None = None,
        seen: Tensor | None = None,
        **optional: Unpack[OptionalInputs],
    ) -> HorizonLoss:
        """The loss of all horizons.

        Args:
            hidden: [B, T, H, W, D]. Position n has seen frames and actions <= n.
            actions: [B, T_a, D] embeddings of the action taken at each frame; those past the last one are left out of
                the sums. None without conditioning "actions".
            video: [B, V, C, H * patch_size, W * patch_size], V >= T: pixels as uint8 or floating in [-1, 1], or
                floating latents. Tokens: ids [B, V, H, W], or [B, V, H, W, ids_per_token] if there are several.
            inputs: [B, V, H, W, D], each frame's embedding plus that of its action, for conditioning "frames"; attend
                "inputs" needs the first T frames of it.
            near_hidden: the near horizon's own hidden state, if it differs from the one that the far ones share.
            segment_ids: [B, V], the episode of each frame: predictions across the end of an episode do not count. With
                more actions than frames, [B, T_a].
            low_tokens: by factor, the ids [B, V, H / factor, W / factor] of the smaller frames, for tokenised targets;
                not read otherwise.
            token_mask: [B, V, H, W] bool, the tokens that the hidden state has not seen: at offset 0 only they count.
            position_weights: [B, T] or [B, T, K], >= 0, of the losses of the predictions made at each position; 0: they
                do not count.
            return_predictions: for tokens, also return the most likely ids of every horizon and position.
            grad_monitor: for the horizons that share `hidden`: all K, without the near one if near_hidden or near_head
                is given, and without horizon 0 if the upsampler computes it. With weighting "gradients" or surgery, its
                scale is set here.
            shares: [K, K], for a part of a larger batch: factors of the weights of horizons (the diagonal) and of
                consistency, such that the mean of the parts' losses is the loss of the batch.
            seen: the frames that the hidden state has seen, of video's shape, where they are not those of `video`, such
                as frames with noise or the model's own: a change is then predicted from these. The targets are those
                of `video`.
        """

        def loss_of(hidden: Tensor, optional: OptionalInputs, monitor: GradMonitor | None) -> HorizonLoss:
            read = video if seen is None else seen
            outputs = self.outputs(hidden, actions, read, grad_monitor=monitor, **optional)
            return self.loss(
                outputs,
                video,
                seen=seen,
                segment_ids=optional.get("segment_ids"),
                low_tokens=low_tokens,
                token_mask=token_mask,
                position_weights=position_weights,
                return_predictions=return_predictions,
                shares=shares,
            )

        if torch.is_grad_enabled() and (self.gradient_norms is not None or self.config.surgery):
            # `outputs` checks these again, but this method reads them first.
            near = optional.get("near_hidden")
            self.layout.states("hidden", hidden)
            if near is not None:
                self.layout.states("near_hidden", near)
            if grad_monitor is None:
                grad_monitor = GradMonitor(self.sharing, device=hidden.device)
            if not isinstance(grad_monitor, GradMonitor):
                raise TypeError(f"grad_monitor must be a GradMonitor, got {type(grad_monitor).__name__}")
            if self.gradient_norms is not None:
                self.gradient_norms.attach(grad_monitor)
            if self.config.surgery:
                probe = hidden.detach().requires_grad_()
                measured = GradMonitor(self.sharing, device=hidden.device)
                detached: OptionalInputs = {**optional, "near_hidden": None if near is None else near.detach()}
                torch.autograd.grad(loss_of(probe, detached, measured).total, probe)
                set_surgery_scale(grad_monitor, measured, balanced=self.gradient_norms is not None)
        return loss_of(hidden, optional, grad_monitor)

    def loss(
        self,
        outputs: Sequence[Tensor],
        video: Tensor,
        *,
        segment_ids: Tensor | None = None,
        low_tokens: Mapping[int, Tensor] | None = None,
        token_mask: Tensor | None = None,
        position_weights: Tensor | None = None,
        return_predictions: bool = False,
        shares: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> HorizonLoss:
        """The loss of what `outputs` returned; arguments as in forward."""
        config = self.config
        self._check_loss(low_tokens, token_mask, return_predictions, shares)
        if seen is not None and self.residual:
            outputs = self._from_seen(outputs, video, seen)
        video, token_mask = self.layout.frames(video), self.layout.cells("token_mask", token_mask, 3)
        segment_ids = None if segment_ids is None else segment_ids[:, : video.shape[1]]
        weights: Any = config.horizon_weights if self.uncertainty is None else self.uncertainty.weights()
        consistency: Any = config.consistency
        if shares is not None:
            weights = times_shares(weights, shares.diagonal())
            if consistency is not None:
                pairs = torch.as_tensor(consistency).ndim == 2
                consistency = times_shares(consistency, shares if pairs else shares[0])
        options: dict[str, Any] = {"segment_ids": segment_ids, "position_weights": position_weights}
        if self.tokens:
            options |= {"return_accuracy": True, "return_predictions": return_predictions}
        if config.token_targets == "tokenised":
            low = {
                factor: self.layout.ids(f"low_tokens[{factor}]", ids, factor)
                for factor, ids in (low_tokens or {}).items()
            }
            loss = tokenised_loss(
                outputs, self._token_weights(), self._token_biases(), video, low, config.horizons, weights, token_mask,
                **options,
            )  # fmt: skip
        elif self.tokens:
            loss = multi_horizon_linear_cross_entropy(
                outputs,
                self._token_weights(),
                video,
                config.horizons,
                biases=self._token_biases(),
                horizon_weights=weights,
                token_mask=token_mask,
                consistency_weights=consistency,
                detach=config.detach,
                **options,
            )
        else:
            loss = multi_horizon_loss(
                outputs,
                video,
                config.horizons,
                kind=config.kind,
                beta=config.beta,
                motion_gain=config.motion_gain,
                delta=config.delta,
                eps=config.eps,
                horizon_weights=weights,
                consistency_weights=consistency,
                detach=config.detach,
                patch_sizes=self.patches,
                residual=config.residual,
                **options,
            )
        if self.grid is not None and loss.predictions is not None:
            loss = HorizonLoss(*loss[:6], tuple(ids.flatten(2, 3) for ids in loss.predictions))
        if self.uncertainty is None:
            return loss
        cost = self.uncertainty.cost(loss.counts > 0 if shares is None else shares.diagonal())
        return HorizonLoss(loss.total + cost, *loss[1:])

    def _from_seen(self, outputs: Sequence[Tensor], video: Tensor, seen: Tensor) -> list[Tensor]:
        """Changes from frame n of `video` that lead to the same frames as the changes `outputs` from that of `seen`."""
        check.shape("seen", seen, tuple(video.shape), "video's shape")
        positions, factors = outputs[0].shape[1], self.config.horizons.factors[: len(outputs)]
        options: dict[str, Any] = {"patch_sizes": self.patches[: len(outputs)], "dtype": torch.float32}
        true, read = (
            video_pyramid(self.layout.frames(frames)[:, :positions], factors, **options) for frames in (video, seen)
        )
        differences = [a - b for a, b in zip(read, true, strict=True)]
        # The log-scales beside the means of a distribution stay as they are.
        return [
            out + F.pad(difference, (0, out.shape[-1] - difference.shape[-1]))
            for out, difference in zip(outputs, differences, strict=True)
        ]

    @torch.no_grad()
    def squared_errors(self, outputs: Sequence[Tensor], video: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """[K] mean squared errors of the means, over what counts; arguments as in loss. For pixels and latents."""
        means = [patches.chunk(parts, -1)[0] for patches, parts in zip(outputs, self.parts, strict=True)]
        video = self.layout.frames(video)
        options: dict[str, Any] = {"patch_sizes": self.patches, "residual": self.config.residual}
        segment_ids = None if segment_ids is None else segment_ids[:, : video.shape[1]]
        return multi_horizon_loss(means, video, self.config.horizons, segment_ids=segment_ids, **options).per_horizon

    def _head(self, i: int) -> nn.Module:
        return self.heads[i] if i or self.near_head is None else self.near_head

    def _token_weights(self) -> list[Tensor] | Tensor:
        weights: Any = [self._head(i).weight for i in range(len(self.heads))]
        return weights[0] if self.config.shared_head else weights

    def _token_biases(self) -> list[Tensor | None] | Tensor | None:
        biases: Any = [self._head(i).bias for i in range(len(self.heads))]
        return biases[0] if self.config.shared_head else biases

    def predict(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        near_only: bool = False,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        **optional: Unpack[OptionalInputs],
    ) -> tuple[Tensor, ...]:
        """The prediction of every horizon, in fp32; arguments as in forward.

        Frames [B, T, C, height / f_i, width / f_i], pixels clamped to [-1, 1]; for tokens, logits
        [B, T, H / f_i, W / f_i, vocabulary], or [..., ids_per_token, vocabulary] if there are several. With a grid, of
        tokens in one dimension where the frames given are.
        near_only: only the near horizon, which a closed-loop rollout feeds back.
        temperature: of horizons that predict distributions: 0 gives their means, 1 samples of them, drawn with
            `generator`; in between, samples closer to the mean. Tokens are sampled from the logits, as rollouts do.
        """
        check_sampling(temperature, generator, hidden)
        if temperature and not self.draws(near_only):
            raise ValueError(f"temperature must be 0 where no horizon predicts a distribution, got {temperature}")
        outputs = self.outputs(hidden, actions, video, near_only=near_only, **optional)
        return self.frames(outputs, video, temperature=temperature, generator=generator)

    def frames(
        self,
        outputs: Sequence[Tensor],
        video: Tensor,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """What `predict` returns, from what `outputs` returned of the first horizons; arguments as in predict."""
        if not self.tokens:
            drawn = [d.draw(temperature, generator) for d in self._distributions(outputs, video)]
            return tuple(frame.clamp(-1, 1) if self.config.output == "pixels" else frame for frame in drawn)
        logits = [self._head(i)(state).float() for i, state in enumerate(outputs)]
        if self.grid is not None:
            logits = [z.flatten(2, 3) for z in logits]
        if self.ids_per_token == 1:
            return tuple(logits)
        return tuple(z.unflatten(-1, (self.ids_per_token, self.config.vocabulary)) for z in logits)

    def draws(self, near_only: bool = False) -> bool:
        """Whether any horizon (or the near one) predicts a distribution of frames, which a temperature concerns."""
        return max(self.parts[:1] if near_only else self.parts) == 2

    def distributions(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        near_only: bool = False,
        **optional: Unpack[OptionalInputs],
    ) -> tuple[Distribution, ...]:
        """Mean and log-scale of every horizon's frames, in fp32, the means unclamped; arguments as in predict."""
        if self.tokens:
            raise ValueError("distributions are of pixels and latents; of tokens, predict gives logits")
        return self._distributions(self.outputs(hidden, actions, video, near_only=near_only, **optional), video)

    def _distributions(self, outputs: Sequence[Tensor], video: Tensor) -> tuple[Distribution, ...]:
        in_rows, video = self.layout.in_rows(video), self.layout.frames(video)
        positions, (height, width) = outputs[0].shape[1], video.shape[-2:]
        factors = self.config.horizons.factors[: len(outputs)]
        frames = [
            [
                unpatchify(part.float(), patch, self.channels, height // factor, width // factor)
                for part in patches.chunk(parts, -1)
            ]
            for patches, patch, parts, factor in zip(outputs, self.patches, self.parts, factors, strict=False)
        ]
        if self.residual:
            seen = video_pyramid(video[:, :positions], factors, dtype=torch.float32)
            for parts_of, last in zip(frames, seen, strict=True):
                parts_of[0] = parts_of[0] + last
        if in_rows:
            frames = [[part.flatten(3).mT for part in parts_of] for parts_of in frames]
        return tuple(
            Distribution(kind, mean, *(s.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT) for s in log_scale))
            for kind, (mean, *log_scale) in zip(self.config.kinds, frames, strict=False)
        )

    def outputs(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        inputs: Tensor | None = None,
        near_hidden: Tensor | None = None,
        segment_ids: Tensor | None = None,
        grad_monitor: GradMonitor | None = None,
        near_only: bool = False,
    ) -> tuple[Tensor, ...]:
        """What the loss reads of every horizon; arguments as in forward.

        Patches [B, T, S_i, P_i], of the change if config.residual, and for distributions twice as wide, means first;
        for tokens, the states [B, T, H / f_i, W / f_i, D] that a linear head maps to logits.
        """
        check.flag("near_only", near_only)
        given = hidden if near_hidden is None else near_hidden
        hidden = self.layout.states("hidden", hidden)
        near_hidden = None if near_hidden is None else self.layout.states("near_hidden", near_hidden)
        inputs = None if inputs is None else self.layout.states("inputs", inputs)
        video = self.layout.frames(video)
        self._check(hidden, actions, video, inputs, near_hidden, segment_ids, grad_monitor)
        dtype = compute_dtype(hidden)
        hidden, inputs = hidden.to(dtype), None if inputs is None else inputs.to(dtype)
        count, near = len(self.config.horizons), range(self.first, self.first + 1)
        near_state = hidden if near_hidden is None else near_hidden.to(dtype)
        groups: list[tuple[Tensor, range, GradMonitor | None]]
        if self.near_head is not None:
            groups = [] if near_only else [(hidden, range(1, count), grad_monitor)]
        elif near_only:
            groups = [(near_state, near, None)]
        elif near_hidden is None:
            groups = [(hidden, range(self.first, count), grad_monitor)]
        else:
            groups = [(near_state, near, None), (hidden, range(near.stop, count), grad_monitor)]
        outputs: list[Tensor] = [] if self.near_head is None else [self._near_output(given)]
        for state, chosen, monitor in groups:
            if chosen:
                outputs += self._branches(state, actions, inputs, chosen, segment_ids, monitor)
        if self.upsampler is not None:
            outputs = [self._upsample(outputs[0], video[:, : hidden.shape[1]])] + ([] if near_only else outputs)
        return tuple(outputs)

    def _near_output(self, given: Tensor) -> Tensor:
        """What the loss reads of horizon 0, from the state that near_head gets as the host gave it."""
        state = self.layout.states("hidden", given)
        if self.tokens:
            return state
        assert self.near_head is not None
        grid = (state.shape[2] // self.pools[0], state.shape[3] // self.pools[0])
        return near_patches(self.near_head(given), given, grid, self.patches[0], self.channels, self.parts[0])

    def _check(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        inputs: Tensor | None,
        near_hidden: Tensor | None,
        segment_ids: Tensor | None,
        grad_monitor: GradMonitor | None,
    ) -> None:
        config = self.config
        if hidden.shape[-1] != self.width:
            raise ValueError(f"hidden must have width D = {self.width}, got shape {list(hidden.shape)}")
        if near_hidden is not None:
            check.shape("near_hidden", near_hidden, hidden.shape, "of hidden")
            check.same_device("near_hidden", near_hidden, "hidden", hidden)
        self.layout.check_frames(video, hidden, self.channels)
        if (config.conditioning == "actions") != (actions is not None):
            rule = "embeddings [B, T_a, D]" if actions is None else "None"
            raise ValueError(f'actions must be {rule} with conditioning "{config.conditioning}"')
        if actions is not None:
            check.tensor("actions", actions, 3, "[B, T_a, D]")
        if segment_ids is not None:
            check.tensor("segment_ids", segment_ids, 2, "[B, V]", check.INTEGER_IDS)
            columns = max(video.shape[1], 0 if actions is None else actions.shape[1])
            if tuple(segment_ids.shape) != (hidden.shape[0], columns):
                raise ValueError(
                    f"segment_ids must have a column for each frame and action, [B, {columns}], got "
                    f"{list(segment_ids.shape)}"
                )
        if config.conditioning == "frames" or config.attend == "inputs":
            if inputs is None:
                raise ValueError(
                    f'inputs must be embeddings [B, V, H, W, D] with conditioning "{config.conditioning}" and attend '
                    f'"{config.attend}"'
                )
            if inputs[:, : hidden.shape[1]].shape != hidden.shape:
                raise ValueError(
                    f"inputs must have hidden's shape {list(hidden.shape)}, or more frames; got {list(inputs.shape)}"
                )
            check.same_device("inputs", inputs, "hidden", hidden)
        if config.conditioning == "frames" and grad_monitor is not None:
            raise ValueError(
                'grad_monitor must be None with conditioning "frames": far horizons reach the hidden state through '
                "nearer ones"
            )

    def _check_loss(self, low_tokens: Any, token_mask: Any, return_predictions: Any, shares: Any) -> None:
        """ValueError or TypeError for arguments of `loss` that the ops do not get as they are given."""
        if low_tokens is not None:
            if not isinstance(low_tokens, Mapping):
                raise TypeError(f"low_tokens must map factors to ids, got {type(low_tokens).__name__}")
            for factor in low_tokens:
                check.integer("low_tokens' factor", factor, least=1)
        check.flag("return_predictions", return_predictions)
        if not self.tokens:
            if token_mask is not None:
                raise ValueError(f'token_mask must be None for output "{self.config.output}"')
            if return_predictions:
                raise ValueError(
                    f"return_predictions must be False for output {self.config.output!r}: predict gives frames"
                )
        if shares is not None:
            count = len(self.config.horizons)
            check.tensor("shares", shares, 2, "[K, K]")
            check.shape("shares", shares, (count, count), "[K, K]")

    def _branches(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        inputs: Tensor | None,
        chosen: range,
        segment_ids: Tensor | None,
        grad_monitor: GradMonitor | None,
    ) -> list[Tensor]:
        """The outputs of the horizons `chosen`, which share `hidden`."""
        if self.config.conditioning == "frames":
            assert inputs is not None
            states = self._chained(hidden, inputs, chosen, segment_ids)
            return [self._read(i, state) for i, state in zip(chosen, states, strict=True)]
        part = slice(chosen.start, chosen.stop)
        offsets, factors = self.config.horizons.offsets[part], self.config.horizons.factors[part]
        horizons = Horizons(offsets, factors)
        conditioning: dict[str, Any] = {
            "norm": self.config.norm or "rms",
            "norm_weight": None if self.norm_weight is None else self.norm_weight[part].to(hidden.dtype),
            "norm_bias": None if self.norm_bias is None else self.norm_bias[part].to(hidden.dtype),
            "lag_weight": None if self.lag_weight is None else self._lag_weight(part, offsets).to(hidden.dtype),
            "segment_ids": None if actions is None or segment_ids is None else segment_ids[:, : actions.shape[1]],
            "window_start": self.window_start,
            "grad_monitor": grad_monitor,
        }
        actions = None if actions is None else actions.to(hidden.dtype)
        heads = [self.heads[i] for i in chosen]
        if not self.tokens and all(self.pools[i] == 1 and not self.blocks[i] for i in chosen):
            patches = multi_horizon_linear(
                hidden,
                actions,
                [head.weight for head in heads],  # type: ignore[misc]
                horizons,
                biases=[head.bias for head in heads],  # type: ignore[misc]
                **conditioning,
            )
            return [out.flatten(2, 3) for out in patches]
        conditioned = fan_out(hidden, actions, horizons, pool=self.pools[part], **conditioning)
        mask = time_mask(segment_ids, hidden.shape[1], self.window, hidden.device)
        pairs = zip(chosen, conditioned, strict=True)
        return [self._read(i, self._transform(i, state, inputs, mask)) for i, state in pairs]

    def _lag_weight(self, part: slice, offsets: tuple[int, ...]) -> Tensor:
        assert self.lag_weight is not None
        return self.lag_weight[part, : max(1, *offsets)]

    def _transform(self, i: int, state_BTHWD: Tensor, inputs: Tensor | None, mask: Tensor | None) -> Tensor:
        """Horizon i's blocks on its grid."""
        x_BTSD = state_BTHWD.flatten(2, 3)
        seen_BTSD = None
        if self.config.attend == "inputs":
            assert inputs is not None
            seen_BTSD = pool_grid(inputs[:, : x_BTSD.shape[1]], self.pools[i]).flatten(2, 3)
        stack: Any = self.blocks[i]
        for depth, block in enumerate(stack):
            if seen_BTSD is None:
                x_BTSD = block(x_BTSD, mask)
            else:
                if depth:
                    seen_BTSD = stack[depth - 1](seen_BTSD, mask)
                x_BTSD = block.append(x_BTSD, seen_BTSD, mask)
        return x_BTSD.view(state_BTHWD.shape)

    def _chained(self, hidden: Tensor, inputs: Tensor, chosen: range, segment_ids: Tensor | None) -> list[Tensor]:
        """The states of conditioning "frames": horizon i continues from the last earlier one whose grid it can pool."""
        offsets, pools = self.config.horizons.offsets, self.pools
        mask = time_mask(segment_ids, hidden.shape[1], self.window, hidden.device)
        states: dict[int, Tensor] = {}
        for i in chosen:
            state, pool, first = hidden, pools[i], 1
            for j in states:
                if pools[i] % pools[j] == 0:
                    state, pool, first = states[j], pools[i] // pools[j], max(1, offsets[j])
            state = pool_grid(state, pool)
            smaller = pool_grid(inputs, pools[i])
            for lag in range(first, offsets[i]):
                state = self.joins[lag - 1](state, later(smaller, lag, hidden.shape[1], segment_ids))
            states[i] = self._transform(i, state, inputs, mask)
        return list(states.values())

    def _read(self, i: int, state_BTHWD: Tensor) -> Tensor:
        normed = self.last_norms[i](state_BTHWD)
        return normed if self.tokens else self.heads[i](normed).flatten(2, 3)

    def _upsample(self, patches: Tensor, video: Tensor) -> Tensor:
        """Patches of horizon 0, from those of horizon 1 and the last frame seen."""
        assert self.upsampler is not None
        factor, (height, width) = self.config.horizons.factors[1], video.shape[-2:]
        means = patches.detach().chunk(self.parts[1], -1)[0]
        small = unpatchify(means, self.patches[1], self.channels, height // factor, width // factor)
        (seen,) = video_pyramid(video, (1,), dtype=small.dtype)
        return video_pyramid(self.upsampler(small, seen), (1,), patch_sizes=(self.patches[0],))[0]


def later(x_BVHWD: Tensor, lag: int, positions: int, segment_ids: Tensor | None) -> Tensor:
    """[B, T, H, W, D]: x at n + lag for position n; zero past the end of x and where n + lag is in another segment."""
    V = x_BVHWD.shape[1]
    segments = None if segment_ids is None else segment_ids[:, :V]
    valid = Horizons((lag,), (1,)).valid(0, positions, V, segments, device=x_BVHWD.device)
    index = (torch.arange(positions, device=x_BVHWD.device) + lag).clamp_max(V - 1)
    return x_BVHWD[:, index] * valid[:, :, None, None, None]
