"""Action-labelled video on disk and as training clips.

On disk: the Zarr replay buffer of the robot-learning field (diffusion-policy's `ReplayBuffer`), Zarr format 2:

    data/img             uint8 [N, H, W, 3]        chunks of 64 frames
    data/action          int64 [N] or float32 [N, A]
    meta/episode_ends    int64 [E]                 cumulative: episode e is frames ends[e - 1] to ends[e]
    meta/episode_level   int64 [E]                 level seed where the environment has levels, else the episode index
    attributes           env, actions, action_names, noop, action_repeat, ticks_per_frame, package, package_version

THE ACTION CONVENTION, the field's own: `action[t]` is the action taken AT frame t, and leads to frame t + 1. A hidden
state at n, which has seen the frames and actions up to n, so knows all that frame n + 1 needs.

In memory: B clips, T frames, H x W pixels, A numbers of a continuous action.
"""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs import Blosc
from torch import Tensor
from torch.utils.data import Dataset

CHUNK_FRAMES = 64
MEMORY_LIMIT = 4 << 30  # bytes of frames; a smaller set is read into memory when it is opened


class ReplayWriter:
    """Writes a replay buffer, one `append` per episode.

    `actions` is the number of discrete actions, or None for continuous ones of `action_size` numbers. `attributes`
    are kept with the set; the names that readers know stand in the module's docstring.

    Safe against a crash: an episode's end is written after its frames, and a reader trusts only the ends.
    FileExistsError where `path` holds anything, unless `overwrite`; and with it, ValueError where what it holds is no
    Zarr group, since deleting that would cost somebody else's files.
    """

    def __init__(
        self,
        path: str | Path,
        height: int,
        width: int,
        *,
        actions: int | None,
        action_size: int = 0,
        overwrite: bool = False,
        **attributes: Any,
    ) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be at least 1, got {height} x {width}")
        if (actions is None) == (action_size == 0) or (actions or action_size) < 1:
            raise ValueError(
                "give either actions >= 1 (discrete) or actions=None and action_size >= 1 (continuous), "
                f"got actions={actions}, action_size={action_size}"
            )
        self.path = Path(path)
        self.actions = actions
        make_room(self.path, overwrite=overwrite)

        root = zarr.open_group(str(self.path), mode="w", zarr_format=2)
        root.attrs.update({"actions": actions, **attributes})
        # Format 2, because diffusion-policy and its descendants pin zarr 2; zarr 3 reads both.
        compressor = Blosc(cname="zstd", clevel=3)
        data, meta = root.create_group("data"), root.create_group("meta")
        action_shape, action_type = ((0,), "int64") if actions else ((0, action_size), "float32")
        arrays: list[tuple[Any, str, tuple[int, ...], int, str]] = [
            (data, "img", (0, height, width, 3), CHUNK_FRAMES, "uint8"),
            (data, "action", action_shape, 4096, action_type),
            (meta, "episode_ends", (0,), 4096, "int64"),
            (meta, "episode_level", (0,), 4096, "int64"),
        ]
        self._arrays = {
            name: group.create_array(
                name, shape=shape, chunks=(chunk, *shape[1:]), dtype=dtype, compressors=compressor, fill_value=0
            )
            for group, name, shape, chunk, dtype in arrays
        }
        self.frames = 0
        self.episodes = 0

    def append(self, img: np.ndarray, action: np.ndarray, level: int | None = None) -> None:
        """One episode: `img` uint8 [T, H, W, 3], `action` integers [T] or floats [T, A], with
        `action[t]` taken at `img[t]`.

        Two calls are two episodes, also where both are fragments of one. `level=None` takes the episode's index.
        """
        action = np.asarray(action)
        want = (*img.shape[:1], *self._arrays["img"].shape[1:])
        if img.dtype != np.uint8 or img.shape != want or len(img) == 0:
            raise ValueError(f"img must be uint8 {['T >= 1', *want[1:]]}, got {img.dtype} {list(img.shape)}")
        want = (len(img), *self._arrays["action"].shape[1:])
        if action.shape != want or action.dtype.kind not in ("iu" if self.actions else "f"):
            kind = "integers" if self.actions else "floats"
            raise ValueError(
                f"action must be {kind} {list(want)} for this set, got {action.dtype} {list(action.shape)}"
            )
        if self.actions and not 0 <= action.min() <= action.max() < self.actions:
            raise ValueError(f"action must be in 0..{self.actions - 1}, got {action.min()}..{action.max()}")
        self._arrays["img"].append(img)
        self._arrays["action"].append(action.astype(self._arrays["action"].dtype))
        self._arrays["episode_level"].append(np.array([self.episodes if level is None else level], np.int64))
        self._arrays["episode_ends"].append(np.array([self.frames + len(img)], np.int64))
        self.frames += len(img)
        self.episodes += 1


