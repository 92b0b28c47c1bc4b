"""Zarr v3 arrays, one per volume variable: (places, *shape), a chunk per record, sharded, Zstandard-compressed.

Shard files are written and read here: the chunks one after the other, then the table of their (offset, bytes) and its
CRC-32C. A chunk is a Zstandard frame and its CRC-32C, which other programs check; the index has offset, size and
CRC-32C of each frame. An empty place, and a missing volume, have no chunk.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from shards.errors import IntegrityError
from shards.index import Index, array_checksum
from shards.pieces import Piece
from shards.record_table import Place, Records
from shards.records import Record
from shards.schema import Value
from shards.stored_files import HashedFile, StoredFiles

FOLDER = "data.zarr"
METADATA = "zarr.json"
LEVEL = 3  # Zstandard's default
EMPTY = 2**64 - 1  # offset and size of a chunk that is not there
CRC = struct.Struct("<I")


def shard_path(variable: str, number: int, axes: int) -> str:
    """The file of a shard, relative to the data set's folder.

    Args:
        variable: the array's name.
        number: of the shard.
        axes: of one record's array.
    """
    return f"{FOLDER}/{variable}/c/{number}{'/0' * axes}"


def metadata(
    arrays: Mapping[str, Mapping[str, Any]], places: int, per_shard: int, level: int = LEVEL
) -> dict[str, bytes]:
    """The store's metadata: path relative to the data set's folder -> content.

    Args:
        arrays: variable -> {shape, dtype} of one record's array.
        places: up to the last record.
        per_shard: places per shard.
        level: of the compression.
    """
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    found = {f"{FOLDER}/{METADATA}": group}
    for variable, spec in arrays.items():
        shape, dtype = [int(n) for n in spec["shape"]], np.dtype(spec["dtype"])
        endian = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
        bytes_codec = {"name": "bytes", **endian}
        chunk_codecs = [
            bytes_codec,
            {"name": "zstd", "configuration": {"level": level, "checksum": False}},
            {"name": "crc32c"},
        ]
        sharding = {
            "chunk_shape": [1, *shape],
            "codecs": chunk_codecs,
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
            "attributes": {},
        }
    return {path: json.dumps(content, indent=2).encode() + b"\n" for path, content in found.items()}


class ZarrShard:
    """Writes one shard of each array.

    Args:
        folder: of the data set.
        number: of the shard.
        per_shard: places per shard.
        level: of the compression.
    """

    path = ""  # a record of a Zarr store needs no file name

    def __init__(self, folder: Path, number: int, per_shard: int, level: int = LEVEL) -> None:
        self._folder, self._number, self._per_shard = folder, number, per_shard
        self._codec = Zstd(level)
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
            Variable -> byte offset of its frame, size, CRC-32C.
        """
        places = {}
        for variable, array in arrays.items():
            if variable not in self._files:
                path = shard_path(variable, self._number, array.ndim)
                self._files[variable] = HashedFile(self._folder / path)
                self._tables[variable] = np.full((self._per_shard, 2), EMPTY, "<u8")
            frame = self._codec.encode(array)
            crc = int(google_crc32c.value(frame))
            offset = self._files[variable].write(frame)
            self._files[variable].write(CRC.pack(crc))
            self._tables[variable][slot] = offset, len(frame) + CRC.size
            places[variable] = (offset, len(frame), crc)
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


def layout(records: Iterable[Record], variable: str, size: int) -> Iterator[Piece]:
    """The pieces of a shard file.

    Args:
        records: with a volume in the file.
        variable: the array's name.
        size: bytes of the file.
    """
    found = sorted(((r.offsets[variable], r) for r in records if r.sizes.get(variable)), key=lambda place: place[0])
    at = 0
    for i, (offset, record) in enumerate(found):
        if offset > at:
            yield Piece(at, offset - at, "between volumes")
        name, length, crc = f"{record.key} {variable}", record.sizes[variable], record.crcs[variable]
        yield Piece(offset, length, name, crc=crc, key=record.key, variable=variable)
        at = offset + length
        rest = found[i + 1][0] - at if i + 1 < len(found) else (size - at - CRC.size) % 16  # 16: a row of the table
        if rest == CRC.size:
            yield Piece(at, rest, name, fixed=CRC.pack(crc))
            at += rest
    yield Piece(at, size - at, "table of chunks", own_crc=True)


