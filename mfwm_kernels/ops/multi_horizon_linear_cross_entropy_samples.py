"""The calls of multi_horizon_linear_cross_entropy that its record lists: for tests, compilation and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..horizon_loss import DETACH
from ..horizons import Horizons

CASCADE = Horizons.cascade(4)
# Every horizon at full resolution, because most other libraries support only hard targets.
FLAT = Horizons((1, 2, 4, 8), (1, 1, 1, 1))
# Three targets on one state, as in a language model that predicts the next three ids from it.
TARGETS = Horizons((1, 2, 3), (1, 1, 1))
CONSISTENCY = [0, 0.1, 0.1, 0.1]


def _bench(
    batch: int,
    time: int,
    side: int,
    vocabulary: int,
    depth: int,
    ids_per_token: int = 1,
    horizons: Horizons = CASCADE,
    shares: bool = False,
    **options: Any,
) -> Any:
    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        # Tokens extend past the positions, so that every row counts.
        shape = (batch, time + horizons.offsets[-1], side, side, *((ids_per_token,) if ids_per_token > 1 else ()))
        inputs = [
            torch.randn(batch, time, side // f, side // f, depth, device=device).to(dtype) for f in horizons.factors
        ]
        return {
            "inputs": inputs[:1] * len(horizons) if shares else inputs,
            "weight": (torch.randn(ids_per_token * vocabulary, depth, device=device) / depth**0.5).to(dtype),
            "tokens": torch.randint(0, vocabulary, shape, device=device),
            "horizons": horizons,
            **options,
        }  # fmt: skip

    return make


BENCH = {
    "cpu": _bench(4, 8, 16, 1024, 512),
    "cpu-16k": _bench(4, 8, 16, 16384, 256),
    "cpu-flat": _bench(4, 8, 16, 1024, 512, horizons=FLAT),
    "cpu-consistency": _bench(4, 8, 16, 1024, 512, consistency_weights=CONSISTENCY),
    "cpu-shared": _bench(4, 8, 16, 16384, 256, horizons=TARGETS, shares=True),
    "genie": _bench(36, 16, 16, 1024, 512),
    "genie-flat": _bench(36, 16, 16, 1024, 512, horizons=FLAT),
    "genie-consistency": _bench(36, 16, 16, 1024, 512, consistency_weights=CONSISTENCY),
    "1x": _bench(16, 16, 16, 512, 256, ids_per_token=2),
    "1x-flat": _bench(16, 16, 16, 512, 256, ids_per_token=2, horizons=FLAT),
    "wide": _bench(16, 4, 16, 262144, 2048),
    "wide-near": _bench(16, 4, 16, 262144, 2048, horizons=Horizons.next_frame()),
    # 1024 ids of text a clip, in the sizes of modded-nanogpt.
    "text-shared": _bench(16, 1024, 1, 50304, 768, horizons=TARGETS, shares=True, softcap=15.0),
}


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, device=device)

    def inputs(horizons: Horizons, batch: int, positions: int, height: int, width: int, depth: int) -> list[Tensor]:
        return [normal(batch, positions, height // f, width // f, depth) for f in horizons.factors]

    # Each cell clearly has a largest logit, so that predictions are the same in every dtype.
    def sure(*shape: int) -> Tensor:
        return (4 * F.one_hot(ids(5, *shape), 6) + 0.3 * torch.randn(*shape, 6, device=device)).to(dtype)

    def head(repeats: int = 1) -> Tensor:
        return (
            torch.eye(5, 6, device=device).repeat(repeats, 1) + 0.1 * torch.randn(5 * repeats, 6, device=device)
        ).to(dtype)

    def weights(*shape: int) -> Tensor:
        drawn = torch.rand(*shape, device=device)
        return torch.where(drawn < 0.3, 0, drawn)

    cascade = Horizons.cascade(3)
    segments = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]], device=device)
    yield {
        "inputs": inputs(cascade, 2, 5, 4, 8, 12), "weight": normal(19, 12), "tokens": ids(19, 2, 5, 4, 8),
        "horizons": cascade, "segment_ids": segments, "return_accuracy": True,
    }  # fmt: skip
    tokens = ids(7, 2, 5, 4, 4, 2)
    tokens[0, :, :2, :2] = -1
    yield {
        "inputs": inputs(cascade, 2, 4, 4, 4, 9), "weight": [normal(14, 9) for _ in range(3)], "tokens": tokens.int(),
        "horizons": cascade, "ignore_index": -1, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0,
        "horizon_weights": torch.tensor([1.0, 0.5, 0.25], device=device),
        "consistency_weights": [0, 0.5, 0.25], "detach": None,
    }  # fmt: skip
    # Three horizons share logits, in every order with one that has its own, at rows of which each counts at some.
    states = sure(2, 3, 2, 4)
    yield {
        "inputs": [states, states, sure(2, 3, 1, 2), states], "weight": head(2), "tokens": ids(5, 2, 4, 2, 4, 2),
        "horizons": Horizons((0, 1, 1, 2), (1, 1, 2, 1)), "biases": normal(10) / 4,
        "segment_ids": torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]], device=device),
        "token_mask": torch.rand(2, 4, 2, 4, device=device) < 0.5, "position_weights": weights(2, 3, 4),
        "softcap": 3.0, "z_loss": 0.01, "label_smoothing": 0.1, "return_accuracy": True,
    }  # fmt: skip
    maskgit = Horizons((0, 1), (1, 2))
    yield {
        "inputs": inputs(maskgit, 2, 3, 2, 4, 8), "weight": normal(6, 8), "tokens": ids(6, 2, 3, 2, 4),
        "horizons": maskgit, "token_mask": torch.rand(2, 3, 2, 4, device=device) < 0.5,
        "consistency_weights": torch.tensor([0.0, 0.5], device=device),
    }  # fmt: skip
    yield {
        "inputs": inputs(cascade, 0, 3, 4, 4, 8),
        "weight": normal(6, 8),
        "tokens": ids(6, 0, 3, 4, 4),
        "horizons": cascade,
    }
    yield {
        "inputs": inputs(cascade, 2, 0, 4, 4, 8),
        "weight": normal(6, 8),
        "tokens": ids(6, 2, 3, 4, 4),
        "horizons": cascade,
    }
    # As wide as real states, and sliced in time as next-frame trainers do, so that the rows do not flatten.
    yield {
        "inputs": [states[:, :3] for states in inputs(cascade, 2, 4, 4, 8, 512)],
        "weight": normal(40, 512) / 512**0.5, "tokens": ids(40, 2, 3, 4, 8), "horizons": cascade,
        "consistency_weights": [0, 0.5, 0.25],
    }  # fmt: skip

    pair = Horizons((1, 2), (1, 2))
    yield {
        "inputs": [sure(2, 3, 2, 4), sure(2, 3, 1, 2)], "weight": head(2), "tokens": ids(5, 2, 4, 2, 4, 2),
        "horizons": pair, "biases": [normal(10) / 4, normal(10) / 4], "position_weights": weights(2, 3, 2),
        "softcap": 3.0, "z_loss": 0.01, "label_smoothing": 0.1, "consistency_weights": [0, 0.5], "detach": "far",
        "return_accuracy": True, "return_predictions": True,
    }  # fmt: skip
    tokens = ids(5, 2, 3, 4, 4)
    tokens[0, :, :2, 1:] = -100
    yield {
        "inputs": [sure(2, 3, 2, 2), sure(2, 3, 1, 1)], "weight": [head(), head()], "tokens": tokens,
        "horizons": Horizons((0, 1), (2, 4)), "biases": normal(5) / 4, "position_weights": weights(2, 3),
        "token_mask": torch.rand(2, 3, 4, 4, device=device) < 0.5, "consistency_weights": [0, 0.5], "detach": None,
        "return_predictions": True,
    }  # fmt: skip
    # A pair of horizons that share logits of cells of four ids.
    tokens, states, both = ids(5, 1, 4, 2, 4), sure(1, 3, 1, 2), head()
    tokens[0, 1, 0, 1:] = -100
    yield {
        "inputs": [states, states], "weight": [both, both], "tokens": tokens, "horizons": Horizons((1, 2), (2, 2)),
        "consistency_weights": [0, 0.5], "detach": None, "return_accuracy": True, "return_predictions": True,
    }  # fmt: skip
    yield {
        "inputs": [sure(1, 2, 8), sure(1, 2, 2)], "weight": head(), "tokens": ids(5, 1, 3, 8), "grid": (2, 4),
        "horizons": pair, "biases": [normal(5) / 4, normal(5) / 4], "return_predictions": True,
    }  # fmt: skip


def variants(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    kwargs = BENCH["genie"](dtype, device)
    tokens, positions = kwargs["tokens"], kwargs["inputs"][0].shape[1]
    # As many frames as positions: the kernels gather rows of the far horizons.
    yield {**kwargs, "tokens": tokens[:, :positions]}
    mask = torch.empty(tokens.shape, dtype=torch.bool, device=device)
    yield {**kwargs, "horizons": Horizons((0, 2, 4, 8), (1, 2, 4, 8)), "token_mask": mask}
    segment_ids = torch.empty(tokens.shape[:2], dtype=torch.int64, device=device)
    kwargs.update(softcap=30.0, z_loss=1e-4, label_smoothing=0.1, return_accuracy=True, segment_ids=segment_ids)
    for detach in DETACH:
        yield {**kwargs, "consistency_weights": CONSISTENCY, "detach": detach}
    # One long row a program, and rows longer than registers hold: what biases and predictions add to both.
    for size in ("genie", "wide"):
        kwargs = BENCH[size](dtype, device)
        shape, states = kwargs["tokens"].shape, kwargs["inputs"][0]
        new = {
            "biases": torch.empty(kwargs["weight"].shape[0], dtype=dtype, device=device),
            "position_weights": torch.empty(states.shape[:2], device=device),
            "token_mask": torch.empty(shape, dtype=torch.bool, device=device),
            "horizons": Horizons((0, 2, 4, 8), (1, 2, 4, 8)), "return_predictions": True, "return_accuracy": True,
        }  # fmt: skip
        for softcap in (None, 30.0):
            yield {**kwargs, **new, "softcap": softcap}
        for detach in DETACH:
            yield {**kwargs, **new, "consistency_weights": CONSISTENCY, "detach": detach}
        # Three horizons share logits beside one of four ids a cell.
        inputs, shared = [states, states, states, kwargs["inputs"][1]], Horizons((0, 1, 2, 4), (1, 1, 1, 2))
        yield {**kwargs, **new, "inputs": inputs, "horizons": shared, "softcap": 30.0, "label_smoothing": 0.1}
