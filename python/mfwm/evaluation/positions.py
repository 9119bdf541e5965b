"""Where the objects in a frame are: a small network that reads their positions, trained on true frames.

PSNR hardly notices whether a small object is where it should be. A reader does: it is trained on the frames of the
training levels and their stored state, and then reads frames that a world model has predicted. These are blurred where
the model is unsure, so the reader is trained on blurred and noisy frames too. Its own error, on true frames of held-out
levels, bounds what it can tell.

An object is a pair of columns NAME_x, NAME_y of data/state, in pixels. Letters: B clips, T frames of each, N frames,
O objects.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.replay import Replay
from ..metrics.intervals import interval_of_defined, mean_of_defined
from ..training.checkpoints import written_beside
from ..training.data_identity import digest
from ..training.run_config import parsed

STEPS, BATCH, RATE = 500, 32, 6e-3
CHANNELS = (24, 32, 32)
# Of the frames to train on: their blur in pixels, and their noise for pixels in -1..1.
MOST_BLUR, MOST_NOISE = 1.5, 0.2
# A row or column of heat maps for this many pixels; from MANY_PIXELS on for twice as many, to bound the cost.
STRIDE, MANY_PIXELS = 2, 48
# Where the header of a reader's file holds its arguments.
HEADER = "position_reader"
# Pixels: how far from a coordinate that never changes an object may be drawn.
LANE = 1.5
# Pixels; the loss is quadratic in smaller errors, linear in larger ones.
BEND = 0.5

Measures = dict[str, np.ndarray]


def objects_of(replay: Replay) -> dict[str, tuple[int, int]]:
    """The columns of x and y of every object whose position the state holds in pixels, by its name.

    Objects that never move or are never visible are left out.
    """
    names, units = replay.state_names, replay.attributes.get("state_units", [])
    of_pixels = {name: column for column, (name, unit) in enumerate(zip(names, units, strict=True)) if unit == "pixels"}
    found = {}
    for name, x in of_pixels.items():
        if name.endswith("_x") and (y := of_pixels.get(f"{name[:-2]}_y")) is not None:
            known = positions(replay, np.arange(replay.frames), [(x, y)])[:, 0]
            known = known[~np.isnan(known).any(1)]
            if len(known) and (known != known[0]).any():
                found[name[:-2]] = (x, y)
    return found


def positions(replay: Replay, frames: np.ndarray, columns: list[tuple[int, int]]) -> np.ndarray:
    """[*frames.shape, O, 2]: x and y of objects at these frames; both NaN where an object is not visible."""
    found = replay.state[frames][..., np.array(columns)]
    found[np.isnan(found).any(-1)] = np.nan
    return found


class PositionReader(nn.Module):
    """Reads positions [N, O, 2] in pixels from frames [N, C, height, width] in [-1, 1].

    Convolutions compute one heat map per object, and a position is the mean over its softmax. The convolutions see
    where they are, so that objects that look alike, such as cars in lanes, are told apart.

    Args:
        frame: (channels, height, width).
        objects: names.
        data: digest of the set it is trained on.
    """

    fixed: Tensor
    levels: Tensor

    def __init__(self, frame: tuple[int, int, int], objects: list[str], data: str) -> None:
        super().__init__()
        self.frame, self.objects, self.data = frame, objects, data
        channels, height, width = frame
        strides = (STRIDE, 2 if min(height, width) >= MANY_PIXELS else 1, 1)
        layers: list[nn.Module] = []
        read = channels + 2
        for written, kernel, stride, dilation in zip(CHANNELS, (5, 3, 3), strides, (1, 1, 2), strict=True):
            padding = dilation * (kernel // 2)
            layers += [nn.Conv2d(read, written, kernel, stride, padding, dilation), nn.ReLU()]
            read = written
        self.layers = nn.Sequential(*layers, nn.Conv2d(read, len(objects), 1))
        # Coordinates that never change, in pixels; NaN for those to be read.
        self.register_buffer("fixed", torch.full((len(objects), 2), math.nan))
        # The levels that it was trained on.
        self.register_buffer("levels", torch.zeros(0, dtype=torch.int64))

    def forward(self, frames: Tensor) -> Tensor:
        _, height, width = self.frame
        places = [torch.linspace(-1, 1, side, device=frames.device) for side in (height, width)]
        grid = torch.stack(torch.meshgrid(*places, indexing="ij")).expand(len(frames), -1, -1, -1)
        maps = self.layers(torch.cat([frames, grid], dim=1))
        rows, columns = maps.shape[2:]
        at_x, at_y = (centers(cells, pixels, frames.device) for cells, pixels in ((columns, width), (rows, height)))
        near = self._near(0, at_x)[:, None] + self._near(1, at_y)[:, :, None]
        shares = (maps + near).flatten(2).softmax(-1).unflatten(2, (rows, columns))
        x, y = shares.sum(2) @ at_x, shares.sum(3) @ at_y
        return torch.where(self.fixed.isnan(), torch.stack([x, y], dim=-1), self.fixed)

    def _near(self, axis: int, places: Tensor) -> Tensor:
        """[O, cells]: what to add to heat maps to look for an object near the coordinate that it keeps, as a car in its
        lane does."""
        distance = places - self.fixed[:, axis, None]
        return (-0.5 * (distance / LANE).square()).nan_to_num(0.0)

    def seen(self, levels: np.ndarray) -> float:
        """The share of these levels that it was trained on."""
        return float(np.isin(np.unique(levels), self.levels.cpu().numpy()).mean())

    @torch.no_grad()
    def read(self, frames: Tensor, batch: int = 256) -> Tensor:
        """Positions [..., O, 2] in frames [..., C, height, width], a batch at a time."""
        found = [self(part.clamp(-1, 1)) for part in frames.flatten(0, -4).split(batch)]
        return torch.cat(found).unflatten(0, frames.shape[:-3])


def centers(cells: int, pixels: int, device: torch.device) -> Tensor:
    """The middle of each of the cells that share a side of so many pixels; that of pixel c is at c + 0.5."""
    return (torch.arange(cells, device=device) + 0.5) * (pixels / cells)


def train_reader(replay: Replay, episodes: np.ndarray, *, seed: int) -> PositionReader:
    """A reader of the positions in the frames of these episodes, on the CPU.

    ValueError if the set is of tokens, or has no objects whose positions are known.
    """
    columns = objects_of(replay)
    if replay.vocabulary or not columns:
        raise ValueError(f"{replay.path}: a reader needs pixels, and columns NAME_x and NAME_y of data/state in pixels")
    numbers = frames_of(replay, episodes)
    known = positions(replay, numbers, list(columns.values()))
    numbers, known = numbers[~np.isnan(known).all((1, 2))], known[~np.isnan(known).all((1, 2))]
    if not len(numbers):
        raise ValueError(f"{replay.path}: no object is visible in the frames of the training levels")
    draw = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = PositionReader(replay.frame, list(columns), digest(replay))
        low, high = np.nanmin(known, 0), np.nanmax(known, 0)
        reader.fixed.copy_(torch.from_numpy(np.where(low == high, low, np.nan)))
        reader.levels = torch.from_numpy(np.unique(replay.episode_level[episodes]))
        optimizer = torch.optim.Adam(reader.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
        for _ in range(STEPS):
            chosen = np.sort(draw.integers(len(numbers), size=BATCH))
            frames = torch.from_numpy(replay.read(numbers[chosen])).permute(0, 3, 1, 2).float() / 127.5 - 1
            frames = blurred(frames, MOST_BLUR * draw.random())
            frames = frames + MOST_NOISE * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(frames)
            truth = torch.from_numpy(known[chosen])
            visible = ~truth.isnan()
            loss = F.smooth_l1_loss(reader(frames.clamp(-1, 1))[visible], truth[visible], beta=BEND)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reader.eval().requires_grad_(False)


def frames_of(replay: Replay, episodes: np.ndarray) -> np.ndarray:
    """The numbers of all frames of these episodes."""
    starts, lengths = replay.episode_starts[episodes], replay.episode_lengths[episodes]
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def blurred(frames: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with a standard deviation of `sigma` pixels; a frame continues past its edges as it is there."""
    reach = math.ceil(3 * MOST_BLUR)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(sigma, 1e-3)) ** 2)
    kernel = (weights / weights.sum()).expand(frames.shape[1], 1, 1, -1)
    padded = F.pad(frames, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel, groups=frames.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=frames.shape[1])


