"""Horizons of the token loss that are given the same tensor of states share one product and one softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import device_of, interpreted, require_grad
from token_call import BACKENDS, KERNELS, call_of
from torch import Tensor

from mfwm_kernels import Horizons, multi_horizon_linear_cross_entropy, use_backend
from mfwm_kernels.check import doubled, relative_error
from mfwm_kernels.launches import flat_arguments
from mfwm_kernels.op import OPS

OP = OPS["multi_horizon_linear_cross_entropy"]
# Horizons 0, 1 and 3 have the same states, 2 its own.
MIXED = Horizons((0, 1, 1, 2), (1, 1, 2, 1))


def shared_call(backend: str, **changes: Any) -> dict[str, Any]:
    """Three positions of 2 x 4 tokens; in Triton's interpreter, where a row takes milliseconds, of 2 x 2."""
    width = 2 if interpreted(backend) else 4
    kwargs = call_of(backend, MIXED, 1 if interpreted(backend) else 2, **changes)
    cells = zip(kwargs["inputs"], MIXED.factors, strict=True)
    kwargs["inputs"] = [states[:, :3, : 2 // f, : width // f] for states, f in cells]
    kwargs["inputs"][1] = kwargs["inputs"][3] = kwargs["inputs"][0]
    return {**kwargs, "tokens": kwargs["tokens"][:, :4, :2, :width]}


class Scaled(torch.autograd.Function):
    """The same memory, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def gradients_of(backend: str, kwargs: dict[str, Any], states: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """The loss, and the gradients of `states` and of the weight."""
    weight = kwargs["weight"].detach().requires_grad_()
    with use_backend(backend):
        loss = multi_horizon_linear_cross_entropy(**{**kwargs, "weight": weight})
    return loss, list(torch.autograd.grad(loss.total, [*states, weight]))


def assert_same(got: tuple[Any, list[Tensor]], want: tuple[Any, list[Tensor]], backend: str) -> None:
    least = 1e-5 if backend == "triton" else 1e-12
    pairs = [*zip(got[0][:5], want[0][:5], strict=True), *zip(got[1], want[1], strict=True)]
    assert [i for i, (a, b) in enumerate(pairs) if relative_error(a, b) > least] == []


def test_samples_that_share_do_so_in_tests() -> None:
    """Copies of their tensors for a test are the same where the tensors are."""
    found = []
    for sample in OP.samples(torch.float32, torch.device("cpu")):
        leaders = [flat_arguments(OP, call).leaders for call in (sample, require_grad(OP, sample), doubled(sample))]
        assert leaders[0] == leaders[1] == leaders[2]
        found.append(leaders[0])
    assert [0, 0, 2, 0] in found[:3] and [0, 0] in found and [0, 1, 2] in found


@pytest.mark.parametrize("backend", KERNELS)
def test_sharing_changes_nothing(backend: str) -> None:
    """Against views of the same states, which have products of their own. Chunks part the shared rows."""
    for chunk_size in (None, 7):
        kwargs = shared_call(backend, chunk_size=chunk_size, horizon_weights=[1.0, 0.5, 2.0, 0.25])
        states, other = kwargs["inputs"][0].clone().requires_grad_(), kwargs["inputs"][2].clone().requires_grad_()
        kwargs["inputs"] = [states, states, other, states]
        got = gradients_of(backend, kwargs, [states, other])
        views = {**kwargs, "inputs": [states, states.view_as(states), other, states.view_as(states)]}
        assert flat_arguments(OP, views).leaders == [0, 1, 2, 3]
        assert_same(got, gradients_of("reference", views, [states, other]), backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_horizons_may_have_the_same_id(backend: str) -> None:
    """In every frame: its logit loses the shares of all of them, also where cells have several ids."""
    kwargs = shared_call(backend)
    kwargs["tokens"] = kwargs["tokens"][:, :1].expand_as(kwargs["tokens"])
    near, far = (kwargs["inputs"][i].clone().requires_grad_() for i in (0, 2))
    for horizons, inputs in ((MIXED, [near, near, far, near]), (Horizons((1, 2), (2, 2)), [far, far])):
        call = {**kwargs, "horizons": horizons, "inputs": inputs}
        want = gradients_of("reference", call, inputs[:1])
        assert_same(gradients_of(backend, call, inputs[:1]), want, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_the_same_memory_keep_their_gradients(backend: str) -> None:
    """Each has its own: equal memory is not the same tensor."""
    kwargs = shared_call(backend)
    states, (far, near) = kwargs["inputs"][0], (3.0, -1.0)
    leaves = [states.clone().requires_grad_() for _ in range(3)]
    apart = {**kwargs, "inputs": [leaves[0], leaves[1], kwargs["inputs"][2], leaves[2]]}
    loss, (first, second, third, weight) = gradients_of("reference", apart, leaves)
    leaf = states.clone().requires_grad_()
    detached = [leaf, Scaled.apply(leaf, near), kwargs["inputs"][2], leaf.detach()]
    got = gradients_of(backend, {**kwargs, "inputs": detached}, [leaf])
    assert_same(got, (loss, [first + near * second, weight]), backend)
    scaled = [leaf, Scaled.apply(leaf, near), kwargs["inputs"][2], Scaled.apply(leaf, far)]
    got = gradients_of(backend, {**kwargs, "inputs": scaled}, [leaf])
    assert_same(got, (loss, [first + near * second + far * third, weight]), backend)


@pytest.mark.skipif("cpu" not in KERNELS, reason="needs the compiled module")
def test_a_compiled_call_shares_and_keeps_gradients() -> None:
    """The compiler removes views that change nothing, so that equal arguments of the op need not be the same tensor."""
    torch._dynamo.reset()
    kwargs = shared_call("cpu")
    other, leaf = kwargs["inputs"][2], kwargs["inputs"][0].clone().requires_grad_()

    def call(leaf: Tensor, scale: float) -> Any:
        states = leaf * 2
        last = Scaled.apply(states, scale) if scale else states
        return multi_horizon_linear_cross_entropy(**{**kwargs, "inputs": [states, states, other, last]}).total

    for scale, leaders in ((0.0, [0, 0, 2, 0]), (3.0, [0, 0, 2, 3])):
        seen: list[list[int]] = []

        def record(graph: Any, inputs: Any, seen: list[list[int]] = seen) -> Any:
            seen += [
                node.args[OP.arguments._fields.index("leaders")]
                for node in graph.graph.nodes
                if node.target is torch.ops.mfwm.multi_horizon_linear_cross_entropy.default
            ]
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        with use_backend("cpu"):
            compiled = torch.compile(call, fullgraph=True, backend=record)
            got = torch.autograd.grad(compiled(leaf, scale), leaf)
            want = torch.autograd.grad(call(leaf, scale), leaf)
        assert [list(entry) for entry in seen] == [leaders]
        assert relative_error(got[0], want[0]) <= 1e-12


@pytest.mark.parametrize("backend", [b for b in BACKENDS if not interpreted(b)])
def test_a_second_backward_of_states_that_are_no_leaves(backend: str) -> None:
    kwargs = shared_call(backend)
    leaf = kwargs["inputs"][0].clone().requires_grad_()
    states = leaf * 2
    with use_backend(backend):
        total = multi_horizon_linear_cross_entropy(
            **{**kwargs, "inputs": [states, states, kwargs["inputs"][2], states]}
        ).total
    (once,) = torch.autograd.grad(total, leaf, retain_graph=True)
    assert once.any() and relative_error(*torch.autograd.grad(total, leaf), once) <= 1e-12


class Counts:
    """How many products there are of logits and of gradients, and how many rows each pass has."""

    def __init__(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.passes: list[int] = []
        for name in ("mm", "addmm", "bmm"):
            monkeypatch.setattr(torch, name, self.counting(getattr(torch, name)))
        module = __import__(f"mfwm_kernels.{backend}.multi_horizon_linear_cross_entropy", fromlist=["PASSES"])

        def cross_entropy(args: Any, logits: Tensor, *rest: Any) -> None:
            self.passes.append(logits.shape[0])
            module.cross_entropy(args, logits, *rest)

        monkeypatch.setattr(module, "PASSES", module.PASSES._replace(cross_entropy=cross_entropy))

    def counting(self, product: Any) -> Any:
        def counted(*operands: Any, **options: Any) -> Tensor:
            left, right = operands[-2:]
            self.shapes.append((*left.shape, right.shape[-1]))
            return product(*operands, **options)

        return counted


@pytest.mark.parametrize("backend", KERNELS)
def test_one_product_for_all_that_share(backend: str, no_small_calls: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three horizons on one tensor: a product forward and two backward per chunk, of the rows of one horizon. Apart
    they have three times as many products and rows."""
    kwargs = call_of(backend, Horizons((1, 2, 3), (1, 1, 1)), batch=1)
    kwargs["tokens"] = torch.randint(0, 37, (1, 8, 1, 2), device=device_of(backend))
    apart = [states[:, :, :1, :2].clone().requires_grad_() for states in kwargs["inputs"]]
    kwargs["weight"].requires_grad_()

    def products(inputs: list[Tensor], chunk_size: int | None = None) -> Counts:
        with monkeypatch.context() as patch, use_backend(backend):
            counts = Counts(backend, patch)
            multi_horizon_linear_cross_entropy(**{**kwargs, "inputs": inputs, "chunk_size": chunk_size})
        return counts

    def of_rows(rows: int) -> list[tuple[int, ...]]:
        return [(rows, 6, 37), (37, rows, 6), (rows, 37, 6)]

    together, chunks, separate = products(apart[:1] * 3), products(apart[:1] * 3, 5), products(apart)
    assert (together.passes, together.shapes) == ([10], of_rows(10))
    assert (chunks.passes, chunks.shapes) == ([5, 5], of_rows(5) * 2)
    assert separate.passes == [30] and sorted(separate.shapes) == sorted(of_rows(10) * 3)
    of_call = OP.cost({**kwargs, "inputs": apart[:1] * 3}), OP.cost({**kwargs, "inputs": apart})
    assert 3 * of_call[0].flops == of_call[1].flops


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("counts_anywhere", [True, False])
def test_rows_that_count_for_no_horizon_may_be_nan(backend: str, counts_anywhere: bool) -> None:
    """The last position is past the end for both; in one-frame episodes nothing counts."""
    kwargs = shared_call(backend)
    states = kwargs["inputs"][0].clone().requires_grad_()
    kwargs |= {"horizons": Horizons((2, 3), (1, 1)), "inputs": [states] * 2}
    if not counts_anywhere:
        kwargs["segment_ids"] = torch.arange(4, device=states.device).expand(states.shape[0], -1)
    want = gradients_of(backend, kwargs, [states])
    assert want[0].counts.any() == counts_anywhere
    with torch.no_grad():
        states[:, 2 if counts_anywhere else 0 :] = float("nan")
    got = gradients_of(backend, kwargs, [states])
    assert all(gradient.isfinite().all() for gradient in got[1])
    assert_same(got, want, backend)


def test_states_are_cast_once() -> None:
    kwargs = shared_call("reference")
    kwargs = {**kwargs, "inputs": [t.float() for t in kwargs["inputs"]], "weight": kwargs["weight"].float()}
    kwargs["inputs"][1] = kwargs["inputs"][3] = kwargs["inputs"][0]
    with torch.autocast("cpu", torch.bfloat16):
        args = flat_arguments(OP, kwargs)
    assert args.inputs[0].dtype == torch.bfloat16 and args.leaders == [0, 0, 2, 0]
    assert args.inputs[1] is args.inputs[0] and args.inputs[3] is args.inputs[0]


@pytest.mark.parametrize("apart", ["weight", "biases"])
def test_horizons_of_other_heads_do_not_share(apart: str) -> None:
    kwargs = shared_call("reference", biases=None)
    head, bias = kwargs["weight"], torch.randn(37, dtype=torch.float64)
    given, leaders = {
        "weight": ([head, head, head, head.clone()], [0, 0, 2, 3]),
        "biases": ([None, bias, bias, bias], [0, 1, 2, 1]),
    }[apart]
    assert flat_arguments(OP, {**kwargs, apart: given}).leaders == leaders
