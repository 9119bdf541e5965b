"""What tests/test_engines.py runs under torchrun: python -m torch.distributed.run ... engines_processes.py DIR.

For DDP and FSDP2, the gradients of the first global batch, then the losses of a short training run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "engines"))
import torchrun_ddp
import torchrun_fsdp2
from world import BATCH, Clips, World

STEPS = 3


def gradients(model: torch.nn.Module, first: int, count: int, every: int) -> dict[str, torch.Tensor]:
    """Of the mean loss over `count` clips, `every` apart."""
    numbers = range(first, first + count * every, every)
    clips = [Clips(1)[number] for number in numbers]
    total, _ = model(*(torch.stack(parts) for parts in zip(*clips, strict=True)))
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    processes = dist.get_world_size()
    prepared = {"ddp": torchrun_ddp.prepare, "fsdp2": torchrun_fsdp2.prepare}
    for name, prepare in prepared.items():
        torch.manual_seed(0)
        model = prepare(World())
        found = gradients(model, dist.get_rank(), BATCH // processes, processes)
        whole = {key.removeprefix("module."): getattr(g, "full_tensor", lambda g=g: g)() for key, g in found.items()}
        losses = torchrun_ddp.train(STEPS, torch.device("cpu"), prepare)
        if dist.get_rank() == 0:
            torch.save({"gradients": whole, "losses": losses}, folder / f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
