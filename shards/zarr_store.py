"""Zarr v3 arrays, one per volume variable: (places, *shape), sharded; a record is one or several chunks.

Shard files are written and read here: the chunks one after the other, then the table of their (offset, bytes) and its
CRC-32C. The chunks of a record (:mod:`shards.frames`) lie together; the index has their offset, size and CRC-32C. An
empty place, and a missing volume, have no chunk. In version 1 a record is one frame of Zstandard.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from shards.errors import IntegrityError
from shards.frames import CRC, codecs, decode, decode_checked, encode, planes_per_frame, seal
from shards.index import Index
from shards.pieces import Piece, crc32c
from shards.record_table import Place
from shards.records import Record
from shards.schema import Value
from shards.stored_files import HashedFile, StoredFiles

FOLDER = "data.zarr"
METADATA = "zarr.json"
ZSTANDARD = b"\x28\xb5\x2f\xfd"  # begins each of its frames; no Blosc frame begins so
DAMAGES = (OSError, ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, struct.error)  # of bytes read
EMPTY = 2**64 - 1  # offset and size of a chunk that is not there


def shard_path(variable: str, number: int, axes: int) -> str:
    """The file of a shard, relative to the data set's folder.

    Args:
        variable: the array's name.
        number: of the shard.
        axes: of one record's array.
    """
    return f"{FOLDER}/{variable}/c/{number}{'/0' * axes}"


def metadata(arrays: Mapping[str, Mapping[str, Any]], places: int, per_shard: int) -> dict[str, bytes]:
    """The store's metadata: path relative to the data set's folder -> content.

    Args:
        arrays: variable -> {shape, dtype} of one record's array.
        places: up to the last record.
        per_shard: places per shard.
    """
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    found = {f"{FOLDER}/{METADATA}": group}
    for variable, spec in arrays.items():
        shape, dtype = [int(n) for n in spec["shape"]], np.dtype(spec["dtype"])
        endian = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
        bytes_codec = {"name": "bytes", **endian}
        sharding = {
            "chunk_shape": [1, planes_per_frame(tuple(shape), dtype), *shape[1:]],
            "codecs": [bytes_codec, *codecs(dtype)],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        found[f"{FOLDER}/{variable}/{METADATA}"] = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [places, *shape],
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [per_shard, *shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if dtype.kind in "iu" else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"scale_factor": spec["scale"]} if "scale" in spec else {},  # CF's, which xarray applies
        }
    return {path: json.dumps(content, indent=2).encode() + b"\n" for path, content in found.items()}


class ZarrShard:
    """Writes one shard of each array.

    Args:
        folder: of the data set.
        number: of the shard.
        per_shard: places per shard.
    """

    path = ""  # a record of a Zarr store needs no file name

    def __init__(self, folder: Path, number: int, per_shard: int) -> None:
        self._folder, self._number, self._per_shard = folder, number, per_shard
        self._files: dict[str, HashedFile] = {}
        self._tables: dict[str, NDArray[np.uint64]] = {}

    def add(
        self,
        slot: int,
        key: str,
        subject: str,
        values: Mapping[str, Value],
        arrays: Mapping[str, NDArray[Any]],
        affines: Mapping[str, Any],
    ) -> dict[str, tuple[int, int, int]]:
        """Append the arrays of a record, of which the index holds all else.

        Returns:
            Variable -> byte offset of its frames, size, CRC-32C.
        """
        places = {}
        for variable, array in arrays.items():
            frames = list(encode(array, planes_per_frame(array.shape, array.dtype)))
            if variable not in self._files:
                path = shard_path(variable, self._number, array.ndim)
                self._files[variable] = HashedFile(self._folder / path)
                self._tables[variable] = np.full((self._per_shard, len(frames), 2), EMPTY, "<u8")
            stored = b"".join([*frames, seal(frames)])
            offset = self._files[variable].write(stored)
            sizes = [len(frame) for frame in frames]
            self._tables[variable][slot] = np.stack([offset + np.cumsum([0, *sizes[:-1]]), sizes], axis=1)
            places[variable] = (offset, len(stored), crc32c(stored))
        return places

    def close(self) -> dict[str, dict[str, Any]]:
        """Write the table of each file's chunks; returns path -> {bytes, sha256}."""
        found = {}
        for variable, file in self._files.items():
            table = self._tables[variable].tobytes()
            file.write(table + CRC.pack(google_crc32c.value(table)))
            found[file.path.relative_to(self._folder).as_posix()] = file.close()
        return found

    def discard(self) -> None:
        """Remove the files."""
        for file in self._files.values():
            file.discard()


