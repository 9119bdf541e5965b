"""mfwm data import-lerobot: a LeRobot data set, format v2 or v3, as a replay buffer.

    meta/info.json                        version, fps, features, and where the files are
    meta/episodes.jsonl (v2)              one episode per line: episode_index, length
    meta/episodes/*/*.parquet (v3)        one episode per row: also its files, and where it begins in its video
    data/*/*.parquet                      one frame per row: action, frame_index, episode_index, timestamp (without it,
                                          times follow from fps); images, unless frames are in videos
    videos/                               an MP4 file per episode (v2) or for many (v3)

A row's action was taken at its frame, as in a replay buffer. Its frame is the one at its time in the table, within
LeRobot's own tolerance of 1e-4 s.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

import numpy as np

from .check import INT64
from .import_episodes import Episode, integer_of, parse_object, read_object, read_text, write_episodes
from .pictures import check_size, decoded, picture, stacked


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

    camera: name of the camera's feature; None if there is only one camera.
    size: height and width to scale frames to; None keeps those of the data set.
    skip_damaged: leave out an episode whose files cannot be read to the end, or do not have one action per frame, and
        return the reasons. Without it, ValueError names file, rule and value, and `out` is left as it was.
    """
    check_size(size)
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
    """One camera of a LeRobot data set. ValueError names file, rule and value where the data do not fit the format."""

    def __init__(self, folder: Path, camera: str | None, size: tuple[int, int] | None) -> None:
        self.folder, self.size = folder, size
        path = folder / "meta/info.json"
        self.info_path, self.info = path, read_object(path)
        version, fps = self.info.get("codebase_version"), self.info.get("fps")
        if not isinstance(version, str) or version[:2] not in ("v2", "v3"):
            raise ValueError(f"{path}: codebase_version must be v2 or v3, got {version!r}")
        self.one_file_an_episode = version.startswith("v2")
        if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < math.inf:
            raise ValueError(f"{path}: fps must be a number > 0, got {fps!r}")
        self.fps = fps
        features = self.info.get("features")
        if not isinstance(features, dict):
            raise ValueError(f"{path}: features must be an object, got {features!r}")
        for name, feature in features.items():
            if not isinstance(feature, dict) or not isinstance(feature.get("dtype"), str):
                raise ValueError(f"{path}: feature {name} must have a dtype, got {feature!r}")
        cameras = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
        if not cameras:
            raise ValueError(f"{path}: features must have a camera, of dtype video or image, got {', '.join(features)}")
        if camera is None and len(cameras) == 1:
            camera = cameras[0]
        if camera is None or camera not in cameras:
            raise ValueError(f"{path}: camera must be one of {', '.join(cameras)}, got {camera!r}")
        self.camera = camera
        self.in_table = features[camera]["dtype"] == "image"
        if "action" not in features:
            raise ValueError(f"{path}: features must have action, got {', '.join(features)}")
        self.discrete = "int" in features["action"]["dtype"] and features["action"].get("shape") == [1]
        self.overlaps: dict[int, str] = {}
        self.table = lru_cache(maxsize=2)(self._table)
        # The video file being read, the time of the last frame read, and an iterator over the frames after it.
        self.open: tuple[Path | None, float, Iterator[tuple[float | None, np.ndarray]]] = (None, 0.0, iter(()))

    def episodes(self) -> list[dict[str, Any]]:
        """The metadata that `episode` needs of each episode, checked."""
        rows: list[tuple[str, dict[str, Any]]] = []
        if self.one_file_an_episode:
            path = self.folder / "meta/episodes.jsonl"
            for number, line in enumerate(read_text(path).splitlines(), start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    rows.append((place, parse_object(place, line)))
        else:
            for path in sorted((self.folder / "meta/episodes").glob("*/*.parquet")):
                # Hidden files and folders come from the operating system, such as ._file-000.parquet.
                if not path.name.startswith(".") and not path.parent.name.startswith("."):
                    found = self._table(path, None).to_pylist()
                    rows += [(f"{path}, row {number}", row) for number, row in enumerate(found)]
        if not rows:
            raise ValueError(f"{self.folder}/meta has no episodes")
        numbers = {"episode_index": 0, "length": 1}
        if not self.one_file_an_episode:
            videos = () if self.in_table else (f"videos/{self.camera}",)
            numbers |= {f"{part}/{name}_index": 0 for part in ("data", *videos) for name in ("chunk", "file")}
            times = [f"{part}/from_timestamp" for part in videos]
            if lacking := [n for n in sorted([*numbers, *times]) if any(row.get(n) is None for _, row in rows)]:
                raise ValueError(f"{self.folder}: the episodes in meta must have {', '.join(lacking)}")
            for place, row in rows:
                for name in times:
                    if type(row[name]) not in (int, float) or not 0 <= row[name] < math.inf:
                        raise ValueError(f"{place}: {name} must be seconds >= 0, got {row[name]!r}")
        for place, row in rows:
            for name, least in numbers.items():
                integer_of(place, name, row.get(name), least)
        seen: set[int] = set()
        for place, row in rows:
            if row["episode_index"] in seen:
                raise ValueError(f"{place}: episode {row['episode_index']} appears twice")
            seen.add(row["episode_index"])
        for name, have in (("total_episodes", len(rows)), ("total_frames", sum(row["length"] for _, row in rows))):
            if (stated := self.info.get(name)) != have:
                raise ValueError(f"{self.folder}: meta/info.json says {name} = {stated}, but its episodes have {have}")
        if not self.one_file_an_episode and not self.in_table:
            self.check_starts([row for _, row in rows])
        for part in ("data_path",) if self.in_table else ("data_path", "video_path"):
            self._path(part, rows[0][1])
        return [row for _, row in rows]

    def check_starts(self, rows: list[dict[str, Any]]) -> None:
        """Note episodes that overlap in a video: one of the two begins at the wrong frame, and no file says which."""
        part = f"videos/{self.camera}"
        where = [(row[f"{part}/chunk_index"], row[f"{part}/file_index"], row[f"{part}/from_timestamp"]) for row in rows]
        order = sorted(range(len(rows)), key=lambda number: where[number])
        for one, two in itertools.pairwise(order):
            last = where[one][2] + (rows[one]["length"] - 1) / self.fps
            if where[one][:2] == where[two][:2] and last > where[two][2] - tolerance(last):
                first, second = rows[one]["episode_index"], rows[two]["episode_index"]
                what = f"the last frame of episode {first} is at {last:.4f} s, {second} begins at {where[two][2]:.4f} s"
                self.overlaps |= {first: what, second: what}

    def action_count(self, episodes: list[dict[str, Any]]) -> int:
        """One more than the largest discrete action. Episodes that cannot be read raise later, when decoded."""
        largest = 0
        for row in episodes:
            with suppress(ValueError):
                largest = max(largest, int(self.actions(row).max()))
        return largest + 1

    def episode(self, row: dict[str, Any]) -> Episode:
        action = self.actions(row)
        place = self._path("data_path" if self.in_table else "video_path", row)
        return Episode(stacked(place, self.pictures(row) if self.in_table else self.frames(row)), action)

    def rows(self, row: dict[str, Any], column: str) -> tuple[Path, list[Any]]:
        """The file with an episode's rows, and this column of them, one cell per frame."""
        import pyarrow as pa
        import pyarrow.compute as pc

        index, length = row["episode_index"], row["length"]
        path = self._path("data_path", row)
        table = self.table(path, ("episode_index", "frame_index", column))
        try:
            table = table.filter(pc.equal(table["episode_index"], index)).sort_by("frame_index")
            numbers, cells = table["frame_index"].to_pylist(), table[column].to_pylist()
        except (pa.ArrowException, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if len(numbers) != length or numbers != list(range(length)):
            raise ValueError(
                f"{path} must have a row for each frame 0 to {length - 1} of episode {index}, got {len(numbers)} rows"
            )
        return path, cells

    def actions(self, row: dict[str, Any]) -> np.ndarray:
        """Integers [T] or floats [T, A]."""
        path, cells = self.rows(row, "action")
        kinds = "iu" if self.discrete else "iufb"
        try:
            values = np.array(cells)
            if values.dtype.kind not in kinds:
                raise ValueError(f"it holds {next((cell for cell in cells if is_other_kind(cell, kinds)), cells[0])!r}")
        except ValueError as error:  # also rows of unequal length
            what = "an integer" if self.discrete else "numbers, the same count in each row"
            raise ValueError(f"{path}: action of episode {row['episode_index']} must be {what}: {error}") from error
        if self.discrete:
            if not 0 <= int(values.min()) <= int(values.max()) < INT64:
                raise ValueError(
                    f"{path}: action of episode {row['episode_index']} must be an integer >= 0 that fits into 64 bits, "
                    f"got {values.min()} to {values.max()}"
                )
            return values.reshape(-1)
        return values.reshape(len(values), -1).astype(np.float64)

    def times(self, row: dict[str, Any]) -> np.ndarray:
        """float64 [T]: the times of an episode's frames in its table, in seconds from the first frame."""
        path = self._path("data_path", row)
        if "timestamp" not in self._columns(path):
            return np.arange(row["length"]) / self.fps
        path, cells = self.rows(row, "timestamp")
        where = f"{path}: timestamp of episode {row['episode_index']}"
        if any(is_other_kind(cell, "iuf") for cell in cells):
            raise ValueError(
                f"{where} must be seconds, got {next(cell for cell in cells if is_other_kind(cell, 'iuf'))!r}"
            )
        times = np.array(cells, np.float64)
        for t, step in enumerate(np.diff(times), start=1):
            if not abs(step - 1 / self.fps) <= 2 * tolerance(times[t]):
                raise ValueError(
                    f"{where} must grow by {1 / self.fps:.6f} s, at {self.fps} frames a second, got {times[t - 1]} s "
                    f"and {times[t]} s at frames {t - 1} and {t}"
                )
        return times

    def pictures(self, row: dict[str, Any]) -> Iterator[np.ndarray]:
        """The frames of an episode whose images are in the table, uint8 [H, W, 3] each."""
        path, cells = self.rows(row, self.camera)
        for t, cell in enumerate(cells):
            try:
                yield picture(cell["bytes"] if isinstance(cell, dict) and "bytes" in cell else cell, self.size)
            except ValueError as error:
                raise ValueError(
                    f"{path}: frame {t} of {self.camera} of episode {row['episode_index']} cannot be used: {error}"
                ) from error

    def frames(self, row: dict[str, Any]) -> Iterator[np.ndarray]:
        """The frames of an episode in its video, at the times in its table, uint8 [H, W, 3] each."""
        path = self._path("video_path", row)
        if row["episode_index"] in self.overlaps:
            raise ValueError(f"{path}: episodes must not overlap: {self.overlaps[row['episode_index']]}")
        start = row.get(f"videos/{self.camera}/from_timestamp", 0.0)
        times = start + self.times(row)
        opened, last, source = self.open
        # Continue where the last episode ended: a file holds one after another, and is then decoded only once.
        if opened != path or last >= times[0]:
            source = decoded(path, self.size)
        self.open = (None, 0.0, iter(()))
        for wanted in times:
            near = tolerance(wanted)
            time, img = -math.inf, None
            while time < wanted - near:
                found, img = next(source, (math.inf, None))
                if found is None:
                    raise ValueError(f"{path} has no times of its frames")
                time = found
            if img is None or time > wanted + near:
                got = "the end of the file"
                if img is not None:
                    got = f"one at {time:.3f} s, {time - wanted:.6f} s later; the tolerance is {near:.6f} s"
                raise ValueError(f"{path} must have a frame at {wanted:.3f} s, got {got}")
            yield img
        if self.one_file_an_episode and next(source, None) is not None:
            raise ValueError(f"{path} has more frames than the {row['length']} of its episode")
        self.open = (path, time, source)

    def _path(self, part: str, row: dict[str, Any]) -> Path:
        """The path of a file of an episode: `part` is data_path or video_path."""
        template = self.info.get(part)
        index = row["episode_index"]
        names: dict[str, Any] = {"video_key": self.camera}
        if self.one_file_an_episode:
            names["episode_index"] = index
            if "{episode_chunk" in str(template):
                names["episode_chunk"] = index // integer_of(
                    self.info_path, "chunks_size", self.info.get("chunks_size")
                )
        else:
            of = "data" if part == "data_path" else f"videos/{self.camera}"
            names |= {name: row[f"{of}/{name}"] for name in ("chunk_index", "file_index")}
        try:
            if not isinstance(template, str):
                raise ValueError("it must be text")
            for _, field, form, _ in Formatter().parse(template):
                if field is not None and field not in names:
                    raise ValueError(f"it must use {', '.join(names)}, got {field!r}")
                if form and not re.fullmatch(r"0?(1?[0-9]|20)?d", form):
                    raise ValueError(f"formats must be like 06d, with at most 20 digits, got {form!r}")
            path = PurePosixPath(template.format(**names))
            if path.is_absolute() or ".." in path.parts:
                raise ValueError("it must stay in the data set")
        except (IndexError, KeyError, ValueError) as error:
            raise ValueError(f"{self.info_path}: {part} = {template!r} cannot be used: {error}") from error
        return self.folder / path

    def _columns(self, path: Path) -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return list(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def _table(self, path: Path, columns: tuple[str, ...] | None) -> Any:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError("LeRobot data sets need the package pyarrow: pip install 'mfwm-kernels[data]'") from error
        if columns is None:
            # The row of a v3 episode also has statistics of every feature, which are not needed.
            columns = tuple(n for n in self._columns(path) if not n.startswith("stats/"))
        try:
            return pq.ParquetFile(path).read(columns=list(columns))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def is_other_kind(cell: Any, kinds: str) -> bool:
    return np.asarray(cell).dtype.kind not in kinds


def tolerance(time: float) -> float:
    """LeRobot's own tolerance in seconds, plus the rounding of float32, its type of times."""
    return 1e-4 + float(np.spacing(np.float32(time))) / 2
