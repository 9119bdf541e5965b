"""mfwm data import-lerobot: a LeRobot data set, format v2 or v3, as a replay buffer.

    meta/info.json                        version, fps, features, and where the files are
    meta/episodes.jsonl (v2)              an episode a line: episode_index, length
    meta/episodes/*/*.parquet (v3)        an episode a row: also its files, and where it begins in its video
    data/*/*.parquet                      a frame a row: action, frame_index, episode_index; images, where not videos
    videos/                               an MP4 file for an episode (v2) or for many (v3)

A row's action was taken at its frame, as in a replay buffer.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .import_episodes import Episode, write_episodes
from .import_videos import decoded


def import_lerobot(
    folder: Path,
    out: str | Path,
    *,
    camera: str | None = None,
    size: tuple[int, int] | None = None,
    skip_damaged: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> list[str]:
    """Write one camera of the LeRobot data set in `folder`, and its actions, as the replay buffer `out`.

    camera: name of the feature; None where there is one camera only.
    size: height and width to scale frames to; None keeps those of the data set.
    skip_damaged: leave out an episode whose files cannot be read to their end, or do not have one action per frame;
        what is left out, with the reason, is returned. Otherwise ValueError names file, rule and value, and nothing is
        left in `out`.
    """
    data = LeRobot(Path(folder), camera, size)
    episodes = data.episodes()
    return write_episodes(
        out,
        {f"episode {row['episode_index']}": lambda row=row: data.episode(row) for row in episodes},  # type: ignore[misc]
        actions=data.action_count(episodes) if data.discrete else None,
        skip_damaged=skip_damaged,
        overwrite=overwrite,
        progress=progress,
        env=Path(folder).resolve().name,
        fps=data.fps,
    )


class LeRobot:
    """One camera of a LeRobot data set. ValueError names file, rule and value where the format is broken."""

    def __init__(self, folder: Path, camera: str | None, size: tuple[int, int] | None) -> None:
        self.folder, self.size = folder, size
        try:
            self.info = json.loads((folder / "meta/info.json").read_text())
            self.fps, features, version = self.info["fps"], self.info["features"], self.info["codebase_version"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}/meta/info.json cannot be read: {error!r}") from error
        if version[:2] not in ("v2", "v3"):
            raise ValueError(f"{folder}: codebase_version must be v2 or v3, got {version!r}")
        self.one_file_an_episode = version.startswith("v2")
        cameras = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
        if camera is None and len(cameras) == 1:
            camera = cameras[0]
        if camera is None or camera not in cameras:
            raise ValueError(f"camera must be one of {', '.join(cameras)}, got {camera!r}")
        self.camera = camera
        self.in_table = features[camera]["dtype"] == "image"
        if "action" not in features:
            raise ValueError(f"{folder}/meta/info.json: features must have action, got {', '.join(features)}")
        self.discrete = "int" in features["action"]["dtype"] and list(features["action"]["shape"]) == [1]
        self.table = lru_cache(maxsize=2)(self._table)
        # The video file being read, the number of its next frame, and the frames from there.
        self.open: tuple[Path | None, int, Iterator[tuple[float, np.ndarray]]] = (None, 0, iter(()))

    def episodes(self) -> list[dict[str, Any]]:
        if self.one_file_an_episode:
            path = self.folder / "meta/episodes.jsonl"
            try:
                rows = [json.loads(line) for line in path.read_text().splitlines()]
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
        else:
            rows = []
            for path in sorted((self.folder / "meta/episodes").glob("*/*.parquet")):
                rows += self._table(path, None).to_pylist()
        wanted = {"episode_index", "length"}
        if not self.one_file_an_episode:
            videos = () if self.in_table else (f"videos/{self.camera}",)
            wanted |= {f"{part}/{name}_index" for part in ("data", *videos) for name in ("chunk", "file")}
            wanted |= {f"{part}/from_timestamp" for part in videos}
        if lacking := [name for name in sorted(wanted) if any(row.get(name) is None for row in rows)]:
            raise ValueError(f"{self.folder}: the episodes in meta must have {', '.join(lacking)}")
        for name, have in (("total_episodes", len(rows)), ("total_frames", sum(row["length"] for row in rows))):
            if (said := self.info.get(name)) != have:
                raise ValueError(f"{self.folder}: meta/info.json says {name} = {said}, its episodes have {have}")
        return rows

    def action_count(self, episodes: list[dict[str, Any]]) -> int:
        """One more than the largest discrete action. An episode that cannot be read is named when its turn comes."""
        largest = 0
        for row in episodes:
            with suppress(ValueError):
                largest = max(largest, int(self.actions(row).max()))
        return largest + 1

    def episode(self, row: dict[str, Any]) -> Episode:
        action = self.actions(row)
        video = self.pictures(row) if self.in_table else np.stack(list(self.frames(row)))
        return Episode(video, action)

    def rows(self, row: dict[str, Any], columns: tuple[str, ...]) -> Any:
        """These columns of an episode, a row a frame."""
        import pyarrow.compute as pc

        index, length = row["episode_index"], row["length"]
        path = self._path("data_path", row, "data")
        table = self.table(path, ("episode_index", "frame_index", *columns))
        table = table.filter(pc.equal(table["episode_index"], index)).sort_by("frame_index")
        if (numbers := table["frame_index"].to_pylist()) != list(range(length)):
            raise ValueError(
                f"{path} must have frames 0 to {length - 1} of episode {index}, a row each, got {len(numbers)} rows"
            )
        return table

    def actions(self, row: dict[str, Any]) -> np.ndarray:
        """int64 [T] or float32 [T, A]."""
        values = np.array(self.rows(row, ("action",))["action"].to_pylist())
        if self.discrete:
            return values.reshape(-1)
        return values.reshape(len(values), -1).astype(np.float32)

    def pictures(self, row: dict[str, Any]) -> np.ndarray:
        """uint8 [T, H, W, 3] of images that stand in the table."""
        from PIL import Image, UnidentifiedImageError

        pictures = []
        for t, cell in enumerate(self.rows(row, (self.camera,))[self.camera].to_pylist()):
            try:
                image = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
            except (OSError, TypeError, UnidentifiedImageError) as error:
                raise ValueError(f"frame {t} of {self.camera} cannot be decoded: {error}") from error
            pictures.append(np.asarray(image.resize(self.size[::-1], Image.Resampling.BOX) if self.size else image))
        return np.stack(pictures)

    def frames(self, row: dict[str, Any]) -> Iterator[np.ndarray]:
        """The frames of an episode, uint8 [H, W, 3] each, and their times compared with those that they must have."""
        path = self._path("video_path", row, f"videos/{self.camera}")
        first = round(row.get(f"videos/{self.camera}/from_timestamp", 0.0) * self.fps)
        opened, following, source = self.open
        # Episodes lie one after another in a file, which is decoded once.
        if opened != path or following > first:
            source = decoded(path, self.size)
        self.open = (None, 0, iter(()))
        number = first
        while number < first + row["length"]:
            time, img = next(source, (math.inf, None))
            if time < (first - 0.5) / self.fps:
                continue
            if img is None or abs(time - number / self.fps) > 0.5 / self.fps:
                got = "the end of the file" if img is None else f"one at {time:.3f} s"
                raise ValueError(f"{path} must have a frame at {number / self.fps:.3f} s, got {got}")
            yield img
            number += 1
        if self.one_file_an_episode and next(source, None) is not None:
            raise ValueError(f"{path} has more frames than the {row['length']} of its episode")
        self.open = (path, first + row["length"], source)

    def _path(self, template: str, row: dict[str, Any], columns: str) -> Path:
        if self.one_file_an_episode:
            index = row["episode_index"]
            names = {"episode_index": index, "episode_chunk": index // self.info["chunks_size"]}
        else:
            names = {name: row[f"{columns}/{name}"] for name in ("chunk_index", "file_index")}
        return self.folder / self.info[template].format(video_key=self.camera, **names)

    def _table(self, path: Path, columns: tuple[str, ...] | None) -> Any:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError("LeRobot data sets need the package pyarrow: pip install 'mfwm-kernels[data]'") from error
        try:
            if columns is None:
                # Statistics of every feature also stand in a v3 episode's row.
                columns = tuple(n for n in pq.read_schema(path).names if not n.startswith("stats/"))
            return pq.read_table(path, columns=list(columns))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are among these
            raise ValueError(f"{path} cannot be read: {error}") from error
