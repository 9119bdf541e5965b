"""The CUDA C++ kernels on the CPU (cuda_emulator): every sample of every op that has one, values and gradients."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import differentiable_outputs, gradients, leaves, require_grad
from cuda_emulator import ROOT, Fences, emulated_cuda, emulated_module
from torch import Tensor

import mfwm_kernels.cuda.multi_horizon_loss as loss_launcher
from mfwm_kernels import Horizons, multi_horizon_loss
from mfwm_kernels.backends import BackendError, use_backend
from mfwm_kernels.check import TOLERANCE, doubled, relative_error, tensors_of
from mfwm_kernels.op import OPS
from mfwm_kernels.ops.loss_kinds import KIND_OF_MEANS, KINDS
from mfwm_kernels.ops.video_pyramid import output_shape

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

CUDA_OPS = [op for op in OPS.values() if "cuda" in op.backends]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHTS = (torch.float32, torch.float64)
CASES = [
    pytest.param(op, dtype, id=f"{op.name}-{str(dtype)[6:]}")
    for op in CUDA_OPS
    for dtype in DTYPES
    if dtype in op.backends["cuda"].dtypes
]


def check_sample(op: Any, sample: dict[str, Any], dtype: torch.dtype, edge: str, module: Any = None) -> None:
    """Outputs and gradients against the reference in fp64, and nothing touched outside the tensors."""
    fences = Fences(edge)
    kwargs = {name: fences.copy(value) for name, value in sample.items()}
    for tensor in [t for name in op.differentiable for t in tensors_of(kwargs.get(name))]:
        tensor.requires_grad_(tensor.is_floating_point())
    before = [t.detach().clone() for t in tensors_of(list(kwargs.values()))]
    exact_kwargs = require_grad(op, doubled(sample))
    with use_backend("reference"):
        exact = op.public(**exact_kwargs)
    upstream = [torch.randn_like(output) for output in differentiable_outputs(exact)]
    want = [*tensors_of(exact), *gradients(op, exact_kwargs, exact, upstream)]
    with emulated_cuda(fences, module), use_backend("cuda"):
        result = op.public(**kwargs)
        got = [*tensors_of(result), *gradients(op, kwargs, result, upstream)]
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        if a.is_floating_point():
            error = relative_error(a, b)
            assert error <= TOLERANCE[dtype], f"result {place} {list(a.shape)}: relative error {error:.2e}"
        else:
            assert torch.equal(a, b), f"result {place}"
    assert [leaf.dtype for leaf in leaves(op, kwargs)] == [t.dtype for t in got[len(tensors_of(result)) :]]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(list(kwargs.values())), strict=True))


@pytest.mark.parametrize("edge", ["start", "end", "unaligned"])
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_values_and_gradients(op: Any, dtype: torch.dtype, edge: str) -> None:
    torch.manual_seed(1)
    for sample in op.samples(dtype, torch.device("cpu")):
        check_sample(op, sample, dtype, edge)


def random_loss(seed: int) -> tuple[dict[str, Any], torch.dtype]:
    """A call of multi_horizon_loss whose every option is drawn, and the dtype of its predictions."""
    draw = random.Random(seed)
    torch.manual_seed(seed)

    def strided(tensor: Tensor) -> Tensor:
        axes = [0, 1, *draw.sample(range(2, tensor.dim()), tensor.dim() - 2)]
        permuted = tensor.permute(axes).contiguous().permute([axes.index(axis) for axis in range(tensor.dim())])
        return draw.choice([tensor, tensor, permuted, torch.stack([tensor, tensor], -1)[..., 0]])

    count = draw.randint(1, 5)
    # Up to 8 in powers of 2, or any; the same offset with other factors only.
    factors = draw.choice([(1, 2, 4, 8), (1, 2, 4, 8), (1, 2), (1, 2, 3, 6), (1, 3), (2, 4, 16)])
    places = sorted({(draw.choice([0, 1, 2, 3, 4, 6]), draw.choice(factors)) for _ in range(count)})
    horizons, count = Horizons(*map(tuple, zip(*places, strict=True))), len(places)
    layout = draw.choice(["images", "images", "tokens", "tokens", "grid"])
    patches = [draw.randint(1, 3) for _ in places] if layout == "tokens" else None
    step = math.lcm(*(f * (1 if patches is None else patches[i]) for i, f in enumerate(horizons.factors)))
    height, width = step * draw.randint(1, max(1, 32 // step)), step * draw.randint(1, max(1, 32 // step))
    frames = draw.choice([2, 5, 9])
    shape = (draw.randint(1, 2), frames, draw.choice([1, 2, 3, 5]), height, width)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    dtype, video_dtype = draw.choice(dtypes), draw.choice([torch.uint8, torch.uint8, *dtypes])
    video = (torch.randint(0, 256, shape) if video_dtype == torch.uint8 else torch.randn(shape)).to(video_dtype)
    positions = draw.choice([frames, max(1, frames - 2)])
    kinds = [draw.choice(KINDS) for _ in places] if draw.random() < 0.4 else [draw.choice(KINDS)] * count
    # Clamped log-scales outweigh all others, so only some calls have them.
    spread = draw.choice([1, 1, 6])
    weights = None
    if draw.random() < 0.5:
        weights = torch.rand(shape[0], positions, *draw.choice([(), (count,)]), dtype=draw.choice(WEIGHTS))
        weights = (weights * (torch.rand(weights.shape) > 0.3)).to(weights.dtype)
        if weights.dtype == torch.float64 and positions > 3:
            weights[0, 1] = 1e-60  # 0 in fp32, but it counts
        weights = draw.choice([weights, weights.mT.contiguous().mT, weights[:, :1].expand_as(weights)])
    preds = []
    for i, factor in enumerate(horizons.factors):
        batch, _, *rest = output_shape(video, factor, None if patches is None else patches[i])
        channels = -1 if layout == "tokens" else 2
        pred = torch.randn(batch, positions, *rest)
        if kinds[i] in KIND_OF_MEANS:
            pred = torch.cat([pred, spread * torch.randn_like(pred)], channels)
        if weights is not None:
            # What does not count must not leak.
            pred[(weights if weights.dim() == 2 else weights[:, :, i]) == 0] = float("inf")
        preds.append(strided((pred.flatten(3).mT if layout == "grid" else pred).to(dtype)))
    kwargs: dict[str, Any] = {
        "preds": preds, "video": strided(video.flatten(3).mT if layout == "grid" else video), "horizons": horizons,
        "kind": kinds if len(set(kinds)) > 1 else kinds[0], "residual": draw.random() < 0.3,
        "motion_gain": draw.choice([0, 0, 0.7]), "beta": draw.choice([0, 0.5, 1]), "position_weights": weights,
        "detach": draw.choice([None, "near", "far"]), "delta": 0.6, "eps": 0.05,
        "horizon_weights": torch.rand(count, dtype=draw.choice(WEIGHTS)),
    }  # fmt: skip
    if layout == "tokens":
        kwargs["patch_sizes"] = patches
    if layout == "grid":
        kwargs["grid"] = (height, width)
    if draw.random() < 0.5:
        kwargs["segment_ids"] = torch.randint(0, 2, shape[:2], dtype=draw.choice([torch.int32, torch.int64]))
    pairs = [
        [float(i < j and horizons.factors[j] % horizons.factors[i] == 0) * draw.choice([0.3, 1]) for j in range(count)]
        for i in range(count)
    ]
    if draw.random() < 0.8:
        kwargs["consistency_weights"] = pairs[0] if draw.random() < 0.4 else torch.tensor(pairs).T.contiguous().T
    return kwargs, dtype


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_random_calls_of_the_loss(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(first, first + 10):
        # Few blocks go over several tiles each.
        monkeypatch.setattr(loss_launcher, "BLOCKS", (1, 3, 2048)[seed % 3])
        kwargs, dtype = random_loss(seed)
        edge = ("start", "end", "unaligned", "start")[seed % 4]
        check_sample(OPS["multi_horizon_loss"], kwargs, dtype, edge)


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("kind", KIND_OF_MEANS)
def test_a_nan_log_scale_reaches_all_but_its_own_gradient(kind: str, factor: int) -> None:
    """A clamp that drops NaN would give a finite loss. The gradient at NaN is 0, like that of torch.clamp. The factors
    are those of two kernels."""
    pred = torch.zeros(1, 2, 2, 6 // factor, 6 // factor)
    pred[0, 0, 1, 0, 0] = float("nan")
    pred.requires_grad_()
    with emulated_cuda(Fences("start")), use_backend("cuda"):
        loss = multi_horizon_loss([pred], torch.zeros(1, 2, 1, 6, 6), Horizons((1,), (factor,)), kind=kind)
        (gradient,) = torch.autograd.grad(loss.total, [pred])
    assert loss.total.isnan() and gradient[0, 0, 0, 0, 0].isnan() and gradient.isnan().sum() == 1
    assert gradient[0, 0, 1, 0, 0] == 0 and (gradient[0, 0, 1].flatten()[1:] != 0).all()


def test_no_gradient_wanted_and_an_upstream_gradient_of_1() -> None:
    """Without gradients the same values; the scale kernel leaves alone what it would multiply by 1."""
    kwargs, _ = random_loss(3)
    preds = [pred.clone().requires_grad_() for pred in kwargs["preds"]]
    with emulated_cuda(Fences("start")), use_backend("cuda"):
        with_gradients = multi_horizon_loss(**{**kwargs, "preds": preds})
        gradients_of_1 = torch.autograd.grad(with_gradients.total, preds, retain_graph=True)
        gradients_of_2 = torch.autograd.grad(2 * with_gradients.total, preds)
        without = multi_horizon_loss(**kwargs)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(with_gradients), tensors_of(without), strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(gradients_of_1, gradients_of_2, strict=True))


def test_calls_that_it_does_not_serve_are_refused() -> None:
    kwargs, _ = random_loss(3)
    many = Horizons(tuple(range(17)), (1,) * 17)
    frames = torch.zeros(1, 2, 1, 2, 2)
    with emulated_cuda(Fences("start")), use_backend("cuda"):
        with pytest.raises(BackendError, match="not float64"):
            multi_horizon_loss(**doubled(kwargs))
        with pytest.raises(BackendError, match="video is float64"):
            multi_horizon_loss([frames], frames.double(), Horizons.next_frame())
        with pytest.raises(BackendError, match="16 horizons, these are 17"):
            multi_horizon_loss([frames] * 17, frames, many)


# name: (op, file, what stands there, what stands there instead, what is seen)
FAULTS = {
    "no barrier": (
        "video_pyramid", "video_pyramid.cu", "      __syncthreads();\n    }\n    for", "    }\n    for", "relative",
    ),
    "a wrong stride": (
        "video_pyramid", "video_pyramid.cu", "(k / columns) * s[3] +", "(k / columns) * s[4] +", "relative error",
    ),
    "boxes past the last": (
        "video_pyramid", "strips.cuh", "min(number, tiling.boxes - 1)", "number", "outside all tensors",
    ),
    "a collective that not all reach": (
        "video_pyramid", "video_pyramid.cu", "const Output& output = p.outputs[i];",
        "const Output& output = p.outputs[i]; if (threadIdx.x != 3) __syncwarp();", "never come",
    ),
    "the wrong lane": ("multi_horizon_loss", "frames.cuh", "pair, 16)", "pair, 8)", "relative error"),
    "a vector from an odd address": (
        "multi_horizon_loss", "frames.cuh", "reinterpret_cast<uintptr_t>(array.data) % vector_bytes == 0",
        "vector_bytes > 0", "misaligned",
    ),
    "no zero gradients": (
        "multi_horizon_loss", "multi_horizon_loss_patches.cu", "if (!work.is_active(i)) continue;\n      float",
        "if (!work.is_counted(i)) continue;\n      float", "relative error inf",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    name, place, right, wrong, seen = FAULTS[fault]
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources, ignore=shutil.ignore_patterns("cpu"))
    file = sources / "cuda" / place
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    op = OPS[name]
    torch.manual_seed(1)
    with pytest.raises((AssertionError, RuntimeError), match=seen):
        for sample in op.samples(torch.float32, torch.device("cpu")):
            for edge in ("end", "unaligned"):
                check_sample(op, sample, torch.float32, edge, emulated_module(sources))
