"""What a world model makes of held-out clips in the middle of its training: figures, and strips of pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfwm_kernels import GradMonitor, Horizons, video_pyramid

from .maskgit import training_mask
from .rollouts import rollout
from .world_model import WorldModel

# Of a rollout: frames that it starts from.
SEEN = 4


def names_of(horizons: Horizons) -> list[str]:
    """A name per horizon: its offset; with its factor where several horizons share an offset: "1@1/4"."""
    pairs = zip(horizons.offsets, horizons.factors, strict=True)
    return [str(k) if horizons.offsets.count(k) == 1 else f"{k}@1/{f}" for k, f in pairs]


def look(model: WorldModel, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of the horizons [K], accuracies of tokens, and where several share a hidden state how large their
    gradients into it are, and their cosines.

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
        outputs = model.heads.outputs(video=video, grad_monitor=monitor, **states)
        loss = model.heads.loss(outputs, video, segment_ids=segments, token_mask=mask)
        figures = {"per_horizon": loss.per_horizon}
        if loss.accuracy is not None:
            figures["accuracy"] = loss.accuracy
        if monitor is not None:
            torch.autograd.grad(loss.total, states["hidden"])
            figures |= {"gradient_norms": monitor.norms, "gradient_cosines": monitor.cosines}
    return figures


def strips(model: WorldModel, clips: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pictures [3, height, width] in 0..1, truth above prediction: what all horizons make of one position, and a
    closed-loop rollout. Of the first clip that lies in one episode; none where no clip does, or for other than pixels.
    """
    config, segments = model.config, clips["segment_ids"]
    alone = (segments == segments[:, :1]).all(1).nonzero()
    if config.heads.output != "pixels" or config.frame[0] != 3 or len(alone) == 0:
        return {}
    clip = {name: value[alone[0]] for name, value in clips.items()}
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
    found = {"horizons": strip(above, below)}
    if (horizons.offsets[0], horizons.factors[0]) == (1, 1) and video.shape[1] > SEEN:
        rolled = rollout(model, video[:, :SEEN], actions, video.shape[1] - SEEN)
        found["rollout"] = strip(list(truth[0, SEEN:]), list(rolled[0]))
    return found


def strip(above: list[Tensor], below: list[Tensor]) -> Tensor:
    """Two rows of pictures [3, h, w] in [-1, 1], the smaller ones enlarged, with a gap of a pixel."""
    height, width = above[0].shape[1:]
    rows = []
    for pictures in (above, below):
        full = [F.interpolate(picture[None].float(), (height, width))[0] for picture in pictures]
        rows.append(torch.cat([F.pad(picture, (0, 1, 0, 1), value=1.0) for picture in full], dim=2))
    return ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) / 2).cpu()
