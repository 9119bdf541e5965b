"""The transformer block of the trunk and of the horizons: attention in space, attention in time, one MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfwm_kernels import Horizons, fan_out, mtp_combine


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32, in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension.

    For tokens [B, T, S, D] or [B, T, H, W, D] trained on the CPU without a compiler, this is a fan_out with one
    horizon, because torch 2.13 has no fused kernel there: forward and backward of 8 clips of 16 frames of 64 tokens,
    width 192, took 7 ms with fan_out and 30 ms with torch, on 2 cores in fp32.
    """
    if x.ndim > 3 and x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        no_actions = x.new_zeros(x.shape[0], x.shape[1], x.shape[-1])
        return fan_out(x, no_actions, Horizons.next_frame(), pool=(1,), norm_weight=weight_D, norm_eps=eps)[0]
    return F.rms_norm(x, x.shape[-1:], weight_D, eps)


class LayerNorm(nn.Module):
    """F.layer_norm over the last dimension with weight and bias, in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Projections of multi-head self-attention.

    Queries, keys and values have a matrix each, so that their outputs are contiguous and the heads of either axis are
    split off as a view, which scaled_dot_product_attention takes without a copy.
    """

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def join(self, mixed: Tensor, like_BTSD: Tensor) -> Tensor:
        return self.out(mixed.transpose(1, 2).reshape(like_BTSD.shape))


