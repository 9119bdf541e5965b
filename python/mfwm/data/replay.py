"""Action-labelled video on disk and as training clips.

On disk: the Zarr replay buffer of the robot-learning field (diffusion-policy's `ReplayBuffer`), Zarr format 2:

    data/img             uint8 [N, H, W, 3], chunks of 64 frames; or, if frames are tokens of F ids each,
    data/tokens          integers [N, rows, columns] or [N, rows, columns, F], each in 0..vocabulary - 1
    data/tokens_2        integers [N, rows / 2, columns / 2(, F)]   optional: ids of the frames at half the size, from a
                         tokenizer of their own; likewise for other factors, which the attribute low_factors lists
    data/action          int64 [N] or float32 [N, A]; absent if the attribute action_size is 0 and actions null
    data/state           float32 [N, S]            optional: what the world's state was at each frame
    meta/episode_ends    int64 [E]                 cumulative: episode e is frames ends[e - 1] .. ends[e] - 1
    meta/episode_level   int64 [E]                 level seed if the environment has levels, else the episode index
    attributes           actions (null unless discrete), action_size, vocabulary (of tokens);
                         state_names, state_units (of the columns of data/state);
                         env, action_names, noop, action_repeat, ticks_per_frame, package, package_version;
                         field (of Atari: cropped to the playing field), recorded_from (of mfwm play: model or game)

The action convention, the field's own: `action[t]` is the action taken at frame t, and leads to frame t + 1. So a
hidden state at n, which has seen frames and actions up to n, has seen every action that frame n + 1 depends on.

In memory: B clips, T frames, H x W pixels, A numbers of a continuous action.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .check import (
    action_problems,
    chunk_problems,
    end_problems,
    integer_problems,
    layout_problems,
    length_problems,
    pixel_problems,
    raise_invalid,
    state_problems,
    token_problems,
    written_ends,
)
from .place import absolute, identity, location
from .stored import ACTION, ENDS, IMG, LEVELS, STATE, TOKENS, low_factors, low_name, open_stored, read_rows

# Names of the ids of smaller frames in clips begin with it; their factor follows.
LOW_TOKENS = "low_tokens_"
MEMORY_LIMIT = 4 << 30  # bytes of frames; sets up to this size are read into memory when they are opened


class Replay:
    """A replay buffer, opened read-only and checked.

    `video` uint8 [N, H, W, 3] or ids [N, rows, columns(, F)] (a NumPy array up to `memory_limit` bytes, else the Zarr
    array), `action` int64 [N] or float32 [N, A] (A = 0 in a set without actions), `episode_ends` and `episode_level`
    int64 [E], `actions` (number of discrete actions, or None), `vocabulary` (of tokens; 0 for pixels), `low_factors`
    (of the smaller frames whose ids the set has, too) and `attributes`.
    A set without levels has one level per episode. If a set does not state its number of discrete actions, it is one
    more than the largest action. Frames after the end of the last episode were left by an interrupted writer and are
    not part of the set: a warning says how many.

    `path` is a directory, or a URL that fsspec supports. ValueError names path, rule and value if the set breaks a rule
    of the layout (check.py has the rules). Reading raises ValueError for a chunk that is missing or damaged, and if
    another set has replaced this one since it was opened.
    """

    def __init__(self, path: str | Path, *, memory_limit: int = MEMORY_LIMIT) -> None:
        self.path = location(path)
        self._place = absolute(path)
        stored = open_stored(self._place)
        self._identity = stored.identity
        self.attributes: dict[str, Any] = stored.attributes
        raise_invalid(self.path, layout_problems(stored))
        arrays = stored.arrays
        self._name = IMG if IMG in arrays else TOKENS
        video, ends = arrays[self._name], arrays[ENDS]
        self.vocabulary: int = 0 if self._name == IMG else self.attributes["vocabulary"]

        self.episode_ends = written_ends(self._integers(ENDS, ends, ends.shape[0]))
        raise_invalid(self.path, end_problems(self.episode_ends, self._name, video.shape[0]))
        self.frames = int(self.episode_ends[-1])
        raise_invalid(self.path, chunk_problems(self._name, video, self.frames, read=False))
        self.episode_level = np.arange(self.episodes, dtype=np.int64)
        if LEVELS in arrays:
            self._check_rows(LEVELS, arrays[LEVELS], self.episodes, "episode")
            self.episode_level = self._integers(LEVELS, arrays[LEVELS], self.episodes)
        self.action = np.empty((self.frames, 0), np.float32)
        self.actions: int | None = None
        if ACTION in arrays:
            self._check_rows(ACTION, arrays[ACTION], self.frames, "frame")
            values = self._read(ACTION, arrays[ACTION], 0, self.frames)
            raise_invalid(self.path, action_problems(ACTION, values, self.attributes))
            self.action = values.astype(np.float32 if values.ndim == 2 else np.int64)
            if values.ndim == 1:
                self.actions = int(self.attributes.get("actions") or self.action.max() + 1)
        self.state_names: list[str] = self.attributes.get("state_names") or []
        self._state = arrays.get(STATE)
        if self._state is not None:
            self._check_rows(STATE, self._state, self.frames, "frame")
        # diffusion-policy's own sets have float32 frames that are integers in 0..255.
        self._dtype = np.dtype(np.uint8) if self._name == IMG else video.dtype.newbyteorder("=")
        self.in_memory = self.frames * self._dtype.itemsize * int(np.prod(video.shape[1:])) <= memory_limit
        self.video: Any = video
        if self.in_memory:
            self.video = self._frames(self._name, video, 0, self.frames)
        self.low_factors = tuple(low_factors(self.attributes))
        self._low: dict[int, Any] = {}
        for factor in self.low_factors:
            name = low_name(factor)
            self._check_rows(name, arrays[name], self.frames, "frame")
            low = arrays[name]
            self._low[factor] = self._frames(name, low, 0, self.frames) if self.in_memory else low

    def _check_rows(self, name: str, array: Any, rows: int, of: str) -> None:
        """Check that the array has its first `rows` rows, one per frame or episode."""
        raise_invalid(self.path, length_problems(name, array, rows, of))
        raise_invalid(self.path, chunk_problems(name, array, rows, read=False))

    def _integers(self, name: str, array: Any, rows: int) -> np.ndarray:
        values = self._read(name, array, 0, rows)
        raise_invalid(self.path, integer_problems(name, values))
        return values.astype(np.int64)

    def _read(self, name: str, array: Any, begin: int, end: int) -> np.ndarray:
        try:
            values = read_rows(name, array, begin, end)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if identity(self._place) != self._identity:
            raise ValueError(f"{self.path} has been replaced or removed since it was opened")
        return values

    def _frames(self, name: str, array: Any, begin: int, end: int) -> np.ndarray:
        frames = self._read(name, array, begin, end)
        if self.vocabulary:
            raise_invalid(self.path, token_problems(name, frames, self.vocabulary, begin))
        elif frames.dtype.kind == "f":
            raise_invalid(self.path, pixel_problems(name, frames, begin))
        return frames.astype(self._dtype if name == self._name else np.int32, copy=False)

    @cached_property
    def state(self) -> np.ndarray:
        """The state at each frame, float32 [N, S], with the columns `state_names`; S is 0 in a set without state.

        NaN marks an object that does not exist or is not visible. The state is read from disk on first access.
        """
        if self._state is None:
            return np.empty((self.frames, 0), np.float32)
        values = self._read(STATE, self._state, 0, self.frames)
        raise_invalid(self.path, state_problems(STATE, values))
        return values.astype(np.float32, copy=False)

    @property
    def episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def frame(self) -> tuple[int, int, int]:
        """(channels, height, width) of pixels, or (ids per token, rows, columns), as in WorldModelConfig.frame."""
        _, height, width, *rest = self.video.shape
        return (rest[0] if rest else 1, height, width)

    @property
    def episode_starts(self) -> np.ndarray:
        """The first frame of every episode, int64 [E]."""
        return np.concatenate([np.zeros(1, np.int64), self.episode_ends[:-1]])

    @property
    def episode_lengths(self) -> np.ndarray:
        """The number of frames of every episode, int64 [E]."""
        return np.diff(self.episode_ends, prepend=0)

    def read(self, frames: np.ndarray) -> np.ndarray:
        """The frames with these numbers, an integer array of any shape: uint8 [*frames.shape, H, W, 3], or ids."""
        return self._chosen(self._name, self.video, frames)

    def read_low(self, factor: int, frames: np.ndarray) -> np.ndarray:
        """The ids of the smaller frames with these numbers, for a factor of `low_factors`."""
        return self._chosen(low_name(factor), self._low[factor], frames)

    def _chosen(self, name: str, array: Any, frames: np.ndarray) -> np.ndarray:
        if self.in_memory:
            return array[frames]
        flat = frames.reshape(-1)
        out = np.empty((len(flat), *array.shape[1:]), self._dtype if name == self._name else np.int32)
        # Read runs of consecutive frames, because each touches few chunks.
        borders = [0, *(np.flatnonzero(np.diff(flat) != 1) + 1).tolist(), len(flat)]
        for begin, end in itertools.pairwise(borders):
            if end > begin:
                first = int(flat[begin])
                out[begin:end] = self._frames(name, array, first, first + end - begin)
        return out.reshape(*frames.shape, *array.shape[1:])


def split_levels(replay: Replay, held_out_fraction: float = 0.1, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Episode numbers for training and for validation, int64 each, split by level.

    round(held_out_fraction * L) of the set's L levels, but at least one, are held out, drawn with `seed`. All their
    episodes are for validation and none for training. ValueError if either side would be empty.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be between 0 and 1, got {held_out_fraction}")
    levels = np.unique(replay.episode_level)
    held_out = max(1, round(held_out_fraction * len(levels)))
    if held_out >= len(levels):
        raise ValueError(
            f"{replay.path}: held_out_fraction = {held_out_fraction} of {len(levels)} levels leaves none to train on; "
            "collect more levels or hold out less"
        )
    chosen = np.random.default_rng(seed).permutation(levels)[:held_out]
    validation = np.isin(replay.episode_level, chosen)
    return np.flatnonzero(~validation), np.flatnonzero(validation)


class Clips(Dataset[dict[str, Tensor]]):
    """Every clip of `length` consecutive frames of a replay buffer, or of some of its `episodes`, by its first frame.

    The chosen episodes are concatenated, and a clip starts at any frame, so that episodes shorter than a clip are used
    too: a clip may span episodes, and `segment_ids` tell which frames belong together. With `within_episode`, only
    clips that lie in one episode count, as closed-loop evaluation needs them.

    An item is {"video": uint8 [T, 3, H, W], a permuted view of [T, H, W, 3] memory, or ids int64 [T, rows, columns] or
    [T, rows, columns, F]; "actions": int64 [T] or float32 [T, A], where actions[t] was taken at frame t; "segment_ids":
    int64 [T], the episode's number in the replay buffer}; with `state`, also "state": float32 [T, S]; in a set that has
    them, the ids of smaller frames, "low_tokens_2": int64 [T, rows / 2, columns / 2(, F)] and so on.

    `too_short` is the number of chosen episodes that are shorter than a clip.
    """

    def __init__(
        self,
        replay: Replay,
        length: int,
        *,
        episodes: Sequence[int] | np.ndarray | None = None,
        within_episode: bool = False,
        state: bool = False,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1 frame, got {length}")
        if state and not replay.state_names:
            raise ValueError(f"{replay.path}: state = True needs a set with {STATE}, and this one has none")
        chosen = np.arange(replay.episodes) if episodes is None else np.unique(np.asarray(episodes, np.int64))
        if len(chosen) == 0 or chosen[0] < 0 or chosen[-1] >= replay.episodes:
            raise ValueError(f"episodes must be numbers in 0..{replay.episodes - 1}, at least one, got {episodes}")
        self.replay = replay
        self.length = length
        # Read here, and not by the first of several threads.
        self.state = replay.state if state else None
        lengths = replay.episode_lengths[chosen]
        # By position in the concatenated episodes: the episode number, and the frame number.
        self.segment_ids = np.repeat(chosen, lengths)
        positions = np.cumsum(lengths) - lengths
        self.frames = np.arange(lengths.sum()) + np.repeat(replay.episode_starts[chosen] - positions, lengths)
        self.too_short = int((lengths < length).sum())
        starts = np.arange(max(0, len(self.frames) - length + 1))
        if within_episode:
            starts = starts[self.segment_ids[starts] == self.segment_ids[starts + length - 1]]
        if len(starts) == 0:
            what = "the longest episode" if within_episode else "all episodes together"
            have = int(lengths.max() if within_episode else lengths.sum())
            raise ValueError(f"{replay.path}: length = {length} frames is more than {what} ({have} frames)")
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The clips with these B numbers, stacked: video uint8 [B, T, 3, H, W] or ids, actions, segment_ids [B, T];
        with `state`, also state [B, T, S]."""
        positions_BT = self.starts[indices][:, None] + np.arange(self.length)
        frames_BT = self.frames[positions_BT]
        video = torch.from_numpy(self.replay.read(frames_BT))
        clips = {
            "video": video.long() if self.replay.vocabulary else video.permute(0, 1, 4, 2, 3),
            "actions": torch.from_numpy(self.replay.action[frames_BT]),
            "segment_ids": torch.from_numpy(self.segment_ids[positions_BT]),
        }
        if self.state is not None:
            clips["state"] = torch.from_numpy(self.state[frames_BT])
        for factor in self.replay.low_factors:
            clips[f"{LOW_TOKENS}{factor}"] = torch.from_numpy(self.replay.read_low(factor, frames_BT)).long()
        return clips


def low_tokens(clips: dict[str, Tensor]) -> dict[int, Tensor]:
    """The ids of smaller frames that clips hold, by factor."""
    return {int(name.removeprefix(LOW_TOKENS)): ids for name, ids in clips.items() if name.startswith(LOW_TOKENS)}


class ClipSampler:
    """Random batches of clips. `batch(step)` depends only on (seed, step), so that a run can be resumed exactly.

    Clips are drawn uniformly with replacement. `episodes`, `within_episode` and `state` as in `Clips`. With
    `part=(i, n)`, `batch` returns the i-th of n equal parts of the batch, for the i-th of n processes.
    """

    def __init__(
        self,
        replay: Replay,
        clip_length: int,
        batch_size: int,
        seed: int = 0,
        *,
        episodes: Sequence[int] | np.ndarray | None = None,
        within_episode: bool = False,
        part: tuple[int, int] = (0, 1),
        state: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.clips = Clips(replay, clip_length, episodes=episodes, within_episode=within_episode, state=state)
        self.batch_size = batch_size
        rank, count = part
        if not 0 <= rank < count or batch_size % count:
            raise ValueError(f"part = ({rank}, {count}) must be one of n equal parts of a batch of {batch_size}")
        self.seed = seed
        self.rows = slice(rank * batch_size // count, (rank + 1) * batch_size // count)

    def batch(self, step: int) -> dict[str, Tensor]:
        """{"video": uint8 [B, T, 3, H, W] or ids, "actions": [B, T] or [B, T, A], "segment_ids": int64 [B, T]}; with
        `state`, also "state": float32 [B, T, S]."""
        return self.clips.batch(self._indices(step)[self.rows])

    def _indices(self, step: int) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        draw = np.random.default_rng((self.seed, step))
        return draw.integers(len(self.clips), size=self.batch_size)

    def batches(self, first_step: int, last_step: int, workers: int = 1) -> Iterator[dict[str, Tensor]]:
        """`batch(step)` for first_step <= step < last_step, in order; `workers` threads read ahead, two batches each.

        An error in a thread, such as a damaged chunk, is raised when its batch is due.
        """
        if workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        readers = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="clips")
        ahead: deque[Future[dict[str, Tensor]]] = deque()
        try:
            for step in range(first_step, last_step):
                ahead.append(readers.submit(self.batch, step))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            readers.shutdown(cancel_futures=True)
