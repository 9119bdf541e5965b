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
    multi_horizon_linear_cross_entropy,
    multi_horizon_loss,
    video_pyramid,
)
from mfwm_kernels import arguments as check

from ..checks import options_repr
from .balance import GradientNorms, Uncertainty, set_surgery_scale, times_shares
from .branches import Branches, OptionalInputs
from .distributions import LOG_SCALE_LIMIT, Distribution, check_sampling
from .heads_config import HeadsConfig
from .maskgit import sample
from .terms import HeadsLoss, difference_term, hidden_terms, horizons_that_count, kl_term
from .tokenised import tokenised_loss
from .upsampler import unpatchify


class HeadInputs(OptionalInputs):
    """All that heads read of a clip beside its frames."""

    hidden: Tensor
    actions: Tensor | None


class LossInputs(TypedDict, total=False):
    """What the loss reads beside outputs and frames; described in MultiFrameHeads.forward."""

    low_tokens: Mapping[int, Tensor] | None
    token_mask: Tensor | None
    position_weights: Tensor | None
    return_predictions: bool
    shares: Tensor | None
    seen: Tensor | None


class ForwardInputs(OptionalInputs, LossInputs, total=False):
    latent_noise: Tensor | None


class MultiFrameHeads(Branches):
    """Drop-in heads that predict several future frames from a hidden state [B, T, H, W, D].

    Per horizon i, of offset k and factor f, with the hidden state at position n having seen frames and actions <= n:

        state_i = norm(avg_pool(hidden, pool_i) + sum(actions[:, n + 1 : n + k]))        (fan_out)
        pred_i  = linear_i(blocks_i(state_i))          patches of frame n + k at 1/f of its size
        loss    = sum_i weights_i * kind_i(pred_i + frame n at 1/f, frame n + k at 1/f) + consistency + terms

    where kind_i is the mean squared error unless the config says otherwise; or, for tokens, the cross-entropy of
    linear_i's logits against the ids of frame n + k, pooled by f. With conditioning "frames", state_i is that of an
    earlier horizon, after its blocks, joined with the real frames from there to n + k - 1 (mtp_combine), on the grid of
    horizon i. With config.raster, a causal decoder over the tokens of the near frame comes before linear_0.
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
        config = HeadsConfig() if config is None else config
        super().__init__(
            width,
            patch_size,
            config,
            channels=channels,
            ids_per_token=ids_per_token,
            head_width=head_width,
            rotary=rotary,
            window=window,
            window_start=window_start,
            near_head=near_head,
            grid=grid,
        )
        weights = config.horizon_weights
        self.uncertainty = Uncertainty(weights) if config.weighting == "uncertainty" else None
        self.gradient_norms = GradientNorms(weights[-self.sharing :]) if config.weighting == "gradients" else None

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
        grad_monitor: GradMonitor | None = None,
        **optional: Unpack[ForwardInputs],
    ) -> HeadsLoss:
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
            return_predictions: for tokens, also return the most likely ids of every horizon and position; with
                config.raster, those of the near frame given the true tokens before each.
            grad_monitor: for the horizons that share `hidden`: all K, without the near one if near_hidden or near_head
                is given, and without horizon 0 if the upsampler computes it. With weighting "gradients" or surgery, its
                scale is set here.
            latent_noise: [B, T, far horizons, config.latent], standard normal, for the draws of inferred latents. None:
                drawn here in training, and in evaluation the means are taken.
            shares: [K + 3, K], for a part of a larger batch: factors of the weights of horizons (the diagonal),
                consistency (above it), latent_consistency, temporal_difference and kl (the last rows), such that the
                mean of the parts' losses is the loss of the batch. There is none for contrast, whose negatives are
                those of the part.
            seen: the frames that the hidden state has seen, of video's shape, where they are not those of `video`, such
                as frames with noise or the model's own: a change is then predicted from these. The targets are those
                of `video`.
        """
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
                detached: ForwardInputs = {**optional, "near_hidden": None if near is None else near.detach()}
                loss, _ = self.loss_and_outputs(probe, actions, video, grad_monitor=measured, **detached)
                torch.autograd.grad(loss.total, probe)
                set_surgery_scale(grad_monitor, measured, balanced=self.gradient_norms is not None)
        return self.loss_and_outputs(hidden, actions, video, grad_monitor=grad_monitor, **optional)[0]

    def loss_and_outputs(
        self,
        hidden: Tensor,
        actions: Tensor | None,
        video: Tensor,
        *,
        inputs: Tensor | None = None,
        near_hidden: Tensor | None = None,
        segment_ids: Tensor | None = None,
        grad_monitor: GradMonitor | None = None,
        latent_noise: Tensor | None = None,
        **of_loss: Unpack[LossInputs],
    ) -> tuple[HeadsLoss, tuple[Tensor, ...]]:
        """The loss of all horizons and what `outputs` returns, without balancing gradients; arguments as in forward."""
        seen, shares = of_loss.get("seen"), of_loss.get("shares")
        position_weights = of_loss.get("position_weights")
        latents: dict[str, Any] = {}
        if self.latents is None and latent_noise is not None:
            raise ValueError("latent_noise must be None for heads without latent")
        if self.latents is not None:
            # What counts is computed here, before Branches checks its arguments.
            batch, positions = self.layout.states("hidden", hidden).shape[:2]
            letters = "[B, V, C, H, W], or [B, V, S, C] with grid"
            check.tensor("video", video, (4, 5), letters, (torch.uint8, *check.FLOATING))
            if position_weights is not None:
                letters, size = "[B, T] or [B, T, K]", (batch, positions, len(self.config.horizons))
                check.tensor("position_weights", position_weights, (2, 3), letters, (torch.float32, torch.float64))
                check.shape("position_weights", position_weights, size[: position_weights.dim()], letters)
                check.same_device("position_weights", position_weights, "hidden", hidden)
            noise_size = (batch, positions, len(self.latents.far), self.latents.size)
            if latent_noise is not None:
                check.tensor("latent_noise", latent_noise, 4, "[B, T, far horizons, latent]")
                check.shape("latent_noise", latent_noise, noise_size, "[B, T, far horizons, latent]")
                check.same_device("latent_noise", latent_noise, "hidden", hidden)
            elif self.training:
                latent_noise = torch.randn(noise_size, device=hidden.device)
            counts = horizons_that_count(self.config.horizons, hidden, video, segment_ids, position_weights)
            latents = {"targets": video, "counts": counts, "latent_noise": latent_noise}
        outputs, states, shared, kl = self.branched(
            hidden,
            actions,
            video if seen is None else seen,
            inputs=inputs,
            near_hidden=near_hidden,
            segment_ids=segment_ids,
            grad_monitor=grad_monitor,
            **latents,
        )
        loss = self.loss(outputs, video, segment_ids=segment_ids, **of_loss)
        added, terms = hidden_terms(self.config, self.pools, shared, states, segment_ids, position_weights, shares)
        total = loss.total + added
        if kl is not None:
            added, of_latents = kl_term(self.config, kl, latents["counts"], position_weights, shares)
            total, terms = total + added, {**terms, **of_latents}
        return HeadsLoss(total, *loss[1:7], {**loss.terms, **terms}), outputs

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
    ) -> HeadsLoss:
        """The loss of what `outputs` returned, without contrast and latent_consistency, which read hidden states;
        arguments as in forward."""
        config = self.config
        self._check_loss(low_tokens, token_mask, return_predictions, shares)
        if seen is not None and self.residual:
            outputs = self._from_seen(outputs, video, seen)
        video, token_mask = self.layout.frames(video), self.layout.cells("token_mask", token_mask, 3)
        outputs = self._decoded(outputs, video)
        segment_ids = None if segment_ids is None else segment_ids[:, : video.shape[1]]
        weights: Any = config.horizon_weights if self.uncertainty is None else self.uncertainty.weights()
        consistency: Any = config.consistency
        if shares is not None:
            weights = times_shares(weights, shares.diagonal())
            if consistency is not None:
                pairs = torch.as_tensor(consistency).ndim == 2
                consistency = times_shares(consistency, shares[: len(shares[0])] if pairs else shares[0])
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
        total = loss.total
        terms: dict[str, Tensor] = {}
        if self.uncertainty is not None:
            counted = loss.counts > 0
            total = total + self.uncertainty.cost(counted if shares is None else counted * shares.diagonal())
        if config.temporal_difference:
            added, terms = difference_term(
                config, self.patches, self._means(outputs), video, segment_ids, position_weights, shares
            )
            total = total + added
        return HeadsLoss(total, *loss[1:], terms)

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
            check.tensor("shares", shares, 2, "[K + 3, K]")
            check.shape("shares", shares, (count + 3, count), "[K + 3, K]")

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
        video = self.layout.frames(video)
        options: dict[str, Any] = {"patch_sizes": self.patches, "residual": self.config.residual}
        segment_ids = None if segment_ids is None else segment_ids[:, : video.shape[1]]
        means = self._means(outputs)
        return multi_horizon_loss(means, video, self.config.horizons, segment_ids=segment_ids, **options).per_horizon

    def _means(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of pixels and latents without the log-scales of distributions."""
        return [patches.chunk(parts, -1)[0] for patches, parts in zip(outputs, self.parts, strict=True)]

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
        [B, T, H / f_i, W / f_i, vocabulary], or [..., ids_per_token, vocabulary] if there are several. With
        config.raster, those of horizon 0 follow the most likely tokens, each given those before it. With a grid, of
        tokens in one dimension where the frames given are.

        Args:
            near_only: only the near horizon, which a closed-loop rollout feeds back.
            temperature: of horizons that predict distributions or have latents: 0 gives their means, 1 samples of them,
                drawn with `generator`; in between, samples closer to the mean. Tokens are sampled from the logits, as
                rollouts do.
        """
        check_sampling(temperature, generator, hidden)
        if temperature and not self.draws(near_only):
            raise ValueError(f"temperature must be 0 where no horizon predicts a distribution, got {temperature}")
        draws: dict[str, Any] = {"temperature": temperature, "generator": generator}
        outputs = self.outputs(hidden, actions, video, near_only=near_only, **draws, **optional)
        return self.frames(outputs, video, **draws)

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
        if self.decoder is None:
            return self._logits(outputs)
        _, first = self.decoder.sample(outputs[0], self._head(0))
        return (self._in_layout(first), *self._logits(outputs[1:], first=1))

    def logits(self, outputs: Sequence[Tensor], video: Tensor) -> tuple[Tensor, ...]:
        """Of tokens, the logits that the loss reads, from what `outputs` returned: those of `frames`, but with
        config.raster each token of horizon 0 is given the true ones before it. video: as in loss."""
        if not self.tokens:
            raise ValueError(f'logits are of output "tokens", not of {self.config.output!r}')
        self._check_outputs(outputs)
        if not isinstance(video, Tensor):
            raise TypeError(f"video must be a torch.Tensor, got {type(video).__name__}")
        frames = self.layout.frames(video)
        self.layout.check_frames(frames, outputs[0], self.channels)
        return self._logits(self._decoded(outputs, frames))

    def _check_outputs(self, outputs: Sequence[Tensor]) -> None:
        """TypeError or ValueError unless they may be what `outputs` returned of tokens."""
        count = len(self.config.horizons)
        if not isinstance(outputs, tuple | list) or not 1 <= len(outputs) <= count:
            raise ValueError(f"outputs must be 1 to {count} tensors, those of the first horizons; got {outputs!r:.80}")
        for i, states in enumerate(outputs):
            check.tensor(f"outputs[{i}]", states, (5,), "[B, T, H, W, D]", check.FLOATING)
            device = next(self.parameters()).device
            if states.shape[-1] != self.width or states.device != device:
                raise ValueError(
                    f"outputs[{i}] must have D = {self.width} features on {device}, got {list(states.shape)} on "
                    f"{states.device}"
                )

    def draw_ids(
        self,
        outputs: Sequence[Tensor],
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Ids of horizon 0, [B, T, H, W(, ids_per_token)], from what `outputs` returned: the most likely ones at
        temperature 0, else samples from the top_k most likely; with config.raster, one token after another."""
        if not self.tokens:
            raise ValueError(f'draw_ids is for output "tokens", not for {self.config.output!r}')
        self._check_outputs(outputs)
        if top_k is not None:
            check.integer("top_k", top_k, least=1)
        check_sampling(temperature, generator, outputs[0])
        if self.decoder is None:
            return sample(self._logits(outputs[:1])[0], temperature, top_k, generator)
        ids, _ = self.decoder.sample(outputs[0], self._head(0), temperature, top_k, generator)
        ids = ids if self.grid is None else ids.flatten(2, 3)
        return ids if self.ids_per_token > 1 else ids.squeeze(-1)

    def _decoded(self, outputs: Sequence[Tensor], video: Tensor) -> Sequence[Tensor]:
        """The states that linear heads map to logits, given the true tokens of `video` where the decoder reads them."""
        if self.decoder is None:
            return outputs
        index = torch.arange(outputs[0].shape[1], device=video.device) + self.config.horizons.offsets[0]
        truth = video[:, index.clamp_max(video.shape[1] - 1)]
        return (self.decoder(outputs[0], truth), *outputs[1:])

    def _logits(self, states: Sequence[Tensor], first: int = 0) -> tuple[Tensor, ...]:
        """Of the horizons from `first` on."""
        ids = (self.ids_per_token, self.config.vocabulary)
        rows = (self._head(first + i)(state).float() for i, state in enumerate(states))
        return tuple(self._in_layout(logits.unflatten(-1, ids)) for logits in rows)

    def _in_layout(self, logits_BTHWFV: Tensor) -> Tensor:
        """As `predict` returns logits: in rows with a grid, and without F where tokens have one id."""
        z = logits_BTHWFV if self.grid is None else logits_BTHWFV.flatten(2, 3)
        return z if self.ids_per_token > 1 else z.squeeze(-2)

    def draws(self, near_only: bool = False) -> bool:
        """Whether any horizon (or the near one) predicts a distribution of frames, which a temperature concerns."""
        if self.latents is not None and not near_only:
            return True
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
