"""Training of a world model on clips of a replay buffer: mfwm train."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mfwm_kernels import Horizons, video_pyramid
from mfwm_kernels import arguments as check

from ..data.replay import Replay, low_tokens
from ..metrics.quality import psnr
from ..models.cost import cost_of
from ..models.maskgit import training_mask
from ..models.terms import HeadsLoss, counts_of_terms
from ..models.world_model import WorldModel, WorldModelConfig, check_far_gradient
from .run_config import read
from .trainer import Objective, TrainerConfig, load_trained, train_on_replay
from .validation import prediction_strips, validation_figures

WeightSchedule = Literal["constant", "anneal", "grow"]


@dataclass(frozen=True)
class TrainingConfig(TrainerConfig):
    """One training run of a world model.

    Args:
        model: its sizes and heads.
        context_noise: Gaussian noise on the frames that the model sees, not on its targets, in units of the frames
            (pixels: -1..1). Each clip's standard deviation is drawn uniformly from 0 to this, and the model is told it
            (model.noise_condition), as in GameNGen (arXiv 2408.14837). Evaluation adds none.
        rollout_loss: the mean of this many losses, each but the first on frames that the model predicted itself: every
            frame after a clip's first is replaced by the near horizon's prediction of it in the pass before. Gradients
            do not pass through predicted frames. 1: the true frames only.
        weight_schedule: of the far horizons' weights. "constant"; "anneal": times a factor that falls linearly from 1
            to 0 over the run; "grow": the horizons join one after another in the first half of the run.
        far_gradient: False: the far horizons' losses train their heads and not the trunk, whose gradient
            is that of the near horizon alone. A placebo, to compare with.
        kl_warmup: the weight of the KL divergence of latents (model.heads.latent) rises linearly to model.heads.kl over
            so many steps.
    """

    model: WorldModelConfig = field(default_factory=WorldModelConfig)
    context_noise: float = 0.0
    rollout_loss: int = 1
    weight_schedule: WeightSchedule = "constant"
    far_gradient: bool = True
    kl_warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("context_noise", self.context_noise, least=0)
        check.integer("rollout_loss", self.rollout_loss, least=1)
        check.flag("far_gradient", self.far_gradient)
        if check.integer("kl_warmup", self.kl_warmup, least=0) and self.model.heads.latent is None:
            raise ValueError(f"kl_warmup must be 0 for a model without model.heads.latent, got {self.kl_warmup}")
        if self.context_noise and self.model.heads.output == "tokens":
            raise ValueError(
                f"context_noise must be 0 for tokens, which no Gaussian noise is added to, got {self.context_noise}"
            )
        if self.context_noise and not self.model.noise_condition:
            object.__setattr__(self, "model", replace(self.model, noise_condition=True))
        if self.rollout_loss > 1:
            check_rollout_loss(self.model)
        if not self.far_gradient:
            check_far_gradient(self.model.heads)
        if self.weight_schedule != "constant" and self.model.heads.weighting == "gradients":
            raise ValueError(
                f'weight_schedule must be "constant" with weighting "gradients", which gives each horizon its share of '
                f"the gradient whatever its loss is scaled by; got {self.weight_schedule!r}"
            )
        shortest = max(5, 1 + min(self.model.heads.horizons.offsets))
        if self.clip < shortest:
            raise ValueError(f"clip must be >= {shortest} (four frames to see and one to roll out), got {self.clip}")

    @property
    def frames_per_step(self) -> int:
        return self.batch * min(self.clip, self.model.context)


class WorldModelLoss(Objective):
    """The multi-frame loss of a world model. The options, and `steps`, are those of TrainingConfig."""

    factors: Tensor
    kl_factor: Tensor

    def __init__(
        self,
        model: WorldModel,
        *,
        context_noise: float = 0.0,
        rollout_loss: int = 1,
        weight_schedule: WeightSchedule = "constant",
        far_gradient: bool = True,
        kl_warmup: int = 0,
        steps: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.context_noise, self.rollout_loss, self.far_gradient = context_noise, rollout_loss, far_gradient
        self.weight_schedule, self.kl_warmup, self.steps = weight_schedule, kl_warmup, steps
        heads = model.config.heads
        # A tensor, because torch.compile would compile a new graph for each new number.
        self.register_buffer("factors", torch.ones(len(heads.horizons)), persistent=False)
        self.register_buffer("kl_factor", torch.ones(()), persistent=False)
        # Losses of different kinds are in different units: viewers show "2_gaussian" beside "1".
        labels = zip(heads.horizons.labels, heads.kinds, strict=True)
        self.names = [label if kind == "mse" else f"{label}_{kind}" for label, kind in labels]

    def begin_step(self, step: int) -> None:
        if self.weight_schedule != "constant":
            offsets = self.model.config.heads.horizons.offsets
            self.factors.copy_(torch.tensor(far_factors(self.weight_schedule, offsets, step / self.steps)))
        if self.kl_warmup:
            self.kl_factor.fill_(min(1.0, (step + 1) / self.kl_warmup))

    def random_inputs(self, clips: dict[str, Tensor]) -> dict[str, Tensor]:
        video, found = clips["video"], {}
        if self.model.config.masked:
            found["token_mask"] = training_mask(video.shape[0], video.shape[1], self.model.grid, video.device)
        if self.context_noise:
            found["noise"] = self.context_noise * torch.rand(video.shape[0], device=video.device)
            found["noise_on_frames"] = torch.randn(video.shape, device=video.device)
        latents = self.model.heads.latents
        if latents is not None:
            positions = min(video.shape[1], self.model.config.context)
            size = (video.shape[0], positions, len(latents.far), latents.size)
            found["latent_noise"] = torch.randn(size, device=video.device)
        return found

    def counts(self, clips: dict[str, Tensor]) -> Tensor:
        config = self.model.config
        if config.heads.weighting == "gradients" or config.heads.surgery:
            raise ValueError(
                'weighting "gradients" and surgery need the gradients of a whole batch at once: '
                "processes * accumulate must be 1"
            )
        if config.heads.contrast:
            raise ValueError(
                "contrast needs the negatives of a whole batch at once: processes * accumulate must be 1, got contrast "
                f"{config.heads.contrast}"
            )
        segments, mask = clips["segment_ids"], clips.get("token_mask")
        return positions_that_count(config.heads.horizons, segments, config.context, mask)

    def forward(self, clips: dict[str, Tensor], shares: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        scheduled = self._scheduled(shares)
        if self.rollout_loss == 1:
            seen = self._noisy(clips, clips["video"]) if self.context_noise else None
            loss = self.model(
                clips["video"],
                clips.get("actions"),
                clips["segment_ids"],
                low_tokens=low_tokens(clips),
                token_mask=clips.get("token_mask"),
                seen=seen,
                noise=clips.get("noise"),
                far_gradient=self.far_gradient,
                shares=scheduled,
                latent_noise=clips.get("latent_noise"),
            )
            total = loss.total
        else:
            losses = list(self._losses_of_rollout(clips, scheduled))
            # The figures are those on true frames, as without this option.
            loss, total = losses[0], torch.stack([each.total for each in losses]).mean()
        figures = {"per_horizon": loss.per_horizon, "consistency": loss.consistency, **loss.terms}
        if loss.accuracy is not None:
            figures["accuracy"] = loss.accuracy
        if shares is not None:
            count = len(self.factors)
            rows = dict(zip(("latent_consistency", "temporal_difference", "kl"), shares[count:], strict=True))
            rows["consistency"] = shares[0] if loss.consistency.ndim == 1 else shares[:count]
            figures = {name: means * rows.get(name, shares.diagonal()) for name, means in figures.items()}
        return total, figures

    def _losses_of_rollout(self, clips: dict[str, Tensor], shares: Tensor | None) -> Iterator[HeadsLoss]:
        """The loss on the true frames, then on those predicted from them, then on those predicted from these ..."""
        model, video, segment_ids = self.model, clips["video"], clips["segment_ids"]
        frames = video
        for last in (*(False,) * (self.rollout_loss - 1), True):
            seen = self._noisy(clips, frames)
            states = model.states(
                seen, clips.get("actions"), segment_ids, noise=clips.get("noise"), far_gradient=self.far_gradient
            )
            loss, outputs = model.heads.loss_and_outputs(
                video=video,
                seen=seen,
                low_tokens=low_tokens(clips),
                shares=shares,
                latent_noise=clips.get("latent_noise"),
                **states,
            )
            yield loss
            if not last:
                with torch.no_grad():
                    frames = fed_back(model.heads.frames(outputs[:1], seen)[0], video, segment_ids)

    def _noisy(self, clips: dict[str, Tensor], frames: Tensor) -> Tensor:
        if not self.context_noise:
            return frames
        (pixels,) = video_pyramid(frames, (1,), dtype=torch.float32)
        return pixels + clips["noise"].view(-1, 1, 1, 1, 1) * clips["noise_on_frames"]

    def _scheduled(self, shares: Tensor | None) -> Tensor | None:
        """The shares times the factors of this step's weights; consistency of a pair has those of its far horizon."""
        if self.weight_schedule == "constant" and not self.kl_warmup:
            return shares
        rows = torch.cat([self.factors.expand(len(self.factors) + 2, -1), self.kl_factor * self.factors[None]])
        return rows * (1 if shares is None else shares)

    def validate(self, clips: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        # Pictures first: the backward in validation_figures makes FSDP release the gathered weights.
        pictures = prediction_strips(self.model, clips)
        found: dict[str, Any] = {name: value.tolist() for name, value in validation_figures(self.model, clips).items()}
        if self.model.config.heads.output == "pixels":
            found["psnr"] = [psnr(error) for error in found.get("squared_error", found["per_horizon"])]
        return found, pictures


def objective_of(config: TrainingConfig) -> WorldModelLoss:
    return WorldModelLoss(
        WorldModel(config.model),
        context_noise=config.context_noise,
        rollout_loss=config.rollout_loss,
        weight_schedule=config.weight_schedule,
        far_gradient=config.far_gradient,
        kl_warmup=config.kl_warmup,
        steps=config.steps,
    )


def far_factors(schedule: WeightSchedule, offsets: Sequence[int], progress: float) -> list[float]:
    """The factor of each horizon's weight when `progress` of the run, 0..1, is done; that of the nearest offset is 1.

    >>> far_factors("anneal", (1, 2, 4, 8), 0.25)
    [1.0, 0.75, 0.75, 0.75]
    >>> far_factors("grow", (1, 2, 4, 8), 0.25)
    [1.0, 1.0, 0.5, 0.0]
    """
    ranks = [sorted(set(offsets)).index(offset) for offset in offsets]
    if schedule == "constant" or max(ranks) == 0:
        return [1.0] * len(ranks)
    if schedule == "anneal":
        return [1.0 if rank == 0 else 1 - progress for rank in ranks]
    return [1.0 if rank == 0 else min(1.0, max(0.0, 2 * progress * max(ranks) - (rank - 1))) for rank in ranks]


def check_rollout_loss(model: WorldModelConfig) -> None:
    horizons = model.heads.horizons
    if model.masked or (horizons.offsets[0], horizons.factors[0]) != (1, 1):
        raise ValueError(
            "rollout_loss above 1 feeds back the near horizon's frames, which must be of offset 1 and factor 1, in a "
            f"model that is not masked; got {horizons}, masked = {model.masked}"
        )
    if model.heads.weighting == "gradients" or model.heads.surgery:
        raise ValueError('rollout_loss must be 1 with weighting "gradients" and surgery, which balance one pass')


def fed_back(predicted: Tensor, video: Tensor, segment_ids: Tensor) -> Tensor:
    """`video` with the frames that were predicted in place of the true ones, as pixels in fp32, or as ids.

    predicted [B, T, ...]: at n, the prediction of frame n + 1 (of tokens, its logits). The first frame of a segment,
    which nothing predicts, and frames past T stay the true ones.
    """
    if video.dtype in check.INTEGER_IDS:
        frames, predicted = video, predicted.argmax(-1).to(video.dtype)
    else:
        (frames,) = video_pyramid(video, (1,), dtype=torch.float32)
    count = min(predicted.shape[1], video.shape[1] - 1)
    inside = segment_ids[:, 1 : count + 1] == segment_ids[:, :count]
    inside = inside.view(*inside.shape, *(1,) * (video.ndim - 2))
    after = torch.where(inside, predicted[:, :count], frames[:, 1 : count + 1])
    return torch.cat([frames[:, :1], after, frames[:, count + 1 :]], dim=1)


def positions_that_count(
    horizons: Horizons, segment_ids: Tensor, context: int, token_mask: Tensor | None = None
) -> Tensor:
    """[K + 3, K]: on the diagonal the positions where each horizon counts, at [i, j] those of the consistency of i and
    j, in the last rows those of latent_consistency, temporal_difference and kl.

    segment_ids [B, V]; the horizons are predicted from the first `context` frames of it. With token_mask [B, V, H, W],
    a horizon of offset 0 counts in cells: those with a masked token.
    """
    frames = segment_ids.shape[1]
    offsets, positions = horizons.offsets, min(frames, context)
    valid = [horizons.valid(i, positions, frames, segment_ids) for i in range(len(offsets))]
    counts = torch.zeros(len(offsets), len(offsets), device=segment_ids.device)
    for i, j in itertools.combinations_with_replacement(range(len(offsets)), 2):
        # The far prediction at n against the near one at n + apart.
        apart = offsets[j] - offsets[i]
        both = valid[j][:, : max(0, positions - apart)] & valid[i][:, apart:]
        if i == j and offsets[i] == 0 and token_mask is not None:
            cells = F.max_pool2d(token_mask[:, :positions].float(), horizons.factors[i]) > 0
            both = both[..., None, None] & cells
        counts[i, j] = both.sum()
    return torch.cat([counts, counts_of_terms(horizons, positions, frames, segment_ids)])


def training_flops(config: TrainingConfig) -> float:
    """FLOPs of an optimiser step. A backward takes twice those of its forward; rollout_loss repeats both."""
    model = config.model
    return 3 * cost_of(model).flops * model.context * config.batch * config.rollout_loss


def train(config: TrainingConfig, out: Path, *, progress: bool = True, stop_after: int | None = None) -> WorldModel:
    """Train in `out`, or resume the run with the same config and data set there. Returns the model.

    Signals and stop_after as in Trainer.fit.
    """
    if progress:
        print(f"{training_flops(config) / 1e9:.1f} GFLOP per step")
    return train_on_replay(objective_of, config, out, progress, stop_after).model


def for_replay(config: TrainingConfig, replay: Replay) -> TrainingConfig:
    """The config with the frame size and actions of the data."""
    if config.model.heads.vocabulary != replay.vocabulary:
        raise ValueError(
            f"model.heads.vocabulary must be that of the data, {replay.vocabulary} (0 for pixels), "
            f"got {config.model.heads.vocabulary}"
        )
    heads = config.model.heads
    if heads.token_targets == "tokenised" and not set(heads.horizons.factors) - {1} <= set(replay.low_factors):
        raise ValueError(
            f'model.heads.token_targets "tokenised" needs the ids of smaller frames at each factor of '
            f"{heads.horizons}, and {replay.path} has those of {list(replay.low_factors)}: mfwm encode "
            "--low-tokenizers writes them"
        )
    model = replace(
        config.model,
        frame=replay.frame,
        actions=replay.actions or 0,
        action_size=0 if replay.actions else replay.action.shape[1],
    )
    return replace(config, model=model)


def load_config(run: Path) -> TrainingConfig:
    """The config that a run was started with. ValueError names file, rule and value where it is not valid."""
    return read(TrainingConfig, run)[0]


def load_model(run: Path) -> tuple[WorldModel, TrainingConfig, int]:
    """The trained model of a run (its moving average, where it keeps one), its config and its step."""
    objective, config, step = load_trained(TrainingConfig, objective_of, run)
    return objective.model.eval(), config, step