class ZarrReader:
    """Reads single arrays of a Zarr store."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self._files = StoredFiles(folder)
        self._specs = {name: (tuple(a["shape"]), np.dtype(a["dtype"])) for name, a in index.arrays.items()}
        self._codec = Zstd()
        self._per_shard: dict[str, int] = {}

    def read(self, key: str, variable: str, place: Place) -> NDArray[Any]:
        """The array of ``variable``, (*arrays[variable].shape), checked where its CRC-32C is known.

        Raises:
            IntegrityError: the shard is missing, too short or damaged.
        """
        try:
            if not place.size:
                return self._read_by_table(variable, place)
            path = self._path(variable, place.slot)
            frame = self._files.read(path, place.offset, place.size)
            if len(frame) < place.size:
                raise ValueError(f"{path} ends within it")
            if google_crc32c.value(frame) != place.crc:
                raise ValueError("checksum")
            return self._decode(frame, variable)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{self.folder}: {key} {variable} is damaged or missing ({error}); see `shards verify`"
            ) from error

    def per_shard(self, variable: str) -> int:
        """Places per shard; data sets of version 1 have it in their metadata alone."""
        if not self.index.per_shard and variable not in self._per_shard:
            stored = json.loads((self.folder / FOLDER / variable / METADATA).read_bytes())
            self._per_shard[variable] = int(stored["chunk_grid"]["configuration"]["chunk_shape"][0])
        return self.index.per_shard or self._per_shard[variable]

    def _path(self, variable: str, slot: int) -> str:
        return shard_path(variable, slot // self.per_shard(variable), len(self._specs[variable][0]))

    def _decode(self, frame: bytes, variable: str) -> NDArray[Any]:
        array: NDArray[Any] = np.empty(*self._specs[variable])
        self._codec.decode(frame, out=array)
        return array

    def _read_by_table(self, variable: str, place: Place) -> NDArray[Any]:
        """A volume of which the index knows the row alone, as in data sets of version 1."""
        chunk = self.chunk(variable, place)
        if chunk is None:
            return np.zeros(*self._specs[variable])  # zarr-python leaves out chunks of zeros
        path, offset, size = chunk
        return self._decode(self._files.read(path, offset, size), variable)

    def chunk(self, variable: str, place: Place) -> tuple[str, int, int] | None:
        """Path, offset and size of a chunk by the table of its shard; None for a chunk that is not there.

        Raises:
            OSError, ValueError: metadata, shard or table that cannot be read.
        """
        per_shard = self.per_shard(variable)
        path, slot = self._path(variable, place.slot), place.slot % per_shard
        length = 16 * per_shard
        raw = self._files.read(path, self._files.size(path) - length - CRC.size, length + CRC.size)
        if len(raw) < length + CRC.size or google_crc32c.value(raw[:length]) != CRC.unpack(raw[length:])[0]:
            raise ValueError(f"the table of {path} is damaged")
        offset, size = (int(n) for n in np.frombuffer(raw, "<u8", 2, 16 * slot))
        return None if offset == EMPTY else (path, offset, size)

    def damaged_members(self, file: str) -> Iterator[str]:
        """The records whose arrays in a shard are damaged; none for metadata."""
        variable, _, chunk = file.removeprefix(f"{FOLDER}/").partition("/c/")
        if not chunk:
            return
        records = self.index.records
        assert isinstance(records, Records)
        for row, record in enumerate(records):
            place = records.place(row, variable)
            if place is None:
                continue
            try:
                if self._path(variable, place.slot) != file:
                    continue
            except (OSError, ValueError, KeyError, TypeError):
                return  # version 1, and its metadata are damaged too: they are reported as a file of their own
            try:
                intact = array_checksum(self.read(record.key, variable, place)) == record.checksums[variable]
            except IntegrityError:
                intact = False
            if not intact:
                yield f"{record.key} {variable}"
