"""The branches of MultiFrameHeads, one for each horizon, from a hidden state to what the loss reads."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from mfwm_kernels import GradMonitor, Horizons, fan_out, multi_horizon_linear, video_pyramid
from mfwm_kernels import arguments as check

from .blocks import Join, LayerNorm, RMSNorm, SpaceTimeBlock, compute_dtype, initialise, pool_grid, time_mask
from .distributions import DISTRIBUTIONS
from .frame_decoder import FrameDecoder
from .heads_config import HeadsConfig
from .latents import FrameLatents
from .layout import Layout
from .near_head import check_near_head, near_patches
from .raster import RasterDecoder
from .upsampler import Analogy, Upsampler, unpatchify

# Where predicted log standard deviations (of "laplace": log mean deviations) start: frames that move differ from the
# last one by about 0.4 in pixels of -1..1, and latents usually have unit variance.
LOG_SCALE_START = {"pixels": -1.0, "latents": 0.0}


class OptionalInputs(TypedDict, total=False):
    """What some heads read beside hidden states, actions and frames; described in MultiFrameHeads.forward."""

    inputs: Tensor | None
    near_hidden: Tensor | None
    segment_ids: Tensor | None


class Branched(NamedTuple):
    """What the branches compute of every horizon.

    outputs: as from Branches.outputs.
    states: [B, T, H / f_i, W / f_i, D] that head i reads; None where near_head, the upsampler or the fused
        multi_horizon_linear computes the output.
    hidden: [B, T, H, W, D] that the branches share, as it was given.
    kl: [B, T, K], the divergence of inferred latents; None where none are inferred.
    """

    outputs: tuple[Tensor, ...]
    states: tuple[Tensor | None, ...]
    hidden: Tensor
    kl: Tensor | None


class Branches(nn.Module):
    """The modules of K horizons, and `outputs`, which computes them. Arguments as in MultiFrameHeads."""

    def __init__(
        self,
        width: int,
        patch_size: int,
        config: HeadsConfig,
        *,
        channels: int,
        ids_per_token: int,
        head_width: int,
        rotary: bool,
        window: int | None,
        window_start: int,
        near_head: nn.Module | None,
        grid: tuple[int, int] | None,
    ):
        super().__init__()
        self.config = config
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
        if config.raster is not None and (width % head_width or head_width % 2):
            raise ValueError(f"head_width must be even and divide width = {width} with raster, got {head_width}")
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
            elif i == 0 and config.near_decoder is not None:
                self.heads.append(FrameDecoder(width, patch, channels, self.parts[0], config.near_decoder))
            else:
                self.heads.append(nn.Linear(width, self.parts[i] * patch * patch * channels))
        for i, head in enumerate(self.heads):
            if isinstance(head, FrameDecoder):
                self._initialise_last(i, head.conv_out)
            elif isinstance(head, nn.Linear) and head is not near_head:
                self._initialise_last(i, head)
        fused = config.norm is not None and not chained and self.first < count
        self.norm_weight = nn.Parameter(torch.ones(count, width)) if fused else None
        self.norm_bias = nn.Parameter(torch.zeros(count, width)) if fused and config.norm == "layer" else None
        longest = max(1, *config.horizons.offsets)
        gated = config.lag_gate and self.first < count
        self.lag_weight = nn.Parameter(torch.ones(count, longest, width)) if gated else None
        self.joins = nn.ModuleList(Join(width) for _ in range(longest - 1) if chained)
        self.upsampler: Upsampler | Analogy | None = None
        if config.upsampler is not None:
            kind = Analogy if config.upsampling == "analogy" else Upsampler
            self.upsampler = kind(channels, config.horizons.factors[1], config.upsampler)
        self.decoder = None
        if config.raster is not None:
            self.decoder = RasterDecoder(width, config.raster, head_width, config.vocabulary, ids_per_token)
        self.latents = None
        if config.latent is not None:
            self.latents = FrameLatents(width, config.latent, config.horizons, config.far, channels)

    def _initialise_last(self, i: int, layer: nn.Linear | nn.Conv2d) -> None:
        """Weight and bias of the layer that computes horizon i's output."""
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if self.residual:
            nn.init.zeros_(layer.weight)
        else:
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        if self.parts[i] == 2:
            means = len(layer.weight) // 2
            start = LOG_SCALE_START[self.config.output] * (2 if self.config.kinds[i] == "gaussian" else 1)
            assert layer.bias is not None
            nn.init.zeros_(layer.weight[means:])
            nn.init.constant_(layer.bias[means:], start)

    def outputs(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        grad_monitor: GradMonitor | None = None,
        near_only: bool = False,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        **optional: Unpack[OptionalInputs],
    ) -> tuple[Tensor, ...]:
        """What the loss reads of every horizon; arguments as in MultiFrameHeads.forward and predict. With
        config.latent, for z drawn from its prior.

        Patches [B, T, S_i, P_i], of the change if config.residual, and for distributions twice as wide, means first;
        for tokens, the states [B, T, H / f_i, W / f_i, D] that a linear head maps to logits, or with config.raster, of
        horizon 0, that its decoder reads.
        """
        check.flag("near_only", near_only)
        check.number("temperature", temperature, least=0)
        options: dict[str, Any] = {"grad_monitor": grad_monitor, "near_only": near_only}
        options |= {"temperature": temperature, "generator": generator}
        return self.branched(hidden, actions, video, **options, **optional).outputs

    def branched(
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
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        targets: Tensor | None = None,
        counts: Tensor | None = None,
        latent_noise: Tensor | None = None,
    ) -> Branched:
        """Outputs, states and the divergence of latents; arguments as in `outputs`.

        targets: the true frames, of video's shape, from which latents are inferred where `counts` [B, T, K] says that a
            horizon has one; None: latents are drawn. latent_noise [B, T, far horizons, latent]: of the inferred ones.
        """
        given = hidden if near_hidden is None else near_hidden
        hidden = self.layout.states("hidden", hidden)
        near_hidden = None if near_hidden is None else self.layout.states("near_hidden", near_hidden)
        inputs = None if inputs is None else self.layout.states("inputs", inputs)
        video = self.layout.frames(video)
        self._check(hidden, actions, video, inputs, near_hidden, segment_ids, grad_monitor)
        condition, kl = None, None
        if self.latents is not None and not near_only:
            if targets is None:
                condition = self.latents.drawn(hidden, temperature, generator)
            else:
                assert counts is not None
                condition, kl = self.latents.inferred(hidden, self.layout.frames(targets), counts, latent_noise)
        shared, dtype = hidden, compute_dtype(hidden)
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
        found: list[tuple[Tensor, Tensor | None]] = []
        if self.near_head is not None:
            found.append((self._near_output(given), None))
        for state, chosen, monitor in groups:
            if chosen:
                found += self._branches(state, actions, inputs, video, chosen, segment_ids, monitor, condition)
        if self.upsampler is not None:
            upsampled = self._upsample(found[0][0], video[:, : hidden.shape[1]])
            found = [(upsampled, None)] + ([] if near_only else found)
        outputs, states = zip(*found, strict=True)
        return Branched(outputs, states, shared, kl)

    def _head(self, i: int) -> nn.Module:
        return self.heads[i] if i or self.near_head is None else self.near_head

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

    def _branches(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        inputs: Tensor | None,
        video: Tensor,
        chosen: range,
        segment_ids: Tensor | None,
        grad_monitor: GradMonitor | None,
        condition: Tensor | None,
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Outputs and states of the horizons `chosen`, which share `hidden`."""
        if self.config.conditioning == "frames":
            assert inputs is not None
            states = self._chained(hidden, inputs, chosen, segment_ids)
            return [self._read(i, state, video) for i, state in zip(chosen, states, strict=True)]
        part = slice(chosen.start, chosen.stop)
        offsets, factors = self.config.horizons.offsets[part], self.config.horizons.factors[part]
        horizons = Horizons(offsets, factors)
        conditioning: dict[str, Any] = {
            "condition": None if condition is None else condition[:, :, part].to(hidden.dtype),
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
        linear = all(self.pools[i] == 1 and not self.blocks[i] and isinstance(self.heads[i], nn.Linear) for i in chosen)
        if linear and not self.tokens and not self.config.latent_consistency:
            patches = multi_horizon_linear(
                hidden,
                actions,
                [head.weight for head in heads],  # type: ignore[misc]
                horizons,
                biases=[head.bias for head in heads],  # type: ignore[misc]
                **conditioning,
            )
            return [(out.flatten(2, 3), None) for out in patches]
        conditioned = fan_out(hidden, actions, horizons, pool=self.pools[part], **conditioning)
        mask = time_mask(segment_ids, hidden.shape[1], self.window, hidden.device)
        pairs = zip(chosen, conditioned, strict=True)
        return [self._read(i, self._transform(i, state, inputs, mask), video) for i, state in pairs]

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

    def _read(self, i: int, state_BTHWD: Tensor, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """Horizon i's output and the state that its head reads."""
        normed, head = self.last_norms[i](state_BTHWD), self.heads[i]
        if self.tokens:
            return normed, normed
        if not isinstance(head, FrameDecoder):
            return head(normed).flatten(2, 3), normed
        last, factors = video[:, : normed.shape[1]], self.config.horizons.factors[i : i + 1]
        (seen,) = video_pyramid(last, factors, patch_sizes=(head.cell,), dtype=normed.dtype)
        return head(normed, seen).flatten(2, 3), normed

    def _upsample(self, patches: Tensor, video: Tensor) -> Tensor:
        """Patches of horizon 0, from those of horizon 1 and the last frame seen."""
        assert self.upsampler is not None
        factor, (height, width) = self.config.horizons.factors[1], video.shape[-2:]
        means = patches.detach().chunk(self.parts[1], -1)[0]
        small = unpatchify(means, self.patches[1], self.channels, height // factor, width // factor)
        (seen,) = video_pyramid(video, (1,), dtype=small.dtype)
        if self.residual and isinstance(self.upsampler, Analogy):
            # It reads frames, where the other upsampler enlarges changes as they are.
            full = self.upsampler(small + video_pyramid(seen, (factor,))[0], seen) - seen
        else:
            full = self.upsampler(small, seen)
        return video_pyramid(full, (1,), patch_sizes=(self.patches[0],))[0]

    def upsampled(self, small: Tensor, seen: Tensor) -> Tensor:
        """Frames of the size of `seen` that the upsampler computes from small frames and the last ones seen."""
        assert self.upsampler is not None
        if self.residual and isinstance(self.upsampler, Upsampler):
            change = small - video_pyramid(seen, (self.upsampler.factor,))[0]
            return seen + self.upsampler(change, seen)
        return self.upsampler(small, seen)


def later(x_BVHWD: Tensor, lag: int, positions: int, segment_ids: Tensor | None) -> Tensor:
    """[B, T, H, W, D]: x at n + lag for position n; zero past the end of x and where n + lag is in another segment."""
    V = x_BVHWD.shape[1]
    segments = None if segment_ids is None else segment_ids[:, :V]
    valid = Horizons((lag,), (1,)).valid(0, positions, V, segments, device=x_BVHWD.device)
    index = (torch.arange(positions, device=x_BVHWD.device) + lag).clamp_max(V - 1)
    return x_BVHWD[:, index] * valid[:, :, None, None, None]
