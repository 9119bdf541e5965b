"""The compiled module, as csrc/bindings.cpp defines it. It checks no arguments; csrc/ops.h states shapes and dtypes."""

from collections.abc import Sequence
from typing import TypeAlias, TypedDict

# (pointer, dtype code, sizes, strides); csrc/ops.h lists the codes, and strides count elements.
Array: TypeAlias = tuple[int, int, Sequence[int], Sequence[int]]

class LossNumbers(TypedDict):
    motion_gain: float
    beta: float
    scale: float
    shift: float
    delta: float
    eps: float

class BuildInfo(TypedDict):
    compiler: str
    cuda: str
    cuda_architectures: str
    signatures: str  # the SHA-256 of this file when the module was built
    simd: str

build_info: BuildInfo
has_cuda: bool

def action_window_sum_forward(
    actions: Array,
    lag_weight: Array | None,
    segment_ids: Array | None,
    offsets: Sequence[int],
    window_start: int,
    sums: Array,
    threads: int,
    /,
) -> None: ...
def action_window_sum_backward(
    actions: Array,
    lag_weight: Array | None,
    segment_ids: Array | None,
    offsets: Sequence[int],
    window_start: int,
    sums: Array,
    threads: int,
    actions_gradient: Array | None,
    lag_weight_gradient: Array | None,
    /,
) -> None: ...
def fan_out_forward(
    hidden: Array,
    sums: Array,
    norm_weight: Array | None,
    norm_bias: Array | None,
    layer: bool,
    pool: Sequence[int],
    norm_eps: float,
    outputs: list[Array],
    threads: int,
    /,
) -> None: ...
def fan_out_backward(
    hidden: Array,
    sums: Array,
    norm_weight: Array | None,
    norm_bias: Array | None,
    layer: bool,
    pool: Sequence[int],
    norm_eps: float,
    upstream: list[Array | None],
    threads: int,
    hidden_gradient: Array | None,
    sums_gradient: Array | None,
    norm_weight_gradient: Array | None,
    norm_bias_gradient: Array | None,
    gram: Array | None,
    scale: Sequence[float],
    /,
) -> None: ...
def multi_horizon_linear_forward(
    hidden: Array,
    sums: Array,
    inverse_rms: Array | None,
    means: Array | None,
    first: int,
    tokens: int,
    norm_eps: float,
    threads: int,
    product: Array,
    projected: Array,
    head_sums: Array | None,
    bias: Array | None,
    outputs: list[Array],
    /,
) -> None: ...
def multi_horizon_linear_scale(
    hidden: Array,
    sums: Array,
    inverse_rms: Array | None,
    means: Array | None,
    first: int,
    tokens: int,
    norm_eps: float,
    threads: int,
    upstream: list[Array | None],
    outputs: list[Array],
    bias: Array | None,
    scaled: Array,
    shares: Array,
    scaled_sums: Array | None,
    /,
) -> None: ...
def multi_horizon_linear_combine(
    hidden: Array,
    sums: Array,
    inverse_rms: Array | None,
    means: Array | None,
    first: int,
    tokens: int,
    norm_eps: float,
    threads: int,
    product: Array | None,
    shares: Array,
    hidden_gradient: Array | None,
    sums_gradient: Array | None,
    /,
) -> None: ...
def multi_horizon_linear_monitor(
    hidden: Array,
    sums: Array,
    inverse_rms: Array | None,
    means: Array | None,
    first: int,
    tokens: int,
    norm_eps: float,
    threads: int,
    states: list[Array | None],
    shares: Array,
    scale: Sequence[float],
    hidden_gradient: Array,
    sums_gradient: Array | None,
    gram: Array,
    /,
) -> None: ...
def multi_horizon_linear_small_forward(
    hidden: Array,
    actions: Array | None,
    lag_weight: Array | None,
    segment_ids: Array | None,
    condition: Array | None,
    norm_weight: Array | None,
    norm_bias: Array | None,
    layer: bool,
    norm_eps: float,
    offsets: Sequence[int],
    window_start: int,
    weights: list[Array],
    biases: list[Array],
    outputs: list[Array],
    /,
) -> None: ...
def multi_horizon_linear_small_backward(
    hidden: Array,
    actions: Array | None,
    lag_weight: Array | None,
    segment_ids: Array | None,
    condition: Array | None,
    norm_weight: Array | None,
    norm_bias: Array | None,
    layer: bool,
    norm_eps: float,
    offsets: Sequence[int],
    window_start: int,
    weights: list[Array],
    biases: list[Array],
    upstream: list[Array | None],
    hidden_gradient: Array | None,
    actions_gradient: Array | None,
    lag_weight_gradient: Array | None,
    condition_gradient: Array | None,
    norm_weight_gradient: Array | None,
    norm_bias_gradient: Array | None,
    weight_gradients: list[Array | None],
    bias_gradients: list[Array | None],
    /,
) -> None: ...
def multi_horizon_linear_cross_entropy(
    logits: Array,
    biases: Array | None,
    bias_rows: Array | None,
    ids: Array,
    starts: Array,
    scales: Array,
    losses: Array,
    hits: Array | None,
    predictions: Array | None,
    entries: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradients: bool,
    threads: int,
    /,
) -> None: ...
def multi_horizon_linear_cross_entropy_small(
    inputs: list[Array],
    weights: list[Array],
    biases: list[Array],
    tokens: Array,
    horizon_weights: Array,
    segment_ids: Array | None,
    token_mask: Array | None,
    position_weights: Array | None,
    offsets: Sequence[int],
    factors: Sequence[int],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradients: bool,
    outputs: list[Array | None],
    input_gradients: list[Array | None],
    weight_gradients: list[Array | None],
    bias_gradients: list[Array | None],
    /,
) -> bool: ...
def multi_horizon_linear_consistency(
    near: Array,
    far: Array,
    near_bias: Array | None,
    far_bias: Array | None,
    known: Array | None,
    losses: Array,
    ids_per_token: int,
    softcap: float,
    scale: float,
    near_gradients: bool,
    far_gradients: bool,
    threads: int,
    /,
) -> None: ...
def multi_horizon_linear_add(sum: Array, term: Array, threads: int, /) -> None: ...
def mtp_combine_norm(states: list[Array], joined: Array, eps: float, threads: int, /) -> None: ...
def mtp_combine_gradient(
    states: list[Array],
    joined: Array,
    eps: float,
    threads: int,
    gradients: list[Array | None],
    /,
) -> None: ...
def mtp_combine_small_forward(
    states: list[Array], norm_weights: list[Array], weight: Array, out: Array, eps: float, /
) -> None: ...
def mtp_combine_small_backward(
    states: list[Array],
    norm_weights: list[Array],
    weight: Array,
    upstream: Array,
    eps: float,
    state_gradients: list[Array | None],
    norm_gradients: list[Array | None],
    weight_gradient: Array | None,
    /,
) -> None: ...
def video_pyramid(
    video: Array,
    factors: Sequence[int],
    patch_sizes: Sequence[int],
    scale: float,
    shift: float,
    outputs: list[Array],
    threads: int,
    /,
) -> None: ...
def multi_horizon_loss(
    preds: list[Array],
    gradients: list[Array | None],
    video: Array,
    segment_ids: Array | None,
    position_weights: Array | None,
    horizon_weights: Array,
    consistency_weights: Array | None,
    offsets: Sequence[int],
    factors: Sequence[int],
    pairs: Sequence[int],
    patch_sizes: Sequence[int],
    kinds: Sequence[int],
    detach: int,
    residual: bool,
    numbers: LossNumbers,
    outputs: list[Array],
    threads: int,
    /,
) -> None: ...

# The rest exists only if has_cuda. `stream` is a cudaStream_t, as an integer.
def cuda_video_pyramid(
    video: Array,
    factors: Sequence[int],
    patch_sizes: Sequence[int],
    scale: float,
    shift: float,
    outputs: list[Array],
    stream: int,
    /,
) -> None: ...
def cuda_multi_horizon_loss(
    preds: list[Array],
    gradients: list[Array | None],
    video: Array,
    segment_ids: Array | None,
    position_weights: Array | None,
    horizon_weights: Array,
    consistency_weights: Array | None,
    offsets: Sequence[int],
    factors: Sequence[int],
    pairs: Sequence[int],
    patch_sizes: Sequence[int],
    kinds: Sequence[int],
    detach: int,
    residual: bool,
    numbers: LossNumbers,
    outputs: list[Array],
    term_counts: Array | None,
    partial: Array,
    stream: int,
    /,
) -> None: ...
def cuda_multi_horizon_loss_scale(tensors: list[Array], upstream: Array, stream: int, /) -> None: ...
