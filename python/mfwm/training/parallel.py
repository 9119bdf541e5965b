"""Training in several processes that torchrun starts, by torch's DistributedDataParallel or FSDP2.

Every process takes its rows of the same global batch, and gradients are averaged over the processes.
FSDP2 takes as long to import as torch itself, so only a run imports it, not every command.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.blocks import SpaceTimeBlock


@contextmanager
def processes(mode: str) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device; joins the processes that torchrun started unless `mode` is "none".

    An existing process group is used and stays.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if mode == "none" and launched > 1:
        raise ValueError(f'parallel must be "ddp" or "fsdp" in {launched} processes, got "none"')
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if mode == "none":
        yield 0, 1, device
        return
    if "RANK" not in os.environ:
        raise ValueError(f'parallel = "{mode}" needs torchrun: torchrun --nproc-per-node N -m mfwm.cli train ...')
    joined = not dist.is_initialized()
    if joined:
        # Checkpoints are gathered over gloo, gradients over NCCL where there are GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        if joined:
            dist.destroy_process_group()


def distribute(model: nn.Module, mode: str) -> nn.Module:
    """The module to call in training; `model` holds the weights, or this process's shards of them."""
    if mode == "ddp":
        return DistributedDataParallel(model)
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for block in [module for module in model.modules() if isinstance(module, SpaceTimeBlock)]:
            fully_shard(block)
            register_fsdp_forward_method(block, "append")
        fully_shard(model)
        register_fsdp_forward_method(model, "validate")
    return model


@contextmanager
def gradient_sync(module: nn.Module, shared: bool) -> Iterator[None]:
    """Sum gradients over the processes only if `shared`: in the last part of an accumulated step."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(shared)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not shared else nullcontext():
        yield


def sum_over_processes(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    return sum_over_processes(values) / (dist.get_world_size() if dist.is_initialized() else 1)


def gathered(value: Tensor) -> Tensor:
    """The full tensor of a sharded one."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