def save_reader(reader: PositionReader, path: Path) -> None:
    """Write the reader as one safetensors file, completely or not at all."""
    header = {HEADER: json.dumps({"frame": reader.frame, "objects": reader.objects, "data": reader.data})}
    with written_beside(Path(path)) as unfinished:
        save_file({name: x.contiguous() for name, x in reader.state_dict().items()}, unfinished, header)


def load_reader(path: Path) -> PositionReader:
    """The reader that save_reader wrote. ValueError if the file holds anything else."""
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    rule = f"{path} must be a reader of positions that mfwm evaluate wrote"
    if HEADER not in header:
        raise ValueError(f"{rule}; its header lacks {HEADER}")
    known = parsed(header[HEADER], f"{path}, {HEADER}")
    try:
        channels, height, width = known["frame"]
        reader = PositionReader((channels, height, width), known["objects"], known["data"])
        reader.levels = torch.zeros_like(state["levels"])
        reader.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{rule}: {error}") from error
    return reader.eval().requires_grad_(False)


def reader_of(replay: Replay, episodes: np.ndarray, *, seed: int, path: Path | None = None) -> PositionReader:
    """The reader in the file at `path` if that exists, else a newly trained one, which is written there.

    ValueError if it was trained on another set. A reader of the same set may have been trained on other levels.
    """
    if path is None or not Path(path).exists():
        reader = train_reader(replay, episodes, seed=seed)
        if path is not None:
            save_reader(reader, path)
        return reader
    reader = load_reader(path)
    if (reader.frame, reader.objects, reader.data) != (replay.frame, list(objects_of(replay)), digest(replay)):
        raise ValueError(f"reader must have been trained on the frames of {replay.path}; {path} was on another set's")
    return reader


