"""Times forward and backward of every op, eager PyTorch, torch.compile and libraries that do the same work.

    python -m benchmarks --only ops [--op OP ...] [--size SIZE ...] [--dtype bf16 fp32] [--contender NAME ...]

Each contender is checked before it is timed, with one clip, against the reference in fp64. To avoid compiling twice,
torch.compile is checked at the full size against the first contender that passed, normally the eager formula that it
compiles; its error is the distance from that contender plus that contender's error.

Libraries that are not installed have a row that says so. MFWM_MODDED_NANOGPT names the triton_kernels.py of a checkout
of modded-nanogpt, whose loss of three targets on one state is a rival at *text-shared* on a GPU.

With pytest-benchmark, `pytest benchmarks/` runs the CPU sizes one contender at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mfwm_kernels.backends import ABSENT, served_devices, use_backend
from mfwm_kernels.check import TOLERANCE, converted, different, doubled, relative_error, tensors_of
from mfwm_kernels.op import OPS, Op

from . import rivals
from .measure import Contender, Timing, copies_for, interleaved, multiplied, rates, roofs

COMPILED = "torch.compile"
# The choices of --contender. "mfwm" is our op on every backend that runs here.
CONTENDERS = ("eager", *rivals.LIBRARIES, "mfwm", COMPILED)
# Not a rival, but torch's share of our work too. Its error is not measured.
PRODUCTS = "matrix products"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Formula = Callable[..., tuple[Tensor, ...]]


def sizes_of(op: Op, device: torch.device) -> list[str]:
    """The sizes for this kind of device."""
    return [size for size in op.bench if size.startswith("cpu") == (device.type == "cpu")]


def backends_of(op: Op, device: torch.device) -> list[str]:
    """The backends that run here at full speed, or the reference if there is none."""
    names = [name for name in op.backends if not ABSENT[name] and device.type in served_devices(name)]
    return [name for name in names if not (name == "triton" and device.type == "cpu")] or ["reference"]


def ours(op: Op, backend: str) -> Formula:
    def formula(**kwargs: Any) -> tuple[Tensor, ...]:
        with use_backend(backend):
            result = op.public(**kwargs)
        if isinstance(result, Tensor):
            return (result,)
        return (result.total,) if hasattr(result, "total") else tuple(result)

    return formula


def contenders_of(
    op: Op, kwargs: dict[str, Any], device: torch.device, chosen: Sequence[str]
) -> tuple[dict[str, Formula], dict[str, str]]:
    """Name -> formula, the compiled one last; and name -> why a contender is absent."""
    eager = rivals.formula_of(op.name)
    found: dict[str, Formula] = {"eager": eager} if "eager" in chosen else {}
    absent: dict[str, str] = {}
    for name, library in rivals.LIBRARIES.items() if op.name == "multi_horizon_linear_cross_entropy" else ():
        if name not in chosen or not rivals.expresses(library, kwargs):
            continue
        if library.needs_gpu and device.type == "cpu":
            absent[name] = "needs a GPU"
            continue
        try:
            found[name] = library.load()
        except ImportError as error:
            absent[name] = str(error)
    if "mfwm" in chosen:
        found.update({f"mfwm {backend}": ours(op, backend) for backend in backends_of(op, device)})
    if COMPILED in chosen:
        torch._dynamo.reset()
        found[COMPILED] = torch.compile(eager, dynamic=False)
    return found, absent


def with_gradients(op: Op, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: converted(value, lambda t: t.detach().clone().requires_grad_()) if name in op.differentiable else value
        for name, value in kwargs.items()
    }


def leaves_of(op: Op, kwargs: dict[str, Any]) -> list[Tensor]:
    return different([t for name in op.differentiable for t in tensors_of(kwargs.get(name)) if t.requires_grad])


def call_of(op: Op, formula: Formula, kwargs: dict[str, Any], upstream: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A forward and backward, which returns the gradients of all leaves; only a forward if there are none."""
    leaves = leaves_of(op, kwargs)
    if not leaves:
        return lambda: list(formula(**kwargs))
    return lambda: list(torch.autograd.grad(formula(**kwargs), leaves, upstream))


def upstream_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the outputs: 1 for a loss, otherwise random."""
    return [torch.ones_like(o) if o.dim() == 0 else torch.randn_like(o) for o in outputs]


def error_of(op: Op, formula: Formula, kwargs: dict[str, Any]) -> float:
    """The largest relative error of outputs and gradients against the reference in fp64."""
    with torch.no_grad():
        upstream = upstream_of(formula(**kwargs))
    exact = results_of(op, ours(op, "reference"), with_gradients(op, doubled(kwargs)), upstream)
    return distance(results_of(op, formula, with_gradients(op, kwargs), upstream), exact)


def results_of(op: Op, formula: Formula, kwargs: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of all leaves."""
    outputs, leaves = formula(**kwargs), leaves_of(op, kwargs)
    given = [gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, given) if leaves else ()
    return [*(output.detach() for output in outputs), *gradients]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(got, want, strict=True))


