"""Tests of multi_horizon_linear_cross_entropy alone: dense targets, chunks, what does not count, memory."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of, interpreted
from token_call import BACKENDS, CASCADE, KERNELS, call_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from mfwm_kernels import Horizons, multi_horizon_linear_cross_entropy, use_backend
from mfwm_kernels.check import relative_error

pytestmark = pytest.mark.usefixtures("size")


def tolerance(backend: str) -> float:
    return 1e-5 if backend == "triton" else 1e-12


def few_clips(backend: str) -> int:
    """One clip in Triton's interpreter, which takes seconds per clip."""
    return 1 if interpreted(backend) else 2


def results(backend: str, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """(HorizonLoss, gradients of inputs, weights and biases)."""
    learned = {name: kwargs[name] for name in ("inputs", "weight", "biases") if name in kwargs}
    learned = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), learned)
    with use_backend(backend):
        loss = multi_horizon_linear_cross_entropy(**{**kwargs, **learned})
    leaves = [t for t in tree_leaves(learned) if isinstance(t, Tensor)]
    return loss, list(torch.autograd.grad(loss.total, leaves))


def hosts_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Biases per horizon, position weights of which some are 0, and predictions."""
    like, batch = kwargs["inputs"][0], kwargs["tokens"].shape[0]
    weights = torch.rand(batch, 5, len(kwargs["inputs"]), device=like.device) + 0.1
    weights[0, 1], weights[-1, 0, 1] = 0, 0
    return {
        "biases": [torch.randn_like(kwargs["weight"][:, 0]) for _ in kwargs["inputs"]],
        "position_weights": weights,
        "return_predictions": True,
    }


def assert_same(got: Any, want: Any, least: float) -> None:
    for index, (a, b) in enumerate(zip(tree_leaves(got), tree_leaves(want), strict=True)):
        if isinstance(a, Tensor):
            assert relative_error(a, b) <= least, f"{index}: {relative_error(a, b):.2e}"


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense_cross_entropy(backend: str, shared: bool) -> None:
    kwargs = call_of(backend, label_smoothing=0.1)
    if not shared:
        kwargs["weight"] = [torch.randn_like(kwargs["weight"]) for _ in range(3)]
    loss, gradients = results(backend, kwargs)

    inputs = [states.requires_grad_() for states in kwargs["inputs"]]
    heads = [kwargs["weight"]] * 3 if shared else kwargs["weight"]
    leaves = [*inputs, *([kwargs["weight"]] if shared else heads)]
    one_hot = F.one_hot(kwargs["tokens"], 37).to(inputs[0].dtype)
    total = inputs[0].new_zeros(())
    for states, head, offset, factor in zip(inputs, heads, CASCADE.offsets, CASCADE.factors, strict=True):
        logits = F.linear(states[:, : 6 - offset], head.requires_grad_()).flatten(0, 3)
        frames = one_hot[:, offset : offset + states.shape[1]].permute(0, 1, 4, 2, 3).flatten(0, 1)
        cells = F.avg_pool2d(frames, factor).permute(0, 2, 3, 1).flatten(0, 2)
        total = total + F.cross_entropy(logits, cells, label_smoothing=0.1)
    assert relative_error(loss.total, total) < tolerance(backend)
    assert_same(gradients, list(torch.autograd.grad(total, leaves)), tolerance(backend))


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("backend", KERNELS)
def test_any_chunk_size(backend: str, options: str) -> None:
    kwargs = call_of(backend, batch=few_clips(backend), return_accuracy=True)
    if options == "all":
        kwargs["tokens"] = kwargs["tokens"][:, :5]
        kwargs["tokens"][0, :, :2, 3:] = -100
        near_pair = 0 if few_clips(backend) == 1 else 0.5
        kwargs |= {"consistency_weights": [0, near_pair, 2], "detach": None, "softcap": 3.0, "z_loss": 0.01}
        kwargs |= hosts_options(kwargs)
    want = results("reference", kwargs)
    for chunk_size in (7, 64) if few_clips(backend) == 1 else (1, 7, 64, 10**6):
        assert_same(results(backend, {**kwargs, "chunk_size": chunk_size}), want, tolerance(backend))


@pytest.mark.parametrize("detach", [None, "near", "far"])
@pytest.mark.parametrize("backend", KERNELS)
def test_consistency(backend: str, detach: str | None) -> None:
    """Factors (1, 2, 4), two episodes in a clip, a softcap, and weight 0 for the cross-entropies."""
    batch = few_clips(backend)
    segments = torch.tensor([[0, 0, 0, 0, 0, 1], [2, 2, 2, 2, 2, 2]], device=device_of(backend))[:batch]
    kwargs = call_of(backend, batch=batch, detach=detach, segment_ids=segments, softcap=2.0, horizon_weights=[0, 0, 0])
    kwargs["consistency_weights"] = [0, 0.5, 2]
    want = results("reference", kwargs)
    assert want[0].consistency[1:].all()
    assert_same(results(backend, kwargs), want, tolerance(backend))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_clip_does_not_depend_on_the_others(backend: str) -> None:
    kwargs = call_of(backend, batch=3)
    _, together = results(backend, kwargs)
    for clip in range(3):
        part = {
            "inputs": [states[clip : clip + 1] for states in kwargs["inputs"]],
            "tokens": kwargs["tokens"][clip : clip + 1],
        }
        _, alone = results(backend, {**kwargs, **part})
        for i in range(3):
            assert relative_error(together[i][clip] * 3, alone[i][0]) <= tolerance(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_horizon_of_which_nothing_counts(backend: str) -> None:
    """The far horizon predicts only tokens of frames 4 and 5, which are ignored."""
    kwargs = call_of(backend)
    kwargs["tokens"][:, 4:] = -100
    loss, gradients = results(backend, kwargs)
    assert loss.counts.tolist() == [2 * 3 * 32, 2 * 2 * 8, 0]
    assert loss.per_horizon[2] == 0 and loss.total.isfinite()
    assert not gradients[2].any()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in (gradients[0], gradients[1], gradients[3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_the_end_may_be_nan(backend: str) -> None:
    kwargs = call_of(backend)
    want = results(backend, kwargs)
    kwargs["inputs"][1][:, 4:] = float("nan")
    kwargs["inputs"][2][:, 2:] = float("inf")
    assert_same(results(backend, kwargs), want, 0)


@pytest.mark.parametrize("left_out", ["segments", "mask"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_a_mask_or_segments_leave_out_may_be_nan(backend: str, left_out: str) -> None:
    kwargs = call_of(backend, Horizons((0, 2), (1, 2)), batch=few_clips(backend))
    if left_out == "segments":
        segments = torch.tensor([[0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]], device=device_of(backend))
        kwargs |= {"segment_ids": segments[: few_clips(backend)], "consistency_weights": [0, 0.5], "detach": None}
    else:
        kwargs["token_mask"] = torch.rand(kwargs["tokens"].shape, device=device_of(backend)) < 0.5
    want = results(backend, kwargs)
    for value in (float("nan"), float("inf")):
        spoiled = [states.clone() for states in kwargs["inputs"]]
        if left_out == "segments":
            spoiled[1][0, :2] = value
        else:
            spoiled[0][~kwargs["token_mask"][:, :5]] = value
        loss, gradients = results(backend, {**kwargs, "inputs": spoiled})
        assert_same(loss, want[0], 0)
        assert_same(gradients, want[1], 1e-6 if backend == "reference" else 0)


@pytest.mark.parametrize("predicts", [False, True], ids=["", "predictions"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_weight_0_may_be_nan(backend: str, predicts: bool) -> None:
    """Position 1 of horizon 0 and positions 0 and 1 of horizon 1, as sides of a pair too."""
    kwargs = call_of(backend, Horizons((1, 2), (1, 2)), batch=few_clips(backend))
    kwargs |= {"consistency_weights": [0, 0.5], "detach": None, "return_predictions": predicts, "return_accuracy": True}
    kwargs["biases"] = torch.randn_like(kwargs["weight"][:, 0])
    weights = torch.rand(kwargs["tokens"].shape[0], 5, 2, device=device_of(backend)) + 0.1
    weights[0, 1, 0] = weights[0, 0, 1] = weights[0, 1, 1] = 0
    kwargs["position_weights"] = weights
    want = results(backend, kwargs)
    assert want[0].counts.tolist() == [(weights.shape[0] * 5 - 1) * 32, (weights.shape[0] * 4 - 2) * 8]
    assert want[0].consistency_counts.tolist() == [0, (weights.shape[0] * 4 - 2) * 8]
    for value in (float("nan"), float("inf")):
        spoiled = [states.clone() for states in kwargs["inputs"]]
        spoiled[0][0, 1] = value
        spoiled[1][0, :2] = value
        loss, gradients = results(backend, {**kwargs, "inputs": spoiled})
        assert_same(loss[:6], want[0][:6], 0)
        assert_same(gradients, want[1], 1e-6 if backend == "reference" else 0)
        if predicts:
            for ids, exact, counts in zip(loss.predictions, want[0].predictions, weights.unbind(-1), strict=True):
                assert torch.equal(ids[counts > 0], exact[counts > 0])
                assert ((ids >= 0) & (ids < 37)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_weights(backend: str) -> None:
    """They multiply losses, and neither counts, accuracies nor consistency; [B, T] is [B, T, K] expanded."""
    kwargs = call_of(backend, batch=few_clips(backend), return_accuracy=True, consistency_weights=[0, 0, 0.5])
    plain = results(backend, kwargs)[0]
    weights = torch.full((*kwargs["tokens"].shape[:1], 5), 3.0, device=device_of(backend))
    loss, gradients = results(backend, {**kwargs, "position_weights": weights})
    assert_same(loss.per_horizon, 3 * plain.per_horizon, tolerance(backend))
    assert_same(loss[2:6], plain[2:6], tolerance(backend))
    each = weights[..., None].double().repeat(1, 1, 3)
    assert_same(results(backend, {**kwargs, "position_weights": each}), (loss, gradients), 0)


def fp16_gradients(backend: str, dtype: torch.dtype, kwargs: dict[str, Any], upstream: float) -> list[Tensor]:
    """Gradients in `dtype` of states, weights and biases that are exact in fp16."""
    leaves = tree_map_only(
        Tensor, lambda t: t.half().to(dtype).requires_grad_(), {n: kwargs[n] for n in ("inputs", "weight", "biases")}
    )
    with use_backend(backend):
        loss = multi_horizon_linear_cross_entropy(**{**kwargs, **leaves})
    return list(torch.autograd.grad(loss.total * upstream, tree_leaves(leaves)))


@pytest.mark.parametrize("factor", [1e-9, 1e9])
@pytest.mark.parametrize("backend", KERNELS)
def test_fp16_gradients_of_any_size(backend: str, factor: float) -> None:
    """Those of logits are below fp16's smallest number or above its largest until the upstream gradient scales them."""
    kwargs = call_of(backend, Horizons((1, 2), (1, 2)), batch=1)
    kwargs["biases"] = torch.randn_like(kwargs["weight"][:, 0])
    if factor > 1:
        kwargs["position_weights"] = torch.full((1, 5), factor, device=device_of(backend))
    else:
        kwargs |= {"horizon_weights": [factor, 0.5 * factor], "consistency_weights": [0.0, factor], "detach": None}
    found = fp16_gradients(backend, torch.float16, kwargs, 1 / factor)
    assert_same(found, fp16_gradients("reference", torch.float64, kwargs, 1 / factor), 2e-3)


