"""Reads checkpoints without running anything that is in them, whoever wrote them.

torch.distributed.checkpoint reads a checkpoint's `.metadata`, and the values in it that are not tensors, with Python's
pickle, which calls whatever a file names. Here the metadata is read by an unpickler that allows only the few classes in
it, and the values by torch's weights-only unpickler, which also reads the tensors.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import stat
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

# Classes whose fields are set from the file.
RECORDS = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    _StorageInfo,
)
# All that a `.metadata` may name. The paths in it say where it was written, and nothing is opened by them.
ALLOWED: dict[tuple[str, str], Any] = {
    **{(record.__module__, record.__name__): record for record in (*RECORDS, _MEM_FORMAT_ENCODING)},
    **{("torch", str(d).removeprefix("torch.")): d for d in vars(torch).values() if isinstance(d, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    **{
        (module, f"{kind}{system}Path"): pure
        for module in ("pathlib", "pathlib._local")
        for kind in ("", "Pure")
        for system, pure in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath))
    },
}
PLAIN = (bool, int, float, str, type(None))


# The Python unpickler, because the C one offers no way to restrict which objects a BUILD opcode may change.
class MetadataUnpickler(pickle._Unpickler):
    """Unpickles instances of ALLOWED classes and nothing else; UnpicklingError names any other class."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a checkpoint") from None

    def build(self) -> None:
        if not isinstance(self.stack[-2], RECORDS):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError(f"it sets attributes of {self.stack[-2]!r}")  # type: ignore[attr-defined]
        self.load_build()  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: build}


class Reader(FileSystemReader):
    """Reads the checkpoint in `folder`. ValueError where one of its files is a link, or its metadata is not valid."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder / ".metadata")
        for name in sorted({info.relative_path for info in self.metadata.storage_data.values()}):
            check_file(folder / name)
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class Planner(DefaultLoadPlanner):
    """Fills tensors from tensors, and replaces plain values (numbers, text, tuples and lists) by plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{name} is not a plain value: {first_line(error)}") from error
        if isinstance(self.state_dict[name], Tensor) or not is_plain(loaded):
            raise ValueError(f"{name} must be {type(self.state_dict[name]).__name__}, got {type(loaded).__name__}")
        # super() unpickles anything, so it gets a pickle that was written here.
        rewritten = io.BytesIO()
        torch.save(loaded, rewritten)
        rewritten.seek(0)
        super().load_bytes(read_item, rewritten)


def read_metadata(path: Path) -> Metadata:
    """The metadata of a checkpoint; ValueError names the file and what is wrong with it."""
    check_file(path)
    try:
        metadata = MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # A damaged pickle raises almost anything.
        raise ValueError(f"{path} is not the metadata of a checkpoint: {first_line(error)}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} must hold the metadata of a checkpoint, got {type(metadata).__name__}")
    for name, entries, keys, values in (
        ("state_dict_metadata", metadata.state_dict_metadata, str, (TensorStorageMetadata, BytesStorageMetadata)),
        ("storage_data", metadata.storage_data, MetadataIndex, _StorageInfo),
    ):
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: {name} must be a dict, got {type(entries).__name__}")
        for key, value in entries.items():
            if not isinstance(key, keys) or not isinstance(value, values):
                raise ValueError(f"{path}: {name} must not map {type(key).__name__} to {type(value).__name__}")
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"{path}: files of a checkpoint must be in its own directory, got {name!r}")
        if any(type(number) is not int or number < 0 for number in (info.offset, info.length)):
            raise ValueError(f"{path}: offset and length must be >= 0, got {info.offset!r} and {info.length!r}")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{path}: transform_descriptors must be empty, got {info.transform_descriptors!r}")
    return metadata


def check_file(path: Path) -> None:
    """ValueError for a link, which may lead anywhere, and for anything but a file."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "not a file"
        raise ValueError(f"{path} is {kind}: a checkpoint holds plain files only")


def is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) in (list, tuple) and all(is_plain(entry) for entry in value))


def first_line(error: BaseException) -> str:
    """The first line of a message: torch's go on to advise loading the file unsafely."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
