"""What the benchmarks compare does the same work."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from mfwm.models.world_model import WorldModel, WorldModelConfig

from benchmarks import bench_train


@pytest.mark.parametrize("only_next", [False, True], ids=["multi-frame", "next frame"])
def test_the_written_out_training_step_is_the_same_step(only_next: bool) -> None:
    config = replace(bench_train.CPU_MODEL, width=32, layers=1, context=10)
    config = bench_train.next_frame(config) if only_next else config

    def loss_and_gradients(written_out: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = WorldModel(config)
        video, actions = clips(config)
        with bench_train.written_out() if written_out else contextlib.nullcontext():
            loss = model(video, actions).total
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours, plain = loss_and_gradients(False), loss_and_gradients(True)
    assert len(ours) == len(plain) > 10
    for got, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def clips(config: WorldModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    frames = config.context + max(bench_train.OFFSETS)
    video = torch.randint(0, 256, (2, frames, *config.frame), dtype=torch.uint8)
    return video, torch.randint(0, config.actions, (2, frames))
