"""Several horizons under FSDP2, with the heads as a unit of their own:

    torchrun --nproc-per-node 2 examples/engines/torchrun_fsdp2.py

The ops read the weights of all horizons in the forward of MultiFrameHeads, so that is the module to shard, not the
linear layers in it. FSDP2 then gathers its weights for that forward and backward. The loop is that of torchrun_ddp.py.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torchrun_ddp import main


def prepare(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model.heads)
    # Heads are also called by other names than forward, which FSDP2 must know of.
    register_fsdp_forward_method(model.heads, "predict")
    return fully_shard(model)


if __name__ == "__main__":
    main(prepare)
