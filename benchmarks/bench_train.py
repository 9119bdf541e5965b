"""Measures the multi-frame tax: a training step that predicts four frames, over the same trunk's next-frame step.

    python -m benchmarks --only train

Both steps are forward, backward and AdamW, under bf16 autocast except on a CPU without bf16 products. The multi-frame
step has K = 4 horizons with actions, a cascade, consistency and one block per far horizon on its pooled grid.
Each runs in four ways:

    eager                 the ops written out in PyTorch (rivals.py)
    torch.compile         the same, the whole model compiled
    mfwm                  our ops in an eager model
    mfwm + torch.compile  our ops in a compiled model

Peak memory excludes parameters and optimiser state, and includes gradients, which each step allocates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import mfwm.models.blocks
import mfwm.models.branches
import mfwm.models.heads
import mfwm.models.world_model
import torch
from mfwm.models.heads import HeadsConfig
from mfwm.models.world_model import WorldModel, WorldModelConfig
from torch import Tensor

from mfwm_kernels import HorizonLoss, Horizons

from . import rivals
from .bench_ops import failure, figures, release
from .measure import Contender, interleaved, multiplied

CONTENDERS = ("eager", "torch.compile", "mfwm", "mfwm + torch.compile")
OFFSETS = (1, 2, 4, 8)


def _heads(factors: tuple[int, ...], patches: tuple[int, ...]) -> HeadsConfig:
    return HeadsConfig(
        horizons=Horizons(OFFSETS, factors),
        patch_sizes=patches,
        blocks=(0, 1, 1, 1),
        residual=False,
        consistency=(0.0, 0.1, 0.1, 0.1),
        detach=None,
    )


CPU_MODEL = WorldModelConfig(width=256, layers=6, heads=_heads((1, 2, 4, 8), (8, 8, 8, 8)))
# Size -> (clips in a batch, model). "tiny" tests in seconds that the benchmark runs.
SIZES: dict[str, tuple[int, WorldModelConfig]] = {
    "tiny": (2, replace(CPU_MODEL, width=32, layers=1, context=10)),
    "cpu": (8, CPU_MODEL),
    "cpu-32": (32, CPU_MODEL),
    "genie": (
        36,
        WorldModelConfig(patch=4, width=512, layers=12, head_width=64, heads=_heads((1, 2, 4, 4), (4, 4, 4, 4))),
    ),
    "pixels": (
        4,
        WorldModelConfig(
            frame=(3, 256, 256),
            width=1024,
            layers=12,
            head_width=64,
            context=24,
            heads=_heads((1, 2, 4, 8), (8, 8, 8, 8)),
        ),
    ),
}


def sizes_of(device: torch.device) -> list[str]:
    """The sizes that run by default."""
    return ["cpu"] if device.type == "cpu" else ["genie", "pixels"]


def autocast_dtype(device: torch.device) -> torch.dtype:
    return multiplied(torch.bfloat16, device)


def next_frame(config: WorldModelConfig) -> WorldModelConfig:
    """The same trunk with only the near horizon."""
    near = HeadsConfig(
        Horizons.next_frame(), patch_sizes=(config.patch,), conditioning="none", residual=False, detach=None
    )
    return replace(config, heads=near)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Replace the model's ops by plain PyTorch with the options that this benchmark uses."""

    def fan_out(
        hidden: Tensor,
        actions: Tensor | None,
        horizons: Horizons,
        *,
        pool: Any,
        norm_weight: Tensor,
        norm: str = "rms",
        window_start: int = 1,
        **rest: Any,
    ) -> tuple[Tensor, ...]:
        assert norm == "rms" and window_start == 1 and all(value is None for value in rest.values())
        if actions is None:
            actions = hidden.new_zeros(hidden.shape[0], hidden.shape[1], hidden.shape[-1])
        return tuple(
            rivals.fan_out(hidden, actions, Horizons((offset,), (1,)), norm_weight[i], (pool[i],))[0]
            for i, offset in enumerate(horizons.offsets)
        )

    def multi_horizon_linear(
        hidden: Tensor,
        actions: Tensor | None,
        weights: Sequence[Tensor],
        horizons: Horizons,
        *,
        biases: Sequence[Tensor],
        norm_weight: Tensor,
        norm: str,
        window_start: int,
        **rest: Any,
    ) -> tuple[Tensor, ...]:
        assert norm == "rms" and window_start == 1 and all(value is None for value in rest.values())
        states = fan_out(hidden, actions, horizons, pool=(1,) * len(weights), norm_weight=norm_weight)
        return tuple(torch.nn.functional.linear(s, w, b) for s, w, b in zip(states, weights, biases, strict=True))

    def multi_horizon_loss(
        preds: Sequence[Tensor],
        video: Tensor,
        horizons: Horizons,
        *,
        horizon_weights: Sequence[float],
        consistency_weights: Any,
        detach: str | None,
        patch_sizes: Any,
        residual: bool,
        kind: str,
        beta: float,
        motion_gain: float,
        delta: float,
        eps: float,
        **rest: Any,
    ) -> HorizonLoss:
        assert kind == "mse" and not residual and not beta and not motion_gain
        assert all(value is None for value in rest.values())
        weights = consistency_weights or [0.0] * len(preds)
        options: dict[str, Any] = {"patch_sizes": patch_sizes, "horizon_weights": horizon_weights, "detach": detach}
        (total,) = rivals.multi_horizon_loss(list(preds), video, horizons, weights, **options)
        return HorizonLoss(total, *(torch.empty(0),) * 4)

    def video_pyramid(video: Tensor, factors: Any, *, patch_sizes: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (rivals._patches(rivals._frames(video), patch_sizes[0]).to(dtype),)

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    with contextlib.ExitStack() as patched:
        for formula in (fan_out, multi_horizon_linear):
            patched.enter_context(mock.patch.object(mfwm.models.branches, formula.__name__, formula))
        patched.enter_context(mock.patch.object(mfwm.models.heads, "multi_horizon_loss", multi_horizon_loss))
        patched.enter_context(mock.patch.object(mfwm.models.world_model, "video_pyramid", video_pyramid))
        patched.enter_context(mock.patch.object(mfwm.models.blocks, "rms_norm", rms_norm))
        yield


def step_of(contender: str, config: WorldModelConfig, batch: int, device: torch.device) -> Callable[[], None]:
    """One training step on random frames and actions."""
    torch.manual_seed(0)
    model = WorldModel(config).to(device)
    frames = config.context + max(OFFSETS)
    video = torch.randint(0, 256, (batch, frames, *config.frame), dtype=torch.uint8, device=device)
    actions = torch.randint(0, config.actions, (batch, frames), device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, dynamic=False) if "torch.compile" in contender else model
    plain = not contender.startswith("mfwm")
    dtype = autocast_dtype(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step() -> None:
        with written_out() if plain else contextlib.nullcontext(), autocast:
            loss = forward(video, actions).total
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def measure(
    size: str, device: torch.device, budget: float, contenders: Sequence[str] = CONTENDERS
) -> Iterator[dict[str, Any]]:
    batch, config = SIZES[size]
    ready: list[Contender] = []
    rows: dict[str, dict[str, Any]] = {}
    memory: dict[str, int] = {}
    torch._dynamo.reset()
    for name in contenders:
        dtype = str(autocast_dtype(device)).removeprefix("torch.")
        rows[name] = {"size": size, "batch": batch, "dtype": dtype, "contender": name}
        try:
            for task, task_config in (("next frame", next_frame(config)), ("multi-frame", config)):
                step = step_of(name, task_config, batch, device)
                step()
                step()
                memory[f"{name}, {task}"] = peak_bytes(step, device)
                ready.append(Contender(f"{name}, {task}", [step]))
        except Exception as error:  # A contender that fails gets a row; the benchmark continues.
            rows[name]["status"] = failure(error)
        release(device)
    # Four budgets per contender, because a step takes much longer than an op.
    times = interleaved(ready, device, 4 * budget, graphs=False)
    nearest = [times[f"{name}, next frame"].median for name in contenders if f"{name}, next frame" in times]
    for name, row in rows.items():
        if "status" not in row:
            one, many = times[f"{name}, next frame"], times[f"{name}, multi-frame"]
            one_bytes, many_bytes = memory[f"{name}, next frame"], memory[f"{name}, multi-frame"]
            row.update(
                status="ok",
                next_frame_ms=one.median * 1e3,
                **figures(many),
                tax=many.median / one.median,
                tax_over_fastest=many.median / min(nearest),
                next_frame_peak_bytes=one_bytes,
                peak_bytes=many_bytes,
                memory_tax=many_bytes / one_bytes,
            )
        yield row


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most memory that a step allocates at a time, above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def line_of(row: dict[str, Any]) -> str:
    head = f"training step {row['size']:8}{row['contender']:22}"
    if row["status"] != "ok":
        return head + row["status"]
    return head + (
        f"next frame {row['next_frame_ms']:9.1f} ms  multi-frame {row['median_ms']:9.1f} ms  tax {row['tax']:.2f}x "
        f"({row['tax_over_fastest']:.2f}x the fastest)  memory {row['peak_bytes'] / 2**20:8.0f} MiB, "
        f"{row['memory_tax']:.2f}x"
    )
