"""contrast, latent_consistency and temporal_difference in the heads, in training and in its log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mfwm import HeadsConfig, WorldModelConfig
from mfwm.export import export, load_exported
from mfwm.losses import latent_consistency, temporal_contrast, temporal_difference
from mfwm.models.terms import HeadsLoss
from mfwm.training import TrainingConfig, train
from mfwm.training.run_log import read_log
from mfwm.training.validation import validation_figures
from mfwm.training.world_model import WorldModelLoss
from small_model import HORIZONS, build, clip
from small_run import moving_squares, small_config
from torch import Tensor

from mfwm_kernels import Horizons

TERMS: dict[str, Any] = {"contrast": 0.5, "latent_consistency": 0.3, "temporal_difference": 0.2}
TOKENS: dict[str, Any] = {"output": "tokens", "vocabulary": 7}
# The second clip begins with the end of another episode.
SEGMENTS = torch.tensor([[0] * 9, [1] * 3 + [2] * 6])
OF_POSITIONS = torch.tensor([[1.0, 2.0, 0.0, 1.0, 1.0, 3.0], [1.0, 1.0, 1.0, 0.0, 2.0, 1.0]])


def unit(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": (0, 1, 1), "patch_sizes": (4, 4, 2), "kind": ("mse", "gaussian", "laplace")},
        {"tap": 1, "weights": (1.0, 0.7, 0.3), "residual": False, "output": "latents"},
        {"conditioning": "frames", "weighting": "uncertainty"},
        {"horizons": Horizons((1, 1, 2, 2, 4), (1, 2, 1, 2, 2)), "upsampler": 8},
        TOKENS,
        {**TOKENS, "horizons": Horizons((0, 1, 3), (1, 2, 4)), "trunk": {"masked": True}},
    ],
    ids=["plain", "blocks, kinds", "tap", "frames", "upsampler", "tokens", "masked"],
)
@pytest.mark.parametrize("weights", (None, OF_POSITIONS, "of each horizon"), ids=("", "[B, T]", "[B, T, K]"))
def test_the_terms_are_those_of_the_losses(options: dict[str, Any], weights: Any) -> None:
    """The total is that without them plus their weighted sum, each computed here from the states of the heads."""
    torch.manual_seed(0)
    chosen = {k: v for k, v in TERMS.items() if "output" not in options or options["output"] != "tokens" or k[0] != "t"}
    model, clips = build(**options, **chosen), clip(9)
    clips = {**clip(9, model), "segment_ids": SEGMENTS}
    heads, config = model.heads, model.config.heads
    count, horizons = len(config.horizons), config.horizons
    if weights == "of each horizon":
        weights = OF_POSITIONS[..., None] * torch.tensor((1.0, 0.0, 2.0, 1.0, 1.0)[:count])
    states = (
        model.states(**clips, token_mask=torch.rand(2, 9, 8, 8) < 0.5 if config.output == "tokens" else None)
        if model.config.masked
        else model.states(**clips)
    )
    loss, outputs = heads.loss_and_outputs(video=clips["video"], position_weights=weights, **states)
    bare = replace(config, contrast=0.0, latent_consistency=0.0, temporal_difference=0.0)
    heads.config = bare
    expected = heads.loss(outputs, clips["video"], segment_ids=SEGMENTS, position_weights=weights).total
    heads.config = config
    read = heads.branched(video=clips["video"], **states).states

    hidden, segments = states["hidden"], SEGMENTS[:, :6]
    of_near = weights if weights is None or weights.dim() == 2 else weights[..., 0]
    contrast = temporal_contrast(hidden.mean((2, 3)), segment_ids=segments, position_weights=of_near)
    expected = expected + 0.5 * contrast.total
    assert loss.terms["contrast"] == contrast.total and loss.terms["contrast_accuracy"] == contrast.accuracy[0]  # type: ignore[index]
    for i in range(count):
        if horizons.offsets[i] == horizons.offsets[0] or horizons.offsets[i] == horizons.offsets[i - 1]:
            assert loss.terms["latent_consistency"][i] == 0
            continue
        pair = Horizons((horizons.offsets[i],), (heads.pools[i],))
        of_far = weights if weights is None or weights.dim() == 2 else weights[..., i : i + 1]
        one = latent_consistency(
            [unit(read[i])],
            unit(hidden),
            pair,
            segment_ids=segments,
            position_weights=of_far,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(loss.terms["latent_consistency"][i], one.total.detach())
        assert 0 < one.total or one.counts == 0
        expected = expected + 0.3 * one.total
    if "temporal_difference" in chosen:
        means = [patches.chunk(parts, -1)[0] for patches, parts in zip(outputs, heads.parts, strict=True)]
        difference = temporal_difference(
            means, clips["video"], horizons, horizon_weights=config.horizon_weights, segment_ids=SEGMENTS,
            patch_sizes=heads.patches, residual=config.residual, position_weights=weights,
        )  # fmt: skip
        assert torch.equal(loss.terms["temporal_difference"], difference.per_horizon)
        expected = expected + 0.2 * difference.total
    torch.testing.assert_close(loss.total, expected)
    assert set(loss.terms) == {*chosen, "contrast_accuracy"}


def test_heads_without_terms_have_none() -> None:
    loss = build()(**clip(9))
    assert isinstance(loss, HeadsLoss) and loss.terms == {}


def test_latent_consistency_changes_no_prediction() -> None:
    """It needs the states that multi_horizon_linear does not store, and computes them another way."""
    found = []
    for weight in (0.0, 0.3):
        torch.manual_seed(0)
        model = build(latent_consistency=weight).eval()
        torch.manual_seed(1)
        found.append(model.predict(**clip(9, model)))
    torch.testing.assert_close(found[1], found[0])


def test_the_target_of_latent_consistency_gets_no_gradient() -> None:
    """At the last position there is a target alone, at the others a state that predicts too."""
    model = build(latent_consistency=1.0, weights=(0.0, 0.0, 0.0), horizons=Horizons((1, 2, 4), (1, 1, 1)))
    clips = clip(9, model)
    states = model.states(**clips)
    states["hidden"] = states["hidden"].detach().requires_grad_()
    model.heads.loss_and_outputs(video=clips["video"], **states)[0].total.backward()
    norms = states["hidden"].grad.norm(dim=-1).amax((0, 2, 3))  # type: ignore[union-attr]
    assert (norms[:4] > 0).all() and (norms[4:] == 0).all()


def objective(**options: Any) -> WorldModelLoss:
    torch.manual_seed(0)
    training = {name: options.pop(name) for name in ("weight_schedule", "steps") if name in options}
    return WorldModelLoss(build(**options), **training)


def test_parts_of_a_batch_add_up() -> None:
    """Means of pairs over the global batch, though one part holds more pairs than the other."""
    made = objective(latent_consistency=0.3, temporal_difference=0.2, consistency=(0.0, 0.1, 0.1))
    clips = {**clip(9), "segment_ids": SEGMENTS}
    total, figures = made(clips)
    parts = [{name: value[b : b + 1] for name, value in clips.items()} for b in range(2)]
    counts = torch.stack([made.counts(part) for part in parts])
    shares = 2 * counts / counts.sum(0).clamp_min(1)
    assert not torch.equal(shares[0, -1], shares[1, -1]) and not torch.equal(shares[0, -2], shares[1, -2])
    found = [made(part, share) for part, share in zip(parts, shares, strict=True)]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, total)
    for name, value in figures.items():
        torch.testing.assert_close((found[0][1][name] + found[1][1][name]) / 2, value, msg=name)


def test_a_schedule_scales_the_terms_of_far_horizons() -> None:
    clips = {**clip(9), "segment_ids": SEGMENTS}
    options: dict[str, Any] = {"weights": (0.0, 1.0, 0.0), **TERMS, "weight_schedule": "grow", "steps": 8}
    made = objective(**options)
    made.begin_step(1)  # Horizon 1 at a half, horizon 2 not yet.
    total, figures = made(clips)
    assert total.item() == pytest.approx(
        0.5 * figures["per_horizon"][1].item()
        + 0.5 * figures["contrast"].item()
        + 0.5 * 0.3 * figures["latent_consistency"][1].item()
        + 0.5 * 0.2 * figures["temporal_difference"][1].item(),
        rel=1e-5,
    )


def test_contrast_is_refused_where_it_could_not_work() -> None:
    clips = {**clip(9), "segment_ids": SEGMENTS}
    with pytest.raises(
        ValueError, match=r"contrast needs the negatives of a whole batch at once: .*, got contrast 0\.5"
    ):
        objective(contrast=0.5).counts(clips)
    heads = HeadsConfig(HORIZONS, contrast=0.5)
    with pytest.raises(ValueError, match=r"far_gradient must be True with contrast, .*; got contrast 0\.5"):
        TrainingConfig(data="", model=WorldModelConfig(heads=heads), far_gradient=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": -0.1}, "contrast must be >= 0, got -0.1"),
        ({"latent_consistency": True}, "latent_consistency must be a number, got bool"),
        ({"temporal_difference": float("nan")}, "temporal_difference must be finite, got nan"),
        (
            {**TOKENS, "temporal_difference": 0.1},
            "temporal_difference is of the loss of pixels and latents, .* got 0.1",
        ),
        (
            {"latent_consistency": 0.1, "horizons": Horizons((1, 1), (1, 2))},
            r"latent_consistency needs a horizon of a larger offset than the first, got 0\.1 with Horizons",
        ),
    ],
)
def test_weights_of_terms_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        HeadsConfig(**options)


def test_a_run_logs_its_terms_resumes_and_is_exported(tmp_path: Path) -> None:
    moving_squares(tmp_path / "data")
    small = small_config(tmp_path / "data")
    model = replace(small.model, heads=replace(small.model.heads, **TERMS))
    config = replace(small, steps=6, look_every=6, model=model)
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "run", progress=False, stop_after=3)
    resumed = train(config, tmp_path / "run", progress=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for row in (rows := read_log(tmp_path / "run" / "log.jsonl")):
        assert 0 < row["contrast"] and 0 <= row["contrast_accuracy"] <= 1
        near, *far = row["latent_consistency"]
        assert near == 0 and all(0 < x < 4 for x in far) and all(x > 0 for x in row["temporal_difference"])
    assert {*TERMS, "contrast_accuracy"} <= set(rows[-1]["held_out"])
    with pytest.raises(ValueError, match=r"model\.heads\.contrast is 0\.0, but .* was started with 0\.5"):
        train(replace(config, model=replace(model, heads=replace(model.heads, contrast=0.0))), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model.safetensors")
    exported, read, _ = load_exported(tmp_path / "model.safetensors")
    assert read.model == model and exported.config.heads.latent_consistency == 0.3
    # A run from before these options had none of them.
    tree = json.loads((tmp_path / "run" / "config.json").read_text())
    for name in TERMS:
        del tree["model"]["heads"][name]
    (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"model\.heads\.contrast is 0\.5, but .* was started with 0\.0"):
        train(config, tmp_path / "run", progress=False)


def test_held_out_figures_have_the_terms() -> None:
    model = build(**TERMS)
    figures = validation_figures(model, {**clip(9, model), "segment_ids": SEGMENTS})
    assert {*TERMS, "contrast_accuracy"} <= set(figures) and figures["temporal_difference"].shape == (3,)


@pytest.mark.slow
def test_terms_compile_whole() -> None:
    made = objective(**TERMS)
    clips = {**clip(9), "segment_ids": SEGMENTS}
    found = []
    for run in (made, torch.compile(made, fullgraph=True, backend="eager")):
        made.zero_grad()
        total, figures = run(clips)
        total.backward()
        found.append((total.detach(), figures, [p.grad for p in made.parameters()]))
    torch.testing.assert_close(found[1], found[0])
