"""WorldModel: a space-time transformer on patches or tokens, with multi-frame heads on its hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfwm_kernels import GradMonitor, video_pyramid
from mfwm_kernels import arguments as check

from ..checks import check_choices, check_frame, options_repr
from .blocks import SpaceTimeBlock, TimeCache, compute_dtype, initialise, time_mask
from .distributions import Distribution
from .heads import HeadInputs, MultiFrameHeads
from .heads_config import HeadsConfig
from .maskgit import training_mask
from .terms import HeadsLoss


@dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of a world model.

    Args:
        frame: (channels, height, width) of pixels or latents; of tokens (ids per token, rows, columns).
        patch: side of a token in pixels; 1 for frames of tokens.
        width, layers, head_width, mlp_ratio: of the transformer; width / head_width attention heads.
        context: positions of the hidden state, and the number of frames that a rollout sees.
        actions: number of discrete actions; 0 if there are none.
        action_size: length of a continuous action vector; 0 if actions are discrete.
        positions: how the trunk encodes the time of a frame: an embedding "learned" for each position of the context,
            or queries and keys rotated by it ("rope").
        window: frames that attention in time reaches, the current one included; None: all. With a window, a rollout
            costs one position per frame however long it gets, also past the context, and so it needs "rope".
        masked: MaskGIT: position n sees frame n with most tokens masked, and the action before it. Horizon 0, of offset
            0, predicts the masked tokens; the article's offsets are 0, 1, 3, 7.
        noise_condition: the model is told how strong the noise on the frames is that it sees, a standard deviation per
            clip. Training with context_noise needs it.
        recompute: activation checkpointing: store only the input of each trunk layer, and run the layer again in the
            backward.
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
    window: int | None = None
    masked: bool = False
    noise_condition: bool = False
    recompute: bool = False
    heads: HeadsConfig = field(default_factory=HeadsConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("patch", "width", "layers", "head_width", "mlp_ratio", "context"):
            check.integer(name, getattr(self, name), least=1)
        for name in ("actions", "action_size"):
            check.integer(name, getattr(self, name), least=0)
        check_frame(self.frame)
        _, height, width = self.frame
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch = {self.patch} does not divide the frame {height} x {width}")
        if self.heads.output == "tokens" and self.patch != 1:
            raise ValueError(f"patch must be 1 for frames of tokens, got {self.patch}")
        if self.width % self.head_width:
            raise ValueError(f"head_width must divide width = {self.width}, got {self.head_width}")
        rotary = self.positions == "rope" or self.heads.attend == "inputs" or self.heads.raster is not None
        if self.head_width % 2 and rotary:
            raise ValueError(f"head_width must be even for rotary positions, got {self.head_width}")
        if self.window is not None and (self.window < 1 or self.positions != "rope"):
            raise ValueError(
                f'window must be >= 1, with positions "rope"; got {self.window}, with positions "{self.positions}"'
            )
        if self.actions and self.action_size:
            raise ValueError(
                f"actions are discrete or continuous: got actions = {self.actions}, action_size = {self.action_size}"
            )
        if not (self.actions or self.action_size) and self.heads.conditioning == "actions":
            raise ValueError('heads.conditioning must be "none" for a model without actions')
        if self.masked and (
            self.heads.output != "tokens" or self.heads.horizons.offsets[0] or self.heads.conditioning == "frames"
        ):
            raise ValueError(
                'masked needs heads of output "tokens", of offset 0 first, and conditioning "actions" or "none"; got '
                f"{self.heads.output!r}, {self.heads.horizons.offsets}, {self.heads.conditioning!r}"
            )
        if self.noise_condition and self.heads.output == "tokens":
            raise ValueError("noise_condition must be False for frames of tokens, which no Gaussian noise is added to")
        tap = self.heads.tap
        if tap is not None and not 1 <= tap < self.layers:
            raise ValueError(f"heads.tap must be in 1..{self.layers - 1} for {self.layers} layers, got {tap}")


class WorldModel(nn.Module):
    """Predicts frames n + 1, n + 2, n + 4 and n + 8 from frames and actions up to n.

    Genie's ST-transformer (arXiv 2402.15391) on patches or tokens. Action n is taken at frame n and leads to frame
    n + 1; its embedding is added to every token of frame n. So the hidden state of position n has seen every action
    that frame n + 1 depends on, and horizon k lacks the actions n + 1 .. n + k - 1, its action window.
    """

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = config.heads.output == "tokens"
        config.heads.check_frame(config.frame, config.patch)
        channels, height, width = config.frame
        self.grid = (height // config.patch, width // config.patch)
        # Shape of a frame in `video`: images have their channels first, tokens their `channels` ids last.
        self.frame_shape = config.frame
        if self.tokens:
            self.frame_shape = (height, width, channels) if channels > 1 else (height, width)  # type: ignore[assignment]
            self.embed: nn.Module = nn.Embedding(channels * config.heads.vocabulary, config.width)
        else:
            self.embed = nn.Linear(channels * config.patch**2, config.width)
        self.token_position = nn.Parameter(0.1 * torch.randn(self.grid[0] * self.grid[1], config.width))
        self.time = None
        if config.positions == "learned":
            self.time = nn.Parameter(0.1 * torch.randn(config.context, 1, config.width))
        # A table each, because actions that led to a frame and actions still to come mean different things.
        self.action, self.window_action = self._action_embedding(), None
        if config.heads.conditioning == "actions":
            self.window_action = self._action_embedding()
        rotary = config.positions == "rope"
        self.layers = nn.ModuleList(
            SpaceTimeBlock(config.width, config.head_width, config.mlp_ratio, rotary) for _ in range(config.layers)
        )
        initialise(self, depth=config.layers)
        self.heads = MultiFrameHeads(
            config.width,
            config.patch,
            config.heads,
            channels=3 if self.tokens else channels,
            ids_per_token=channels if self.tokens else 1,
            head_width=config.head_width,
            rotary=rotary,
            window=config.window,
            window_start=0 if config.masked else 1,
        )
        self.mask = nn.Parameter(0.1 * torch.randn(config.width)) if config.masked else None
        # Without a bias, so that frames without noise get the same embedding as in a model without this condition.
        self.noise = nn.Linear(1, config.width, bias=False) if config.noise_condition else None

    def _action_embedding(self) -> nn.Module | None:
        if self.config.actions:
            table = nn.Embedding(self.config.actions, self.config.width)
            nn.init.normal_(table.weight, std=0.5)
            return table
        return nn.Linear(self.config.action_size, self.config.width) if self.config.action_size else None

    def extra_repr(self) -> str:
        return options_repr(self.config, "frame", "patch", "width", "layers", "context", "actions")

    def check_inputs(self, video: Tensor, actions: Tensor | None) -> None:
        """Raise where frames or actions do not fit this model. Values of ids are not checked."""
        dtypes = (torch.int32, torch.int64) if self.tokens else (torch.uint8, *check.FLOATING)
        letters = "[B, T, ...] with frames of " + repr(self.frame_shape)
        check.tensor("video", video, 2 + len(self.frame_shape), letters, dtypes)
        if tuple(video.shape[2:]) != self.frame_shape:
            raise ValueError(f"video must have frames of shape {self.frame_shape}, got {tuple(video.shape[2:])}")
        check.non_zero_sizes("video", video, ())
        if actions is None or self.action is None:
            return
        size = self.config.action_size
        letters = "[B, T_a, action_size]" if size else "[B, T_a]"
        check.tensor("actions", actions, 3 if size else 2, letters, check.FLOATING if size else check.INTEGER_IDS)
        check.same_device("actions", actions, "video", video)
        if actions.shape[0] != video.shape[0]:
            raise ValueError(f"actions must have as many clips as video, {video.shape[0]}, got {list(actions.shape)}")
        if size and actions.shape[2] != size:
            raise ValueError(f"actions must be vectors of action_size = {size}, got shape {list(actions.shape)}")

    def action_embeddings(self, actions: Tensor | None, segment_ids: Tensor | None = None) -> Tensor | None:
        """[B, V, D]: the embedding of the last action that each position has seen.

        That is its own action; in a masked model the one before, with one entry more for the frame that would follow.
        actions: [B, V] ids or [B, V, A] vectors.
        """
        if self.action is None:
            return None
        if actions is None:
            raise ValueError("actions must be given: this model is conditioned on them")
        taken_BVD = self.action(actions)
        if not self.config.masked:
            return taken_BVD
        if segment_ids is not None:
            same = F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (0, 1))
            taken_BVD = taken_BVD * same[..., None]
        return F.pad(taken_BVD, (0, 0, 1, 0))

    def embedded(
        self,
        video: Tensor,
        taken_BVD: Tensor | None,
        token_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """[B, V, H, W, D]: the embedding of every frame plus that of the action it has seen, without a time.

        video: [B, V, C, height, width], uint8 or floating; for tokens, ids [B, V, rows, columns], or
        [..., ids_per_token] if there are several. token_mask: [B, V, rows, columns], True for tokens to hide.
        noise: [B], the standard deviation of the noise on each clip's frames; None: 0.
        """
        dtype = compute_dtype(self.token_position)
        if self.tokens:
            ids_per_token, vocabulary = self.config.frame[0], self.config.heads.vocabulary
            ids = video.unsqueeze(-1) if ids_per_token == 1 else video
            rows = ids + vocabulary * torch.arange(ids_per_token, device=ids.device)
            x_BVSD = self.embed(rows).sum(-2).flatten(2, 3).to(dtype)
        else:
            (patches,) = video_pyramid(video, (1,), patch_sizes=(self.config.patch,), dtype=dtype)
            x_BVSD = self.embed(patches)
        if token_mask is not None:
            assert self.mask is not None
            x_BVSD = torch.where(token_mask.flatten(2)[..., None], self.mask.to(dtype), x_BVSD)
        x_BVSD = x_BVSD + self.token_position
        if taken_BVD is not None:
            x_BVSD = x_BVSD + taken_BVD[:, : video.shape[1], None]
        if noise is not None:
            assert self.noise is not None
            x_BVSD = x_BVSD + self.noise(noise[:, None]).to(dtype)[:, None, None]
        return x_BVSD.unflatten(2, self.grid)

    def trunk(
        self, inputs: Tensor, segment_ids: Tensor | None = None, *, caches: Sequence[TimeCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The hidden state [B, T, H, W, D] that the horizons share, and the near horizon's own if heads.tap is set.

        inputs [B, T, H, W, D] as from `embedded`, at most `context` positions, or any number with a window; segment_ids
        [B, T]: attention stays within one; caches: a TimeCache per layer, of the frames before these, which are added.
        """
        tap, first = self.config.heads.tap, 0 if caches is None else caches[0].length
        end = first + inputs.shape[1]
        if end > self.config.context and self.config.window is None:
            raise ValueError(f"video must have at most context = {self.config.context} frames, got {end}")
        x_BTSD = inputs.flatten(2, 3)
        if self.time is not None:
            x_BTSD = x_BTSD + self.time[first:end]
        mask = time_mask(segment_ids, inputs.shape[1], self.config.window, inputs.device)
        shared = None
        for depth, layer in enumerate(self.layers):
            cache = None if caches is None else caches[depth]
            if self.config.recompute and torch.is_grad_enabled():
                x_BTSD = checkpoint(layer, x_BTSD, mask, use_reentrant=False)
            else:
                x_BTSD = layer(x_BTSD, mask, cache)
            if depth + 1 == tap:
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
        token_mask: Tensor | None = None,
        seen: Tensor | None = None,
        noise: Tensor | None = None,
        far_gradient: bool = True,
        grad_monitor: GradMonitor | None = None,
        shares: Tensor | None = None,
        latent_noise: Tensor | None = None,
    ) -> HeadsLoss:
        """The loss over the first `context` positions of a clip.

        Frames past the context are targets only: with V = context + the longest offset every position has all its
        targets.

        Args:
            video: [B, V, C, height, width], or ids [B, V, rows, columns(, ids_per_token)].
            actions: [B, V], or [B, V, A] of continuous ones; None for a model without actions.
            segment_ids: [B, V], the episode of each frame.
            token_mask: [B, V, rows, columns], the tokens that a masked model does not see; sampled as in Genie if not
                given.
            seen: what the model sees in place of `video`, of the same shape: frames with noise, or predicted ones.
            noise: [B], the standard deviation of the noise on them, for a model with noise_condition.
            far_gradient: False: the far horizons' losses train their heads only, not the hidden state that they share.
            low_tokens, grad_monitor, shares, latent_noise: as in MultiFrameHeads.
        """
        if self.config.masked and token_mask is None:
            token_mask = training_mask(video.shape[0], video.shape[1], self.grid, video.device)
        read = video if seen is None else seen
        states = self.states(read, actions, segment_ids, token_mask, noise=noise, far_gradient=far_gradient)
        return self.heads(
            video=video,
            seen=seen,
            low_tokens=low_tokens,
            token_mask=token_mask,
            grad_monitor=grad_monitor,
            shares=shares,
            latent_noise=latent_noise,
            **states,
        )

    def outputs(
        self, video: Tensor, actions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs of the heads at the first `context` positions, which heads.loss takes."""
        return self.heads.outputs(video=video, **self.states(video, actions, segment_ids))

    @torch.no_grad()
    def predict(
        self,
        video: Tensor,
        actions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        near_only: bool = False,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """The prediction of every horizon at the first `context` positions.

        Frames [B, T, C, height / f_i, width / f_i], or logits [B, T, H / f_i, W / f_i, (ids_per_token,) vocabulary].
        temperature, generator: of horizons that predict distributions, as in MultiFrameHeads.predict.
        """
        states = self.states(video, actions, segment_ids)
        options = {"near_only": near_only, "temperature": temperature, "generator": generator}
        return self.heads.predict(video=video, **options, **states)  # type: ignore[arg-type]

    @torch.no_grad()
    def distributions(
        self, video: Tensor, actions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Distribution, ...]:
        """Mean and log-scale of every horizon's frames at the first `context` positions; for pixels and latents."""
        return self.heads.distributions(video=video, **self.states(video, actions, segment_ids))

    def states(
        self,
        video: Tensor,
        actions: Tensor | None,
        segment_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        far_gradient: bool = True,
    ) -> HeadInputs:
        """What the heads read: hidden states of the positions, and inputs and window embeddings of all V frames.

        noise, far_gradient: as in forward.
        """
        self.check_inputs(video, actions)
        positions = min(video.shape[1], self.config.context)
        frames = video.shape[1] if self.config.heads.conditioning == "frames" else positions
        segments = None if segment_ids is None else segment_ids[:, :frames]
        taken = self.action_embeddings(None if actions is None else actions[:, :frames], segments)
        inputs = self.embedded(video[:, :frames], taken, None if token_mask is None else token_mask[:, :frames], noise)
        hidden, near_hidden = self.trunk(inputs[:, :positions], segments)
        if not far_gradient:
            check_far_gradient(self.config.heads)
            near_hidden = hidden if near_hidden is None else near_hidden
            hidden = hidden.detach()
        return {
            "hidden": hidden,
            "near_hidden": near_hidden,
            "inputs": inputs,
            "actions": None if self.window_action is None else self.window_action(actions),
            "segment_ids": segment_ids,
        }


def check_far_gradient(heads: HeadsConfig) -> None:
    """ValueError where far horizons reach the trunk by another way than the hidden state that they share."""
    balanced = heads.weighting == "gradients" or heads.surgery
    if balanced or heads.conditioning == "frames" or heads.attend == "inputs":
        raise ValueError(
            'far_gradient must be True with conditioning "frames" and attend "inputs", whose horizons reach the '
            'trunk by its inputs too, and with weighting "gradients" and surgery, which balance gradients of the '
            f"trunk; got {heads.conditioning!r}, {heads.attend!r}, {heads.weighting!r} and {heads.surgery}"
        )
    if heads.contrast:
        raise ValueError(
            f"far_gradient must be True with contrast, which trains the trunk alone; got contrast {heads.contrast}"
        )
    if heads.consistency is not None and heads.detach != "near":
        raise ValueError(
            'far_gradient must be True with consistency unless detach is "near": far horizons would reach the trunk '
            f"through the near one; got detach {heads.detach!r}"
        )


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
