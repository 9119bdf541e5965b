"""The Op record: all that dispatch, tests, checks and benchmarks know of an op; and what a backend provides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# By differentiable field of an op's arguments. Want: whether its gradient is needed, for a list of tensors a list of
# bools, None for a field that is None. Gradients: the gradient, for a list of tensors a list with None where none is
# needed; a field whose gradient is not needed may be left out.
Want = Mapping[str, Any]
Gradients = dict[str, Any]


class Cost(NamedTuple):
    """The fewest bytes that must cross memory and the fewest floating-point operations, forward and backward."""

    bytes: int
    flops: int


class Kernels(Protocol):
    """What the module `mfwm_kernels.<backend>.<op>` provides. `args` is the op's NamedTuple.

    Every module has `forward`. Where the record says `gradients_in_forward`, it returns the gradients of outputs[0]
    as well, in `dtypes.stored_dtype`, and `scale` multiplies them by the upstream gradient in the backward. Other ops
    have `backward` instead, and their forward returns no gradients.
    """

    def forward(self, args: Any, want: Want) -> tuple[list[Tensor], Gradients]: ...

    def backward(
        self, args: Any, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]
    ) -> Gradients:
        """`upstream`: an output's gradient, or None. `outputs`: those of the forward, where the record asks for them
        (`outputs_in_backward`), else none."""
        ...

    def scale(self, gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
        """gradients * upstream. The call owns the gradients and may write to them."""
        ...


@dataclass(frozen=True)
class Backend:
    """What a backend of an op launches, and the calls that it refuses: `refuses(args)` gives the reason, or ''."""

    kernels: tuple[str, ...]
    refuses: Callable[[Any], str] = lambda args: ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """One op, whole.

    arguments          NamedTuple type of a checked call: tensors, lists of tensors, numbers and strings, in the order
                       of the registered op's schema
    differentiable     its fields that may receive gradients
    reference          (args) -> outputs: the op as plain PyTorch
    fake               (args) -> outputs as empty tensors: shapes and dtypes only
    public             the function users call
    samples            (dtype, device) -> keyword arguments of `public`, odd shapes and strides included
    variants           (dtype, device) -> keyword arguments of further calls: options that `samples` leave out and that
                       are compiled in their own way. They are compiled ahead of time (mfwm_kernels.aot), never run
    cost               (keyword arguments) -> Cost, forward and backward
    bench              benchmark size -> (dtype, device[, batch]) -> keyword arguments; those named cpu... suit a CPU
    backends           name -> Backend, the faster ones first: `auto` takes the first that serves
    gradients_in_forward  the forward computes the gradients of outputs[0]; only that output is differentiable
    outputs_in_backward   the backward takes the forward's outputs, which are saved for it
    mutated_in_backward   fields that the backward writes (a gradient monitor)
    counts_flops          its FLOPs are those of matrix products, which torch's FlopCounterMode counts: a third of the
                          cost in the forward, two in the backward
    """

    name: str
    arguments: type
    differentiable: tuple[str, ...]
    reference: Callable[[Any], tuple[Tensor, ...]]
    fake: Callable[[Any], list[Tensor]]
    public: Callable[..., Any]
    samples: Callable[[torch.dtype, torch.device], Iterator[dict[str, Any]]]
    cost: Callable[[dict[str, Any]], Cost]
    variants: Callable[[torch.dtype, torch.device], Iterator[dict[str, Any]]] = lambda dtype, device: iter(())
    bench: Mapping[str, Callable[..., dict[str, Any]]] = field(default_factory=dict)
    backends: Mapping[str, Backend] = field(default_factory=dict)
    gradients_in_forward: bool = False
    outputs_in_backward: bool = False
    mutated_in_backward: tuple[str, ...] = ()
    counts_flops: bool = False


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Enter `op` into the table; ops/__init__.py then defines its torch.ops.mfwm.<name>."""
    OPS[op.name] = op
    return op