class ZarrReader:
    """Reads single arrays of a Zarr store."""

    def __init__(self, folder: Path, index: Index, files: StoredFiles) -> None:
        self.folder, self.index = folder, index
        self._files = files
        self._specs = {name: (tuple(a["shape"]), np.dtype(a["dtype"])) for name, a in index.arrays.items()}
        self._per_shard: dict[str, int] = {}
        self._chunks: dict[str, int] = {}

    def read(self, key: str, variable: str, place: Place, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The array of ``variable``, (*arrays[variable].shape), checked where its CRC-32C is known.

        Raises:
            IntegrityError: the shard is missing, too short or damaged.
        """
        if not place.size:
            return self.locate(key, variable, place)[0]
        try:
            path = self._path(variable, place.slot)
            stored = np.empty(place.size, np.uint8)
            self._files.read_checked(path, place.offset, stored, place.crc)
            if stored[: len(ZSTANDARD)].tobytes() == ZSTANDARD:
                return self._decompress(stored, variable)
            array: NDArray[Any] = np.empty(*self._specs[variable]) if out is None else out
            decode(stored, array)
            return array
        except DAMAGES as error:
            raise _damaged(self.folder, key, variable, error) from error

    def locate(self, key: str, variable: str, place: Place) -> tuple[NDArray[Any], Place]:
        """A volume of which the index knows the slot alone, as in data sets of version 1, and where its frame is.

        Returns:
            The array, unchecked; the place, with a size of zero for a volume without a chunk.

        Raises:
            IntegrityError: metadata or shard that are missing or damaged.
        """
        try:
            chunk = self._chunk(variable, place.slot)
            if chunk is None:  # zarr-python leaves out chunks of zeros
                return np.zeros(*self._specs[variable]), place
            offset, size = chunk
            frame = self._files.read(self._path(variable, place.slot), offset, size)
            array = self._decompress(frame, variable)
        except DAMAGES as error:
            raise _damaged(self.folder, key, variable, error) from error
        return array, place._replace(offset=offset, size=size, crc=crc32c(frame))

    def read_box(
        self, key: str, variable: str, place: Place, start: Sequence[int], shape: Sequence[int]
    ) -> NDArray[Any] | None:
        """A part of the array of ``variable``, from the chunks that it touches; None where a record is one chunk.

        Raises:
            IntegrityError: the shard is missing, too short or damaged.
        """
        try:
            planes = self._planes(variable)
            dims, dtype = self._specs[variable]
            count = dims[0] // planes
            if count == 1 or not place.size:
                return None
            first, end = start[0] // planes, -(-(start[0] + shape[0]) // planes)
            path, per_shard = self._path(variable, place.slot), self.per_shard(variable)
            rows = self._table(path, per_shard * count)[place.slot % per_shard * count :][first:end]
            low, high = int(rows[0, 0]), int(rows[-1].sum())
            if not place.offset <= low < high <= place.offset + place.size:
                raise ValueError(f"{path} is of another data set")
            stored = np.frombuffer(self._files.read(path, low, high - low), np.uint8)
            found: NDArray[Any] = np.empty((end - first, planes, *dims[1:]), dtype)
            for part, (offset, size) in zip(found, rows.astype(int).tolist()):
                decode_checked(stored[offset - low : offset - low + size], part)
        except DAMAGES as error:
            raise _damaged(self.folder, key, variable, error) from error
        start = (start[0] - first * planes, *start[1:])
        box = tuple(slice(a, a + n) for a, n in zip(start, shape))
        return np.ascontiguousarray(found.reshape(-1, *dims[1:])[box])

    def _planes(self, variable: str) -> int:
        """Planes of the first axis in a chunk, from the metadata: data sets of version 1 have one chunk per record."""
        if variable not in self._chunks:
            stored = json.loads((self.folder / FOLDER / variable / METADATA).read_bytes())
            self._chunks[variable] = int(stored["codecs"][0]["configuration"]["chunk_shape"][1])
        return self._chunks[variable]

    def per_shard(self, variable: str) -> int:
        """Places per shard; data sets of version 1 have it in their metadata alone."""
        if not self.index.per_shard and variable not in self._per_shard:
            stored = json.loads((self.folder / FOLDER / variable / METADATA).read_bytes())
            self._per_shard[variable] = int(stored["chunk_grid"]["configuration"]["chunk_shape"][0])
        return self.index.per_shard or self._per_shard[variable]

    def _path(self, variable: str, slot: int) -> str:
        return shard_path(variable, slot // self.per_shard(variable), len(self._specs[variable][0]))

    def _decompress(self, frame: Any, variable: str) -> NDArray[Any]:
        """The array of a frame of version 1."""
        array: NDArray[Any] = np.empty(*self._specs[variable])
        Zstd().decode(frame, out=array)
        return array

    def _chunk(self, variable: str, slot: int) -> tuple[int, int] | None:
        """Offset and size of a chunk by the table of its shard; None for a chunk that is not there."""
        path, per_shard = self._path(variable, slot), self.per_shard(variable)
        if path not in self.index.files:
            return None  # nor shards of zeros
        offset, size = (int(n) for n in self._table(path, per_shard)[slot % per_shard])
        return None if offset == EMPTY else (offset, size)

    def _table(self, path: str, chunks: int) -> NDArray[np.uint64]:
        """(chunks, 2), offset and size of each chunk of a shard, checked."""
        length = 16 * chunks
        raw = self._files.read(path, self._files.size(path) - length - CRC.size, length + CRC.size)
        if len(raw) < length + CRC.size or google_crc32c.value(raw[:length]) != CRC.unpack(raw[length:])[0]:
            raise ValueError(f"the table of {path} is damaged")
        return np.frombuffer(raw, "<u8", 2 * chunks).reshape(-1, 2)


def layout(records: Iterable[Record], variable: str, size: int) -> Iterator[Piece]:
    """The pieces of a shard file.

    Args:
        records: with a volume in the file.
        variable: the array's name.
        size: bytes of the file.
    """
    found = sorted((r for r in records if r.sizes.get(variable)), key=lambda r: r.offsets[variable])
    at = 0
    for record in found:
        offset, length = record.offsets[variable], record.sizes[variable]
        if offset > at:
            yield Piece(at, offset - at, "between volumes")
        name = f"{record.key} {variable}"
        yield Piece(offset, length, name, crc=record.crcs[variable], key=record.key, variable=variable)
        at = offset + length
    yield Piece(at, size - at, "table of chunks", own_crc=True)


def _damaged(folder: Path, key: str, variable: str, error: Exception) -> IntegrityError:
    return IntegrityError(f"{folder}: {key} {variable} is damaged or missing ({error}); see `shards verify`")