class SpaceAttention(Attention):
    """Attention over the tokens of a frame."""

    def forward(self, x_BTSD: Tensor) -> Tensor:
        B, T, S, D = x_BTSD.shape
        # Heads are counted, because -1 is ambiguous for an empty batch.
        shape = (B * T, S, D // self.head_width, self.head_width)
        q, k, v = (layer(x_BTSD).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.join(attend(q, k, v, None, causal=False), x_BTSD)


class TimeCache:
    """Keys and values of one layer, for the frames so far that attention can still reach.

    Args:
        context: how many frames to allocate for.
        window: frames that attention reaches, the current one included; None: all.
    """

    def __init__(self, context: int, window: int | None = None):
        self.window = window
        self.capacity = context if window is None else 2 * window
        # Number of frames so far, and of the first one that is still stored.
        self.length, self.first = 0, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def rewind(self, length: int) -> None:
        """Forget the frames after the first `length`: at most those of the last `extend`, or all of them for 0."""
        self.length = length
        self.first = min(self.first, length)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of new frames [B, S * heads, t, head_width]; returns all that these frames can reach."""
        new, stored = keys.shape[2], self.length - self.first
        if self.keys is None or self.values is None or stored + new > self.capacity:
            reached = stored if self.window is None else min(stored, self.window - 1)
            self.capacity = max(self.capacity, reached + new)
            self.keys = self._reallocated(self.keys, keys, stored - reached, stored)
            self.values = self._reallocated(self.values, values, stored - reached, stored)
            self.first, stored = self.length - reached, reached
        start = 0 if self.window is None else max(0, stored - self.window + 1)
        self.keys[:, :, stored : stored + new] = keys
        self.values[:, :, stored : stored + new] = values
        self.length += new
        return self.keys[:, :, start : stored + new], self.values[:, :, start : stored + new]

    def _reallocated(self, old: Tensor | None, like: Tensor, first: int, end: int) -> Tensor:
        buffer = like.new_empty(*like.shape[:2], self.capacity, like.shape[3])
        if old is not None:
            buffer[:, :, : end - first] = old[:, :, first:end]
        return buffer


class TimeAttention(Attention):
    """Attention over the frames at a token, of position n to positions <= n.

    rotary: rotate queries and keys by their position (RoPE, arXiv 2104.09864), so that attention depends on how far
    back a frame is.
    """

    def __init__(self, width: int, head_width: int, rotary: bool = False):
        super().__init__(width, head_width)
        self.rotary = rotary

    def forward(self, x_BTSD: Tensor, mask_B1TT: Tensor | None, cache: TimeCache | None = None) -> Tensor:
        """With a cache, x holds the frames that follow those in it, and attends to both."""
        first = 0 if cache is None else cache.length
        q = self._split(self.query, x_BTSD, first)
        k, v = self._keys_values(x_BTSD, first)
        if cache is not None:
            k, v = cache.extend(k, v)
            mask_B1TT = None if q.shape[2] == 1 else causal_mask(q.shape[2], k.shape[2], cache.window, q.device)
        return self.join(attend(q, k, v, mask_B1TT, causal=cache is None and mask_B1TT is None), x_BTSD)

    def append(self, x_BTSD: Tensor, seen_BTSD: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """Position n of x attends to positions <= n of `seen` and to itself, as if it came right after them."""
        T = x_BTSD.shape[1]
        q = self._split(self.query, x_BTSD, first=1)
        pairs = zip(self._keys_values(seen_BTSD, first=0), self._keys_values(x_BTSD, first=1), strict=True)
        k, v = (torch.cat(pair, dim=2) for pair in pairs)
        causal = torch.ones(T, T, dtype=torch.bool, device=x_BTSD.device).tril()
        earlier = causal[None, None] if mask_B1TT is None else mask_B1TT
        itself = torch.eye(T, dtype=torch.bool, device=x_BTSD.device).expand_as(earlier)
        return self.join(attend(q, k, v, torch.cat([earlier, itself], dim=-1), causal=False), x_BTSD)

    def _split(self, layer: nn.Module, x_BTSD: Tensor, first: int) -> Tensor:
        """[B, S * heads, T, head_width]: tokens and heads share a dimension, so that one mask per clip broadcasts."""
        B, T, S, D = x_BTSD.shape
        parts = layer(x_BTSD).view(B, T, S * (D // self.head_width), self.head_width).transpose(1, 2)
        return rotate(parts, first) if self.rotary and layer is not self.value else parts

    def _keys_values(self, x_BTSD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        return self._split(self.key, x_BTSD, first), self._split(self.value, x_BTSD, first)


def rotate(x: Tensor, first: int) -> Tensor:
    """RoPE: rotate pair (2j, 2j + 1) of x [..., T, d] by (first + t) * 10000^(-2j/d), in fp32.

    Computed with complex numbers, in one pass over memory. Under torch.compile it uses real numbers, because the
    compiler does not fuse complex ones.
    """
    T, d = x.shape[-2:]
    frequency = 10_000.0 ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angle = torch.arange(first, first + T, device=x.device, dtype=torch.float32)[:, None] * frequency
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), cos, sin = pairs.unbind(-1), angle.cos(), angle.sin()
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angle), angle))
    return rotated.flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """scaled_dot_product_attention.

    On the CPU it is written out as two batched products. A world model has very many very short sequences (16 frames or
    64 tokens), and torch 2.13's fused CPU backward is slow for them: 69 ms (space) and 121 ms (time), against 11 and
    13 ms, for 8 clips of 16 frames of 64 tokens, width 192, bf16, on 2 cores.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class SpaceTimeBlock(nn.Module):
    """Pre-norm block of a spatio-temporal transformer (Genie, arXiv 2402.15391): space, time, one MLP.

    Position n attends to positions <= n of its own segment, so its output depends on nothing later.
    """

    def __init__(self, width: int, head_width: int, mlp_ratio: int = 4, rotary: bool = False):
        super().__init__()
        self.space_norm, self.space = RMSNorm(width), SpaceAttention(width, head_width)
        self.time_norm, self.time = RMSNorm(width), TimeAttention(width, head_width, rotary)
        self.mlp_norm = RMSNorm(width)
        self.up = nn.Linear(width, mlp_ratio * width, bias=False)
        self.down = nn.Linear(mlp_ratio * width, width, bias=False)

    def forward(self, x_BTSD: Tensor, mask_B1TT: Tensor | None, cache: TimeCache | None = None) -> Tensor:
        x_BTSD = self._mix_space(x_BTSD)
        x_BTSD = x_BTSD + self.time(self.time_norm(x_BTSD), mask_B1TT, cache)
        return self._transform(x_BTSD)

    def append(self, x_BTSD: Tensor, seen_BTSD: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """The last element of the block over the sequence seen[:, 0], .., seen[:, n], x[:, n], for all n at once.

        The other elements do not depend on x: forward(seen) computes them, for a block that follows.
        """
        x_BTSD, seen_BTSD = self._mix_space(x_BTSD), self._mix_space(seen_BTSD)
        x_BTSD = x_BTSD + self.time.append(self.time_norm(x_BTSD), self.time_norm(seen_BTSD), mask_B1TT)
        return self._transform(x_BTSD)

    def _mix_space(self, x_BTSD: Tensor) -> Tensor:
        return x_BTSD + self.space(self.space_norm(x_BTSD))

    def _transform(self, x_BTSD: Tensor) -> Tensor:
        return x_BTSD + self.down(F.gelu(self.up(self.mlp_norm(x_BTSD))))


class Join(nn.Module):
    """Joins a hidden state and a frame embedding into one state, as DeepSeek-V3's multi-token prediction does."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 2 * width) * (2 * width) ** -0.5)
        self.hidden_norm_weight = nn.Parameter(torch.ones(width))
        self.embedding_norm_weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return mtp_combine(
            hidden,
            embedding,
            self.weight,
            hidden_norm_weight=self.hidden_norm_weight,
            embedding_norm_weight=self.embedding_norm_weight,
        )


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, queries, keys] bool: which positions each of the last `queries` of `keys` positions sees, itself too."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return (seen if window is None else seen.triu(keys - queries - window + 1))[None, None]


def time_mask(
    segment_ids: Tensor | None, positions: int, window: int | None = None, device: torch.device | None = None
) -> Tensor | None:
    """[B, 1, T, T] bool, True where position n (row) may attend to m (column): n - window < m <= n in the segment of n.

    None if m <= n is the only rule: scaled_dot_product_attention then needs no explicit mask.
    """
    if segment_ids is None:
        return (
            None
            if window is None or window >= positions
            else causal_mask(positions, positions, window, torch.device(device or "cpu"))
        )
    ids = segment_ids[:, :positions]
    same = (ids[:, :, None] == ids[:, None, :])[:, None]
    return same & causal_mask(positions, positions, window, ids.device)


def initialise(module: nn.Module, depth: int) -> None:
    """Normal weights of standard deviation fan_in^-0.5, divided by (3 * depth)^0.5 in the last layer of a branch."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            scale = (3 * depth) ** -0.5 if name.split(".")[-1] in ("out", "down") else 1.0
            nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def pool_grid(x_BTHWD: Tensor, pool: int) -> Tensor:
    """Average of pool x pool tokens."""
    if pool == 1:
        return x_BTHWD
    return x_BTHWD.unflatten(3, (-1, pool)).unflatten(2, (-1, pool)).mean(dim=(3, 5))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's dtype if it is enabled on the tensor's device, else the tensor's own."""
    device = tensor.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype
