"""mfwm encode: writes a replay buffer with a tokenizer's ids for frames, inferred codes for actions, or both.

Episodes, levels and their order are unchanged, so clip i of both sets has the same frames. The attributes `pixels`,
`tokenizer` and `latent_actions` say where frames and models are, so that evaluation can decode tokens to pictures. Two
digests identify these frames and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.place import absolute, overlap
from .data.replay import Replay
from .data.replay_writer import ReplayWriter
from .models.latent_actions import LatentActions
from .models.tokenizer import Tokenizer
from .progress import Progress
from .training.data_identity import PIXELS_DIGEST, TOKENIZER_DIGEST, digest, weights_digest
from .training.latent_actions import load_latent_actions
from .training.tokenizer import load_tokenizer, smaller

COPIED = ("env", "action_names", "noop", "action_repeat", "ticks_per_frame", "seed", "package", "package_version")
ABOUT_ACTIONS = ("action_names", "noop", "action_repeat")
PIECE = 64  # frames per forward pass


def encode(
    data: str | Path,
    out: str | Path,
    *,
    tokenizer: Path | None = None,
    low_tokenizers: Sequence[Path] = (),
    latent_actions: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the replay buffer `out` from the pixels of `data`.

    tokenizer: a run of train-tokenizer, whose ids replace the frames; without it frames are copied.
    low_tokenizers: runs of train-tokenizer with a factor each, whose ids of the smaller frames are written, too:
        targets of far horizons with token_targets "tokenised". Their vocabulary must be that of `tokenizer`.
    latent_actions: a run of train-latent-actions, whose codes replace the actions; without it actions are copied.
    overwrite: replace the replay buffer in `out` once the new one is complete.
    """
    if tokenizer is None and latent_actions is None:
        raise ValueError("give tokenizer, latent_actions or both: without them nothing would change")
    if low_tokenizers and tokenizer is None:
        raise ValueError("low_tokenizers must go with a tokenizer of the frames themselves, and none is given")
    if overlap(data, out):
        raise ValueError(
            f"out must be another place than data, which is read while out is written; got {out} and {data}"
        )
    replay = Replay(data)
    if replay.vocabulary:
        raise ValueError(f"data must be pixels, but {data} holds tokens")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attributes = {name: replay.attributes[name] for name in COPIED if name in replay.attributes}
    attributes |= {"pixels": str(absolute(data)), PIXELS_DIGEST: digest(replay)}
    tokens: Tokenizer | None = None
    codes: LatentActions | None = None
    height, width = replay.frame[1:]
    frame: dict[str, Any] = {"height": height, "width": width}
    actions: dict[str, Any] = {"actions": replay.actions}
    if not replay.actions:
        actions["action_size"] = replay.action.shape[1]
    low: dict[int, Tokenizer] = {}
    if tokenizer is not None:
        tokens, training, _ = load_tokenizer(tokenizer)
        tokens = tokens.to(device)
        if training.factor != 1:
            raise ValueError(
                f"tokenizer must be of the frames themselves; {tokenizer} is of frames smaller by {training.factor}: "
                "give it as one of low_tokenizers"
            )
        rows, columns = tokens.config.grid
        frame = {"height": rows, "width": columns, "vocabulary": tokens.config.vocabulary}
        attributes |= {"tokenizer": str(absolute(tokenizer)), TOKENIZER_DIGEST: weights_digest(tokens)}
        low = {factor: model.to(device) for factor, model in sorted(low_models(low_tokenizers, tokens).items())}
        if low:
            frame["low_factors"] = tuple(low)
            attributes["low_tokenizers"] = [str(absolute(path)) for path in low_tokenizers]
    if latent_actions is not None:
        codes = load_latent_actions(latent_actions)[0].to(device)
        actions = {"actions": codes.config.codes}
        attributes = {name: value for name, value in attributes.items() if name not in ABOUT_ACTIONS}
        attributes["latent_actions"] = str(absolute(latent_actions))

    # The state is that of the frames, whatever stands for them: positions stay in pixels of `data`.
    if has_state := bool(replay.state_names):
        attributes |= {name: replay.attributes[name] for name in ("state_names", "state_units")}
    writer = ReplayWriter(out, **frame, **actions, overwrite=overwrite, **attributes)
    episodes = zip(replay.episode_starts, replay.episode_ends, replay.episode_level, strict=True)
    bar = Progress("encode", replay.frames, "frame", shown=progress)
    with bar, writer:
        for begin, end, level in episodes:
            images = replay.read(np.arange(begin, end))
            video = torch.from_numpy(images).permute(0, 3, 1, 2)[None].to(device)
            action = replay.action[begin:end] if replay.action.ndim == 1 or replay.action.shape[1] else None
            if tokens is not None:
                images = in_pieces(tokens.encode, video, before=tokens.reach)[0].cpu().numpy()
            low_ids = {factor: encoded_small(video, factor, model) for factor, model in low.items()}
            if codes is not None:
                action = in_pieces(codes.infer, video, before=codes.reach, after=1)[0].cpu().numpy()
            state = replay.state[begin:end] if has_state else None
            writer.append(images, action, int(level), state=state, low_tokens=low_ids)
            bar.update(len(images))


def low_models(runs: Sequence[Path], tokens: Tokenizer) -> dict[int, Tokenizer]:
    """The tokenizers of smaller frames, by factor. ValueError where their ids do not fit beside those of `tokens`."""
    found: dict[int, Tokenizer] = {}
    for run in runs:
        model, training, _ = load_tokenizer(run)
        factor, grid = training.factor, model.config.grid
        if factor == 1 or factor in found:
            raise ValueError(f"low_tokenizers must be of one factor >= 2 each, got {factor} for {run}")
        expected = (tokens.config.vocabulary, tokens.config.grid)
        if (model.config.vocabulary, tuple(factor * side for side in grid)) != expected:
            raise ValueError(
                f"low_tokenizers must have the vocabulary of the tokenizer, {expected[0]}, and its grid {expected[1]} "
                f"divided by their factor; {run} has {model.config.vocabulary} and {grid} for {factor}"
            )
        found[factor] = model
    return found


def encoded_small(video: Tensor, factor: int, model: Tokenizer) -> np.ndarray:
    """[T, H / factor, W / factor]: the ids of the smaller frames of an episode [1, T, C, height, width]."""

    def ids(part: Tensor) -> Tensor:
        return model.encode(smaller(part, factor))

    return in_pieces(ids, video, before=model.reach)[0].cpu().numpy()


def in_pieces(function: Callable[[Tensor], Tensor], video: Tensor, *, before: int, after: int = 0) -> Tensor:
    """function(video) for a video of any length, in pieces: its output n depends on frames n - before .. n + after."""
    frames, parts = video.shape[1], []
    for begin in range(0, frames, PIECE):
        first, end = max(0, begin - before), min(frames, begin + PIECE)
        parts.append(function(video[:, first : end + after])[:, begin - first : end - first])
    return torch.cat(parts, dim=1)