def make_room(path: Path, *, overwrite: bool) -> None:
    """Raise where `path` holds anything; with `overwrite` delete it first, if it is a Zarr group."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} is not empty: choose another directory, or say overwrite to delete what it holds"
        )
    if not path.is_dir() or not any((path / name).is_file() for name in (".zgroup", "zarr.json")):
        raise ValueError(f"{path} is not empty and no Zarr group, so overwrite does not delete it: remove it yourself")
    shutil.rmtree(path)


class Replay:
    """A replay buffer, opened read-only and checked.

    `img` uint8 [N, H, W, 3] (a NumPy array up to `memory_limit` bytes, else the Zarr array), `action` int64 [N] or
    float32 [N, A], `episode_ends` and `episode_level` int64 [E], `actions` (number of discrete actions, or None) and
    `attributes`. A set without levels has one level per episode; one that does not say how many actions there are has
    as many as its largest action asks for. Frames after the last episode's end were left by an interrupted writer and
    are not part of the set: a warning says how many.

    ValueError names path, rule and value where the set breaks the layout.
    """

    def __init__(self, path: str | Path, *, memory_limit: int = MEMORY_LIMIT) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ValueError(f"{self.path} does not exist: expected a Zarr replay buffer")
        try:
            root = zarr.open_group(str(self.path), mode="r")
        except (OSError, KeyError, ValueError) as error:  # FileNotFoundError and zarr's own errors are among these
            raise ValueError(f"{self.path} is not a Zarr group: {error}") from error
        self.attributes: dict[str, Any] = dict(root.attrs)
        img = self._array(root, "data/img")
        if img.dtype != np.uint8 or img.ndim != 4 or img.shape[3] != 3:
            raise ValueError(f"{self.path}: data/img must be uint8 [N, H, W, 3], got {img.dtype} {list(img.shape)}")

        self.episode_ends = self._ends(root, img.shape[0])
        self.frames = int(self.episode_ends[-1])
        if img.shape[0] > self.frames:
            surplus = img.shape[0] - self.frames
            warnings.warn(f"{self.path}: {surplus} frames after the last episode's end are left out", stacklevel=2)
        self.episode_level = self._levels(root)
        self.action = self._actions(root)
        self.actions = self._action_count()
        self.in_memory = self.frames * int(np.prod(img.shape[1:])) <= memory_limit
        self.img: Any = img[: self.frames] if self.in_memory else img

    @property
    def episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def height(self) -> int:
        return int(self.img.shape[1])

    @property
    def width(self) -> int:
        return int(self.img.shape[2])

    @property
    def episode_starts(self) -> np.ndarray:
        """int64 [E], the first frame of every episode."""
        return np.concatenate([np.zeros(1, np.int64), self.episode_ends[:-1]])

    @property
    def episode_lengths(self) -> np.ndarray:
        """int64 [E], in frames."""
        return np.diff(self.episode_ends, prepend=0)

    def read(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [*frames.shape, H, W, 3] for integer frame numbers of any shape."""
        if self.in_memory:
            return self.img[frames]
        flat = frames.reshape(-1)
        out = np.empty((len(flat), *self.img.shape[1:]), np.uint8)
        # Runs of consecutive frames, each of which touches few chunks.
        borders = [0, *(np.flatnonzero(np.diff(flat) != 1) + 1).tolist(), len(flat)]
        for begin, end in itertools.pairwise(borders):
            if end > begin:
                out[begin:end] = self.img[int(flat[begin]) : int(flat[begin]) + end - begin]
        return out.reshape(*frames.shape, *self.img.shape[1:])

    def _array(self, root: zarr.Group, name: str) -> Any:
        found = root.get(name)
        if not isinstance(found, zarr.Array):
            raise ValueError(
                f"{self.path}: array {name} is missing; a replay buffer has data/img, data/action, meta/episode_ends"
            )
        return found

    def _ends(self, root: zarr.Group, frames: int) -> np.ndarray:
        array = self._array(root, "meta/episode_ends")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: meta/episode_ends must be integers [E], got {array.dtype} {list(array.shape)}"
            )
        ends = np.asarray(array[:], np.int64)
        # An array grows before it is written: a 0 at the back is an episode whose end a crash kept from the disk.
        while len(ends) and ends[-1] == 0:
            ends = ends[:-1]
        if len(ends) == 0:
            raise ValueError(f"{self.path}: meta/episode_ends must hold at least one episode, got none")
        lengths = np.diff(ends, prepend=0)
        if (lengths <= 0).any():
            worst = int(np.flatnonzero(lengths <= 0)[0])
            before = int(ends[worst - 1]) if worst else 0
            raise ValueError(
                f"{self.path}: meta/episode_ends must increase, got {int(ends[worst])} after {before}, episode {worst}"
            )
        if ends[-1] > frames:
            raise ValueError(
                f"{self.path}: meta/episode_ends ends at {int(ends[-1])}, but data/img has {frames} frames"
            )
        return ends

    def _levels(self, root: zarr.Group) -> np.ndarray:
        if "meta/episode_level" not in root:
            return np.arange(self.episodes, dtype=np.int64)
        levels = self._array(root, "meta/episode_level")
        if levels.ndim != 1 or levels.dtype.kind not in "iu" or levels.shape[0] < self.episodes:
            raise ValueError(
                f"{self.path}: meta/episode_level must be integers [{self.episodes}], one per episode, "
                f"got {levels.dtype} {list(levels.shape)}"
            )
        return np.asarray(levels[: self.episodes], np.int64)

    def _actions(self, root: zarr.Group) -> np.ndarray:
        action = self._array(root, "data/action")
        if len(action.shape) == 0 or action.shape[0] < self.frames:
            raise ValueError(f"{self.path}: data/action must have {self.frames} rows, got shape {list(action.shape)}")
        if action.dtype.kind in "iu" and action.ndim == 1:
            return np.asarray(action[: self.frames], np.int64)
        if action.dtype.kind == "f" and action.ndim == 2:
            values = np.asarray(action[: self.frames], np.float32)
            if not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                raise ValueError(f"{self.path}: data/action must be finite, got {values[row].tolist()} at frame {row}")
            return values
        raise ValueError(
            f"{self.path}: data/action must be integers [N] or floats [N, A], got {action.dtype} {list(action.shape)}"
        )

    def _action_count(self) -> int | None:
        if self.action.dtype != np.int64:
            return None
        said = self.attributes.get("actions")
        actions = int(self.action.max()) + 1 if said is None else int(said)
        if not 0 <= self.action.min() <= self.action.max() < actions:
            raise ValueError(
                f"{self.path}: data/action must be in 0..{actions - 1}, got {self.action.min()}..{self.action.max()}"
            )
        return actions


