"""The Op record, the choice of a backend, and the two ways a call reaches it.

In eager mode a call goes straight to an autograd.Function: the registered-op boundary costs tens of microseconds.
Under torch.compile, and where torch watches or transforms the call (transforms.py), it goes through
`torch.ops.mfwm.<name>`, registered here from the same record. The `reference` backend is plain PyTorch: the compiler
traces through it.

An op's *flat arguments* are a NamedTuple of tensors, tensor lists, numbers and strings, in the order of its schema.
A backend is a module `mfwm_kernels.<backend>.<op>` with

    forward(args, wanted) -> (outputs, extras)
    backward(args, wanted, grads) -> [gradient of each wanted leaf]        (absent where `gradients_in_forward`)

where the last is `backward(args, wanted, grads, outputs)` for an op with `outputs_in_backward`.

A *leaf* is a differentiable tensor of the flat arguments, in order, lists flattened, None left out; `wanted` has a bool
for each. Where `gradients_in_forward`, `extras` are the gradients of outputs[0] with respect to the wanted leaves.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .arguments import names
from .transforms import is_batched, refuse_compiled_forward_mode, refuse_transforms, settle

BACKENDS = ("reference", "cpu", "triton", "cuda")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class BackendError(ValueError, RuntimeError):
    """A forced backend cannot serve a call: wrong name, not installed, or an option it does not have."""


def _import_native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mfwm_kernels._native"), ""
    except ImportError as error:
        return None, f"the compiled module mfwm_kernels._native did not import: {error}"


native, _native_reason = _import_native()


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs Triton's interpreter on the CPU)"
    return ""


def _cuda_reason() -> str:
    if native is None:
        return _native_reason
    if not native.has_cuda:
        return "mfwm_kernels._native was built without CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device"


# Why a backend is absent from this machine; an empty string means that it is present.
ABSENT: dict[str, str] = {"reference": "", "cpu": _native_reason, "triton": _triton_reason(), "cuda": _cuda_reason()}


class Cost(NamedTuple):
    """The fewest bytes that must cross memory and the fewest floating-point operations, forward and backward."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Backend:
    """What a backend of an op launches, and the calls that it refuses: `refuses(args)` gives the reason, or ''."""

    kernels: tuple[str, ...]
    refuses: Callable[[Any], str] = lambda args: ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """One op, whole: what dispatch, the generic tests, the self-check and the benchmarks know of it.

    arguments          NamedTuple type of the flat call
    differentiable     its fields that may receive gradients
    reference          the op as plain PyTorch, called with the flat arguments by position; returns a tuple of tensors
    fake               (args) -> outputs as empty tensors: shapes and dtypes only
    public             the function users call
    samples            (dtype, device) -> keyword arguments of `public`, odd shapes and strides included
    variants           (dtype, device) -> keyword arguments of further calls: options that `samples` leave out and that
                       are compiled in their own way. They are compiled ahead of time (mfwm_kernels.aot), never run
    cost               (keyword arguments) -> Cost, forward and backward
    bench              benchmark size -> (dtype, device[, batch]) -> keyword arguments; those named cpu... suit a CPU
    backends           name -> Backend, the faster ones first: `auto` takes the first that serves
    gradients_in_forward  the forward makes the gradients of outputs[0]; only that output is differentiable
    outputs_in_backward   the backward takes the forward's outputs, which are kept for it
    mutated_in_backward   fields that the backward writes (a gradient monitor)
    counts_flops          its FLOPs are those of matrix products, which torch's FlopCounterMode counts: a third of the
                          cost in the forward, two in the backward
    """

    name: str
    arguments: type
    differentiable: tuple[str, ...]
    reference: Callable[..., tuple[Tensor, ...]]
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
    """Enter `op` into the table and, if it has a backend besides the reference, into torch.library."""
    OPS[op.name] = op
    if op.backends:
        _register_with_torch(op)
    return op


# ---- choosing a backend

# Process-wide on purpose: a plain global is what torch.compile can guard on.
_forced: str = os.environ.get("MFWM_BACKEND") or "auto"


