"""mtp_combine: the multi-token-prediction join, without the concatenation.

out = F.linear(cat(RMSNorm(hidden), RMSNorm(embedding)), weight)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments as check
from ..autograd import call
from ..dtypes import cast_all
from ..op import Backend, Cost, Op, register
from .fan_out import rms_norm

ORDERS = ("hidden_first", "embedding_first")


class Arguments(NamedTuple):
    hidden: Tensor
    embedding: Tensor
    weight: Tensor
    hidden_norm_weight: Tensor
    embedding_norm_weight: Tensor
    norm_eps: float
    order: str


def mtp_combine(
    hidden: Tensor,
    embedding: Tensor,
    weight: Tensor,
    *,
    hidden_norm_weight: Tensor,
    embedding_norm_weight: Tensor,
    norm_eps: float = 1e-6,
    order: str = "hidden_first",
) -> Tensor:
    """Combine the hidden state of one prediction depth with the embedding of the real frame that follows.

    Equivalent to:

        h = F.rms_norm(hidden, (D,), hidden_norm_weight, norm_eps)
        e = F.rms_norm(embedding, (D,), embedding_norm_weight, norm_eps)
        F.linear(torch.cat([h, e], -1), weight)

    with h and e swapped for order="embedding_first". Norms are in fp32 (fp64 for fp64). Under autocast, every floating
    tensor is cast as F.linear does.

    Args:
        hidden, embedding: [..., D], equal shapes; fp32, bf16, fp16 or fp64, any strides.
        weight: [N, 2 D].
        hidden_norm_weight, embedding_norm_weight: [D].
        norm_eps: added to the mean square.
        order: which half of weight's columns multiplies the hidden state: "hidden_first" as in the paper, or
            "embedding_first" as in Megatron's `eh_proj`.

    Returns:
        [..., N], dtype of hidden. Differentiable with respect to all five tensors.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.

    Source: DeepSeek-V3 technical report, arXiv 2412.19437, equation 21.
    """
    check.tensor("hidden", hidden, tuple(range(1, 9)), "[..., D]")
    device = hidden.device
    check.tensor("embedding", embedding, hidden.dim(), "[..., D]")
    check.tensor("weight", weight, 2, "[N, 2 * D]")
    check.tensor("hidden_norm_weight", hidden_norm_weight, 1, "[D]")
    check.tensor("embedding_norm_weight", embedding_norm_weight, 1, "[D]")
    hidden, embedding, weight, hidden_norm_weight, embedding_norm_weight = cast_all(
        (hidden, embedding, weight, hidden_norm_weight, embedding_norm_weight), device
    )
    args = Arguments(
        hidden,
        embedding,
        weight,
        hidden_norm_weight,
        embedding_norm_weight,
        check.number("norm_eps", norm_eps, least=0),
        check.choice("order", order, ORDERS),
    )
    width = hidden.shape[-1]
    check.non_zero_sizes("hidden", hidden)
    check.shape("embedding", embedding, hidden.shape, "that of hidden")
    check.shape("weight", weight, (weight.shape[0], 2 * width), "[N, 2 D]")
    check.non_zero_sizes("weight", weight, may_be_zero=())
    check.shape("hidden_norm_weight", hidden_norm_weight, (width,), "[D]")
    check.shape("embedding_norm_weight", embedding_norm_weight, (width,), "[D]")
    for name in Arguments._fields[1:5]:
        check.like(name, getattr(args, name), "hidden", args.hidden)
    return call(OP, args)[0]


def reference(args: Arguments) -> tuple[Tensor]:
    hidden, embedding = args.hidden, args.embedding
    computed = torch.promote_types(hidden.dtype, torch.float32)
    halves = [
        rms_norm(hidden.to(computed), args.hidden_norm_weight.to(computed), args.norm_eps).to(hidden.dtype),
        rms_norm(embedding.to(computed), args.embedding_norm_weight.to(computed), args.norm_eps).to(hidden.dtype),
    ]
    joined = torch.cat(halves if args.order == "hidden_first" else halves[::-1], dim=-1)
    return (F.linear(joined, args.weight),)


def fake(args: Arguments) -> list[Tensor]:
    return [args.hidden.new_empty(*args.hidden.shape[:-1], args.weight.shape[0])]


def samples(dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def norms(width: int) -> dict[str, Tensor]:
        return {"hidden_norm_weight": normal(width), "embedding_norm_weight": normal(width)}

    yield {"hidden": normal(2, 3, 5, 16), "embedding": normal(2, 3, 5, 16), "weight": normal(16, 32), **norms(16)}
    yield {"hidden": normal(7, 4, 9).transpose(0, 1), "embedding": normal(4, 7, 18)[..., ::2],
           "weight": normal(18, 5).T, "order": "embedding_first", "norm_eps": 1e-3, **norms(9)}  # fmt: skip
    yield {"hidden": normal(8), "embedding": normal(8), "weight": normal(3, 16), **norms(8)}
    yield {"hidden": normal(0, 3, 8), "embedding": normal(0, 3, 8), "weight": normal(8, 16), **norms(8)}
    # Wide enough for pipelined loops in the GPU kernels, and sliced in time so that the rows do not flatten.
    yield {"hidden": normal(2, 3, 40, 512)[:, :2], "embedding": normal(2, 3, 40, 512)[:, 1:],
           "weight": normal(72, 1024) / 32, **norms(512)}  # fmt: skip


def cost(kwargs: dict[str, Any]) -> Cost:
    hidden, columns = kwargs["hidden"], kwargs["weight"].shape[0]
    rows, width = hidden.numel() // hidden.shape[-1], hidden.shape[-1]
    return Cost(hidden.element_size() * rows * (6 * width + 2 * columns), 12 * rows * width * columns)


def _bench(batch: int, rows: int, width: int) -> Any:
    def make(dtype: torch.dtype, device: torch.device, batch: int = batch) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        return {
            "hidden": normal(batch, rows, width),
            "embedding": normal(batch, rows, width),
            "weight": normal(width, 2 * width),
            "hidden_norm_weight": normal(width),
            "embedding_norm_weight": normal(width),
        }

    return make


KERNELS = ("mtp_combine_norm", "mtp_combine_gradient")
SMALL = ("mtp_combine_small_forward", "mtp_combine_small_backward")

OP = register(
    Op(
        name="mtp_combine",
        arguments=Arguments,
        differentiable=("hidden", "embedding", "weight", "hidden_norm_weight", "embedding_norm_weight"),
        reference=reference,
        fake=fake,
        public=mtp_combine,
        samples=samples,
        cost=cost,
        counts_flops=True,
        bench={
            "cpu": _bench(4, 1024, 512),
            "genie": _bench(36, 16 * 256, 512),
            "pixels": _bench(32, 24 * 1024, 1024),
            "latents": _bench(16, 32 * 256, 1024),
            "1x": _bench(16, 16 * 256, 256),
            "wide": _bench(16, 1024, 2048),
        },
        backends={
            "cpu": Backend((*KERNELS, *SMALL), dtypes=check.FLOATING),
            "triton": Backend((*KERNELS, "mtp_combine_finish")),
        },
    )
)
