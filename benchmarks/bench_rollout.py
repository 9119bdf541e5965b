"""Times closed-loop rollouts of the demo's model, 64 steps of one clip, with and without a cache.

    python -m benchmarks --only rollout

"uncached" reruns the trunk on all frames within its windows, and gives the same rollout. "the last 16 frames anew" is
cheaper, but gives another one: it forgets frames before the trained context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from mfwm.models.rollouts import Rollout, rollout
from mfwm.models.sizes import DEMO_MODEL
from mfwm.models.world_model import WorldModel
from torch import Tensor

from .bench_ops import figures
from .measure import Contender, interleaved

SEEN, STEPS = 4, 64


def measure(device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    config = DEMO_MODEL
    model = WorldModel(config).to(device).eval()
    # The head predicts changes and is initialised to zero, so the model would copy its last frame.
    torch.nn.init.normal_(model.heads.heads[0].weight, std=0.02)  # type: ignore[arg-type]
    windowless = WorldModel(replace(config, window=None)).to(device).eval()
    windowless.load_state_dict(model.state_dict())
    video = torch.randint(0, 256, (1, SEEN, *config.frame), dtype=torch.uint8, device=device)
    actions = torch.randint(0, config.actions, (1, SEEN + STEPS), device=device)
    anew = f"the last {config.context} frames anew"
    calls = {
        "cached": lambda: rollout(model, video, actions, STEPS),
        "uncached": lambda: rollout(model, video, actions, STEPS, cached=False),
        anew: lambda: rollout(windowless, video, actions, STEPS, cached=False, keep=config.context),
    }
    apart = (calls["cached"]() - calls["uncached"]()).abs().max().item()
    times = interleaved([Contender(name, [call]) for name, call in calls.items()], device, budget, graphs=False)
    half, full = held_bytes(model, video, actions)
    for name in calls:
        row = {"size": "demo", "dtype": "float32", "contender": name, "steps": STEPS, **figures(times[name])}
        row["ms_per_frame"] = row["median_ms"] / STEPS
        row["over_cached"] = times[name].median / times["cached"].median
        if name == "cached":
            row |= {"apart_from_uncached": apart, f"bytes_at_{STEPS // 2}": half, f"bytes_at_{STEPS}": full}
        yield row


def held_bytes(model: WorldModel, video: Tensor, actions: Tensor) -> tuple[int, int]:
    """The bytes that a rollout holds for its past, half way and at its end."""
    running = Rollout(model, video, actions, STEPS)
    held = []
    for step in range(1, STEPS + 1):
        running.step()
        if step in (STEPS // 2, STEPS):
            memory = running.memory
            tensors = [memory.frames, memory.actions, *memory.states.values()]
            tensors += [x for cache in memory.caches for x in (cache.keys, cache.values)]
            held.append(sum(x.untyped_storage().nbytes() for x in tensors if x is not None))
    return held[0], held[1]


def line_of(row: dict[str, Any]) -> str:
    more = f"  {row['apart_from_uncached']:.0e} from uncached" if "apart_from_uncached" in row else ""
    return (
        f"rollout {row['size']:8}{row['contender']:26}{row['ms_per_frame']:9.2f} ms a frame"
        f"{row['over_cached']:7.2f}x cached{more}"
    )
