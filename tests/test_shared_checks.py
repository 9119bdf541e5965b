"""Checks that several ops share: horizons that never count, DTensors, position weights, sizes that do not divide."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import mfwm_kernels as m
from mfwm_kernels import Horizons, horizon_loss

CASCADE = Horizons.cascade(4)


def frame_loss(frames: int = 4, positions: int = 4, horizons: Horizons = CASCADE, **options: Any) -> m.HorizonLoss:
    preds = [torch.zeros(2, positions, 3, 16 // f, 16 // f) for f in horizons.factors]
    video = torch.zeros(2, frames, 3, 16, 16, dtype=torch.uint8)
    return m.multi_horizon_loss(preds, video, horizons, **options)


def token_loss(frames: int = 4, positions: int = 4, horizons: Horizons = CASCADE, **options: Any) -> m.HorizonLoss:
    inputs = [torch.zeros(2, positions, 8 // f, 8 // f, 4) for f in horizons.factors]
    ids = torch.zeros(2, frames, 8, 8, dtype=torch.int64)
    return m.multi_horizon_linear_cross_entropy(inputs, torch.zeros(5, 4), ids, horizons, **options)


LOSSES = [pytest.param(frame_loss, id="frames"), pytest.param(token_loss, id="tokens")]


@pytest.fixture
def warned() -> Iterator[None]:
    """Forget which horizons were warned of, for one test."""
    before = set(horizon_loss._warned)
    horizon_loss._warned.clear()
    yield
    horizon_loss._warned.clear()
    horizon_loss._warned.update(before)


def messages_of(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(entry.message) for entry in caught if "never counts" in str(entry.message)]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_horizon_that_never_counts_warns_once(loss: Callable[..., Any], warned: None) -> None:
    first = messages_of(loss)
    assert [message[:9] for message in first] == ["horizon 2", "horizon 3"] and "offset, 4" in first[0]
    assert messages_of(loss) == []
    assert messages_of(lambda: loss(horizons=Horizons((1, 4), (1, 2))))[0].startswith("horizon 1")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [{"frames": 9}, {"frames": 9, "positions": 1}, {"frames": 3, "positions": 0}])
def test_no_warning_where_every_horizon_counts_or_nothing_is_predicted(
    loss: Callable[..., Any], sizes: dict[str, int], warned: None
) -> None:
    assert messages_of(lambda: loss(**sizes)) == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_warns_while_it_is_traced(dynamic: bool, warned: None) -> None:
    compiled = torch.compile(frame_loss, fullgraph=True, dynamic=dynamic, backend="eager")
    assert len(messages_of(compiled)) == 2
    assert messages_of(compiled) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_position_weights_that_cannot_be_read_up_front_make_the_total_nan(loss: Callable[..., Any]) -> None:
    """The compiler cannot read them: the rule that raises in eager mode must not pass in silence there."""

    def total(weights: torch.Tensor) -> torch.Tensor:
        return loss(frames=12, position_weights=weights).total

    compiled = torch.compile(total, fullgraph=True, backend="eager")
    weights = torch.rand(2, 4)
    torch.testing.assert_close(compiled(weights), total(weights))
    for bad in (-0.5, float("nan"), float("inf")):
        weights[1, 2] = bad
        assert compiled(weights).isnan()
        with pytest.raises(ValueError, match="position_weights must be finite and >= 0"):
            total(weights)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_dtensor_is_refused_with_the_cure(mesh: Any) -> None:
    """FSDP2 does not gather the weight of a module sharded on its own when another module's forward reads it."""

    def sharded(*shape: int) -> torch.Tensor:
        return distribute_tensor(torch.zeros(shape), mesh, [Replicate()])

    hidden, actions = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 8)
    near = Horizons.next_frame()
    ids = torch.zeros(2, 3, 2, 2, dtype=torch.int64)
    calls: dict[str, Callable[[], object]] = {
        "weights[0]": lambda: m.multi_horizon_linear(hidden, actions, [sharded(5, 8)], near),
        "biases[0]": lambda: m.multi_horizon_linear(
            hidden, actions, [torch.zeros(5, 8)], near, biases=[torch.nn.Parameter(sharded(5))]
        ),
        "norm_weight": lambda: m.fan_out(hidden, actions, near, pool=(1,), norm_weight=sharded(8)),
        "weight": lambda: m.multi_horizon_linear_cross_entropy([torch.zeros(2, 3, 2, 2, 8)], sharded(5, 8), ids, near),
        "video": lambda: m.video_pyramid(sharded(1, 1, 1, 2, 2), (1,)),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got a DTensor.*fully_shard") as error:
            call()
        assert str(error.value).startswith(f"{name} must") and f"{name}.full_tensor()" in str(error.value)


def test_sizes_that_do_not_divide_name_the_factors_that_would() -> None:
    """A grid of 14 x 14, that of a ViT on 224 pixels, has neither factor 4 nor 8."""
    hidden, actions = torch.zeros(1, 2, 14, 14, 4), torch.zeros(1, 2, 4)
    near_and_far = Horizons((1, 2), (1, 4))
    with pytest.raises(ValueError, match=r"pool\[1\] = 4 does not divide .*; 1, 2, 7 or 14 would"):
        m.fan_out(hidden, actions, near_and_far, pool=(1, 4))
    with pytest.raises(ValueError, match=r"factors\[1\] = 4 does not divide .*; 1, 2, 7 or 14 would"):
        m.video_pyramid(torch.zeros(1, 2, 3, 14, 14), (1, 4))
    ids = torch.zeros(1, 2, 14, 14, dtype=torch.int64)
    inputs = [torch.zeros(1, 2, 14, 14, 4), torch.zeros(1, 2, 3, 3, 4)]
    with pytest.raises(ValueError, match=r"factors\[1\] = 4 does not divide .*; 1, 2, 7 or 14 would"):
        m.multi_horizon_linear_cross_entropy(inputs, torch.zeros(5, 4), ids, near_and_far)
    with pytest.raises(ValueError, match=r"grid must have Hp \* Wp = 196, .* got 16 x 16"):
        flat = [states.flatten(2, 3) for states in inputs]
        m.multi_horizon_linear_cross_entropy(flat, torch.zeros(5, 4), ids.flatten(2), near_and_far, grid=(16, 16))


@pytest.mark.parametrize(
    ("call", "letters"),
    [
        (lambda: m.fan_out(torch.zeros(2, 3, 4), None, CASCADE, pool=(1,) * 4), "[B, T, Hp, Wp, D] or [B, T, S, D]"),
        (lambda: frame_loss(frames=9, grid=(16, 16)), "[B, T_v, S, C] with grid"),
        (
            lambda: m.multi_horizon_linear_cross_entropy(
                [torch.zeros(2, 3, 4, 8)], torch.zeros(5, 8), torch.zeros(2, 3, 4, dtype=torch.int64), CASCADE
            ),
            "[B, T_v, S] needs grid=(Hp, Wp)",
        ),
    ],
)
def test_an_error_about_a_rank_spells_the_letters(call: Callable[[], object], letters: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert letters in str(error.value)
