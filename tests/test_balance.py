"""How horizons share the gradient: learned uncertainty, balanced gradient norms, and surgery."""

from __future__ import annotations

from dataclasses import replace

import torch
from mfwm import HeadsConfig, MultiFrameHeads
from mfwm.models.balance import surgery_scale
from small_model import build, clip
from torch import nn

from mfwm_kernels import GradMonitor, Horizons


def test_uncertainty_is_kendalls_formula() -> None:
    model, clips = build(weighting="uncertainty", weights=(1.0, 0.5, 2.0)), clip(10)
    assert model.heads.uncertainty is not None
    s = model.heads.uncertainty.log_variance
    nn.init.normal_(s)
    loss = model(**clips)
    w = torch.tensor([1.0, 0.5, 2.0])
    torch.testing.assert_close(loss.total, (w * (torch.exp(-s) * loss.per_horizon + s)).sum())
    loss.total.backward()
    torch.testing.assert_close(s.grad, w * (1 - torch.exp(-s) * loss.per_horizon))
    # Four frames hold no target of offset 4: its s is left alone.
    s.grad = None
    model(**clip(4)).total.backward()
    assert s.grad is not None and s.grad[2] == 0 and (s.grad[:2] != 0).all()


def test_balanced_gradients_have_the_norms_that_weights_ask_for() -> None:
    """On one batch the running mean is exact from the second step on; a checkpoint keeps it."""
    torch.manual_seed(0)
    weights = (1.0, 0.5, 0.25)
    model, clips = build(weighting="gradients", weights=weights), clip(10)
    monitor = GradMonitor(3)
    model(**clips, grad_monitor=monitor).total.backward()
    assert monitor.scale is not None and (monitor.scale == 1).all()
    norms = monitor.norms.clone()
    resumed = build(weighting="gradients", weights=weights)
    resumed.load_state_dict(model.state_dict())
    for other_model in (model, resumed):
        model_monitor = GradMonitor(3)
        other_model(**clips, grad_monitor=model_monitor).total.backward()
        assert model_monitor.scale is not None
        scaled = model_monitor.scale * norms
        torch.testing.assert_close(scaled / scaled[0], torch.tensor(weights))
        torch.testing.assert_close(scaled.sum(), norms.sum())


def test_surgery_scale_is_pcgrad() -> None:
    """Against the algorithm of the paper on the gradients themselves."""
    torch.manual_seed(0)
    gradients_K, orders = torch.randn(4, 3), [[3, 1, 0, 2], [0, 1, 2, 3], [1, 3, 2, 0], [2, 0, 1, 3]]
    projected = gradients_K.clone()
    for i, order in enumerate(orders):
        for j in order:
            dot = projected[i] @ gradients_K[j]
            if j != i and dot < 0:
                projected[i] -= dot / gradients_K[j].square().sum() * gradients_K[j]
    assert not torch.allclose(projected, gradients_K)
    scale = surgery_scale(gradients_K @ gradients_K.T, orders)
    torch.testing.assert_close(scale @ gradients_K, projected.sum(0))
    aligned = torch.eye(3) + 1
    assert torch.equal(surgery_scale(aligned, [[0, 1, 2]] * 3), torch.ones(3))


def test_surgery_changes_the_gradient_of_the_trunk_alone() -> None:
    """By the scale of the horizons' gradients; two horizons that ask for opposite things show it."""
    torch.manual_seed(0)
    config = HeadsConfig(Horizons((1, 2), (1, 1)), conditioning="none", residual=False, norm=None, output="latents")
    heads = MultiFrameHeads(32, 4, config)
    operated = MultiFrameHeads(32, 4, replace(config, surgery=True))
    with torch.no_grad():
        heads.heads[1].weight.copy_(-heads.heads[0].weight + 0.1 * torch.randn(48, 32))  # type: ignore[arg-type, operator]
    operated.load_state_dict(heads.state_dict())
    hidden, video = torch.randn(2, 4, 2, 2, 32), torch.full((2, 6, 3, 8, 8), 10.0)
    found = []
    for module in (heads, operated):
        leaf, monitor = hidden.clone().requires_grad_(), GradMonitor(2)
        module(leaf, None, video, grad_monitor=monitor).total.backward()
        found.append((leaf.grad, monitor, [p.grad for p in module.parameters()]))
    (plain, before, plain_heads), (cut, after, cut_heads) = found
    assert before.cosines[0, 1] < -0.1 and after.scale is not None and plain is not None
    gram = before.cosines * before.norms[:, None] * before.norms
    torch.testing.assert_close(after.scale, surgery_scale(gram, [[0, 1], [0, 1]]))
    assert not torch.allclose(plain, cut)
    torch.testing.assert_close(plain_heads, cut_heads)
