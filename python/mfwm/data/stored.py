"""Opens the arrays of a replay buffer for reading.

The set may come from anyone. Its metadata is read before anything is decoded, and only codecs that do nothing but
decode are accepted (numcodecs' pickle executes what the set tells it to). Reading a missing chunk is an error, where
Zarr would return zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from .place import METADATA, absolute, identity, location, restore

IMG, TOKENS, ACTION, STATE = "data/img", "data/tokens", "data/action", "data/state"
ENDS, LEVELS = "meta/episode_ends", "meta/episode_level"


def low_name(factor: int) -> str:
    """The array with the ids of the frames that are smaller by `factor`."""
    return f"{TOKENS}_{factor}"


def low_factors(attributes: dict[str, Any]) -> list[int]:
    """The factors of smaller frames whose ids a set states that it has; none where that is not a list of factors."""
    stated = attributes.get("low_factors")
    if not isinstance(stated, list) or not all(type(factor) is int and factor >= 2 for factor in stated):
        return []
    return stated if sorted(set(stated)) == stated else []


# Codecs that do nothing but decode. imagecodecs_* are picture codecs, such as JPEG XL, of the package imagecodecs.
CODECS = re.compile(
    r"(numcodecs\.)?(blosc|zstd|zlib|gzip|bz2|lzma|lz4|crc32c?|adler32|fletcher32|jenkins_lookup3|shuffle|delta|astype"
    r"|packbits|bitround|quantize|fixedscaleoffset|imagecodecs_\w+)|bytes|endian|transpose|sharding_indexed"
)


class StrictStore(WrapperStore[Any]):
    """A store that raises ValueError for a missing chunk."""

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        return require(key, await self._store.get(key, prototype, byte_range))

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]) -> list[Any]:
        ranges = list(key_ranges)
        parts = await self._store.get_partial_values(prototype, ranges)
        return [require(key, part) for (key, _), part in zip(ranges, parts, strict=True)]


def require(key: str, value: Any) -> Any:
    if value is None and key.rpartition("/")[2] not in METADATA:
        raise ValueError(f"chunk {key} is missing, and would be read as zeros")
    return value


class Stored(NamedTuple):
    """A set's arrays by name, and the reasons for those that cannot be read. `identity` is that of its directory."""

    identity: tuple[int, int] | None
    attributes: dict[str, Any]
    arrays: dict[str, Any]
    unreadable: dict[str, str]


def open_stored(path: str | Path) -> Stored:
    """Open the set at `path`. ValueError if there is no Zarr group."""
    place = location(path)
    if isinstance(place, Path):
        try:
            restore(place)
        except OSError as error:
            raise ValueError(f"{place} was moved aside by a killed writer and cannot be restored: {error}") from error
        if not place.exists():
            raise ValueError(f"{place} does not exist: expected a Zarr replay buffer")
        if place.is_file():
            archive = f"; for a zip archive, give zip://::file://{place.absolute()}" if is_zipfile(place) else ""
            raise ValueError(f"{place} is a file: expected the directory of a Zarr replay buffer{archive}")
    opened = identity(place)
    try:
        # Absolute, because of a relative path "data" Zarr lists no chunks: the arrays' names also begin with "data".
        plain = zarr.open_group(str(absolute(place)), mode="r", use_consolidated=False)
        root = zarr.open_group(StrictStore(plain.store), mode="r", path=plain.path, use_consolidated=False)
        attributes = dict(root.attrs)
    except Exception as error:  # Zarr, fsspec and their stores raise almost anything on bad or missing files.
        raise ValueError(f"{place} is not a Zarr group: {error}") from error
    arrays, unreadable = {}, {}
    # Other projects' sets have an array of this name with a meaning of their own, and without names of its columns.
    state = (STATE,) if attributes.get("state_names") is not None else ()
    low = map(low_name, low_factors(attributes))
    for name in (IMG, TOKENS, *low, ACTION, *state, ENDS, LEVELS):
        try:
            metadata = metadata_of(root, name)
            if unknown := [codec for codec in codecs_of(metadata) if not CODECS.fullmatch(codec)]:
                raise ValueError(f"its codec {unknown[0]!r} is not one that a set may use")
            array = root.get(name)
            if array is None:
                continue
            if not isinstance(array, zarr.Array):
                raise ValueError("it is a group")
            if min(array.chunks, default=1) < 1 or min(array.shape, default=1) < 0:
                raise ValueError(f"its shape is {list(array.shape)}, in chunks of {list(array.chunks)}")
            arrays[name] = array
        except Exception as error:  # As above.
            unreadable[name] = str(error) or type(error).__name__
    return Stored(opened, attributes, arrays, unreadable)


def metadata_of(root: zarr.Group, name: str) -> Any:
    """The array's metadata, parsed from JSON; None if it does not exist."""
    file = "zarr.json" if root.metadata.zarr_format == 3 else ".zarray"
    key = "/".join(part for part in (root.path, name, file) if part)
    content = sync(root.store.get(key, default_buffer_prototype()))
    return None if content is None else json.loads(content.to_bytes())


def codecs_of(metadata: Any) -> Iterator[str]:
    """Names of the codecs in an array's metadata, nested ones included."""
    if isinstance(metadata, dict):
        for name, value in metadata.items():
            if name in ("filters", "compressor", "codecs", "index_codecs"):
                for codec in value if isinstance(value, list) else [value]:
                    if codec is not None:
                        yield str(codec.get("id", codec.get("name"))) if isinstance(codec, dict) else str(codec)
            yield from codecs_of(value)
    elif isinstance(metadata, list):
        for value in metadata:
            yield from codecs_of(value)


def missing_and_damaged(name: str, array: Any, begin: int, end: int, *, read: bool) -> Iterator[str]:
    """Missing chunks in rows `begin` to `end`; with `read`, also chunks that cannot be decoded."""
    unit = array.shards or array.chunks

    async def stored() -> set[str]:
        listing: AsyncIterator[str] = array.store.list_prefix(f"{array.path}/")
        return {key async for key in listing}

    keys = sync(stored())
    counts = [-(-size // step) for size, step in zip((min(end, array.shape[0]), *array.shape[1:]), unit, strict=True)]
    for index in chunk_indices(begin // unit[0], counts):
        key = array.metadata.encode_chunk_key(index)
        where = (
            f"{name}: chunk {key} (rows {index[0] * unit[0]} to {min((index[0] + 1) * unit[0], array.shape[0]) - 1})"
        )
        if f"{array.path}/{key}" not in keys:
            yield f"{where} is missing, and would be read as zeros"
        elif read:
            try:
                array[tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, unit, strict=True))]
            except Exception as error:  # Codecs raise almost anything on damaged bytes.
                yield f"{where} cannot be decoded: {error}"


def chunk_indices(first: int, counts: list[int]) -> Iterator[tuple[int, ...]]:
    """Indices of chunks, from row `first` on. A generator, because a damaged shape may have any number of them."""
    if not counts:
        yield ()
        return
    for number in range(first, counts[0]):
        for rest in chunk_indices(0, counts[1:]):
            yield (number, *rest)


def read_rows(name: str, array: Any, begin: int, end: int) -> np.ndarray:
    """array[begin:end], in native byte order. ValueError names a chunk that is missing or damaged."""
    try:
        values = np.asarray(array[begin:end])
    except Exception as error:  # Stores and codecs raise almost anything.
        named = next(
            missing_and_damaged(name, array, begin, end, read=True), f"{name}: rows {begin} to {end - 1}: {error}"
        )
        raise ValueError(named) from error
    return values.astype(values.dtype.newbyteorder("="), copy=False)
