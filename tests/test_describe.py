"""Sizes and what mfwm describe counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mfwm import HeadsConfig, WorldModel, WorldModelConfig
from mfwm.describe import rows, training_rows
from mfwm.models.cost import cost_of
from mfwm.models.sizes import TRUNKS, variants
from mfwm.models.world_model import parameters_of
from mfwm.training.world_model import TrainingConfig, training_flops

from mfwm_kernels import Horizons

TINY = WorldModelConfig((3, 16, 16), 4, 32, 3, 16, context=5, actions=5, heads=HeadsConfig(Horizons.next_frame()))


def block_flops(tokens: int, context: int, width: int, ratio: int) -> int:
    """Of a frame: query, key, value and out in space and time, the MLP, and all pairs of tokens and of frames."""
    return 2 * tokens * (8 + 2 * ratio) * width**2 + 4 * tokens * (tokens + context) * width


def test_cost_is_that_of_the_products() -> None:
    cost = cost_of(TINY)
    head = 2 * 16 * 32 * 48
    assert cost.head_flops == head
    assert cost.flops == 2 * 16 * 48 * 32 + 3 * block_flops(16, 5, 32, 4) + head
    assert (cost.parameters, cost.head_parameters) == (parameters_of(WorldModel(TINY)), 32 + 32 * 48 + 48)
    far = HeadsConfig(Horizons((1, 4), (1, 4)), patch_sizes=(4, 2), blocks=(0, 2), mlp_ratios=(4, 1))
    with_far = cost_of(replace(TINY, heads=far))
    assert with_far.head_flops == head + 2 * block_flops(4, 5, 32, 1) + 2 * 4 * 32 * 12
    assert with_far.flops - with_far.head_flops == cost.flops - head


def test_the_posterior_of_latents_is_counted() -> None:
    """As in training: the prior, an MLP on the target's 8 x 8 picture, and the embedding of z."""
    far = HeadsConfig(Horizons((1, 4), (1, 4)), patch_sizes=(4, 1))
    without, latents = (cost_of(replace(TINY, heads=heads)) for heads in (far, replace(far, latent=3)))
    added = 2 * (32 * 6 + (32 + 3 * 64) * 32 + 32 * 6 + 3 * 32)
    assert latents.head_flops == without.head_flops + added and latents.parameters > without.parameters


def test_the_decoder_of_raster_order_is_counted() -> None:
    """Its blocks attend to all pairs of the tokens of a frame, as the other blocks do."""
    heads = HeadsConfig(Horizons.next_frame(), output="tokens", vocabulary=7)
    tokens = replace(TINY, frame=(1, 4, 4), patch=1, heads=heads)
    parallel, raster = (cost_of(replace(tokens, heads=each)) for each in (heads, replace(heads, raster=2)))
    block = 2 * 16 * 12 * 32**2 + 4 * 16 * 16 * 32
    assert raster.head_flops == parallel.head_flops + 2 * block


def test_an_analogy_is_counted() -> None:
    heads = HeadsConfig(Horizons((1, 1), (1, 2)), upsampler=8, upsampling="analogy")
    small = cost_of(
        replace(TINY, heads=replace(heads, horizons=Horizons((1,), (2,)), upsampler=None, upsampling="correction"))
    )
    convolutions = 2 * (3 * 8 + 8 * 8) + (12 * 8 + 8 * 8) + 8 * 8 + 8 * 16
    assert cost_of(replace(TINY, heads=heads)).head_flops == small.head_flops + 2 * 9 * 64 * convolutions


def test_a_near_decoder_is_counted() -> None:
    plain, decoded = (cost_of(replace(TINY, heads=replace(TINY.heads, near_decoder=n))) for n in (None, 8))
    patch = 3 * 4 * 4
    products = 32 * 2 * 8 + 9 * (patch * 8 + 8 * patch)
    assert decoded.parameters - plain.parameters == products + 2 * 8 + 8 + patch - (32 * patch + patch)
    assert decoded.head_flops - plain.head_flops == 2 * 4 * 4 * (products - 32 * patch)


@pytest.mark.parametrize("size", TRUNKS)
def test_trunks_have_the_parameters_of_their_names(size: str) -> None:
    with torch.device("meta"):
        found = parameters_of(WorldModel(variants(size)["next frame"]))
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert 0.9 * named < found < 1.25 * named


def test_rows_name_every_variant_with_its_tax(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [name for name in variants("1m") if name in ("next frame", "cascade, blocks", "tokens, masked")]
    monkeypatch.setattr("mfwm.describe.variants", lambda size: {name: variants(size)[name] for name in few})
    _, _, *table = rows("1m")
    assert [row[:28].strip() for row in table] == few
    taxes = [float(row.split()[-1].rstrip("x")) for row in table]
    assert taxes[0] == taxes[2] == 1 < taxes[1] < 1.25


def test_a_step_costs_three_forwards_and_each_pass_of_a_rollout_loss_again() -> None:
    config = TrainingConfig(data="", batch=3, clip=9, model=TINY)
    assert training_flops(config) == 3 * cost_of(TINY).flops * 5 * 3
    assert training_flops(replace(config, rollout_loss=2)) == 2 * training_flops(config)
    _, *table = training_rows("1m")
    taxes = {row[:28].strip(): float(row.split()[-1].rstrip("x")) for row in table}
    assert taxes["next frame"] == taxes["... context noise"] == 1 and taxes["... rollout loss of 2"] == 2
    assert 1 < taxes["cascade, blocks"] == taxes["... without far gradient"]
