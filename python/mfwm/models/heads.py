"""MultiFrameHeads: several future frames from one shared hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
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

from ..checks import options_repr
from .balance import GradientNorms, Uncertainty, surgery_scale, times_shares
from .blocks import Join, RMSNorm, SpaceTimeBlock, compute_dtype, initialise, pool_grid, time_mask
from .heads_config import HeadsConfig
from .upsampler import Upsampler, unpatchify


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

        state_i = RMSNorm(avg_pool(hidden, pool_i) + sum(actions[:, n + 1 : n + k]))        (fan_out)
        pred_i  = linear_i(blocks_i(state_i))          patches of frame n + k at 1/f of its size
        loss    = sum_i weights_i * mse(pred_i + frame n at 1/f, frame n + k at 1/f) + consistency

    or, for tokens, the cross-entropy of linear_i's logits against the ids of frame n + k, pooled by f. With
    conditioning "frames", state_i is that of an earlier horizon, after its blocks, joined with the real frames from
    there to n + k - 1 (mtp_combine), on the grid of horizon i.
    If no horizon has blocks or pools, all K linear heads run as one multi_horizon_linear.

    Args:
        width: D, the width of the hidden state and of the action embeddings.
        patch_size: side of a token in pixels: frames are H * patch_size by W * patch_size. 1 for tokens.
        config: the options.
        channels: of pixels or latents.
        ids_per_token: for tokens: how many ids make up one token.
        head_width: width of an attention head in the horizons' blocks; it divides width.
        rotary: whether these blocks rotate queries and keys by their position in time. With attend "inputs" they always
            do, because the inputs carry no time.
        window: how many frames these blocks attend to, the current one included; None: all.
        window_start: first lag of the action window: 1, or 0 if the hidden state of n has not seen action n.
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
    ):
        super().__init__()
        if width % head_width:
            raise ValueError(f"head_width must divide width = {width}, got {head_width}")
        self.config = config = config or HeadsConfig()
        self.width, self.patch_size = width, patch_size
        self.channels, self.ids_per_token = channels, ids_per_token
        self.window, self.window_start = window, window_start
        self.patches, self.pools = config.layout(patch_size)
        self.tokens, self.residual = config.output == "tokens", config.residual and config.output != "tokens"
        count = len(config.horizons)
        # The first horizon with a branch: the upsampler computes horizon 0 from horizon 1.
        self.first = 0 if config.upsampler is None else 1
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
        self.last_norms = nn.ModuleList(
            RMSNorm(width) if (depth or chained) and config.norm and i >= self.first else nn.Identity()
            for i, depth in enumerate(blocks)
        )
        self.heads = nn.ModuleList()
        for i, patch in enumerate(self.patches):
            if i < self.first:
                self.heads.append(nn.Identity())
            elif self.tokens:
                shared = config.shared_head and i > 0
                self.heads.append(
                    self.heads[0] if shared else nn.Linear(width, ids_per_token * config.vocabulary, bias=False)
                )
            else:
                self.heads.append(nn.Linear(width, patch * patch * channels))
        for head in self.heads:
            if isinstance(head, nn.Linear):
                if head.bias is not None:
                    nn.init.zeros_(head.bias)
                if self.residual:
                    nn.init.zeros_(head.weight)
                else:
                    nn.init.normal_(head.weight, std=width**-0.5)
        self.norm_weight = nn.Parameter(torch.ones(count, width)) if config.norm and not chained else None
        longest = max(1, *config.horizons.offsets)
        self.lag_weight = nn.Parameter(torch.ones(count, longest, width)) if config.lag_gate else None
        self.joins = nn.ModuleList(Join(width) for _ in range(longest - 1) if chained)
        self.upsampler = None
        if config.upsampler is not None:
            self.upsampler = Upsampler(channels, config.horizons.factors[1], config.upsampler)
        weights = config.weights or (1.0,) * count
        self.uncertainty = Uncertainty(weights) if config.weighting == "uncertainty" else None
        self.gradient_norms = GradientNorms(weights[-config.sharing :]) if config.weighting == "gradients" else None

    def extra_repr(self) -> str:
        frames = f"ids_per_token={self.ids_per_token}" if self.tokens else f"channels={self.channels}"
        sizes = f"width={self.width}, patch_size={self.patch_size}, {frames}"
        return f"{sizes}, {options_repr(self.config, 'horizons')}"

    def forward(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        low_tokens: Mapping[int, Tensor] | None = None,
        token_mask: Tensor | None = None,
        grad_monitor: GradMonitor | None = None,
        shares: Tensor | None = None,
        **optional: Unpack[OptionalInputs],
    ) -> HorizonLoss:
        """The loss of all horizons.

        Args:
            hidden: [B, T, H, W, D]. Position n has seen frames and actions <= n.
            actions: [B, V, D] embeddings of the action taken at each frame; None without conditioning "actions".
            video: [B, V, C, H * patch_size, W * patch_size], V >= T: pixels as uint8 or floating in [-1, 1], or
                floating latents. Tokens: ids [B, V, H, W], or [B, V, H, W, ids_per_token] if there are several.
            inputs: [B, V, H, W, D], each frame's embedding plus that of its action, for conditioning "frames"; attend
                "inputs" needs the first T frames of it.
            near_hidden: the near horizon's own hidden state, if it differs from the one that the far ones share.
            segment_ids: [B, V], the episode of each frame: predictions across the end of an episode do not count.
            low_tokens: by factor, the ids [B, V, H / factor, W / factor] of the smaller frames, for tokenised targets.
            token_mask: [B, V, H, W] bool, the tokens that the hidden state has not seen: at offset 0 only they count.
            grad_monitor: for the horizons that share `hidden`: all K, without the near one if near_hidden is given, and
                without horizon 0 if the upsampler computes it. With weighting "gradients" or surgery, its scale is set
                here.
            shares: [K, K], for a part of a larger batch: factors of the weights of horizons (the diagonal) and of
                consistency, such that the mean of the parts' losses is the loss of the batch.
        """

        def loss_of(hidden: Tensor, optional: OptionalInputs, monitor: GradMonitor | None) -> HorizonLoss:
            outputs = self.outputs(hidden, actions, video, grad_monitor=monitor, **optional)
            return self.loss(
                outputs,
                video,
                segment_ids=optional.get("segment_ids"),
                low_tokens=low_tokens,
                token_mask=token_mask,
                shares=shares,
            )

        if torch.is_grad_enabled() and (self.gradient_norms is not None or self.config.surgery):
            if grad_monitor is None:
                grad_monitor = GradMonitor(self.config.sharing, device=hidden.device)
            if self.gradient_norms is not None:
                self.gradient_norms.attach(grad_monitor)
            if self.config.surgery:
                probe = hidden.detach().requires_grad_()
                measured = GradMonitor(self.config.sharing, device=hidden.device)
                near = optional.get("near_hidden")
                detached: OptionalInputs = {**optional, "near_hidden": None if near is None else near.detach()}
                torch.autograd.grad(loss_of(probe, detached, measured).total, probe)
                self._set_surgery_scale(grad_monitor, measured)
        return loss_of(hidden, optional, grad_monitor)

    def _set_surgery_scale(self, monitor: GradMonitor, measured: GradMonitor) -> None:
        """Set the monitor's scale to surgery, in random order, on the `measured` gradients as balancing scales them."""
        balanced = self.gradient_norms is not None and monitor.scale is not None
        scale = monitor.scale if balanced else torch.ones_like(measured.norms)
        assert scale is not None
        lengths = measured.norms * scale
        gram = measured.cosines * lengths[:, None] * lengths
        orders = [torch.randperm(len(lengths)).tolist() for _ in lengths]
        monitor.scale = scale * surgery_scale(gram, orders)

    def loss(
        self,
        outputs: Sequence[Tensor],
        video: Tensor,
        *,
        segment_ids: Tensor | None = None,
        low_tokens: Mapping[int, Tensor] | None = None,
        token_mask: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> HorizonLoss:
        """The loss of what `outputs` returned; arguments as in forward."""
        config = self.config
        weights: Any = config.weights if self.uncertainty is None else self.uncertainty.weights()
        consistency: Any = config.consistency
        if shares is not None:
            weights = times_shares(weights, shares.diagonal())
            if consistency is not None:
                pairs = torch.as_tensor(consistency).ndim == 2
                consistency = times_shares(consistency, shares if pairs else shares[0])
        if config.token_targets == "tokenised":
            loss = self._tokenised_loss(outputs, video, segment_ids, low_tokens or {}, token_mask, weights)
        elif self.tokens:
            loss = multi_horizon_linear_cross_entropy(
                outputs,
                self._token_weights(),
                video,
                config.horizons,
                horizon_weights=weights,
                segment_ids=segment_ids,
                token_mask=token_mask,
                consistency_weights=consistency,
                detach=config.detach,
                return_accuracy=True,
            )
        else:
            loss = multi_horizon_loss(
                outputs,
                video,
                config.horizons,
                horizon_weights=weights,
                consistency_weights=consistency,
                detach=config.detach,
                patch_sizes=self.patches,
                residual=config.residual,
                segment_ids=segment_ids,
            )
        if self.uncertainty is None:
            return loss
        cost = self.uncertainty.cost(loss.counts > 0 if shares is None else shares.diagonal())
        return HorizonLoss(loss.total + cost, *loss[1:])

    def _token_weights(self) -> list[Tensor] | Tensor:
        weights: list[Tensor] = [head.weight for head in self.heads]  # type: ignore[misc]
        return weights[0] if self.config.shared_head else weights

    def _tokenised_loss(
        self,
        outputs: Sequence[Tensor],
        tokens: Tensor,
        segment_ids: Tensor | None,
        low_tokens: Mapping[int, Tensor],
        token_mask: Tensor | None,
        weights: Tensor | Sequence[float] | None,
    ) -> HorizonLoss:
        """One call for all horizons of the same factor, because they share their ids."""
        offsets, factors = self.config.horizons.offsets, self.config.horizons.factors
        parts: list[HorizonLoss] = []
        order: list[int] = []
        for factor in sorted(set(factors)):
            if factor != 1 and factor not in low_tokens:
                raise ValueError(f"low_tokens must have the ids of factor {factor}, got factors {sorted(low_tokens)}")
            chosen = [i for i, f in enumerate(factors) if f == factor]
            heads = self._token_weights()
            part = multi_horizon_linear_cross_entropy(
                [outputs[i] for i in chosen],
                heads if isinstance(heads, Tensor) else [heads[i] for i in chosen],
                tokens if factor == 1 else low_tokens[factor],
                Horizons(tuple(offsets[i] for i in chosen), (1,) * len(chosen)),
                horizon_weights=weights[chosen]
                if isinstance(weights, Tensor)
                else weights and [weights[i] for i in chosen],
                segment_ids=segment_ids,
                token_mask=token_mask if factor == 1 else None,
                return_accuracy=True,
            )
            parts.append(part)
            order += chosen
        position = [order.index(i) for i in range(len(order))]
        total = torch.stack([part.total for part in parts]).sum()
        means, counts, consistency, consistency_counts, accuracy = (
            torch.cat([part[f] for part in parts])[position]  # type: ignore[misc]
            for f in range(1, 6)
        )
        return HorizonLoss(total, means, counts, consistency, consistency_counts, accuracy)

    def predict(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        near_only: bool = False,
        **optional: Unpack[OptionalInputs],
    ) -> tuple[Tensor, ...]:
        """The prediction of every horizon, in fp32; arguments as in forward.

        Frames [B, T, C, height / f_i, width / f_i], pixels clamped to [-1, 1]; for tokens, logits
        [B, T, H / f_i, W / f_i, vocabulary], or [..., ids_per_token, vocabulary] if there are several.
        near_only: only the near horizon, which a closed-loop rollout feeds back.
        """
        outputs = self.outputs(hidden, actions, video, near_only=near_only, **optional)
        if self.tokens:
            logits = [head(state).float() for head, state in zip(self.heads, outputs, strict=False)]
            if self.ids_per_token == 1:
                return tuple(logits)
            return tuple(z.unflatten(-1, (self.ids_per_token, self.config.vocabulary)) for z in logits)
        positions, (height, width) = hidden.shape[1], video.shape[-2:]
        factors = self.config.horizons.factors[: len(outputs)]
        frames = [
            unpatchify(patches.float(), patch, self.channels, height // factor, width // factor)
            for patches, patch, factor in zip(outputs, self.patches, factors, strict=False)
        ]
        if self.residual:
            seen = video_pyramid(video[:, :positions], factors, dtype=torch.float32)
            frames = [frame + last for frame, last in zip(frames, seen, strict=True)]
        return tuple(frame.clamp(-1, 1) if self.config.output == "pixels" else frame for frame in frames)

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

        Patches [B, T, S_i, P_i], of the change if config.residual; for tokens, the states [B, T, H / f_i, W / f_i, D]
        that a linear head maps to logits.
        """
        self._check(hidden, actions, inputs, grad_monitor)
        dtype = compute_dtype(hidden)
        hidden, inputs = hidden.to(dtype), None if inputs is None else inputs.to(dtype)
        count, near = len(self.config.horizons), range(self.first, self.first + 1)
        near_state = hidden if near_hidden is None else near_hidden.to(dtype)
        groups: list[tuple[Tensor, range, GradMonitor | None]]
        if near_only:
            groups = [(near_state, near, None)]
        elif near_hidden is None:
            groups = [(hidden, range(self.first, count), grad_monitor)]
        else:
            groups = [(near_state, near, None), (hidden, range(near.stop, count), grad_monitor)]
        outputs: list[Tensor] = []
        for state, chosen, monitor in groups:
            if chosen:
                outputs += self._branches(state, actions, inputs, chosen, segment_ids, monitor)
        if self.upsampler is not None:
            outputs = [self._upsample(outputs[0], video[:, : hidden.shape[1]])] + ([] if near_only else outputs)
        return tuple(outputs)

    def _check(
        self, hidden: Tensor, actions: Tensor | None, inputs: Tensor | None, grad_monitor: GradMonitor | None
    ) -> None:
        config = self.config
        if (config.conditioning == "actions") != (actions is not None):
            rule = "embeddings [B, V, D]" if actions is None else "None"
            raise ValueError(f'actions must be {rule} with conditioning "{config.conditioning}"')
        if config.conditioning == "frames" or config.attend == "inputs":
            if inputs is None:
                raise ValueError(
                    f'inputs must be embeddings [B, V, H, W, D] with conditioning "{config.conditioning}" and attend '
                    f'"{config.attend}"'
                )
            if inputs.shape[1] < hidden.shape[1] or inputs.shape[2:] != hidden.shape[2:]:
                raise ValueError(
                    f"inputs must have hidden's shape {list(hidden.shape)}, or more frames; got {list(inputs.shape)}"
                )
        if config.conditioning == "frames" and grad_monitor is not None:
            raise ValueError(
                'grad_monitor must be None with conditioning "frames": far horizons reach the hidden state through '
                "nearer ones"
            )

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
            "norm_weight": None if self.norm_weight is None else self.norm_weight[part].to(hidden.dtype),
            "lag_weight": None if self.lag_weight is None else self._lag_weight(part, offsets).to(hidden.dtype),
            "segment_ids": None if actions is None else segment_ids,
            "window_start": self.window_start,
            "grad_monitor": grad_monitor,
        }
        if actions is None:
            actions = hidden.new_zeros(hidden.shape[0], hidden.shape[1], hidden.shape[-1])
        actions = actions.to(hidden.dtype)
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
        small = unpatchify(patches.detach(), self.patches[1], self.channels, height // factor, width // factor)
        (seen,) = video_pyramid(video, (1,), dtype=small.dtype)
        return video_pyramid(self.upsampler(small, seen), (1,), patch_sizes=(self.patches[0],))[0]


def later(x_BVHWD: Tensor, lag: int, positions: int, segment_ids: Tensor | None) -> Tensor:
    """[B, T, H, W, D]: x at n + lag for position n; zero past the end of x and where n + lag is in another segment."""
    V = x_BVHWD.shape[1]
    segments = None if segment_ids is None else segment_ids[:, :V]
    valid = Horizons((lag,), (1,)).valid(0, positions, V, segments, device=x_BVHWD.device)
    index = (torch.arange(positions, device=x_BVHWD.device) + lag).clamp_max(V - 1)
    return x_BVHWD[:, index] * valid[:, :, None, None, None]