def measure(
    op: Op,
    size: str,
    dtype_name: str,
    device: torch.device,
    budget: float,
    contenders: Sequence[str] = CONTENDERS,
) -> Iterator[dict[str, Any]]:
    """Yield a row per contender at one size."""
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    # One clip, because the fp64 reference stores everything, including dense targets.
    checked = op.bench[size](dtype, device, 1)
    kwargs = op.bench[size](dtype, device)
    cost = op.cost(kwargs)
    formulas, absent = contenders_of(op, kwargs, device, contenders)
    rows = {name: {"op": op.name, "size": size, "dtype": dtype_name, "contender": name} for name in formulas}
    for name, why in absent.items():
        yield {"op": op.name, "size": size, "dtype": dtype_name, "contender": name, "status": f"absent: {why}"}

    held = [with_gradients(op, kwargs)]
    input_bytes = sum(t.numel() * t.element_size() for t in tensors_of(list(kwargs.values())))
    for _ in range(copies_for(input_bytes, device) - 1):
        held.append(with_gradients(op, op.bench[size](dtype, device)))
    ready: list[Contender] = list(roofs(device, dtype).values())
    upstream: list[Tensor] = []
    passed = ""
    for name, formula in formulas.items():
        row = rows[name]
        try:
            if name != COMPILED:
                row["error"] = error_of(op, formula, checked)
            elif passed:
                right = results_of(op, formulas[passed], held[0], upstream)
                row["error"] = distance(results_of(op, formula, held[0], upstream), right) + rows[passed]["error"]
                del right
            else:
                row["status"] = "not checked: no other contender passed"
            library = rivals.LIBRARIES.get(name)
            most = TOLERANCE[dtype] if library is None else max(TOLERANCE[dtype], library.error)
            if "error" in row and not row["error"] <= most:
                row["status"] = f"wrong: relative error {row['error']:.1e} above {most:.0e}"
            if "status" not in row:
                if not upstream:
                    with torch.no_grad():
                        upstream = upstream_of(formula(**held[0]))
                calls = [call_of(op, formula, copy, upstream) for copy in held]
                row["peak_bytes"] = peak_bytes(calls[0], device)
                for call in calls:
                    call()
                ready.append(Contender(name, calls))
                passed = passed or name
        except Exception as raised:  # A rival that fails gets a row; the benchmark continues.
            row["status"] = failure(raised)
        if "status" in row:
            # Yield now, because a GPU fault can end this process.
            yield rows.pop(name)
        release(device)
    if op.name in rivals.PRODUCTS:
        ready.append(Contender(PRODUCTS, [rivals.PRODUCTS[op.name](kwargs, multiplied(dtype, device))]))
        rows[PRODUCTS] = {"op": op.name, "size": size, "dtype": dtype_name, "contender": PRODUCTS, "error": None}
    times = interleaved(ready, device, budget)
    roof = rates(times, device)
    floor = max(cost.bytes / roof["bytes_per_s"], cost.flops / roof["flops_per_s"])
    compiled = times.get(COMPILED)
    for name, row in rows.items():
        if name in times:
            row.update(status="ok", **figures(times[name]))
            row.update(
                floor_bytes=cost.bytes,
                floor_flops=cost.flops,
                floor_ms=floor * 1e3,
                share_of_roof=floor / times[name].median,
                to_compile=None if compiled is None else compiled.median / times[name].median,
                copy_gb_per_s=roof["bytes_per_s"] / 1e9,
                matmul_tflop_per_s=roof["flops_per_s"] / 1e12,
            )
        yield row


def failure(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error)[:200]}"


def figures(timing: Timing) -> dict[str, Any]:
    return {
        "median_ms": timing.median * 1e3,
        "p20_ms": timing.low * 1e3,
        "p80_ms": timing.high * 1e3,
        "samples": timing.samples,
        "cuda_graph": timing.graph,
    }


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call allocates at a time, above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def line_of(row: dict[str, Any]) -> str:
    head = f"{row['op']:36}{row['size']:12}{row['dtype']:6}{row['contender']:24}"
    if row["status"] != "ok":
        return head + row["status"]
    ratio = "" if row["to_compile"] is None else f"{row['to_compile']:7.2f}x compile"
    error = "" if row["error"] is None else f"  error {row['error']:.0e}"
    return head + (
        f"{row['median_ms']:10.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f}){row['share_of_roof']:7.0%} of roof"
        f"{ratio}{error}"
    )


CPU = torch.device("cpu")


@pytest.mark.parametrize("contender", ["eager", "mfwm"])
@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS.values()])
def test_op_on_the_cpu(benchmark: Any, op: Op, contender: str) -> None:
    benchmark.group = op.name
    torch.manual_seed(0)
    kwargs = with_gradients(op, op.bench["cpu"](torch.float32, CPU))
    formula = rivals.formula_of(op.name) if contender == "eager" else ours(op, backends_of(op, CPU)[0])
    assert error_of(op, formula, op.bench["cpu"](torch.float32, CPU, 1)) <= TOLERANCE[torch.float32]
    with torch.no_grad():
        upstream = upstream_of(formula(**kwargs))
    benchmark.pedantic(call_of(op, formula, kwargs, upstream), rounds=5, warmup_rounds=1)
