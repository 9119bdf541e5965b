"""Horizons' presets and the one validity rule."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mfwm_kernels import Horizons
from mfwm_kernels.horizons import consistency_pairs, valid_at


def test_presets() -> None:
    assert Horizons.next_frame() == Horizons((1,), (1,))
    assert Horizons.cascade(4) == Horizons((1, 2, 4, 8), (1, 2, 4, 8))
    assert Horizons.low_res() == Horizons((1, 2, 4, 8), (1, 4, 4, 4))
    assert Horizons.low_res((0, 1, 3), factor=2) == Horizons((0, 1, 3), (1, 2, 2))
    assert Horizons.multi_resolution() == Horizons((1, 1, 1, 2, 4), (1, 2, 4, 2, 4))
    assert Horizons.multi_resolution({4: (4,), 1: (1, 2)}) == Horizons((1, 1, 4), (1, 2, 4))
    assert len(Horizons.cascade(3)) == 3


def test_frozen_and_hashable() -> None:
    horizons = Horizons([1, 2], [1, 2])  # type: ignore[arg-type]
    assert hash(horizons) == hash(Horizons((1, 2), (1, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        horizons.offsets = (3,)  # type: ignore[misc]


def test_what_counts() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert valid_at(2, 5, 6, None, 1, "cpu").tolist() == [[True, True, True, True, False]]
    assert valid_at(2, 5, 6, segments, 1, "cpu").tolist() == [[True, False, False, True, False]]
    assert valid_at(9, 5, 6, segments, 1, "cpu").tolist() == [[False] * 5]
    assert valid_at(0, 6, 6, segments, 1, "cpu").all()


def test_valid() -> None:
    horizons, segments = Horizons((1, 2), (1, 2)), torch.tensor([[0, 0, 0, 1, 1, 1], [4] * 6], dtype=torch.int32)
    assert torch.equal(horizons.valid(1, 5, 6, segments), valid_at(2, 5, 6, segments, 2, "cpu"))
    assert torch.equal(horizons.valid(1, 5, 6, segments.T.contiguous().T), valid_at(2, 5, 6, segments, 2, "cpu"))
    assert horizons.valid(1, 5, 6).tolist() == [[True, True, True, True, False]]
    assert horizons.valid(1, 0, 6, segments).shape == (2, 0)
    assert horizons.valid(0, 5, 6, device="meta").is_meta
    for given, message in (
        ((2, 5, 6), "i must be <= 1, got 2"),
        ((-1, 5, 6), "i must be >= 0, got -1"),
        (("near", 5, 6), "i must be an integer, got 'near'"),
        ((0, -1, 6), "positions must be >= 0, got -1"),
        ((0, 5, 1.5), "frames must be an integer, got 1.5"),
        ((0, 5, 9, segments), r"segment_ids must have shape \[B, frames\] = \[2, 9\], got \[2, 6\]"),
        ((0, 5, 6, segments[0]), "segment_ids must have 2 dimensions"),
        ((0, 5, 6, segments.float()), "segment_ids must have dtype int32, int64, got float32"),
        ((0, 5, 6, [[0] * 6]), "segment_ids must be a torch.Tensor, got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            horizons.valid(*given)  # type: ignore[arg-type]


def test_labels() -> None:
    assert Horizons.cascade(3).labels == ("1", "2", "4")
    assert Horizons.multi_resolution().labels == ("1@1/1", "1@1/2", "1@1/4", "2", "4")


def test_pairs() -> None:
    assert consistency_pairs(3, (3,)) == [(0, 1), (0, 2)]
    assert consistency_pairs(3, (3, 3)) == [(0, 1), (0, 2), (1, 2)]
