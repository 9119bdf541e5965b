"""Evaluation of latents, as SVG is measured (arXiv 1802.07687): the best of several drawn frames, beside their mean.

Where chance decides, a single draw is usually wrong. Among several, one should be near what happened, and nearer than
the prediction at the prior's mean, which averages what could happen. How many nats the posterior adds to the prior
tells whether the latent is used at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics.intervals import interval
from ..metrics.quality import psnr
from ..models.terms import horizons_that_count
from ..models.world_model import WorldModel

# Draws of each predicted frame, unless told otherwise.
SAMPLES = 10


def latent_measures(
    model: WorldModel, clips: dict[str, Tensor], truths: Sequence[Tensor], samples: int, generator: torch.Generator
) -> dict[str, np.ndarray]:
    """Measures [clips, M] of the M horizons that have a latent, over the positions that count.

    truths: of every horizon, the true frames [B, T_i, C, h, w] of its first positions.
    latent_best: squared error of the best draw of each frame; latent_draws: mean of the errors of all `samples` draws;
    latent_prediction: of the prediction at the prior's mean; latent_kl: KL divergence from the posterior, which sees
    the target, to the prior, in nats. Draws are of z alone: of a distribution, the means that z leads to.
    """
    heads, video, segments = model.heads, clips["video"], clips["segment_ids"]
    assert heads.latents is not None
    far = heads.latents.far
    with torch.no_grad():
        states = model.states(video, clips["actions"], segments)

        def errors(temperature: float) -> list[Tensor]:
            """Of each horizon in `far`, those of every frame: [B, T_i]."""
            outputs = heads.outputs(video=video, temperature=temperature, generator=generator, **states)
            frames, found = heads.frames(outputs, video), []
            for i in far:
                difference = frames[i][:, : truths[i].shape[1]] - truths[i]
                found.append(difference.square().mean((2, 3, 4)))
            return found

        prediction = [each.mean(1) for each in errors(0.0)]
        best, total = None, None
        for _ in range(samples):
            drawn = errors(1.0)
            best = drawn if best is None else [torch.minimum(a, b) for a, b in zip(best, drawn, strict=True)]
            total = drawn if total is None else [a + b for a, b in zip(total, drawn, strict=True)]
        assert best is not None and total is not None
        counts = horizons_that_count(model.config.heads.horizons, states["hidden"], video, segments, None)
        _, kl_BTK = heads.latents.inferred(states["hidden"], video, counts)
        kl = kl_BTK.sum(1) / counts.sum(1).clamp_min(1)
    measures = {
        "latent_best": torch.stack([each.mean(1) for each in best], 1),
        "latent_draws": torch.stack([each.mean(1) / samples for each in total], 1),
        "latent_prediction": torch.stack(prediction, 1),
        "latent_kl": kl[:, list(far)],
    }
    return {name: value.cpu().numpy() for name, value in measures.items()}


def latent_summary(
    measures: dict[str, np.ndarray], names: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, Any] | int]:
    """Metrics of latent_measures, by the names of the M horizons, with 95% intervals over clips.

    latent_best_gain_95: of the best draw's PSNR over that of the prediction at the prior's mean.
    """

    def by_horizon(values: Any) -> dict[str, Any]:
        return dict(zip(names, np.asarray(values).tolist(), strict=True))

    metrics: dict[str, dict[str, Any] | int] = {"latent_samples": samples}
    for name in ("best", "draws", "prediction"):
        values = measures[f"latent_{name}"]
        metrics[f"latent_{name}_psnr"] = by_horizon(psnr(values.mean(0)))
        metrics[f"latent_{name}_psnr_95"] = by_horizon(interval(seed, psnr, values))
    gain = interval(seed, lambda a, b: psnr(a) - psnr(b), measures["latent_best"], measures["latent_prediction"])
    metrics["latent_best_gain_95"] = by_horizon(gain)
    metrics["latent_kl"] = by_horizon(measures["latent_kl"].mean(0))
    metrics["latent_kl_95"] = by_horizon(interval(seed, np.asarray, measures["latent_kl"]))
    return metrics
