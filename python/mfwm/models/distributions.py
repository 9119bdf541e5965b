"""Predicted frames as distributions: the likelihood of the true frame, intervals that should cover it, and samples."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Of a loss; multi_horizon_loss has the formulas.
Kind = Literal["mse", "l1", "huber", "charbonnier", "gaussian", "laplace"]
# Kinds whose heads predict a log-scale beside each mean.
DISTRIBUTIONS = ("gaussian", "laplace")
# Log-scales are clamped to +-LOG_SCALE_LIMIT, as in the loss.
LOG_SCALE_LIMIT = 10.0


class Distribution(NamedTuple):
    """What a horizon predicts of every element of a frame; the elements are independent.

    mean: [B, T, C, h, w], in fp32.
    log_scale: of that shape: of "gaussian" the log-variance, of "laplace" the log of the mean deviation. None for other
        kinds, which predict the mean alone.
    """

    kind: Kind
    mean: Tensor
    log_scale: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """Of "gaussian" the standard deviation, of "laplace" the mean deviation."""
        s = self._predicted_scale()
        return torch.exp(0.5 * s if self.kind == "gaussian" else s)

    def draw(self, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """The mean plus `temperature` times the deviation of a sample from it: 0 gives the mean, 1 a sample."""
        if self.log_scale is None or temperature == 0:
            return self.mean
        if self.kind == "gaussian":
            noise = torch.empty_like(self.mean).normal_(generator=generator)
        else:
            noise = torch.empty_like(self.mean).exponential_(generator=generator)
            noise = noise - torch.empty_like(self.mean).exponential_(generator=generator)
        return self.mean + temperature * self.scale * noise

    def negative_log_likelihood(self, truth: Tensor) -> Tensor:
        """-log of the density at every element of `truth`, in nats."""
        s, difference = self._predicted_scale(), truth - self.mean
        if self.kind == "gaussian":
            return 0.5 * (s + difference.square() * torch.exp(-s) + math.log(2 * math.pi))
        return s + difference.abs() * torch.exp(-s) + math.log(2)

    def covers(self, truth: Tensor, share: float) -> Tensor:
        """bool at every element: whether `truth` is in the central interval of this probability."""
        half = normal_quantile(0.5 + share / 2) if self.kind == "gaussian" else -math.log(1 - share)
        return (truth - self.mean).abs() <= half * self.scale

    def _predicted_scale(self) -> Tensor:
        if self.log_scale is None:
            raise ValueError(f'kind must be "gaussian" or "laplace" for a scale and a likelihood, got {self.kind!r}')
        return self.log_scale


def likelihood_of_one_scale(kind: str, deviation: Tensor, fitted: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of elements that all have the same predicted scale.

    deviation: their mean square (of "laplace": mean absolute) difference from the means; fitted: that of the elements
    which the scale was fitted to, where its maximum-likelihood value is the root of it (of "laplace": itself).
    """
    if kind == "gaussian":
        return 0.5 * (torch.log(2 * math.pi * fitted) + deviation / fitted)
    return torch.log(2 * fitted) + deviation / fitted


def normal_quantile(share: float) -> float:
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