class use_backend:
    """Context manager that forces one backend for every op: `with use_backend("cpu"): ...`.

    "auto" gives the choice back. A forced backend that cannot serve a call raises BackendError.
    """

    def __init__(self, name: str) -> None:
        if name != "auto" and name not in BACKENDS:
            raise ValueError(f"name must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
        self.name = name
        self.previous: list[str] = []

    def __enter__(self) -> None:
        global _forced
        self.previous.append(_forced)
        _forced = self.name

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self.previous.pop()


def refusal(op: Op, backend: str, args: Any) -> str:
    """Why `backend` cannot serve this call, or ''."""
    if backend == "reference":
        return ""
    if backend not in op.backends:
        return f"{op.name} has no {backend} kernel"
    if ABSENT[backend]:
        return ABSENT[backend]
    first = first_tensor(args)
    device = first.device.type
    if device not in served_devices(backend):
        return f"it serves {' and '.join(served_devices(backend))} tensors, these are on {first.device}"
    record = op.backends[backend]
    if first.dtype not in record.dtypes:
        return f"it serves {names(record.dtypes)}, not {names([first.dtype])}"
    return record.refuses(args)


def served_devices(backend: str) -> tuple[str, ...]:
    if backend == "cpu":
        return ("cpu",)
    if backend == "triton" and INTERPRETED:
        return ("cuda", "cpu")
    return ("cuda",)


def choose(op: Op, args: Any) -> str:
    """The backend that this call runs on."""
    if _forced != "auto":
        if _forced not in BACKENDS:
            raise ValueError(f"MFWM_BACKEND must be one of auto, {', '.join(BACKENDS)}; got {_forced!r}")
        reason = refusal(op, _forced, args)
        if reason:
            raise BackendError(f"backend {_forced!r} cannot serve this call of {op.name}: {reason}")
        return _forced
    interpreter_would_run = first_tensor(args).device.type == "cpu"
    for backend in op.backends:
        # The interpreter is for checking kernels: it is right and very slow.
        if not (backend == "triton" and interpreter_would_run) and not refusal(op, backend, args):
            return backend
    return "reference"


def first_tensor(args: Any) -> Tensor:
    """The tensor whose dtype and device stand for the call's."""
    return args[0] if isinstance(args[0], Tensor) else args[0][0]


def load(op: Op, backend: str) -> ModuleType:
    return _module(backend, op.name)


@functools.cache
def _module(backend: str, name: str) -> ModuleType:
    return importlib.import_module(f"mfwm_kernels.{backend}.{name}")


# ---- flat arguments


def leaves_of(op: Op, args: Any) -> list[Tensor]:
    """The differentiable tensors of `args`, in order."""
    leaves = []
    for name in op.differentiable:
        value = getattr(args, name)
        if isinstance(value, Tensor):
            leaves.append(value)
        elif value is not None:
            leaves.extend([entry for entry in value if entry is not None])
    return leaves


def with_leaves(op: Op, args: Any, leaves: Sequence[Tensor]) -> Any:
    """`args` with its leaves replaced."""
    rest = list(leaves)
    changed: dict[str, Any] = {}
    for name in op.differentiable:
        value = getattr(args, name)
        if isinstance(value, Tensor):
            changed[name] = rest.pop(0)
        elif value is not None:
            changed[name] = [None if entry is None else rest.pop(0) for entry in value]
    return args._replace(**changed)


def gradients_by_field(op: Op, args: Any, gradients: Sequence[Tensor | None]) -> dict[str, Any]:
    """The gradients of the leaves, nested as the fields of `args` are."""
    rest = list(gradients)
    nested: dict[str, Any] = {}
    for name in op.differentiable:
        value = getattr(args, name)
        if isinstance(value, Tensor):
            nested[name] = rest.pop(0)
        elif value is not None:
            nested[name] = [None if entry is None else rest.pop(0) for entry in value]
    return nested


def spread(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the wanted leaves -> one entry per leaf, None where unwanted."""
    rest = iter(gradients)
    return [next(rest) if want else None for want in wanted]


# ---- calling


def call(op: Op, args: Any) -> list[Tensor]:
    """Run `op` on checked flat arguments; the outputs are those of `op.reference`."""
    if torch.compiler.is_compiling():
        # The compiler sees the registered op in any case.
        watched = True
        refuse_compiled_forward_mode(op.name)
    else:
        args, watched = settle(args)
    backend = choose(op, args)
    leaves = leaves_of(op, args)
    grad = torch.is_grad_enabled()
    wanted = [grad and leaf.requires_grad for leaf in leaves]
    if watched:
        if backend == "reference":
            outputs = list(op.reference(*args))
        else:
            refuse_transforms(op.name, args)
            flat = getattr(torch.ops.mfwm, op.name).default(*args, wanted, backend)
            outputs = list(flat[: len(flat) - (sum(wanted) if op.gradients_in_forward else 0)])
        return [outputs[0], *(o.detach() for o in outputs[1:])] if op.gradients_in_forward else outputs
    if not any(wanted):
        if backend == "reference":
            return list(op.reference(*args))
        return list(load(op, backend).forward(args, wanted)[0])
    function = _Reference if backend == "reference" else _Kernel
    return list(function.apply(op, backend, args, wanted, *leaves))


def _first_order_only(op: Op) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op.name} has no second derivative: call backward without create_graph=True")


class _Reference(torch.autograd.Function):
    """The reference, differentiated by autograd on a graph of its own: first order only, like every backend."""

    @staticmethod
    def forward(ctx: Any, op: Op, backend: str, args: Any, wanted: list[bool], *leaves: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            own = [leaf.detach().requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True)]
            outputs = op.reference(*with_leaves(op, args, own))
        ctx.op, ctx.wanted = op, wanted
        ctx.inputs = [leaf for leaf, want in zip(own, wanted, strict=True) if want]
        ctx.outputs = outputs
        ctx.set_materialize_grads(False)
        detached = tuple(output.detach() for output in outputs)
        if op.gradients_in_forward:
            ctx.mark_non_differentiable(*detached[1:])
        return detached

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _first_order_only(ctx.op)
        pairs = [(o, g) for o, g in zip(ctx.outputs, grads, strict=True) if g is not None and o.requires_grad]
        gradients: Sequence[Tensor | None] = [None] * len(ctx.inputs)
        if pairs:
            outputs, upstream = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outputs, ctx.inputs, upstream, retain_graph=True, allow_unused=True)
        if any(grad is not None for grad in grads):
            # Zeros where nothing depends on an input, as kernels give.
            gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(ctx.inputs, gradients, strict=True)]
        return (None, None, None, None, *spread(ctx.wanted, gradients))  # type: ignore[arg-type]


class _Kernel(torch.autograd.Function):
    """A backend module's forward and backward."""

    @staticmethod
    def forward(ctx: Any, op: Op, backend: str, args: Any, wanted: list[bool], *leaves: Tensor) -> tuple[Tensor, ...]:
        outputs, extras = load(op, backend).forward(args, wanted)
        ctx.op, ctx.backend, ctx.wanted, ctx.extras = op, backend, wanted, extras
        ctx.dtypes = [leaf.dtype for leaf, want in zip(leaves, wanted, strict=True) if want]
        ctx.save_for_backward(*keep(ctx, op, args), *(outputs if op.outputs_in_backward else ()))
        ctx.set_materialize_grads(False)
        if op.gradients_in_forward:
            ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op, wanted = ctx.op, ctx.wanted
        _first_order_only(op)
        if all(grad is None for grad in grads):
            return (None,) * (4 + len(wanted))
        grads, watched = settle(grads)
        if watched or is_batched(grads):
            refuse_transforms(op.name, grads)
        module = load(op, ctx.backend)
        if op.gradients_in_forward:
            # The first backward scales the stored gradients in place and releases them; another one recomputes them.
            extras, ctx.extras = ctx.extras, None
            if extras is None:
                extras = module.forward(kept(ctx, op)[0], wanted)[1]
            assert grads[0] is not None
            if watched:
                scaled = multiplied(extras, grads[0])
            else:
                scaled = getattr(module, "scale", scale_in_place)(extras, grads[0])
            gradients = [g if g.dtype == dtype else g.to(dtype) for dtype, g in zip(ctx.dtypes, scaled, strict=True)]
        else:
            args, outputs = kept(ctx, op)
            if watched:
                gradients = registered_backward(op, args, list(grads), wanted, ctx.backend, outputs)
            else:
                gradients = module.backward(args, wanted, list(grads), *([outputs] if op.outputs_in_backward else []))
        return (None, None, None, None, *spread(wanted, gradients))


# Stands for a tensor that autograd saves.
_SAVED = object()


def keep(ctx: Any, op: Op, args: Any) -> list[Tensor]:
    """Put all but the tensors of `args` on ctx; the tensors, to be saved through autograd.

    Saved so, a tensor that is changed in place before a backward that reads it is an error. What the backward itself
    writes stays on ctx: it may be written again.
    """
    written = [getattr(args, name) for name in op.mutated_in_backward if getattr(args, name) is not None]
    tensors: list[Tensor] = []

    def put(value: Any) -> Any:
        if type(value) is list and not is_numbers(value):
            return [put(entry) for entry in value]
        if not isinstance(value, Tensor) or (written and any(value is w for w in written)):
            return value
        tensors.append(value)
        return _SAVED

    ctx.rest = [put(value) for value in args]
    return tensors


def is_numbers(value: list[Any]) -> bool:
    """Whether a list of the flat arguments holds numbers, and no tensors."""
    return bool(value) and type(value[0]) in (int, float)


def kept(ctx: Any, op: Op) -> tuple[Any, list[Tensor]]:
    """The flat arguments again, and what was saved after them."""
    rest = iter(ctx.saved_tensors)

    def take(value: Any) -> Any:
        if type(value) is list and not is_numbers(value):
            return [take(entry) for entry in value]
        return next(rest) if value is _SAVED else value

    return op.arguments(*map(take, ctx.rest)), list(rest)


def stored_dtype(leaf: Tensor) -> torch.dtype:
    """What a gradient made in the forward is stored in, until the upstream gradient is known.

    fp16 cannot hold it: with a mean over more than 65,536 elements it would be subnormal before a loss scale lifts it.
    """
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


def laid_out_like(leaf: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` in the strides of torch.empty_like(leaf), which is what the compiler is told."""
    expected = torch.empty_like(leaf, device="meta").stride()
    return gradient if gradient.stride() == expected else torch.empty_like(leaf, dtype=gradient.dtype).copy_(gradient)


def multiplied(gradients: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """gradients * upstream, in fp32 (fp64 for fp64): a loss scale may not be representable in the gradients' dtype."""
    return [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * upstream for gradient in gradients]


def scale_in_place(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """gradients *= upstream, without touching them where it is known to be 1."""
    if upstream.device.type == "cpu":
        factor = upstream.item()
        return gradients if factor == 1 else [gradient.mul_(factor) for gradient in gradients]
    return [gradient.mul_(upstream) for gradient in gradients]


# ---- torch.library

_library = torch.library.Library("mfwm", "DEF")

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "list[Tensor | None]": "Tensor?[]",
    "list[int]": "int[]",
    "list[float]": "float[]",
    "list[int] | None": "int[]?",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "torch.dtype": "ScalarType",
}


def schema_of(op: Op) -> str:
    """The schema of the flat arguments, from their annotations."""
    kinds = {
        name: _SCHEMA_TYPES[annotation if isinstance(annotation, str) else annotation.__forward_arg__]
        for name, annotation in op.arguments.__annotations__.items()
    }
    return ", ".join(f"{kind} {name}" for name, kind in kinds.items())


def registered_backward(
    op: Op, args: Any, grads: list[Tensor | None], wanted: list[bool], backend: str, outputs: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of the wanted leaves, by the registered op."""
    backward_op = getattr(torch.ops.mfwm, f"{op.name}_backward").default
    returned = backward_op(*args, grads, wanted, backend, *([outputs] if op.outputs_in_backward else []))
    gradients, written = returned[: sum(wanted)], returned[sum(wanted) :]
    targets = [getattr(args, name) for name in op.mutated_in_backward if getattr(args, name) is not None]
    for target, value in zip(targets, written, strict=True):
        target.copy_(value)
    return gradients


def _register_with_torch(op: Op) -> None:
    count = len(op.arguments.__annotations__)

    def forward(*flat: Any) -> list[Tensor]:
        args, (wanted, backend) = op.arguments(*flat[:count]), flat[count:]
        outputs, extras = load(op, backend).forward(args, list(map(bool, wanted)))
        leaves = [leaf for leaf, want in zip(leaves_of(op, args), wanted, strict=True) if want]
        return [*outputs, *(laid_out_like(leaf, extra) for leaf, extra in zip(leaves, extras, strict=bool(extras)))]

    def forward_fake(*flat: Any) -> list[Tensor]:
        args, (wanted, _) = op.arguments(*flat[:count]), flat[count:]
        outputs = list(op.fake(args))
        if op.gradients_in_forward:
            leaves = zip(leaves_of(op, args), wanted, strict=True)
            outputs += [torch.empty_like(leaf, dtype=stored_dtype(leaf)) for leaf, want in leaves if want]
        return outputs

    schema = schema_of(op)
    # Flags as int[], because torch.jit.trace knows no bool[].
    _library.define(f"{op.name}({schema}, int[] wanted, str backend) -> Tensor[]")
    _library.impl(op.name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfwm::{op.name}", forward_fake, lib=_library)

    if not op.gradients_in_forward:

        def backward(*flat: Any) -> list[Tensor]:
            args, (grads, wanted, backend, *outputs) = op.arguments(*flat[:count]), flat[count:]
            # Functional, as the compiler wants it: what the kernel writes is returned, and copied by the caller.
            # A backward that has nothing to say of them leaves them as they are.
            written = {n: getattr(args, n).clone() for n in op.mutated_in_backward if getattr(args, n) is not None}
            args = args._replace(**written)
            return [
                *load(op, backend).backward(args, list(map(bool, wanted)), list(grads), *outputs),
                *written.values(),
            ]

        def backward_fake(*flat: Any) -> list[Tensor]:
            args, (_, wanted, *_) = op.arguments(*flat[:count]), flat[count:]
            leaves = [leaf for leaf, want in zip(leaves_of(op, args), wanted, strict=True) if want]
            written = [getattr(args, n) for n in op.mutated_in_backward if getattr(args, n) is not None]
            return [*(leaf.new_empty(leaf.shape) for leaf in leaves), *(torch.empty_like(w) for w in written)]

        given = "Tensor?[] grads, int[] wanted, str backend" + (", Tensor[] outputs" if op.outputs_in_backward else "")
        _library.define(f"{op.name}_backward({schema}, {given}) -> Tensor[]")
        _library.impl(f"{op.name}_backward", backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mfwm::{op.name}_backward", backward_fake, lib=_library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        args, (wanted, backend) = op.arguments(*inputs[:count]), inputs[count:]
        ctx.wanted, ctx.backend = list(wanted), backend
        extras = output[len(output) - sum(ctx.wanted) :] if op.gradients_in_forward else []
        ctx.save_for_backward(*keep(ctx, op, args), *(output if op.outputs_in_backward else extras))

    def autograd_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        _first_order_only(op)
        refuse_transforms(op.name, grads)
        args, extras = kept(ctx, op)
        if op.gradients_in_forward:
            upstream = grads[0]
            assert upstream is not None
            leaves = [leaf for leaf, want in zip(leaves_of(op, args), ctx.wanted, strict=True) if want]
            scaled = multiplied(extras, upstream)
            gradients = [gradient.to(leaf.dtype) for leaf, gradient in zip(leaves, scaled, strict=True)]
        else:
            gradients = registered_backward(op, args, grads, ctx.wanted, ctx.backend, extras)
        nested = gradients_by_field(op, args, spread(ctx.wanted, gradients))
        # torch takes an empty list, whatever it is of, for a list of tensors.
        by_field = [nested.get(n, [] if getattr(args, n) == [] else None) for n in op.arguments.__annotations__]
        return (*by_field, None, None)

    torch.library.register_autograd(f"mfwm::{op.name}", autograd_backward, setup_context=setup_context, lib=_library)
    if op.counts_flops:
        _register_flops(op)


def _register_flops(op: Op) -> None:
    """Tell FlopCounterMode, which sees the op and not the products within it, what it costs."""
    count = len(op.arguments.__annotations__)

    def forward_flops(*flat: Any, **_: Any) -> int:
        whole = op.gradients_in_forward and any(flat[count])
        return op.cost(op.arguments(*flat[:count])._asdict()).flops // (1 if whole else 3)

    def backward_flops(*flat: Any, **_: Any) -> int:
        return 2 * op.cost(op.arguments(*flat[:count])._asdict()).flops // 3

    register_flop_formula(getattr(torch.ops.mfwm, op.name), get_raw=True)(forward_flops)
    if not op.gradients_in_forward:
        register_flop_formula(getattr(torch.ops.mfwm, f"{op.name}_backward"), get_raw=True)(backward_flops)
