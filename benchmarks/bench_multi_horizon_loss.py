"""multi_horizon_loss on the CPU, forward and backward: eager PyTorch, torch.compile and the compiled kernel.

    python benchmarks/bench_multi_horizon_loss.py [--no-consistency] [--dtype bfloat16] [--default-allocator]

The contenders run interleaved, each is checked against the reference in fp64 before it is timed, and the copy bandwidth
that is the roof is measured in the same rounds. The floor counts the fewest bytes: video and predictions read once,
gradients written once.

glibc gives large blocks back to the system, so every fresh gradient costs page faults. All contenders run with that
turned off (the program starts itself again with the variables set); --default-allocator leaves it on.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
OFFSETS = FACTORS = (1, 2, 4, 8)
CONSISTENCY = (0.0, 0.1, 0.1, 0.1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--time", type=int, default=24)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--no-consistency", action="store_true")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--default-allocator", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.default_allocator and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    run(args)


def run(args: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from mfwm_kernels import Horizons, multi_horizon_loss, use_backend

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    consistency = None if args.no_consistency else list(CONSISTENCY)
    horizons = Horizons(OFFSETS, FACTORS)
    video = torch.randint(0, 256, (args.batch, args.time, 3, args.size, args.size), dtype=torch.uint8)
    preds = [
        torch.randn(args.batch, args.time, 3, args.size // f, args.size // f).to(dtype).requires_grad_()
        for f in FACTORS
    ]

    def shrink(x: torch.Tensor, factor: int) -> torch.Tensor:
        return x if factor == 1 else F.avg_pool2d(x.flatten(0, 1), factor).unflatten(0, x.shape[:2])

    def formula(preds: list[torch.Tensor], video: torch.Tensor) -> torch.Tensor:
        target = video.float() / 127.5 - 1
        total = torch.zeros(())
        for pred, k, f in zip(preds, OFFSETS, FACTORS, strict=True):
            total = total + F.mse_loss(pred[:, :-k].float(), shrink(target, f)[:, k:])
        for j in range(1, len(preds)) if consistency else ():
            apart = OFFSETS[j] - OFFSETS[0]
            near = shrink(preds[0].float(), FACTORS[j] // FACTORS[0])[:, apart:]
            inside = slice(0, args.time - OFFSETS[j])
            total = total + CONSISTENCY[j] * F.mse_loss(preds[j].float()[:, inside], near[:, inside])
        return total

    def ours(preds: list[torch.Tensor], video: torch.Tensor) -> torch.Tensor:
        return multi_horizon_loss(preds, video, horizons, consistency_weights=consistency).total

    def step(loss: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(preds, video), preds)

    contenders = {"eager": step(formula), "torch.compile": step(torch.compile(formula)), "mfwm_kernels": step(ours)}
    with use_backend("reference"):
        exact = [pred.detach().double().requires_grad_() for pred in preds]
        expected = torch.autograd.grad(
            multi_horizon_loss(exact, video, horizons, consistency_weights=consistency).total, exact
        )
    for name, contender in contenders.items():
        for i, (gradient, right) in enumerate(zip(contender(), expected, strict=True)):
            error = float((gradient.double() - right).norm() / right.norm())
            if not error < {"float32": 2e-5, "bfloat16": 3e-2, "float16": 2e-2}[args.dtype]:
                raise SystemExit(f"{name} is wrong: gradient of preds[{i}] has relative error {error:.2e}")
    del exact, expected

    pred_bytes = sum(pred.numel() * pred.element_size() for pred in preds)
    floor_bytes = video.numel() + 2 * pred_bytes
    # A copy that moves as many bytes: half read, half written.
    source, destination = (torch.zeros(floor_bytes // 2, dtype=torch.uint8) for _ in range(2))
    timed = {"copy": lambda: destination.copy_(source), **contenders}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(args.repeats + 3):
        for name, body in timed.items():
            start = time.perf_counter()
            body()
            if repeat >= 3:
                times[name].append(time.perf_counter() - start)

    allocator = "default allocator" if args.default_allocator else "allocator keeps its blocks"
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}, {allocator}"
    )
    print(f"B={args.batch} T={args.time} 3x{args.size}x{args.size} uint8, offsets and factors {OFFSETS}, ", end="")
    print("no consistency" if consistency is None else f"consistency {CONSISTENCY}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"floor {floor_bytes / 1e6:.1f} MB; copy roof {floor_bytes / medians['copy'] / 1e9:.1f} GB/s\n")
    print(f"{'':15}{'median ms':>11}{'20 %':>9}{'80 %':>9}{'GB/s':>8}{'of roof':>9}{'to compile':>12}")
    for name, values in times.items():
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5]
        median = medians[name]
        print(
            f"{name:15}{median * 1e3:11.2f}{low * 1e3:9.2f}{high * 1e3:9.2f}{floor_bytes / median / 1e9:8.1f}"
            f"{medians['copy'] / median:9.0%}{medians['torch.compile'] / median:11.2f}x"
        )


if __name__ == "__main__":
    main()
