"""What every evaluation of a run does: draw clips of its held-out levels, and write metrics.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.replay import Clips, Replay, split_levels
from ..training.checkpoints import write_atomically
from ..training.data_identity import open_data
from ..training.json_values import as_json, finite
from ..training.trainer import TrainerConfig


class HeldOut:
    """`count` clips of `length` frames from the levels that a run held out, or all of them if there are fewer.

    With `most`, they are as long as at least half of the held-out episodes allow, but `length` frames at least and
    `most` at most, unless `length` is more.

    Args:
        config: of the run.
        digest: of the data set that the run was trained on; None in runs that have none.
        data: where that data set is, if it was moved.
        draw: chooses the clips.
        within_episode: only clips that lie in one episode.
    """

    def __init__(
        self,
        config: TrainerConfig,
        digest: str | None,
        data: str | Path | None,
        *,
        length: int,
        count: int,
        draw: np.random.Generator,
        most: int = 0,
        within_episode: bool = True,
    ) -> None:
        self.replay = open_data(config.data, digest, data)
        self.trained, self.episodes = split_levels(self.replay, config.held_out, seed=config.seed)
        length = clip_length(self.replay, self.episodes, length, most)
        self.clips = Clips(self.replay, length, episodes=self.episodes, within_episode=within_episode)
        # Numbers of clips in `clips`.
        self.chosen = draw.choice(len(self.clips), size=min(count, len(self.clips)), replace=False)

    def batches(self, size: int) -> list[np.ndarray]:
        """The numbers of the chosen clips, `size` at a time, each batch in the order of the data set."""
        return [np.sort(self.chosen[start : start + size]) for start in range(0, len(self.chosen), size)]

    def read(self, batch: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in self.clips.batch(batch).items()}

    def frames(self, batch: np.ndarray) -> np.ndarray:
        """[B, T]: the numbers of the frames of these clips in the data set."""
        return self.clips.frames[self.clips.starts[batch][:, None] + np.arange(self.clips.length)]

    def summary(self) -> dict[str, int]:
        """How many clips and levels were measured."""
        return {
            "clips": len(self.chosen),
            "held_out_levels": len(np.unique(self.replay.episode_level[self.episodes])),
        }


def clip_length(replay: Replay, episodes: np.ndarray, length: int, most: int) -> int:
    """`length` frames, or up to `most` where at least half of the episodes have them."""
    # Of 5 episodes the length of the third longest.
    lengths = np.sort(replay.episode_lengths[episodes])
    return max(length, min(most, int(lengths[len(lengths) // 2])))


def device_for_evaluation() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_metrics(run: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write metrics.json into the run. Returns the metrics, with None for those that are undefined."""
    write_atomically(run / "metrics.json", as_json(metrics, indent=2).encode())
    return finite(metrics)
