"""Times forward and backward of multi_horizon_loss while clips, frames or pixels grow 64-fold.

python -m benchmarks --only scaling
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mfwm_kernels import Horizons, multi_horizon_loss

from .bench_ops import figures
from .measure import Contender, interleaved

DOUBLINGS = range(7)
# Axis -> (clips, frames, pixels along a side) at each step.
AXES: dict[str, list[tuple[int, int, int]]] = {
    "clips": [(2**k, 24, 128) for k in DOUBLINGS],
    "frames": [(1, 24 * 2**k, 128) for k in DOUBLINGS],
    "pixels": [(1, 24, side) for side in (128, 184, 256, 360, 512, 728, 1024)],
}


def measure(axis: str, dtype_name: str, device: torch.device, budget: float) -> Iterator[dict[str, Any]]:
    """Yield a row per size. All sizes of the axis are interleaved."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    horizons = Horizons.cascade(4)
    contenders, rows = [], {}
    for batch, frames, side in AXES[axis]:
        video = torch.randint(0, 256, (batch, frames, 3, side, side), dtype=torch.uint8, device=device)
        preds = [
            torch.randn(batch, frames, 3, side // f, side // f, device=device).to(dtype).requires_grad_()
            for f in horizons.factors
        ]

        def call(video: torch.Tensor = video, preds: list[torch.Tensor] = preds) -> None:
            loss = multi_horizon_loss(preds, video, horizons, consistency_weights=[0, 0.1, 0.1, 0.1], detach=None)
            torch.autograd.grad(loss.total, preds)

        call()
        name = f"{batch} x {frames} x {side}"
        rows[name] = {"op": "multi_horizon_loss", "size": axis, "dtype": dtype_name, "contender": name}
        rows[name]["pixels"] = batch * frames * side * side
        contenders.append(Contender(name, [call]))
    times = interleaved(contenders, device, budget, graphs=False)
    for name, row in rows.items():
        yield {**row, **figures(times[name]), "ns_per_pixel": times[name].median / row["pixels"] * 1e9}


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['op']:36}{row['size']:8}{row['dtype']:6}{row['contender']:16}{row['median_ms']:10.3f} ms"
        f"{row['ns_per_pixel']:8.2f} ns a pixel"
    )