def split_levels(replay: Replay, held_out_fraction: float = 0.1, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Episode numbers for training and for validation, int64 each, split by level.

    Of the L levels of the set, round(held_out_fraction * L), but at least one, are held out, drawn with `seed`; all
    their episodes validate and none trains. ValueError where either side would be empty.
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
    validates = np.isin(replay.episode_level, chosen)
    return np.flatnonzero(~validates), np.flatnonzero(validates)


class Clips(Dataset[dict[str, Tensor]]):
    """Every clip of `length` consecutive frames of a replay buffer, or of some of its `episodes`, by its first frame.

    The chosen episodes are laid end to end and a clip starts at any frame of that line, so that episodes shorter than a
    clip are kept: a clip may span episodes, and `segment_ids` say which frames belong together. With `within_episode`
    only the clips that lie in one episode count (closed-loop evaluation wants these).

    An item is {"video": uint8 [T, 3, H, W], a permuted view of [T, H, W, 3] memory; "actions": int64 [T] or float32
    [T, A], where actions[t] was taken at frame t; "segment_ids": int64 [T], the episode's number in the replay buffer}.
    """

    def __init__(
        self,
        replay: Replay,
        length: int,
        *,
        episodes: Sequence[int] | np.ndarray | None = None,
        within_episode: bool = False,
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1 frame, got {length}")
        chosen = np.arange(replay.episodes) if episodes is None else np.unique(np.asarray(episodes, np.int64))
        if len(chosen) == 0 or chosen[0] < 0 or chosen[-1] >= replay.episodes:
            raise ValueError(f"episodes must be numbers in 0..{replay.episodes - 1}, at least one, got {episodes}")
        self.replay = replay
        self.length = length
        lengths = replay.episode_lengths[chosen]
        # Position on the line -> frame number, and -> episode number.
        self.segment_ids = np.repeat(chosen, lengths)
        line_starts = np.cumsum(lengths) - lengths
        self.frames = np.arange(lengths.sum()) + np.repeat(replay.episode_starts[chosen] - line_starts, lengths)
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
        """The clips of these B numbers, stacked: video uint8 [B, T, 3, H, W], actions, segment_ids [B, T]."""
        positions_BT = self.starts[indices][:, None] + np.arange(self.length)
        frames_BT = self.frames[positions_BT]
        return {
            "video": torch.from_numpy(self.replay.read(frames_BT)).permute(0, 1, 4, 2, 3),
            "actions": torch.from_numpy(self.replay.action[frames_BT]),
            "segment_ids": torch.from_numpy(self.segment_ids[positions_BT]),
        }


class ClipSampler:
    """Random batches of clips, where `batch(step)` depends on (seed, step) alone: a resumed run equals another.

    Clips are drawn uniformly with replacement. `episodes` and `within_episode` as in `Clips`. With `part=(i, n)`,
    `batch` gives the i-th of n equal parts of the same batch, as the i-th of n processes needs it.
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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.clips = Clips(replay, clip_length, episodes=episodes, within_episode=within_episode)
        self.batch_size = batch_size
        rank, count = part
        if not 0 <= rank < count or batch_size % count:
            raise ValueError(f"part = ({rank}, {count}) must be one of n equal parts of a batch of {batch_size}")
        self.seed = seed
        self.rows = slice(rank * batch_size // count, (rank + 1) * batch_size // count)

    def batch(self, step: int) -> dict[str, Tensor]:
        """{"video": uint8 [B, T, 3, H, W], "actions": [B, T] or [B, T, A], "segment_ids": int64 [B, T]}."""
        return self.clips.batch(self._indices(step)[self.rows])

    def _indices(self, step: int) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        draw = np.random.default_rng((self.seed, step))
        return draw.integers(len(self.clips), size=self.batch_size)

    def batches(self, first_step: int, last_step: int, workers: int = 1) -> Iterator[dict[str, Tensor]]:
        """`batch(step)` for first_step <= step < last_step, in order; `workers` threads make them, two ahead each."""
        if workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        depth = 2 * workers
        with ThreadPoolExecutor(max_workers=workers) as reader:
            ahead: deque[Future[dict[str, Tensor]]] = deque()
            for step in range(first_step, last_step):
                ahead.append(reader.submit(self.batch, step))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
