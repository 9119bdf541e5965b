"""The Op record, which dispatch, tests, checks and benchmarks read, and the interface of a backend's module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Both are keyed by the differentiable fields of an op's arguments. Want says whether a gradient is needed: a bool, a
# list of bools for a list of tensors, None for a field that is None. Gradients holds the gradients: a list for a list
# of tensors, with None where none is needed. A field whose gradient is not needed may be missing.
Want = Mapping[str, Any]
Gradients = dict[str, Any]


class Cost(NamedTuple):
    """The fewest bytes that must move and the fewest floating-point operations, forward and backward together."""

    bytes: int
    flops: int


class Kernels(Protocol):
    """The interface of the module `mfwm_kernels.<backend>.<op>`. `args` is the op's NamedTuple.

    Every module has `forward`. If the record sets `gradients_in_forward`, it also returns the gradients of outputs[0],
    in `dtypes.stored_dtype`, and in the backward `scale` multiplies them by the upstream gradient. Other ops have
    `backward` instead, and their forward returns no gradients.

    Inputs and upstream gradients have any strides. Outputs and gradients are new tensors, contiguous or in the strides
    that torch.empty_like gives them.
    """

    def forward(self, args: Any, want: Want) -> tuple[list[Tensor], Gradients]: ...

    def backward(
        self, args: Any, want: Want, upstream: Sequence[Tensor | None], outputs: Sequence[Tensor]
    ) -> Gradients:
        """`upstream`: the gradient of each output, or None. `outputs`: the forward's outputs and statistics if the
        record sets `outputs_in_backward`, else empty."""
        ...

    def scale(self, gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
        """gradients * upstream. It may overwrite the gradients."""
        ...


@dataclass(frozen=True)
class Backend:
    """A backend of an op: the names of the kernels that it may launch (mfwm_kernels.info lists them) and its dtypes.

    `refuses(args)` says why it cannot serve a call, or returns ''.
    """

    kernels: tuple[str, ...]
    refuses: Callable[[Any], str] = lambda args: ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """Everything that the package knows about one op.

    arguments          NamedTuple type of a checked call, in the order of the registered op's schema. Its first field is
                       a tensor or a list of tensors, whose dtype and device are those of the call; torch_library.py
                       lists the types that fields may have
    differentiable     its fields that may receive gradients
    reference          (args) -> outputs: the op as plain PyTorch
    fake               (args) -> outputs and statistics as empty tensors: shapes and dtypes only
    public             the function users call
    samples            (dtype, device) -> keyword arguments of `public`, odd shapes and strides included. The first
                       three are not empty: finite differences and opcheck take them, torch.compile takes the first,
                       partial gradients the second
    variants           (dtype, device) -> keyword arguments of more calls: options that `samples` omit and that need
                       other compiled code. mfwm_kernels.aot compiles them; nothing runs them
    cost               (keyword arguments) -> Cost, forward and backward
    bench              benchmark size -> (dtype, device[, batch]) -> keyword arguments. Sizes named cpu... suit a CPU;
                       mfwm_kernels.check times "cpu" or, on a GPU, "genie"
    backends           name -> Backend, fastest first: `auto` takes the first that serves the call
    gradients_in_forward  the forward computes the gradients of outputs[0]; only that output is differentiable
    outputs_in_backward   autograd saves the forward's outputs and passes them to the backward
    statistics         the number of tensors that a backend's forward returns behind the outputs for its backward alone;
                       needs outputs_in_backward
    mutated_in_backward   fields that the backward writes (a gradient monitor)
    counts_flops          torch's FlopCounterMode counts the op, whose FLOPs are those of matrix products: a third of
                          the cost in the forward, two thirds in the backward
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
    statistics: int = 0
    mutated_in_backward: tuple[str, ...] = ()
    counts_flops: bool = False

    @functools.cached_property
    def tensor_fields(self) -> tuple[int, ...]:
        """The indices of the arguments that may be a tensor or a list of tensors, by their annotations."""
        return tuple(i for i, kind in enumerate(self.arguments.__annotations__.values()) if "Tensor" in str(kind))

    @functools.cached_property
    def saved_fields(self) -> tuple[int, ...]:
        """The `tensor_fields` that the backward reads and does not write."""
        names = tuple(self.arguments.__annotations__)
        return tuple(i for i in self.tensor_fields if names[i] not in self.mutated_in_backward)


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add `op` to OPS; ops/__init__.py then defines its torch.ops.mfwm.<name>."""
    OPS[op.name] = op
    return op
