"""python -m benchmarks.kernels [--op OP ...] [--size SIZE] [--dtype DTYPE]: profile a forward and backward.

Prints a table per op: how often each GPU kernel ran and for how long, from torch.profiler. With --for-ncu it prints
none, but marks one forward and backward of each op for `ncu --profile-from-start off`.
"""

from __future__ import annotations

import argparse

import torch

from mfwm_kernels.op import OPS

from . import bench_ops


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP")
    parser.add_argument("--size", default="genie")
    parser.add_argument("--dtype", choices=list(bench_ops.DTYPES), default="bf16")
    parser.add_argument("--for-ncu", action="store_true", help="mark the calls for ncu; no table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: torch.profiler and ncu profile GPU kernels")
    device = torch.device("cuda")
    for name in arguments.op:
        op = OPS[name]
        if arguments.size not in op.bench:
            parser.error(f"--size {arguments.size}: {name} has {', '.join(op.bench)}")
        for backend in bench_ops.backends_of(op, device):
            kwargs = bench_ops.with_gradients(op, op.bench[arguments.size](bench_ops.DTYPES[arguments.dtype], device))
            formula = bench_ops.ours(op, backend)
            with torch.no_grad():
                upstream = bench_ops.upstream_of(formula(**kwargs))
            call = bench_ops.call_of(op, formula, kwargs, upstream)
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            if arguments.for_ncu:
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
                continue
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                torch.cuda.synchronize()
            print(f"{name} on {backend}, {arguments.size}, {arguments.dtype}, one forward and backward")
            kernels = [kernel for kernel in profile.key_averages() if kernel.device_time_total]
            for kernel in sorted(kernels, key=lambda kernel: -kernel.device_time_total):
                print(f"{kernel.device_time_total:10.1f} us {kernel.count:5} x  {kernel.key[:90]}", flush=True)


if __name__ == "__main__":
    main()