def test_triton_multiplies_fp16_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mfwm_kernels.gemm.multi_horizon_linear_cross_entropy")
    multiply, dtypes = module.multiply, set()

    def recording_multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        dtypes.add((left.dtype, right.dtype))
        return multiply(left, right, out)

    monkeypatch.setattr(module, "multiply", recording_multiply)
    kwargs = call_of("triton", Horizons((1, 2), (1, 2)), batch=1)
    fp16_gradients("triton", torch.float16, {**kwargs, "biases": torch.randn_like(kwargs["weight"][:, 0])}, 1.0)
    assert dtypes == {(torch.float16, torch.float16)}


@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions(backend: str, softcap: float | None) -> None:
    """Of every position, those past the end, in other segments and of weight 0 too, from uncapped logits: softcap 1
    maps 20 and 30 to the same number. Of equal logits the smallest id wins."""
    device = device_of(backend)
    states = torch.zeros(1, 3, 1, 2, 5, device=device)
    states[0, 0, 0, 0, 3], states[0, 0, 0, 0, 1] = 30, 20
    states[0, 0, 0, 1, 2] = states[0, 0, 0, 1, 4] = 30
    states[0, 1, 0, 0, 4] = 30
    states[0, 2, 0, 0, 1] = 0.5
    # The bias is for id 4: it decides where all logits are 0, and only there.
    bias = torch.tensor([0, 0, 0, 0, 0.25], device=device)
    want = [[[[3, 4]], [[4, 4]], [[1, 4]]]]
    for changes in (
        {},
        {"segment_ids": torch.tensor([[0, 1, 1]], device=device)},
        {"position_weights": torch.tensor([[0.0, 2.0, 1.0]], device=device)},
        {"token_mask": torch.zeros(1, 3, 1, 2, dtype=torch.bool, device=device)},
        {"chunk_size": 1},
    ):
        for offset in (0, 2, 7):
            tokens = torch.zeros(1, 3, 1, 2, dtype=torch.int64, device=device)
            loss = evaluated(
                backend,
                {
                    "inputs": [states], "weight": torch.eye(5, device=device), "tokens": tokens,
                    "horizons": Horizons((offset,), (1,)), "biases": bias, "softcap": softcap,
                    "return_predictions": True, **changes,
                },
            )  # fmt: skip
            (ids,) = loss.predictions
            assert ids.dtype == torch.int64 and ids.tolist() == want
    tied = {
        "inputs": [states],
        "weight": torch.eye(5, device=device),
        "tokens": tokens,
        "horizons": Horizons((1,), (1,)),
    }
    (ids,) = evaluated(backend, {**tied, "softcap": softcap, "return_predictions": True}).predictions
    assert ids.tolist() == [[[[3, 2]], [[4, 0]], [[1, 0]]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_change_nothing_else(backend: str) -> None:
    kwargs = call_of(backend, batch=few_clips(backend), return_accuracy=True)
    kwargs["tokens"] = kwargs["tokens"][:, :5].clone()
    kwargs["tokens"][0, :, :2, 3:] = -100
    want, got = results(backend, kwargs), results(backend, {**kwargs, "return_predictions": True})
    assert_same(got[0][:6], want[0][:6], tolerance(backend))
    assert_same(got[1], want[1], tolerance(backend))
    assert [ids.shape for ids in got[0].predictions] == [states.shape[:-1] for states in kwargs["inputs"]]


@pytest.mark.parametrize("backend", KERNELS)
def test_only_a_bias_learns(backend: str) -> None:
    """Frozen states and heads: the logits' gradients are still needed, those of the second horizon alone."""
    kwargs = call_of(backend, Horizons((1, 2), (1, 2)), batch=few_clips(backend), consistency_weights=[0, 0.5])
    first, second = torch.randn(2, 37, device=device_of(backend), dtype=kwargs["weight"].dtype).unbind()

    def gradient_of(backend: str) -> Tensor:
        bias = second.clone().requires_grad_()
        with use_backend(backend):
            loss = multi_horizon_linear_cross_entropy(**kwargs, biases=[first, bias])
        return torch.autograd.grad(loss.total, [bias])[0]

    assert_same(gradient_of(backend), gradient_of("reference"), tolerance(backend))


@pytest.mark.parametrize("f", [1, 2])
@pytest.mark.parametrize("detach", [None, "near", "far"])
@pytest.mark.parametrize("backend", KERNELS)
def test_true_ids_teach_where_the_mask_leaves_them_out(backend: str, detach: str | None, f: int) -> None:
    """Some cells of one known id, of all ids known, of none, and of ignored ids, which teach nothing."""
    kwargs = call_of(backend, Horizons((0, 1), (f, 2 * f)), batch=few_clips(backend), softcap=3.0, detach=detach)
    mask = torch.rand(kwargs["tokens"].shape, device=device_of(backend)) < 0.5
    mask[:, :, :2, :2], mask[:, :, 2:, :2] = True, False
    kwargs["tokens"][:, :, 2:, 4] = -100
    kwargs |= {"token_mask": mask, "consistency_weights": [0, 2.0], "horizon_weights": [0, 0]}
    kwargs["biases"] = torch.randn_like(kwargs["weight"][:, 0])
    want = results("reference", kwargs)
    assert want[0].consistency[1] > 0
    assert_same(results(backend, kwargs), want, tolerance(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy(backend: str) -> None:
    """Cells of 2 x 2 ids, with the inputs as logits. The smallest of equally frequent ids, or of equal logits, wins."""
    device = device_of(backend)
    tokens = torch.tensor([[3, 3, 0, 2], [0, 2, 2, 0], [-100, 1, -100, -100], [-100, -100, -100, -100]], device=device)
    # The most frequent ids of the cells are 3; 0, as often as 2; 1; and none.
    logits = torch.zeros(1, 1, 2, 2, 4, device=device)
    logits[0, 0, 0, 0, 3] = 1  # right
    logits[0, 0, 0, 1, 0] = logits[0, 0, 0, 1, 2] = 1  # right: the first of two largest
    logits[0, 0, 1, 0, 0] = logits[0, 0, 1, 0, 1] = 1  # wrong for the same reason
    with use_backend(backend):
        loss = multi_horizon_linear_cross_entropy(
            [logits], torch.eye(4, device=device), tokens[None, None], Horizons((0,), (2,)), return_accuracy=True
        )
    assert loss.counts.tolist() == [3]
    assert loss.accuracy is not None
    assert abs(loss.accuracy.item() - 2 / 3) < 1e-6


@pytest.mark.skipif("triton" not in KERNELS, reason="needs Triton")
def test_rows_too_long_for_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    from mfwm_kernels.triton import logits, token_consistency

    monkeypatch.setattr(logits, "LONGEST", 16)
    monkeypatch.setattr(logits, "LOOPED", 16)
    monkeypatch.setattr(token_consistency, "LONGEST_PAIR", 16)
    options = {"softcap": 3.0, "z_loss": 0.01, "label_smoothing": 0.1, "return_accuracy": True}
    kwargs = call_of("triton", batch=few_clips("triton"), consistency_weights=[0, 0, 2], detach=None, **options)
    kwargs |= hosts_options(kwargs)
    kwargs["tokens"][0, :, :2, 3:] = -100
    assert_same(results("triton", kwargs), results("reference", kwargs), 1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_large_logits(backend: str) -> None:
    """Logits for which exp overflows, and logits far below the largest."""
    kwargs = call_of(backend)
    kwargs["weight"] *= 300
    want, got = results("reference", kwargs), results(backend, kwargs)
    assert want[0].total.isfinite()
    assert_same(got, want, tolerance(backend))


def peak_memory(kwargs: dict[str, Any]) -> int:
    """The most bytes allocated at a time in a forward and a backward, including gradients."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        results("cpu", kwargs)
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.skipif("cpu" not in KERNELS, reason="needs the compiled module")
def test_memory_does_not_grow_with_the_logits(
    products: torch.dtype, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides inputs and gradients, memory holds a chunk, and for products copies of the weight and its gradient."""
    horizons, vocabulary, depth, budget = Horizons.cascade(4), 4096, 64, 8 * 2**20
    module = importlib.import_module("mfwm_kernels.cpu.multi_horizon_linear_cross_entropy")
    monkeypatch.setattr(module, "PASSES", module.PASSES._replace(chunk_bytes=budget))

    def held(time: int) -> int:
        shapes = [(4, time, 16 // f, 16 // f, depth) for f in horizons.factors]
        kwargs = {
            "inputs": [torch.randn(shape).bfloat16() for shape in shapes],
            "weight": torch.randn(vocabulary, depth).bfloat16(),
            "tokens": torch.randint(0, vocabulary, (4, time + 8, 16, 16)),
            "horizons": horizons,
        }
        gradients = [*kwargs["inputs"], kwargs["weight"]]
        return peak_memory(kwargs) - sum(gradient.nbytes for gradient in gradients)

    # fp32 products read a copy of the weight and accumulate its gradient in index; bf16 products need a product and a
    # sum. A call of one chunk needs no sum, so this is an upper bound.
    most = budget + vocabulary * depth * (4 + 4 if products == torch.float32 else 2 + 4)
    short, long = held(1), held(4)
    logits = 4 * 4 * (256 + 64 + 16 + 4) * vocabulary * products.itemsize
    assert budget < short < long < most * 1.1 < logits / 2


class Launches:
    """Records how many rows each pass, consistency pass and product of logits has while a test runs."""

    def __init__(self, backend: str, monkeypatch: pytest.MonkeyPatch, vocabulary: int = 37, **changes: Any) -> None:
        self.passes: list[int] = []
        self.pairs: list[int] = []
        self.products: list[int] = []
        module = importlib.import_module(f"mfwm_kernels.{backend}.multi_horizon_linear_cross_entropy")
        mm = torch.mm

        def cross_entropy(args: Any, logits: Tensor, *rest: Any) -> None:
            self.passes.append(logits.shape[0])
            module.cross_entropy(args, logits, *rest)

        def consistency(args: Any, pair: Any, near: Tensor, far: Tensor, *rest: Any) -> None:
            self.pairs.append(near.shape[0] + far.shape[0])
            module.consistency(args, pair, near, far, *rest)

        def recording_mm(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
            if right.shape[1] == vocabulary:
                self.products.append(left.shape[0])
            return mm(left, right, out=out)

        passes = module.PASSES._replace(cross_entropy=cross_entropy, consistency=consistency, **changes)
        monkeypatch.setattr(module, "PASSES", passes)
        monkeypatch.setattr(torch, "mm", recording_mm)


def evaluated(backend: str, kwargs: dict[str, Any]) -> Any:
    with torch.no_grad(), use_backend(backend):
        return multi_horizon_linear_cross_entropy(**kwargs)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("backend", KERNELS)
def test_horizons_share_chunks(backend: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """320, 64 and 8 rows in four chunks: one pass per chunk, and one product per chunk and weight.

    The rows' strides allow no view by clip, so none is multiplied in place. Accuracies cost no product.
    """
    recorded = Launches(backend, monkeypatch)
    kwargs = call_of(backend, chunk_size=100)
    kwargs["inputs"] = [states.transpose(2, 3).contiguous().transpose(2, 3) for states in kwargs["inputs"]]
    kwargs["weight"] = kwargs["weight"] if shared else [kwargs["weight"]] * 3
    evaluated(backend, kwargs)
    assert recorded.passes == [98] * 4
    assert recorded.products == (recorded.passes if shared else [98, 98, 98, 26, 64, 8])
    assert evaluated(backend, {**kwargs, "return_accuracy": True}).accuracy is not None
    assert recorded.products[len(recorded.products) // 2 :] == recorded.products[: len(recorded.products) // 2]


@pytest.mark.parametrize("vocabulary", [4, 200])
@pytest.mark.parametrize("backend", KERNELS)
def test_the_default_chunk_follows_from_its_bytes(
    backend: str, vocabulary: int, no_small_calls: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row needs V + D = 4 + 6 or 200 + 6 numbers of the budget, so V may be below D or far above it."""
    kwargs = call_of(backend, vocabulary=vocabulary)
    budget = 100 * (vocabulary + 6) * kwargs["weight"].itemsize
    recorded = Launches(backend, monkeypatch, vocabulary, chunk_bytes=budget)
    evaluated(backend, kwargs)
    assert recorded.passes == [98] * 4


@pytest.mark.parametrize("backend", KERNELS)
def test_logits_of_a_pair_share_the_chunk(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far cells and the 4 or 16 near cells that each covers share chunks of at most 40 rows."""
    recorded = Launches(backend, monkeypatch)
    evaluated(backend, call_of(backend, chunk_size=40, consistency_weights=[0, 0.5, 2]))
    cells = {4: 2 * 4 * 8, 16: 2 * 2 * 2}
    assert recorded.pairs == [40] * (cells[4] // 8) + [34] * (cells[16] // 2)


@pytest.mark.skipif("cpu" not in KERNELS, reason="needs the compiled module")
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, 5000])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_vocabularies_of_any_size_in_fp32(size: int, softcap: float | None) -> None:
    """In fp32 the kernel has its own exp and tanh."""
    kwargs = call_of("cpu", vocabulary=size, softcap=softcap, return_accuracy=True)
    want = results("reference", kwargs)
    kwargs["inputs"] = [states.float() for states in kwargs["inputs"]]
    kwargs["weight"] = kwargs["weight"].float()
    loss, gradients = results("cpu", kwargs)
    assert relative_error(loss.total, want[0].total) < 1e-6 or size == 1
    # With one id, loss and gradients are 0.
    assert all(relative_error(a, b) < 5e-6 or size == 1 for a, b in zip(gradients, want[1], strict=True))
