"""RasterDecoder: the tokens of a frame one after another, each given those before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import RMSNorm, TimeAttention, TimeCache, initialise
from .maskgit import sample


class RasterDecoder(nn.Module):
    """A causal decoder over the tokens of a frame in raster order (VideoGPT, arXiv 2104.10157).

        x_s = state_s + embed(ids of token s - 1), or a learned start for s = 0
        output_s = norm(blocks(x)_s), of blocks in which token s attends to tokens <= s
        p(frame) = product over s of softmax(head(output_s))[ids of token s]

    Where a token has several ids, these are independent given the tokens before it.

    Args:
        width: D. blocks: how many. head_width: even, and a divisor of width.
        vocabulary, ids_per_token: of the tokens.
    """

    def __init__(self, width: int, blocks: int, head_width: int, vocabulary: int, ids_per_token: int):
        super().__init__()
        self.vocabulary, self.ids_per_token = vocabulary, ids_per_token
        self.embed = nn.Embedding(ids_per_token * vocabulary, width)
        self.start = nn.Parameter(0.1 * torch.randn(width))
        self.blocks = nn.ModuleList(CausalBlock(width, head_width) for _ in range(blocks))
        self.norm = RMSNorm(width)
        initialise(self.blocks, depth=blocks)

    def forward(self, state_BTHWD: Tensor, ids: Tensor) -> Tensor:
        """Outputs [B, T, H, W, D] for the true ids [B, T, H, W(, ids_per_token)] of the frames predicted."""
        ids_NSF = ids.reshape(state_BTHWD.shape[:2].numel(), state_BTHWD.shape[2:4].numel(), self.ids_per_token)
        states = state_BTHWD.flatten(2, 3).flatten(0, 1)
        before = F.pad(self._embedded(ids_NSF[:, :-1]), (0, 0, 1, 0))
        before = before + F.pad(self.start[None, None], (0, 0, 0, before.shape[1] - 1))
        x_NS1D = (states + before.to(states.dtype)).unsqueeze(2)
        for block in self.blocks:
            x_NS1D = block(x_NS1D)
        return self.norm(x_NS1D).view(state_BTHWD.shape)

    def sample(
        self,
        state_BTHWD: Tensor,
        head: Callable[[Tensor], Tensor],
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ids [B, T, H, W, F] drawn one token after another, and the logits [B, T, H, W, F, V] of each.

        head: from outputs [..., D] to logits [..., F * V]. The keys and values of earlier tokens are cached.
        """
        states = state_BTHWD.flatten(2, 3).flatten(0, 1)
        caches = [TimeCache(states.shape[1]) for _ in self.blocks]
        before, ids, logits = self.start.expand(len(states), -1), [], []
        for token in range(states.shape[1]):
            x_N11D = (states[:, token] + before.to(states.dtype))[:, None, None]
            for block, cache in zip(self.blocks, caches, strict=True):
                x_N11D = block(x_N11D, cache)
            scores = head(self.norm(x_N11D)[:, 0, 0]).float().unflatten(-1, (self.ids_per_token, self.vocabulary))
            ids.append(sample(scores, temperature, top_k, generator))
            logits.append(scores)
            before = self._embedded(ids[-1])
        size = state_BTHWD.shape[:4]
        return torch.stack(ids, 1).view(*size, -1), torch.stack(logits, 1).view(*size, *logits[0].shape[1:])

    def _embedded(self, ids: Tensor) -> Tensor:
        """[..., D] of ids [..., F]; zero for ignored ids, and for ids out of range, which the loss refuses."""
        rows = ids + self.vocabulary * torch.arange(self.ids_per_token, device=ids.device)
        known = (ids >= 0) & (ids < self.vocabulary)
        return (self.embed(torch.where(known, rows, 0)) * known[..., None]).sum(-2)


class CausalBlock(nn.Module):
    """Pre-norm transformer block over sequences [N, S, 1, D]: token s attends to tokens <= s, by rotary positions."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.norm, self.attention = RMSNorm(width), TimeAttention(width, head_width, rotary=True)
        self.mlp_norm = RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_NS1D: Tensor, cache: TimeCache | None = None) -> Tensor:
        """With a cache, x holds the tokens that follow those in it."""
        x_NS1D = x_NS1D + self.attention(self.norm(x_NS1D), None, cache)
        return x_NS1D + self.down(F.gelu(self.up(self.mlp_norm(x_NS1D))))
