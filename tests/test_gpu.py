"""What only a GPU can show: graph capture, streams, devices, no waiting for the host, and offsets past 2^31.

Values and gradients on a GPU are tests/test_ops.py's, which runs on the device that is there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import differentiable_outputs, gradients, leaves, require_grad

import mfwm_kernels
from mfwm_kernels import Horizons, arguments, fan_out, multi_horizon_loss, use_backend, video_pyramid
from mfwm_kernels.check import TOLERANCE, doubled, relative_error, tensors_of
from mfwm_kernels.op import OPS, Op

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# On a machine without a GPU every case is listed too, and skipped by name.
CASES = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in OPS.values()
    for backend in ("reference", *op.backends)
    if backend != "cpu"
]


def samples_of(op: Op, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Those with something to do: contiguous, strided and sliced in time."""
    torch.manual_seed(1)
    samples = [require_grad(op, sample) for sample in op.samples(dtype, CUDA)]
    return [sample for sample in samples if all(t.numel() for t in tensors_of(list(sample.values())))]


def results_of(op: Op, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Outputs, and gradients for upstream gradients of one half."""
    result = op.public(**kwargs)
    upstream = [torch.full_like(output, 0.5) for output in differentiable_outputs(result)]
    return [t.detach() for t in tensors_of(result)] + gradients(op, kwargs, result, upstream)


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_cuda_graph(op: Op, backend: str) -> None:
    """Captured once and replayed on other inputs: what an eager call gives for those."""
    for kwargs in samples_of(op):
        captured_and_replayed(op, backend, kwargs)


def captured_and_replayed(op: Op, backend: str, kwargs: dict[str, Any]) -> None:
    with use_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results_of(op, kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results_of(op, kwargs)
        with torch.no_grad():
            for leaf in leaves(op, kwargs):
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, results_of(op, kwargs), strict=True):
            assert relative_error(got, want) <= 1e-6


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_runs_on_the_current_stream(op: Op, backend: str) -> None:
    """Inputs that a busy side stream has yet to write: a launch on another stream would read the old ones."""
    kwargs = samples_of(op)[0]
    with use_backend(backend):
        want = results_of(op, kwargs)
        values = [leaf.detach().clone() for leaf in leaves(op, kwargs)]
        with torch.no_grad():
            for leaf in leaves(op, kwargs):
                leaf.fill_(float("nan"))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            with torch.no_grad():
                for leaf, value in zip(leaves(op, kwargs), values, strict=True):
                    leaf.copy_(value)
            got = results_of(op, kwargs)
        stream.synchronize()
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_never_waits_for_the_host(op: Op, backend: str) -> None:
    for kwargs in samples_of(op):
        with use_backend(backend):
            results_of(op, kwargs)
            torch.cuda.set_sync_debug_mode("error")
            try:
                results_of(op, kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("op", "backend"), [case for case in CASES if case.values[1] != "reference"])
def test_bit_equal_from_run_to_run(op: Op, backend: str) -> None:
    for kwargs in samples_of(op):
        with use_backend(backend):
            first, second = results_of(op, kwargs), results_of(op, kwargs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("width", [512, 1024])
@pytest.mark.parametrize("name", ["multi_horizon_linear", "mtp_combine"])
def test_pipelined_products_are_right_and_repeat(name: str, width: int) -> None:
    """A tile that is overwritten while wgmma reads it gives wrong rows now and then: 200 runs on 5,000 rows."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=CUDA).bfloat16()

    if name == "mtp_combine":
        kwargs = {
            "hidden": normal(5000, width), "embedding": normal(5000, width), "weight": normal(width, 2 * width) / 32,
            "hidden_norm_weight": normal(width), "embedding_norm_weight": normal(width),
        }  # fmt: skip
    else:
        kwargs = {
            "hidden": normal(1, 20, 250, width), "actions": normal(1, 20, width), "horizons": Horizons.cascade(4),
            "weights": [normal(n, width) / 32 for n in (192, 48, 12, 3)], "norm_weight": normal(width),
        }  # fmt: skip
    op = OPS[name]
    with torch.no_grad():
        with use_backend("reference"):
            exact = tensors_of(op.public(**doubled(kwargs)))
        with use_backend("triton"):
            first = tensors_of(op.public(**kwargs))
            different = torch.zeros((), dtype=torch.int64, device=CUDA)
            for _ in range(200):
                again = tensors_of(op.public(**kwargs))
                different += sum((a != b).any() for a, b in zip(first, again, strict=True))
    assert all(relative_error(a, b) <= TOLERANCE[torch.bfloat16] for a, b in zip(first, exact, strict=True))
    assert different.item() == 0


@pytest.mark.parametrize(("op", "backend"), [case for case in CASES if case.values[1] != "reference"])
def test_compiled_by_inductor(op: Op, backend: str) -> None:
    torch._dynamo.reset()
    kwargs = samples_of(op)[0]
    with use_backend(backend):
        want = results_of(op, kwargs)
        compiled = torch.compile(op.public, fullgraph=True)
        result = compiled(**kwargs)
        upstream = [torch.full_like(output, 0.5) for output in differentiable_outputs(result)]
        got = [t.detach() for t in tensors_of(result)] + gradients(op, kwargs, result, upstream)
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_tensors_on_a_second_gpu(op: Op, backend: str) -> None:
    """The current device is the first one; the tensors lie on the second."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    torch.manual_seed(1)
    first = require_grad(op, next(iter(op.samples(torch.float32, torch.device("cuda:0")))))
    moved = {
        name: [t.detach().to("cuda:1") for t in value] if isinstance(value, list) and tensors_of(value) else
        value.detach().to("cuda:1") if isinstance(value, torch.Tensor) else value
        for name, value in first.items()
    }  # fmt: skip
    with use_backend(backend):
        want = results_of(op, first)
        got = results_of(op, require_grad(op, moved))
    assert torch.cuda.current_device() == 0
    assert all(relative_error(a.to("cuda:0"), b) <= 1e-6 for a, b in zip(got, want, strict=True))


# More than 2^31 elements: 32-bit offsets would wrap. What is at the end is compared.


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_video_pyramid_past_2_31(backend: str) -> None:
    video = torch.randint(0, 256, (1, 2800, 3, 512, 512), dtype=torch.uint8, device=CUDA)
    assert video.numel() > 2**31
    with use_backend(backend):
        full, small = video_pyramid(video, (1, 8), dtype=torch.bfloat16)
    with use_backend("reference"):
        want = video_pyramid(video[:, -2:], (1, 8), dtype=torch.bfloat16)
    assert relative_error(full[:, -2:], want[0]) < 1e-2 and relative_error(small[:, -2:], want[1]) < 1e-2


def test_fan_out_past_2_31() -> None:
    hidden = torch.randn(1, 2100, 32, 32, 1024, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    assert hidden.numel() > 2**31
    actions = torch.randn(1, 2100, 1024, device=CUDA, dtype=torch.bfloat16)
    horizons, norm = Horizons((1, 1), (1, 8)), torch.randn(1024, device=CUDA, dtype=torch.bfloat16)

    def both(states: torch.Tensor, acts: torch.Tensor) -> list[torch.Tensor]:
        outputs = fan_out(states, acts, horizons, pool=(1, 8), norm_weight=norm)
        (gradient,) = torch.autograd.grad(outputs, states, [torch.ones_like(o) for o in outputs])
        return [outputs[0][:, -2:].detach(), outputs[1][:, -2:].detach(), gradient[:, -2:]]

    with use_backend("triton"):
        got = both(hidden, actions)
    with use_backend("reference"):
        want = both(hidden[:, -2:].detach().requires_grad_(), actions[:, -2:])
    assert all(relative_error(a, b) < 3e-2 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["triton", *(["cuda"] if "cuda" in OPS["multi_horizon_loss"].backends else [])])
def test_multi_horizon_loss_past_2_31(backend: str) -> None:
    video = torch.randint(0, 256, (1, 2800, 3, 512, 512), dtype=torch.uint8, device=CUDA)
    pred = torch.randn(1, 2800, 3, 512, 512, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    assert pred.numel() > 2**31
    with use_backend(backend):
        loss = multi_horizon_loss([pred], video, Horizons.next_frame())
        (gradient,) = torch.autograd.grad(loss.total, pred)
    target = video[:, -1:].float() / 127.5 - 1
    want = 2 * (pred[:, -2:-1].detach().float() - target) / (2799 * 3 * 512 * 512)
    assert relative_error(gradient[:, -2:-1], want) < 3e-2
    assert not gradient[:, -1:].any()


def test_an_id_out_of_range_is_reported_later_and_once() -> None:
    op = OPS["multi_horizon_linear_cross_entropy"]
    kwargs = samples_of(op)[0]
    op.public(**kwargs)
    tokens = kwargs["tokens"].clone()
    tokens.view(-1)[3] = 10**6
    op.public(**{**kwargs, "tokens": tokens})
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="1000000"):
        mfwm_kernels.check_errors()
    op.public(**kwargs)
    mfwm_kernels.check_errors()


def test_cached_constants_serve_captured_calls() -> None:
    like = torch.zeros(1, device=CUDA)
    first = arguments.constant((1.0, 0.5, 0.25), (3,), like)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert arguments.constant((1.0, 0.5, 0.25), (3,), like) is first
        like.add_(1)
