"""Evaluation of tokens: how well they are predicted, and the pictures that they decode to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.replay import Clips, Replay, low_tokens
from ..metrics.intervals import interval
from ..models.world_model import WorldModel, WorldModelConfig
from ..training.data_identity import PIXELS_DIGEST, TOKENIZER_DIGEST, digest, weights_digest
from ..training.tokenizer import load_tokenizer

# Tokens are sampled from that many most likely ones.
TOP_K = 8


class Decoder:
    """Decodes tokens of a set that mfwm encode wrote, by the tokenizer that encoded it, and reads the original frames.

    length, episodes: of the clips, which lie in one episode, as in Clips. pixels, tokenizer: where frames and tokenizer
    are, if not where the set says. ValueError if they are not the ones that the set was encoded from.
    """

    def __init__(
        self,
        replay: Replay,
        length: int,
        episodes: np.ndarray,
        device: torch.device,
        *,
        pixels: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> None:
        def path_of(name: str, given: str | Path | None) -> str | Path:
            path = replay.attributes.get(name) if given is None else given
            if not isinstance(path, str | Path):
                raise ValueError(f"{replay.path}: attribute {name} must be a path, got {path!r}")
            return path

        try:
            frames = Replay(path_of("pixels", pixels))
            self.tokenizer = load_tokenizer(Path(path_of("tokenizer", tokenizer)))[0].to(device)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"the frames and the tokenizer of {replay.path} must be where its attributes say, or be given as "
                f"pixels and tokenizer: {error}"
            ) from error
        if not np.array_equal(frames.episode_ends, replay.episode_ends):
            raise ValueError(f"{replay.path} was not encoded from {frames.path}: their episodes differ")
        config = self.tokenizer.config
        if (config.vocabulary, config.grid, config.frame) != (replay.vocabulary, replay.frame[1:], frames.frame):
            raise ValueError(
                f"{replay.path} was not encoded by this tokenizer, which has {config.vocabulary} ids on a grid "
                f"{config.grid} for frames {config.frame}; the set has {replay.vocabulary} on {replay.frame[1:]} for "
                f"{frames.frame}"
            )
        # A set without digests is accepted.
        if replay.attributes.get(PIXELS_DIGEST) not in (None, digest(frames)):
            raise ValueError(
                f"pixels must be the set that {replay.path} was encoded from; {frames.path} holds another one"
            )
        if replay.attributes.get(TOKENIZER_DIGEST) not in (None, weights_digest(self.tokenizer)):
            raise ValueError(
                f"tokenizer must be the run that encoded {replay.path}, as it was then; "
                f"{path_of('tokenizer', tokenizer)} has other weights"
            )
        self.clips = Clips(frames, length, episodes=episodes, within_episode=True)

    def pixels(self, indices: np.ndarray) -> Tensor:
        """uint8 [B, T, C, height, width]: the frames of the clips with these numbers."""
        return self.clips.batch(indices)["video"]

    def pictures(self, ids: Tensor, first: int) -> Tensor:
        """The frames [B, T - first, C, height, width] from number `first` on, decoded from ids [B, T, H, W]."""
        return self.tokenizer.decode(ids)[:, first:]


def check_tokens(config: WorldModelConfig, *, pixels: str | Path | None, tokenizer: str | Path | None) -> None:
    """ValueError if a run on pixels is given paths that only a run on tokens uses."""
    for name, given in (("pixels", pixels), ("tokenizer", tokenizer)):
        if given is not None and config.heads.output == "pixels":
            raise ValueError(f"{name} is for runs on tokens, and this run is on pixels; got {given}")


def decoder_of(
    replay: Replay,
    length: int,
    episodes: np.ndarray,
    device: torch.device,
    *,
    pixels: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Decoder | None:
    """The decoder of a set; None if its tokens come from another tokenizer, as imported ones do."""
    if "tokenizer" not in replay.attributes:
        for name, given in (("pixels", pixels), ("tokenizer", tokenizer)):
            if given is not None:
                raise ValueError(
                    f"{name} is for sets that mfwm encode wrote, and {replay.path} is not one; got {given}"
                )
        return None
    return Decoder(replay, length, episodes, device, pixels=pixels, tokenizer=tokenizer)


def token_measures(model: WorldModel, clips: dict[str, Tensor], shuffled: Tensor) -> dict[str, np.ndarray]:
    """Measures [clips, K] of every horizon of a model that is not masked, over the positions that count and their ids.

    Of targets that were tokenised on their own, the ids are those of the smaller frames.
    bits: -log2 of the probability that a cell gives to an id it covers. Where cells are tokens, that is the joint
    likelihood of the frame, per token: with heads.raster each token is given the true ones before it, and else they are
    independent. bits_shuffled: with the `shuffled` actions.
    hits: share of ids that are the most likely of their cell, with heads.raster after the most likely ones before it.
    hits_persistence: share of ids that do not change.
    """
    horizons = model.config.heads.horizons

    def of_ids(given: Tensor, end: int) -> Tensor:
        """[B, end, H / f, W / f, 1, 1, F, V]."""
        scores = given[:, :end].unsqueeze(-2) if model.config.frame[0] == 1 else given[:, :end]
        return scores[:, :, :, :, None, None]

    low = low_tokens(clips) if model.config.heads.token_targets == "tokenised" else {}
    found: dict[str, list[Tensor]] = {name: [] for name in ("bits", "bits_shuffled", "hits", "hits_persistence")}
    with torch.no_grad():
        outputs, outputs_shuffled = (
            model.outputs(clips["video"], actions, clips["segment_ids"]) for actions in (clips["actions"], shuffled)
        )
        logits, logits_shuffled = (model.heads.logits(given, clips["video"]) for given in (outputs, outputs_shuffled))
        greedy = logits if model.heads.decoder is None else model.heads.frames(outputs, clips["video"])
    for i, (offset, factor) in enumerate(zip(horizons.offsets, horizons.factors, strict=True)):
        # A smaller frame that was tokenised on its own has an id per cell.
        ids, factor = (low[factor], 1) if factor in low else (clips["video"], factor)
        ids = ids.unsqueeze(-1) if model.config.frame[0] == 1 else ids
        end = min(logits[i].shape[1], ids.shape[1] - offset)
        truth, before = ids[:, offset : offset + end], ids[:, :end]
        # [B, T, H / f, W / f, f, f, F], beside the logits' [B, T, H / f, W / f, (F,) V].
        cells = truth.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).transpose(3, 4)
        for name, given in (("bits", logits[i]), ("bits_shuffled", logits_shuffled[i])):
            log_probabilities = of_ids(given, end).log_softmax(-1).expand(*cells.shape, -1)
            chosen = log_probabilities.gather(-1, cells[..., None])[..., 0]
            found[name].append(-chosen.flatten(1).mean(1) / np.log(2))
        hits = (of_ids(greedy[i], end).argmax(-1) == cells).float()
        found["hits"].append(hits.flatten(1).mean(1))
        found["hits_persistence"].append((truth == before).float().flatten(1).mean(1))
    return {name: torch.stack(columns, 1).cpu().numpy() for name, columns in found.items()}


def token_summary(
    measures: dict[str, np.ndarray], names: Sequence[str], seed: int, *, controlled: bool
) -> dict[str, Any]:
    """Metrics of token_measures with 95% intervals; those with shuffled actions only if the model has actions.

    accuracy_gain_95 is the interval of the gain over persistence, bits_per_token_for_actions_95 that of the increase
    from true to shuffled actions.
    """
    labels = {"bits": "bits_per_token", "hits": "accuracy", "hits_persistence": "persistence_accuracy"}
    if controlled:
        labels["bits_shuffled"] = "bits_per_token_shuffled_actions"

    def by_horizon(values: list[Any]) -> dict[str, Any]:
        return dict(zip(names, values, strict=True))

    metrics = {label: by_horizon(measures[name].mean(0).tolist()) for name, label in labels.items()}
    metrics["bits_per_token_95"] = by_horizon(interval(seed, np.asarray, measures["bits"]))
    metrics["accuracy_gain_95"] = by_horizon(
        interval(seed, np.subtract, measures["hits"], measures["hits_persistence"])
    )
    if controlled:
        gain = interval(seed, np.subtract, measures["bits_shuffled"], measures["bits"])
        metrics["bits_per_token_for_actions_95"] = by_horizon(gain)
    return metrics
