"""Validation of a world model during its training: figures of held-out clips, and pictures of predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfwm_kernels import GradMonitor, video_pyramid

from ..data.replay import low_tokens
from ..models.maskgit import training_mask
from ..models.rollouts import rollout
from ..models.world_model import WorldModel

# Real frames that a pictured rollout starts from.
CONTEXT = 4


def validation_figures(model: WorldModel, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of the horizons [K], further terms of the loss, accuracies of tokens, squared errors where losses are of
    another kind, and, where several horizons share a hidden state, the norms and cosines of their gradients into it.

    Costs a forward of the model and a backward of the heads, and leaves no gradient in either.
    """
    config, video, segments = model.config.heads, clips["video"], clips["segment_ids"]
    mask = training_mask(video.shape[0], video.shape[1], model.grid, video.device) if model.config.masked else None
    monitor = None
    if config.conditioning != "frames" and config.sharing > 1:
        monitor = GradMonitor(config.sharing, device=video.device)
    with torch.no_grad():
        states = model.states(video, clips.get("actions"), segments, mask)
    with torch.enable_grad():
        states["hidden"] = states["hidden"].detach().requires_grad_()
        loss, outputs = model.heads.loss_and_outputs(
            video=video, low_tokens=low_tokens(clips), token_mask=mask, grad_monitor=monitor, **states
        )
        figures = {"per_horizon": loss.per_horizon, **loss.terms}
        if loss.accuracy is not None:
            figures["accuracy"] = loss.accuracy
        if not model.tokens and (config.motion_gain or set(config.kinds) != {"mse"}):
            figures["squared_error"] = model.heads.squared_errors(outputs, video, segments)
        if monitor is not None:
            torch.autograd.grad(loss.total, states["hidden"])
            figures |= {"gradient_norms": monitor.norms, "gradient_cosines": monitor.cosines}
    return figures


def prediction_strips(model: WorldModel, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pictures [3, height, width] in 0..1, truth above prediction: all horizons from one position, and a rollout.

    They show the first clip that lies in one episode. Where no clip does, or the frames are not RGB, there are none.
    """
    config, segments = model.config, clips["segment_ids"]
    in_one_episode = (segments == segments[:, :1]).all(1).nonzero()
    if config.heads.output != "pixels" or config.frame[0] != 3 or len(in_one_episode) == 0:
        return {}
    clip = {name: value[in_one_episode[0]] for name, value in clips.items()}
    video, actions, horizons = clip["video"], clip.get("actions"), config.heads.horizons
    pyramid = video_pyramid(video, horizons.factors, dtype=torch.float32)
    (truth,) = video_pyramid(video, (1,), dtype=torch.float32)
    predictions = model.predict(video, actions, clip["segment_ids"])
    position = max(0, min(config.context, video.shape[1] - horizons.offsets[-1]) - 1)
    above, below = [truth[0, position]], [truth[0, position]]
    for offset, level, prediction in zip(horizons.offsets, pyramid, predictions, strict=True):
        if position + offset < video.shape[1]:
            above.append(level[0, position + offset])
            below.append(prediction[0, position])
    strips = {"horizons": strip(above, below)}
    if (horizons.offsets[0], horizons.factors[0]) == (1, 1) and video.shape[1] > CONTEXT:
        rolled = rollout(model, video[:, :CONTEXT], actions, video.shape[1] - CONTEXT)
        strips["rollout"] = strip(list(truth[0, CONTEXT:]), list(rolled[0]))
    return strips


def strip(above: list[Tensor], below: list[Tensor]) -> Tensor:
    """Two rows of pictures [3, h, w] in [-1, 1], smaller ones enlarged, with a gap of one pixel."""
    height, width = above[0].shape[1:]
    rows = []
    for pictures in (above, below):
        full = [F.interpolate(picture[None].float(), (height, width))[0] for picture in pictures]
        rows.append(torch.cat([F.pad(picture, (0, 1, 0, 1), value=1.0) for picture in full], dim=2))
    return ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) / 2).cpu()
