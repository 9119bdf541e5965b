"""What tests/test_parallel.py runs under torchrun: python -m torch.distributed.run ... two_processes.py DIR.

Small runs with DDP and with FSDP2, and two that go on where one process stopped, with accumulated gradients.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from mfwm.training import train

sys.path.insert(0, str(Path(__file__).parent))
from small_run import small_config


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    # One group for all runs: a second one would meet the addresses of the first in torchrun's store.
    dist.init_process_group("gloo")
    for mode in ("ddp", "fsdp"):
        config = replace(small_config(folder / "data"), parallel=mode, checkpoint_every=10, look_every=20)
        train(config, folder / mode, progress=False)
        train(replace(config, accumulate=2), folder / f"one-then-{mode}", progress=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
