"""Tests of the token loss's target ids: those out of range, and which rows and consistency pairs have them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from conftest import device_of
from token_call import BACKENDS, KERNELS, call_of

from mfwm_kernels import Horizons, multi_horizon_linear_cross_entropy, use_backend
from mfwm_kernels.arguments import Shared
from mfwm_kernels.gemm.token_targets import listed_pairs, listed_targets
from mfwm_kernels.launches import flat_arguments
from mfwm_kernels.op import OPS
from mfwm_kernels.ops import token_ids


@pytest.mark.parametrize("backend", [b for b in BACKENDS if device_of(b).type == "cpu"])
@pytest.mark.parametrize("value", [37, -1, 2**31 - 1])
def test_an_id_out_of_range_is_named(backend: str, value: int) -> None:
    kwargs = call_of(backend)
    kwargs["tokens"] = kwargs["tokens"].int()
    kwargs["tokens"][1, 5, 2, 7] = value
    message = rf"tokens must be in \[0, 37\) or ignore_index = -100; tokens\[1, 5, 2, 7\] = {value}"
    with use_backend(backend), pytest.raises(ValueError, match=message):
        multi_horizon_linear_cross_entropy(**kwargs)


def test_a_bad_id_on_a_gpu_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the error, copies of the device's record without new bad ids raise nothing."""
    found, pinned = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(token_ids, "_reports", {"a GPU": token_ids._Report(Shared(found), pinned)})

    def call(*tokens: int) -> None:
        ids = torch.tensor(tokens)
        token_ids.write(found, ids, (ids < 0) | (ids >= 7), 7)
        pinned.copy_(found[0])

    call(1, 2)
    token_ids.raise_pending()
    call(1, 9, -3)
    call(4, 5)
    with pytest.raises(ValueError, match=r"\[0, 7\).* a GPU had 2 other ids, such as 9 at flat index 1"):
        token_ids.raise_pending()
    call(4, 5)
    token_ids.raise_pending()
    call(8)
    with pytest.raises(ValueError, match="had 1 other ids, such as 8 at flat index 0"):
        token_ids.raise_pending()


@pytest.mark.skipif("triton" not in KERNELS, reason="needs Triton")
def test_a_kernel_records_bad_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds their number to that of earlier calls, gives details of one, and trains no row on them."""
    from mfwm_kernels.triton import token_targets

    kwargs = call_of("triton", return_accuracy=True)
    args = flat_arguments(OPS["multi_horizon_linear_cross_entropy"], kwargs)
    tokens = kwargs["tokens"]
    found = torch.tensor([3, 0, 0, 0], device=tokens.device)
    monkeypatch.setattr(token_ids, "recording", lambda *_: contextlib.nullcontext(found))

    good = token_targets.targets_of(args)
    assert found.tolist() == [3, 0, 0, 0]
    bad = torch.stack([tokens, tokens], -1)[..., 0].clone(memory_format=torch.preserve_format)
    bad[0, 4, 1, 2], bad[1, 5, 3, 7] = 37, -2
    for layout in (bad, torch.stack([bad, bad], -1)[..., 0]):
        found[0] = 3
        targets = token_targets.targets_of(args._replace(tokens=layout))
        details = {(37, ((0 * 6 + 4) * 4 + 1) * 8 + 2), (-2, ((1 * 6 + 5) * 4 + 3) * 8 + 7)}
        assert found[0] == 5 and tuple(found[1:3].tolist()) in details and found[3] == 37
        # Frame 4 is a target of all three horizons, at offsets 1, 2 and 4; frame 5 too.
        assert ((targets.ids == -1) & (good.ids >= 0)).sum() == 6
        assert torch.equal(targets.ids.where(targets.ids >= 0, good.ids), good.ids)


def options_of_targets(kwargs: dict[str, Any], which: str) -> dict[str, Any]:
    batch, frames, *grid = kwargs["tokens"].shape
    device = kwargs["tokens"].device
    kwargs["tokens"][0, :, :2, 3:] = -100
    if which == "plain":
        return kwargs
    weights = torch.rand(batch, 5, 3, device=device) + 0.1
    weights[0, 1, 0] = weights[1, 0, 2] = weights[1, 2, 0] = 0
    options = {
        "segment_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [2] * 6], device=device)[:batch, :frames],
        "token_mask": torch.rand(batch, frames, *grid, device=device) < 0.5,
        "position_weights": weights,
        "return_predictions": which == "predictions",
        "consistency_weights": [0, 1, 1],
    }
    return {**kwargs, **options}


@pytest.mark.skipif("triton" not in KERNELS, reason="needs Triton")
@pytest.mark.parametrize("which", ["plain", "excluded", "predictions"])
def test_targets_of_a_launch(which: str) -> None:
    from mfwm_kernels.triton import token_targets

    kwargs = options_of_targets(call_of("triton", Horizons((0, 1, 3), (1, 2, 4))), which)
    args = flat_arguments(OPS["multi_horizon_linear_cross_entropy"], kwargs)
    got, want = token_targets.targets_of(args), listed_targets(args, drops=False)
    assert (got.rows, got.sizes) == (want.rows, want.sizes)
    starts = [
        torch.arange(first, last, device=got.ids.device) * f * f + shift
        for first, last, f, shift in zip(got.starts, got.starts[1:], args.factors, got.shifts, strict=False)
    ]
    assert torch.equal(torch.cat(starts), want.starts[:-1])
    for name in ("ids", "cells", "terms", "counted", "known", "weights"):
        mine, theirs = getattr(got, name), getattr(want, name)
        assert (mine is None) == (theirs is None) == (which == "plain" and name in ("counted", "known", "weights"))
        assert mine is None or torch.equal(mine, theirs), name


@pytest.mark.skipif("triton" not in KERNELS, reason="needs Triton")
def test_pairs_of_a_launch() -> None:
    """All pairs' rows in order, of which those that count are the listed ones."""
    from mfwm_kernels.triton import token_consistency

    kwargs = options_of_targets(call_of("triton", Horizons((0, 1, 3), (1, 2, 4))), "excluded")
    args = flat_arguments(OPS["multi_horizon_linear_cross_entropy"], kwargs)
    pairs, listed = token_consistency.pairs(args), listed_pairs(args)
    assert [pair.horizons for pair in pairs] == [(0, 1), (0, 2)]
    for pair, want in zip(pairs, listed, strict=True):
        assert pair.counted is not None and 0 < want.far.shape[0] < pair.far.shape[0]
        assert pair.cells == want.cells == want.far.shape[0]
        assert torch.equal(pair.far[pair.counted], want.far) and torch.equal(pair.near[pair.counted], want.near)
    everywhere = token_consistency.pairs(args._replace(segment_ids=None, position_weights=None))
    assert all(pair.counted is None and pair.cells == pair.far.shape[0] for pair in everywhere)
    assert all(
        torch.equal(a.far, b.far) and torch.equal(a.near, b.near) for a, b in zip(everywhere, pairs, strict=True)
    )
