"""Predicted frames as distributions: the likelihood of the true frame, intervals that should cover it, and samples."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mfwm_kernels import arguments as check

# Of a loss; multi_horizon_loss has the formulas.
Kind = Literal["mse", "l1", "huber", "charbonnier", "gaussian", "laplace"]
# Kinds whose heads predict a log-scale beside each mean.
DISTRIBUTIONS = ("gaussian", "laplace")
# Log-scales are clamped to +-LOG_SCALE_LIMIT, as in the loss.
LOG_SCALE_LIMIT = 10.0


class Distribution(NamedTuple):
    """What a horizon predicts of every element of a frame; the elements are independent.

    Fields:
        kind: of the horizon's loss.
        mean: [B, T, C, h, w], in fp32.
        log_scale: of that shape: of "gaussian" the log-variance, of "laplace" the log of the mean deviation. None for
            other kinds, which predict the mean alone.
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
        check_sampling(temperature, generator, self.mean)
        if self.log_scale is None or temperature == 0:
            return self.mean
        scale = self.scale
        if self.kind == "gaussian":
            noise = torch.empty_like(self.mean).normal_(generator=generator)
        else:
            noise = torch.empty_like(self.mean).exponential_(generator=generator)
            noise = noise - torch.empty_like(self.mean).exponential_(generator=generator)
        return self.mean + temperature * scale * noise

    def negative_log_likelihood(self, truth: Tensor) -> Tensor:
        """-log of the density at every element of `truth`, in nats."""
        self._check_truth(truth)
        s, difference = self._predicted_scale(), truth - self.mean
        if self.kind == "gaussian":
            return 0.5 * (s + difference.square() * torch.exp(-s) + math.log(2 * math.pi))
        return s + difference.abs() * torch.exp(-s) + math.log(2)

    def covers(self, truth: Tensor, share: float) -> Tensor:
        """bool at every element: whether `truth` is in the central interval of this probability."""
        if not check.number("share", share, least=0) < 1:
            raise ValueError(f"share must be < 1, got {share}")
        self._check_truth(truth)
        half = normal_quantile(0.5 + share / 2) if self.kind == "gaussian" else -math.log(1 - share)
        return (truth - self.mean).abs() <= half * self.scale

    def _predicted_scale(self) -> Tensor:
        if self.log_scale is None or self.kind not in DISTRIBUTIONS:
            raise ValueError(f'kind must be "gaussian" or "laplace" for a scale and a likelihood, got {self.kind!r}')
        return self.log_scale

    def _check_truth(self, truth: Tensor) -> None:
        check.tensor("truth", truth, self.mean.dim(), "as the mean")
        check.shape("truth", truth, self.mean.shape, "of the mean")
        check.same_device("truth", truth, "the mean", self.mean)


def check_sampling(temperature: float, generator: torch.Generator | None, like: Tensor) -> None:
    """ValueError or TypeError unless samples like this tensor can be drawn at `temperature`."""
    check.number("temperature", temperature, least=0)
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != like.device.type:
        raise ValueError(f"generator must be on {like.device.type}, where it draws, got {generator.device}")


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