def position_measures(reader: PositionReader, pictures: Tensor, truth: Tensor, positions: Tensor) -> Measures:
    """Distances in pixels, NaN where an object is not visible, over `steps` predicted frames of B clips.

    position_error [B, steps] between what is read from the predicted `pictures` and the true position, the mean over
    the visible objects; by object, object_position_error [B, steps, O]. position_error_copy [B, steps]: if objects
    stayed where they were in the last frame seen. reader_error [B, steps, O]: of what is read from the true frames.

    pictures, truth: [B, steps, C, height, width]. positions: true ones [B, 1 + steps, O, 2], from the last frame seen.
    """
    future, last = positions[:, 1:], positions[:, :1]
    measures = {
        "object_position_error": reader.read(pictures) - future,
        "reader_error": reader.read(truth) - future,
        "position_error_copy": last - future,
    }
    found = {name: difference.norm(dim=-1).cpu().numpy() for name, difference in measures.items()}
    found["position_error"] = mean_of_objects(found["object_position_error"])
    found["position_error_copy"] = mean_of_objects(found["position_error_copy"])
    return found


def mean_of_objects(errors: np.ndarray) -> np.ndarray:
    """[B, steps] from [B, steps, O]: the mean over the visible objects."""
    return mean_of_defined(errors.reshape(-1, errors.shape[-1])).reshape(errors.shape[:-1])


def position_summary(measures: Measures, objects: list[str], seed: int) -> dict[str, Any]:
    """Metrics of position_measures: means over clips, at every step, with 95% intervals."""

    def by_object(errors: np.ndarray) -> dict[str, Any]:
        """The mean of each of the columns [B, ..., O] over clips."""
        means = [mean_of_defined(column.reshape(len(column), -1).T) for column in np.moveaxis(errors, -1, 0)]
        return {name: mean.tolist() for name, mean in zip(objects, means, strict=True)}

    reading = measures["reader_error"].reshape(-1, 1, len(objects))
    metrics: dict[str, Any] = {
        "reader_error": float(mean_of_defined(reading.reshape(1, -1))[0]),
        "reader_error_by_object": {name: mean for name, (mean,) in by_object(reading).items()},
    }
    for name in ("position_error", "position_error_copy"):
        metrics[name] = mean_of_defined(measures[name].T).tolist()
        metrics[f"{name}_95"] = interval_of_defined(seed, measures[name])
    metrics["position_error_by_object"] = by_object(measures["object_position_error"])
    return metrics
